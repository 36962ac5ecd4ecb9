"""Rows → token ids and labels on disk, before any process takes a device: `python -m engine.worker.prepare FOLDER`.

It writes to the run's prepared/: train.arrow, validation.arrow (if there is one), and summary.json with the numbers of
kept, truncated and dropped rows. It uses no GPU. Rows that were prepared before are not prepared again
(`engine.worker.data.cache`).

The rows go through three steps, and no list of them is ever kept: a file is split into blocks (`engine.data.chunks`);
each block becomes a table of examples on disk, in one of several processes (`engine.worker.data.examples`); and after
the last, when the number of rows is known, the tables are written into the splits (`engine.worker.data.splits`).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import RunDir, read_json, write_json
from engine.core.stages import STAGES
from engine.data import template_losses
from engine.data.datasets import Dataset, files_of, read_dataset_info
from engine.data.mixing import held_out, repeats
from engine.models.facts import inspect_model
from engine.models.vocabulary import embedding_rows, rows_of_adapter
from engine.preflight.data_checks import vision_rows_problem
from engine.spec.contradictions import has_validation
from engine.spec.run_spec import RunSpec
from engine.worker.data import cache
from engine.worker.runtime.process_lifecycle import ProgressReport, library_imports, run_lifecycle

BYTES_PER_PROCESS = 1 << 20  # bytes of data for which another process pays off
MAX_BAD_ROWS_SHOWN = 20  # with their problems in full


def prepare(run: RunDir) -> None:
    """Prepare the run in its folder. Raises Refusal if there would be nothing to learn.

    A resumed run keeps its rows, even if its model has to be downloaded again: its checkpoint contains a position in
    exactly these rows.
    """
    prepared = _prepared_before(run)
    if prepared and Path(prepared["model_path"]).is_dir():
        return
    report = ProgressReport(run)
    report("preparing")
    spec = RunSpec.from_yaml(run.spec.read_text(encoding="utf-8"))
    model_path = _model_path(spec, report)
    if prepared:
        write_json(run.prepared / cache.SUMMARY_FILE, prepared | {"model_path": model_path})
        return
    catalogue = {dataset.name: dataset for dataset in read_dataset_info(Path(spec.data.dataset_dir))[0]}
    datasets = [catalogue[name] for name in [*spec.data.datasets, *spec.data.eval_datasets]]
    store = run.path.parents[2] / ".prepared"
    key = cache.cache_key(spec, datasets, model_path, store)
    if summary := cache.link_into_run(store / key, run.prepared):
        print("These rows were prepared before.", flush=True)
    else:
        with cache.new_cache_entry(store, key) as folder:
            build(spec, model_path, datasets, folder, report)
            summary = cache.link_into_run(folder, run.prepared, look_at_images=False)
        assert summary is not None  # written a moment ago, and still locked
    if spec.vision.trains_beside_language:
        refuse_rows_without_images(spec, run.prepared / "train.arrow")
    write_json(run.prepared / cache.SUMMARY_FILE, {"model_path": model_path, "key": key, **summary})
    _print_summary(summary)
    report("preparing", 1, 1)


def _prepared_before(run: RunDir) -> dict[str, Any] | None:
    """The summary of what was prepared for the run, if all of it is still there."""
    summary = read_json(run.prepared / cache.SUMMARY_FILE)
    if not summary:
        return None
    if all((run.prepared / f"{split}.arrow").is_file() for split in summary["splits"]):
        return summary
    print("Prepared rows are missing from this run's folder, so they are prepared again.", flush=True)
    return None


def refuse_rows_without_images(spec: RunSpec, file: Path) -> None:
    """Raises Refusal if the trained vision parts would have nothing to learn from these rows. It is not part of what is
    prepared, which other settings of the vision parts share."""
    import pyarrow as pa

    from engine.worker.data.images_column import IMAGES_COLUMN

    rows = pictured = 0
    with pa.memory_map(str(file)) as source:
        for batch in pa.ipc.open_stream(source):
            rows += batch.num_rows
            if IMAGES_COLUMN in batch.schema.names:
                lengths = batch.column(IMAGES_COLUMN).value_lengths().to_numpy(zero_copy_only=False)
                pictured += int((lengths > 0).sum())
    if wrong := vision_rows_problem(spec.vision, rows, pictured):
        raise Refusal(wrong)


def _model_path(spec: RunSpec, report: ProgressReport) -> str:
    if os.path.isdir(spec.model.model_name_or_path):
        return spec.model.model_name_or_path
    from engine.worker.models.fetch import fetch_model

    return fetch_model(spec, report)


def build(spec: RunSpec, model_path: str, datasets: list[Dataset], folder: Path, report: ProgressReport) -> None:
    """Prepare the rows of `datasets` (for training, then for validation) in `folder`."""
    size = sum(file.stat().st_size for dataset in datasets for file in files_of(dataset))
    cores = len(os.sched_getaffinity(0))
    processes = min(spec.data.preprocessing_num_workers or cores, max(size // BYTES_PER_PROCESS, 1))
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if processes > 1 else "true"

    # Imported here: the progress is written before transformers begins to load, and a cached run never loads it.
    with library_imports():
        from engine.worker.data import tables
        from engine.worker.data.examples import Encoder
        from engine.worker.models.processor import image_options, image_tokens_or_problem
        from engine.worker.models.tokenizer import load_tokenizer
        from engine.worker.runtime.process_pool import ProcessPool

    tokenizer = load_tokenizer(spec, model_path)
    if missing := token_id_problem(max(tokenizer.get_vocab().values()), spec, model_path):
        raise Refusal(missing)
    images = image_tokens_or_problem(model_path, tokenizer, **image_options(spec))
    encoder = Encoder.of(spec, tokenizer, images=images)
    sources = [tables.DatasetTables(dataset, number, spec.data.max_samples) for number, dataset in enumerate(datasets)]
    drafts = folder / "tables"
    drafts.mkdir()
    paths = (drafts / str(number) for number in count())
    pool = ProcessPool(processes, lambda task: tables.make_table(encoder, datasets, task))
    try:
        for source in sources:
            for _ in source.make(pool, lambda: next(paths)):
                rows, seen = (
                    sum(source.good for source in sources),
                    sum(source.bytes_done for source in sources),
                )
                report("preparing", rows, round(rows * size / seen) if seen else None, "rows")
    finally:
        pool.close()
    summary = write_splits(spec, sources, folder)
    shutil.rmtree(drafts)
    bad = [bad_row for source in sources for bad_row in source.bad][:MAX_BAD_ROWS_SHOWN]
    bad_count = sum(source.bad_count for source in sources)
    for split, counts in summary.items():
        if not counts["examples"]:
            raise Refusal(_no_examples_problems(split, counts, spec, bad, bad_count))
    if bad_count and not spec.data.skip_bad_rows:
        names = ", ".join([*spec.data.datasets, *spec.data.eval_datasets])
        raise Refusal([problem("bad-rows", "data.datasets", name=names, bad=bad_count), *bad])
    write_json(
        folder / cache.SUMMARY_FILE,
        {
            "splits": list(summary),
            **summary,
            "bad_rows": bad_count,
            "images_refused": any(row.code.startswith("row-image") for source in sources for row in source.bad),
            "bad_rows_shown": [str(bad_row) for bad_row in bad],
            "notes": [
                {"dataset": source.dataset.name, "rows": count, "of": source.read, "first": str(first)}
                for source in sources
                for count, first in source.notes.values()
            ],
        },
    )


def token_id_problem(highest: int, spec: RunSpec, model_path: str) -> Problem | None:
    """The problem that the loaded tokenizer produces ids up to `highest`, for which the model has no embeddings and
    gets none."""
    rows = embedding_rows(inspect_model(model_path))
    brings = rows_of_adapter(spec.model.adapter_path)
    if not rows or spec.model.makes_rows or highest < max(rows, brings):
        return None
    return problem(
        "tokens-beyond-embeddings",
        "model.resize_embeddings",
        highest=highest,
        rows=rows,
        missing=highest + 1 - rows,
        tokens=f"{rows} … {highest}",
    )


def write_splits(spec: RunSpec, sources: list[Any], folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of all data sets (`engine.worker.data.tables.DatasetTables`), each in its split; returns the counts."""
    from engine.worker.data.splits import SplitWriter, read_tables, repetitions, validation_rows

    names = ["train", "validation"] if has_validation(spec) else ["train"]
    form, seed = STAGES[spec.stage.kind].form, spec.training.seed
    weighted = any(part.weighted for source in sources for part in source.parts)
    pictured = any(part.pictured for source in sources for part in source.parts)
    if pictured and spec.data.packing:
        raise Refusal(problem("packing-with-images", "data.packing"))
    splits = {
        name: SplitWriter(folder / f"{name}.arrow", form, spec.data.max_length, spec.data.packing, weighted, pictured)
        for name in names
    }
    rows = {source.dataset.name: source.good for source in sources if source.dataset.name in spec.data.datasets}
    kept = held_out(spec.data, rows)
    weights = repeats(spec.data, {name: count - kept[name] for name, count in rows.items()})
    for source in sources:
        aside = validation_rows(source.good, kept.get(source.dataset.name, source.good), seed)
        weight = weights.get(source.dataset.name, 0)
        often = {"train": repetitions(~aside, weight, seed), "validation": aside.astype("uint16")}
        at = 0
        for part in source.parts:
            for table in read_tables(part.path):
                for name, split in splits.items():
                    split.add(table.slice(0, part.good), often[name][at : at + part.good])
            at += part.good
            part.path.unlink()
    return {name: split.close() for name, split in splits.items()}


