"""What a model sees of a data set, for the page: `python -m engine.worker.data.preview`, one JSON line per question.

A warm child of the studio that holds transformers and a few tokenizers, so that it answers quickly. It ends when its
parent's pipe closes, or after ten idle minutes. Rows are tokenized by the same functions that preparation uses; only
their presentation is decided here.

    page         rows of a set as tokens: [id, text, trained, special]
    statistics   lengths, what is truncated and left out, and how much is trained, over a sample of the set
"""

from __future__ import annotations

import json
import math
import os
import select
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import stamp
from engine.core.stages import STAGES, Form
from engine.data import browse
from engine.data.dataset_info import INFO_FILE
from engine.data.datasets import example, find
from engine.launch.workspace import template_file
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.optional_packages import hide_torch

IDLE_S = 600
STATISTICS_ROWS = 20_000  # rows in the sample for statistics
STATISTICS_KEPT = 16  # data sets whose statistics are remembered
TOKENIZED_ROWS_PER_BATCH = 1000  # rows tokenized at a time
MAX_TOKENS_SHOWN = 4_000  # tokens of one row that are shown
HISTOGRAM_BINS = 40
MAX_REFUSALS_SHOWN = 3  # of rows that the template rejects
NO_LIMIT = 10**9  # tokens


# --------------------------------------------------------------------------------------- rows → tokens


@dataclass(frozen=True)
class Side:
    """One trained sequence: a pair has two, named after their answers. `weights`: of each trained span, if not all are
    1. `images`: the first token of each image, and its identity."""

    name: str
    ids: Sequence[int]
    trained: Sequence[tuple[int, int]]
    weights: Sequence[float] | None = None
    images: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Encoded:
    """A row as the stage gets it. If it does not get it, `status` and `reason` say why."""

    sides: tuple[Side, ...]
    status: str
    reason: Problem | None = None
    lost: tuple[str, ...] = ()


