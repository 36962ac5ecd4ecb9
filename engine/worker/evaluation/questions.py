"""The rows of an evaluation, sampled from its data sets once and stored, so that a resumed run asks the same ones.

These are the questions, and the answers that a person has rated.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.problems import Refusal
from engine.core.rundir import read_lines, read_object, write_json, write_text
from engine.data.datasets import Dataset, count_rows, entries, example, find
from engine.data.images import image_from_json
from engine.evaluation.evaluation_spec import EvaluationSpec


@dataclass(frozen=True)
class Question:
    """One row. `reference`: the expected answer, as text; `chat`: the row with it, as in training. For a pair, `chosen`
    and `rejected` are the two answers, and `chat` is the row. An answer with a thumb is `chosen`; `up`: which thumb."""

    row: int
    set: str
    place: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    reference: str | None = None
    chat: dict[str, Any] | None = None
    chosen: str = ""
    rejected: str = ""
    up: bool | None = None


def load_questions(spec: EvaluationSpec, file: Path, form: str) -> list[Question]:
    """The questions in `file`; if it does not exist, they are sampled and written to it.

    The spec says how many; each row is equally likely, and they keep the order of the files. Unreadable rows are left
    out and not replaced.
    """
    if not file.exists():
        folder = Path(spec.data.dataset_dir)
        drawn = _draw_questions(spec, [find(folder, name) for name in spec.data.datasets], lambda _: form)
        write_text(file, "".join(_as_json(question) + "\n" for question in drawn))
    return [_from_json(line) for line in read_lines(file)]


def load_ratings(spec: EvaluationSpec, file: Path, unusable_file: Path) -> tuple[list[Question], list[str]]:
    """The same for the answers with a person's thumbs or preferences, and where the drawn rows are that cannot be used.
    These are kept in `unusable_file`."""
    if not file.exists():
        folder, unusable = Path(spec.data.dataset_dir), list[str]()
        datasets = [find(folder, name) for name in spec.judge.ratings]
        drawn = list(_draw_questions(spec, datasets, lambda dataset: dataset.kind, unusable.append))
        write_json(unusable_file, {"places": unusable})
        write_text(file, "".join(_as_json(question) + "\n" for question in drawn))
    return [_from_json(line) for line in read_lines(file)], read_object(unusable_file).get("places", [])


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """A question as text; roles are named if there is more than one turn."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _as_json(question: Question) -> str:
    """A question as a line. Content of images that are part of a row is written as base64."""
    return json.dumps(asdict(question), ensure_ascii=False, default=lambda content: b64encode(content).decode())


def _from_json(line: dict[str, Any]) -> Question:
    chat = line.get("chat") or {}
    for message in [*line["messages"], *chat.get("messages", ())]:
        if "images" in message:
            message["images"] = [image_from_json(image) for image in message["images"]]
    return Question(**line)


def _draw_questions(
    spec: EvaluationSpec,
    datasets: list[Dataset],
    form_of: Callable[[Dataset], str],
    on_unusable: Callable[[str], object] = lambda _: None,
) -> Iterator[Question]:
    """The drawn rows that can be used; where the others are goes to `on_unusable`."""
    total, max_samples = sum(map(count_rows, datasets)), spec.data.max_samples
    chosen = None
    if max_samples and max_samples < total:
        rng = np.random.default_rng(spec.data.seed)
        chosen = set(rng.choice(total, max_samples, replace=False).tolist())
    every = chain.from_iterable(((dataset, place, row) for place, row in entries(dataset)) for dataset in datasets)
    number = 0
    for at, (dataset, place, row) in enumerate(every):
        if chosen is not None and at not in chosen:
            continue
        if not isinstance(row, dict):
            on_unusable(str(place))
            continue
        try:
            yield BUILD_QUESTION[form_of(dataset)](dataset, place, row, number)
        except Refusal:
            on_unusable(str(place))
            continue
        number += 1


def _question(dataset: Dataset, place: Any, row: Any, number: int) -> Question:
    prompt = example(dataset, place, row, "prompts")
    try:
        chat = example(dataset, place, row, "chat")
    except Refusal:  # it has no answer
        chat = None
    return Question(number, dataset.name, str(place), prompt["messages"], prompt["tools"], prompt["answer"], chat)


def _pair_question(dataset: Dataset, place: Any, row: Any, number: int) -> Question:
    pair = example(dataset, place, row, "pairs")
    sides = {side: pair[side][0]["content"] for side in ("chosen", "rejected")}
    return Question(number, dataset.name, str(place), pair["messages"], pair["tools"], chat=pair, **sides)


def _rated_answer(dataset: Dataset, place: Any, row: Any, number: int) -> Question:
    rated = example(dataset, place, row, "thumbs")
    *prompt, answer = rated["messages"]
    text = answer["content"]
    return Question(number, dataset.name, str(place), prompt, rated["tools"], chosen=text, up=rated["label"])


BUILD_QUESTION = {"answers": _question, "pairs": _pair_question, "thumbs": _rated_answer}