def _no_examples_problems(
    split: str, counts: dict[str, Any], spec: RunSpec, bad: list[Problem], bad_count: int
) -> list[Problem]:
    """Why there is not a single example to learn from."""
    if counts.get("rows_too_long"):
        why = problem("all-too-long", "data.max_length", rows=counts["rows_too_long"], length=spec.data.max_length)
    elif counts.get("rows_untrained"):
        why = problem("none-trained", "data.datasets", rows=counts["rows_untrained"])
    else:
        why = problem("no-rows-left", "data.datasets", split=split, bad=bad_count)
    return [why, *bad]


def _print_summary(summary: dict[str, Any]) -> None:
    for split in summary["splits"]:
        counts = summary[split]
        share = counts["trained_tokens"] / max(counts["tokens"], 1)
        dropped = sum(counts.get(f"rows_{status}", 0) for status in ("too_long", "untrained", "equal"))
        print(
            f"{split}: {counts['examples']} examples, {counts['tokens']} tokens, {share:.0%} of them trained, "
            f"longest {counts['longest']}; rows cut {counts.get('rows_cut', 0)}, dropped {dropped}",
            flush=True,
        )
        for note in template_losses.notes(counts["lost"], counts["rows"]):
            print(f"{split}: {note}", flush=True)
    for note in summary.get("notes", ()):
        print(f"{note['dataset']}: {note['rows']} of {note['of']} rows, such as {note['first']}", flush=True)
    for row in summary["bad_rows_shown"]:
        print(f"left out: {row}", flush=True)
    if summary["bad_rows"] > MAX_BAD_ROWS_SHOWN:
        print(f"left out: {summary['bad_rows'] - MAX_BAD_ROWS_SHOWN} more rows", flush=True)


if __name__ == "__main__":
    # A tokenizer needs no torch, and without it transformers loads in half the time.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # as if it were not installed
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that torch is missing
    # A stop arrives as SIGTERM: what is half prepared is deleted, and its processes end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with run_lifecycle(sys.argv[1]) as prepared_run:
        prepare(prepared_run)
