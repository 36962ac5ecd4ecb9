"""Rows → token ids and labels on disk, before any process takes a device: `python -m engine.worker.prepare FOLDER`.

Leaves in the run's prepared/: train.arrow, validation.arrow (if there is one), and summary.json with what was
kept, cut and dropped. It needs no GPU and holds none while it works.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from engine.datasets import Dataset, examples, read_catalogue
from engine.problems import Problem, Refusal, problem
from engine.rundir import RunDir, read_json, write_json
from engine.spec import RunSpec
from engine.stages import STAGES
from engine.worker.edge import Report, edge

BATCH = 1000  # rows rendered and tokenized at a time
SHOWN = 20  # bad rows told in full


def prepare(run: RunDir) -> None:
    """Prepare the run in its folder. Raises Refusal if there would be nothing to learn.

    A resumed run keeps what it has: its checkpoint remembers a place in just these rows.
    """
    prepared = read_json(run.prepared / "summary.json")
    if prepared and Path(prepared["model_path"]).is_dir():
        return
    report = Report(run)
    report("preparing")

    # Imported here: the page is told before transformers has begun to load.
    from engine.worker.fetch import fetch_model
    from engine.worker.tokenizer import load_tokenizer

    spec = RunSpec.from_yaml(run.spec.read_text(encoding="utf-8"))
    run.prepared.mkdir(exist_ok=True)
    model_path = fetch_model(spec, report)
    tokenizer = load_tokenizer(spec, model_path)
    catalogue = {dataset.name: dataset for dataset in read_catalogue(Path(spec.data.dataset_dir))[0]}
    bad: list[Problem] = []
    rows = {name: list(_rows(catalogue[name], spec, bad, report)) for name in spec.data.datasets}
    splits = {"train": rows}
    if spec.data.validation_share:
        splits["train"], splits["validation"] = _set_aside(rows, spec)
    elif spec.data.eval_datasets:
        splits["validation"] = {
            name: list(_rows(catalogue[name], spec, bad, report)) for name in spec.data.eval_datasets
        }
    splits["train"] = _weighted(splits["train"], spec)

    count = sum(len(some) for split in splits.values() for some in split.values())
    encoder = Encoder(spec, tokenizer, report, count, bad)
    summary = {
        split: encoder.write(
            run.prepared / f"{split}.arrow", (row for some in given.values() for row in some)
        )
        for split, given in splits.items()
    }
    for split, counts in summary.items():
        if not counts["examples"]:
            raise Refusal(_nothing_left(split, counts, spec, bad))
    if bad and not spec.data.skip_bad_rows:
        names = ", ".join([*spec.data.datasets, *spec.data.eval_datasets])
        raise Refusal([problem("bad-rows", "data.datasets", name=names, bad=len(bad)), *bad[:SHOWN]])
    write_json(run.prepared / "summary.json", {
        "model_path": model_path, "splits": list(splits), **summary, "bad_rows": len(bad),
        "bad_rows_shown": [str(one) for one in bad[:SHOWN]],
    })  # fmt: skip
    _print_summary(summary, bad)
    report("preparing", 1, 1)


def _rows(dataset: Dataset, spec: RunSpec, bad: list[Problem], report: Report) -> Iterator[dict[str, Any]]:
    """The good rows of a data set, in the form its kind has; the others go into `bad`."""
    for count, row in enumerate(
        islice(examples(dataset, bad.append, STAGES[spec.stage.kind].form), spec.data.max_samples), 1
    ):
        if count % BATCH == 0:
            report("preparing", count, None, "rows")
        yield row


def _set_aside(
    rows: dict[str, list[Any]], spec: RunSpec
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Training and validation rows: a share of each data set, by the seed; at least one row is measured on."""
    train, validation = {}, {}
    for name, some in rows.items():
        shuffled = random.Random(spec.training.seed).sample(some, len(some))
        count = max(round(len(some) * spec.data.validation_share), 1)
        validation[name], train[name] = shuffled[:count], shuffled[count:]
    return train, validation


def _weighted(rows: dict[str, list[Any]], spec: RunSpec) -> dict[str, list[Any]]:
    """Each data set as often as its weight says: 2.5 is every row twice, and a random half once more."""
    weighted = {}
    for name, some in rows.items():
        whole, part = divmod(spec.data.datasets[name], 1)
        more = random.Random(spec.training.seed).sample(some, round(len(some) * part))
        weighted[name] = some * int(whole) + more
    return weighted