def encode(encoder: Any, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
    """Canonical rows as a run gets them whose rows are made by `encoder`."""
    return [
        Encoded(
            SIDES[encoder.form](result) if len(result.values[0]) else (),
            result.status,
            result.reason,
            result.lost,
        )
        for result in encoder.examples(rows)
    ]


def _pair_sides(example: Any) -> tuple[Side, ...]:
    prompt, *answers = example.values
    return tuple(
        _answer_side(name, prompt, answer, example)
        for name, answer in zip(("chosen", "rejected"), answers, strict=True)
    )


def _kto_side(example: Any) -> tuple[Side, ...]:
    prompt, answer, _ = example.values
    return (_answer_side("", prompt, answer, example),)


def _answer_side(name: str, prompt: Any, answer: Any, example: Any) -> Side:
    ids = [*prompt.tolist(), *answer.tolist()]
    return Side(name, ids, [(len(prompt), len(ids))], images=_images(example))


def _whole_side(example: Any) -> tuple[Side, ...]:
    return (Side("", example.values[0].tolist(), example.trained, example.weights, _images(example)),)


def _images(example: Any) -> list[tuple[int, str]]:
    """The first token of each image, and its identity."""
    pairs = zip(example.image_spans, example.images, strict=True)
    return [(begin, image.identity) for (begin, _), image in pairs]


SIDES: dict[Form, Callable[[Any], tuple[Side, ...]]] = {
    "text": _whole_side,
    "chat": _whole_side,
    "pairs": _pair_sides,
    "thumbs": _kto_side,
    "prompts": _whole_side,
}


# ------------------------------------------------------------------------------------------ questions


def page(spec: RunSpec, question: Mapping[str, Any]) -> dict[str, Any]:
    """`size` rows from number `first` on, as tokens."""
    dataset = find(Path(question["data"]), question["name"])
    form = STAGES[spec.stage.kind].form
    whole_rows, cut_rows = encoders(spec)
    tokenizer = cut_rows.tokenizer
    special = set(tokenizer.all_special_ids) | _special_ids(tokenizer)
    shown = browse.page(dataset, int(question["first"]), int(question["size"]))
    made: list[tuple[browse.BrowsedRow, Any]] = []
    for entry in shown:
        try:
            made.append((entry, entry.problem or example(dataset, entry.place, entry.row, form)))
        except Refusal as refusal:
            made.append((entry, refusal.problems[0]))
    good = [row for _, row in made if not isinstance(row, Problem)]
    # The whole row, and what is left of it: what was truncated is also shown, and marked.
    whole = iter(encode(whole_rows, good))
    kept = iter(encode(cut_rows, good))
    rows = []
    for entry, row in made:
        if isinstance(row, Problem):
            bad = {"number": entry.number, "place": str(entry.place), "fate": "bad", "sides": []}
            rows.append(bad | {"reason": _problem_as_json(row)})
            continue
        all_of_it, left = next(whole), next(kept)
        encoded = left if left.sides else all_of_it
        spread = form == "text" and left.status == "cut"  # in one example after another; nothing is lost
        rows.append(
            {
                "number": entry.number,
                "place": str(entry.place),
                "fate": "spread" if spread else left.status,
                "reason": _problem_as_json(left.reason) if left.reason else None,
                "sides": [_side(tokenizer, side, special) for side in encoded.sides],
                "whole": max((len(side.ids) for side in all_of_it.sides), default=0),
            }
        )
    return {"rows": rows, "form": form}


def _side(tokenizer: Any, side: Side, special: set[int]) -> dict[str, Any]:
    trained: list[bool | float] = [False] * len(side.ids)  # a number if a token's loss is weighted
    for number, (begin, end) in enumerate(side.trained):
        weight = side.weights[number] if side.weights else 1
        trained[begin:end] = [True if weight == 1 else weight] * (end - begin)
    texts = token_texts(tokenizer, list(side.ids[:MAX_TOKENS_SHOWN]))
    return {
        "name": side.name,
        "tokens": len(side.ids),
        "trained": sum(map(bool, trained)),
        "images": list(side.images),
        "pieces": [
            [int(token), text, is_trained, int(token) in special]
            for token, text, is_trained in zip(side.ids, texts, trained, strict=False)
        ],
    }


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds. A character made of several tokens is the text of the first of them."""
    texts: list[str] = []
    at = 0
    while at < len(ids):
        size = 1
        text = tokenizer.decode(ids[at : at + 1], skip_special_tokens=False)
        while text.endswith("\ufffd") and size < 8 and at + size < len(ids):
            size += 1
            text = tokenizer.decode(ids[at : at + size], skip_special_tokens=False)
        if text.endswith("\ufffd"):  # bytes that do not form a character
            size, text = 1, "\ufffd"
        if size == 1 and at and not text.startswith((" ", "\ufffd")):
            # Some decoders drop the space before a word at the very beginning.
            token = tokenizer.convert_ids_to_tokens(ids[at])
            text = f" {text}" if token.startswith("▁") else text
        texts += [text, *[""] * (size - 1)]
        at += size
    return texts


def statistics(spec: RunSpec, question: Mapping[str, Any]) -> dict[str, Any]:
    """Counts over at most SAMPLE rows, spread over the set. Remembered until one of the files changes, unless rows may
    have been judged by files of their own, such as images."""
    dataset = find(Path(question["data"]), question["name"])
    files = [*dataset.files, Path(question["data"], INFO_FILE), *tokenizer_files(spec)]
    key = (question["data"], question["name"], _settings(spec), stamp(files))
    if key in _known_statistics:
        return _known_statistics[key]
    counts, only_text = _sample_statistics(spec, dataset)
    if only_text:
        if len(_known_statistics) >= STATISTICS_KEPT:
            _known_statistics.pop(next(iter(_known_statistics)))
        _known_statistics[key] = counts
    return counts


_known_statistics: dict[tuple[str, ...], dict[str, Any]] = {}  # the oldest first


def _sample_statistics(spec: RunSpec, dataset: Any) -> tuple[dict[str, Any], bool]:
    """The counts, and whether all rows are good and none has images."""
    form = STAGES[spec.stage.kind].form
    whole_rows, cut_rows = encoders(spec)
    entries, total = browse.sample_entries(dataset, STATISTICS_ROWS)
    status_counts: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    refused: list[Problem] = []
    lengths: list[int] = []
    examples = tokens = trained = seen = images = 0
    while batch := list(islice(entries, TOKENIZED_ROWS_PER_BATCH)):
        seen += len(batch)
        placed = list(_canonical_rows(dataset, batch, form, status_counts))
        good = [row for _, row in placed]
        whole = encode(whole_rows, good)
        long = [n for n, encoded in enumerate(whole) if _longest(encoded) > spec.data.max_length]
        lengths += [_longest(encoded) for encoded in whole if encoded.sides]
        if form == "text":  # texts are not truncated: what does not fit goes into the next window
            examples += sum(-(-_longest(encoded) // spec.data.max_length) for encoded in whole)
            kept = whole
            status_counts.update("kept" for encoded in whole if encoded.sides)
        else:
            again = encode(cut_rows, [good[n] for n in long])
            kept = list(whole)
            for n, encoded in zip(long, again, strict=True):
                kept[n] = encoded
            status_counts.update(encoded.status for encoded in kept)
            examples += sum(bool(encoded.sides) for encoded in kept)
        lost.update(loss for encoded in kept for loss in encoded.lost)
        reasons = [encoded.reason.at(place) for (place, _), encoded in zip(placed, kept, strict=True) if encoded.reason]
        refused += reasons[: MAX_REFUSALS_SHOWN - len(refused)]
        tokens += sum(len(side.ids) for encoded in kept for side in encoded.sides)
        trained += sum(end - begin for encoded in kept for side in encoded.sides for begin, end in side.trained)
        images += sum(len(side.images) for encoded in kept for side in encoded.sides)
    counts = {
        "total": total,
        "seen": seen,
        "fates": dict(status_counts),
        "examples": examples,
        "tokens": tokens,
        "trained": trained,
        "lost": dict(lost),
        "usable": status_counts["kept"] + status_counts["cut"],
        "refused": [_problem_as_json(reason) for reason in refused],
        "max_length": spec.data.max_length,
        "form": form,
        **_histogram(lengths, spec.data.max_length),
    }
    return counts, not (images or refused or status_counts["bad"])


def _canonical_rows(
    dataset: Any, batch: Any, form: Form, status_counts: Counter[str]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    for place, row in batch:
        try:
            if isinstance(row, Problem):
                raise Refusal(row)
            yield place, example(dataset, place, row, form)
        except Refusal:
            status_counts["bad"] += 1


def _longest(encoded: Encoded) -> int:
    return max((len(side.ids) for side in encoded.sides), default=0)


def _histogram(lengths: list[int], max_length: int) -> dict[str, Any]:
    """Rows by their length in tokens without truncation, up to a limit that only the few longest exceed."""
    import numpy as np

    if not lengths:
        return {"edges": [], "counts": [], "longest": 0, "median": 0}
    tokens = np.array(lengths)
    top = max(float(np.quantile(tokens, 0.998)), 1.0)
    # The line of max_length is shown if it is near the range.
    top = max_length * 1.05 if top < max_length <= top * 2 else top
    wide = math.ceil((top + 1) / HISTOGRAM_BINS)
    edges = np.arange(0, top + 1 + wide, wide)
    counts, edges = np.histogram(np.minimum(tokens, edges[-1]), bins=edges)
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "longest": int(tokens.max()),
        "median": float(np.median(tokens)),
    }


def encoders(spec: RunSpec) -> tuple[Any, Any]:
    """Two encoders: one that leaves rows untruncated, and that of a run of the spec."""
    path = spec.model.model_name_or_path
    if not os.path.isdir(path):
        raise Refusal(problem("preview-needs-model", "model.model_name_or_path", name=path or "—"))
    return _encoders(_settings(spec), stamp(tokenizer_files(spec)))


def tokenizer_files(spec: RunSpec) -> list[Path]:
    """The files that decide which tokens a text becomes."""
    path = spec.model.model_name_or_path
    files = [Path(path, name) for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    return [*files, Path(own)] if (own := template_file(spec)) else files


def _settings(spec: RunSpec) -> str:
    """The settings on which the tokens of a row depend, as JSON."""
    return json.dumps(
        {
            "model": spec.model.model_dump(),
            "stage": spec.stage.model_dump(),
            "data": spec.data.model_dump() | {"datasets": {}},
        }
    )


@lru_cache(maxsize=8)
def _encoders(tells: str, _stamp: str) -> tuple[Any, Any]:
    from engine.worker.data.examples import Encoder
    from engine.worker.models.processor import image_options, image_tokens_or_problem
    from engine.worker.models.tokenizer import load_tokenizer

    spec = RunSpec.read(json.loads(tells))
    tokenizer = load_tokenizer(spec, path := spec.model.model_name_or_path)
    images = image_tokens_or_problem(path, tokenizer, **image_options(spec))
    whole, cut = Encoder.of(spec, tokenizer, NO_LIMIT, images), Encoder.of(spec, tokenizer, images=images)
    return replace(whole, decode_images=False), replace(cut, decode_images=False)


def _special_ids(tokenizer: Any) -> set[int]:
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _problem_as_json(reason: Problem) -> dict[str, Any]:
    return {
        "code": reason.code,
        "field": reason.field,
        "values": {name: str(value) for name, value in reason.values.items()},
    }


# -------------------------------------------------------------------------------------------- the pipe

QUESTIONS = {"page": page, "statistics": statistics}


def answer(line: str) -> dict[str, Any]:
    """The answer to one question; errors are answers, too."""
    try:
        question = json.loads(line)
        return {"answer": QUESTIONS[question["what"]](RunSpec.from_yaml(question["spec"]), question)}
    except Refusal as refusal:
        return {"problems": [_problem_as_json(reason) for reason in refusal.problems]}
    except Exception as error:
        traceback.print_exc()
        return {"problems": [_problem_as_json(problem("preview-failed", what=f"{type(error).__name__}: {error}"))]}


def main() -> None:
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries is not an answer
    hide_torch()
    from engine.worker.data import examples  # noqa: F401  now, while nobody waits

    while select.select([sys.stdin], [], [], IDLE_S)[0] and (line := sys.stdin.readline()):
        output.write(json.dumps(answer(line), ensure_ascii=False) + "\n")
        output.flush()


if __name__ == "__main__":
    main()