class Encoder:
    """Rows → Arrow files of input_ids and labels, counted."""

    def __init__(self, spec: RunSpec, tokenizer: Any, report: Report, rows: int, bad: list[Problem]):
        self.spec, self.tokenizer, self.report, self.rows, self.bad = spec, tokenizer, report, rows, bad
        self.done = 0

    def write(self, path: Path, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Write the examples of `rows`; returns counts of examples, tokens, trained tokens and what was left out."""
        if STAGES[self.spec.stage.kind].form == "prompts":
            return self._write_prompts(path, rows)
        import pyarrow as pa

        from engine.worker.examples import IGNORED

        fates: Counter[str] = Counter()
        tokens = trained = longest = unended = 0
        packed = self.spec.data.packing
        columns = ("input_ids", "labels", "seq_lengths") if packed else ("input_ids", "labels")
        schema = pa.schema([(name, pa.list_(pa.int32())) for name in columns])
        kept: list[tuple[list[int], list[int]]] = []
        examples_written = 0
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:

            def flush(batch: list[dict[str, list[int]]]) -> None:
                if batch:
                    stream.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))

            for encoded in self._encoded(rows):
                fates.update(one.fate for one in encoded)
                self.bad += [one.reason for one in encoded if one.reason]
                good = [one for one in encoded if one.usable]
                unended += sum(not one.ended for one in good)
                tokens += sum(len(one.input_ids) for one in good)
                trained += sum(len(one.labels) - one.labels.count(IGNORED) for one in good)
                longest = max([longest, *(len(one.input_ids) for one in good)])
                if packed:
                    kept += [(one.input_ids, one.labels) for one in good]
                else:
                    flush([{"input_ids": one.input_ids, "labels": one.labels} for one in good])
                    examples_written += len(good)
            if packed:
                for batch in self._packed(kept):
                    flush(batch)
                    examples_written += len(batch)
        return {
            "examples": examples_written, "rows": sum(fates.values()), "tokens": tokens, "trained_tokens": trained,
            "longest": longest, "without_end": unended, **{f"rows_{fate}": count for fate, count in fates.items()},
        }  # fmt: skip

    def _write_prompts(self, path: Path, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
        import pyarrow as pa

        from engine.worker.examples import encode_prompts

        fields = [("prompt_ids", pa.list_(pa.int32())), ("prompt", pa.string()), ("answer", pa.string())]
        lengths: list[int] = []
        seen, rows = 0, iter(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.schema(fields)) as stream:
            while batch := list(islice(rows, BATCH)):
                seen += len(batch)
                made = zip(encode_prompts(self.tokenizer, batch), batch, strict=True)
                kept = [
                    {"prompt_ids": ids, "prompt": json.dumps(row["messages"], ensure_ascii=False), "answer": row["answer"]}
                    for ids, row in made
                    if len(ids) <= self.spec.data.max_length
                ]  # fmt: skip
                lengths += [len(one["prompt_ids"]) for one in kept]
                stream.write_batch(pa.RecordBatch.from_pylist(kept, schema=pa.schema(fields)))
        return {
            "examples": len(lengths), "rows": seen, "tokens": sum(lengths), "trained_tokens": 0,
            "longest": max(lengths, default=0), "rows_too_long": seen - len(lengths),
        }  # fmt: skip

    def _encoded(self, rows: Iterable[dict[str, Any]]) -> Iterator[list[Any]]:
        from engine.worker.examples import encode_chat, encode_text

        data, rows = self.spec.data, iter(rows)
        while batch := list(islice(rows, BATCH)):
            if self.spec.stage.kind == "pt":
                yield encode_text(self.tokenizer, [row["text"] for row in batch], max_length=data.max_length)
            else:
                yield encode_chat(
                    self.tokenizer, batch, max_length=data.max_length, train_on=self.spec.stage.train_on,
                    too_long=data.too_long,
                )  # fmt: skip
            self.done += len(batch)
            self.report("preparing", self.done, self.rows, "rows")

    def _packed(self, kept: list[tuple[list[int], list[int]]]) -> Iterator[list[dict[str, list[int]]]]:
        from engine.worker.examples import IGNORED, pack

        packs = iter(pack([len(ids) for ids, _ in kept], self.spec.data.max_length))
        while some := list(islice(packs, BATCH)):
            yield [
                {
                    "input_ids": [token for index in rows for token in kept[index][0]],
                    # The first token of an example is not to be predicted from the end of the one before.
                    "labels": [label for index in rows for label in (IGNORED, *kept[index][1][1:])],
                    "seq_lengths": [len(kept[index][0]) for index in rows],
                }
                for rows in some
            ]


def _nothing_left(split: str, counts: dict[str, Any], spec: RunSpec, bad: list[Problem]) -> list[Problem]:
    """Why there is not one example to learn from."""
    if counts.get("rows_too_long"):
        why = problem(
            "all-too-long", "data.max_length", rows=counts["rows_too_long"], length=spec.data.max_length
        )
    elif counts.get("rows_untrained"):
        why = problem("none-trained", "data.datasets", rows=counts["rows_untrained"])
    else:
        why = problem("no-rows-left", "data.datasets", split=split, bad=len(bad))
    return [why, *bad[:SHOWN]]


def _print_summary(summary: dict[str, dict[str, Any]], bad: list[Problem]) -> None:
    for split, counts in summary.items():
        share = counts["trained_tokens"] / max(counts["tokens"], 1)
        print(
            f"{split}: {counts['examples']} examples, {counts['tokens']} tokens, {share:.0%} of them trained, "
            f"longest {counts['longest']}; rows cut {counts.get('rows_cut', 0)}, "
            f"dropped {counts.get('rows_too_long', 0) + counts.get('rows_untrained', 0)}",
            flush=True,
        )
    for one in bad[:SHOWN]:
        print(f"left out: {one}", flush=True)
    if len(bad) > SHOWN:
        print(f"left out: {len(bad) - SHOWN} more rows", flush=True)


if __name__ == "__main__":
    with edge(sys.argv[1]) as here:
        prepare(here)
