"""Problems of a spec's data sets, as far as their first rows show them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

from engine.core.problems import Problem, problem
from engine.core.stages import KINDS_BY_FORM, STAGES
from engine.data.datasets import INFO_FILE, Dataset, examples, read_dataset_info
from engine.data.images import Size
from engine.data.row_files import version
from engine.data.row_images import images_of
from engine.data.soundness import sound_names
from engine.data.validation import ValidationReport, check
from engine.models.processor_files import has_image_processor, pixel_limits
from engine.spec.run_spec import RunSpec
from engine.spec.strategies import LIMITS, NAMES
from engine.spec.vision_settings import Vision

ROWS_CHECKED = 20_000  # rows of a data set checked before the start; preparation checks all
MAX_BAD_ROWS_LISTED = 5  # number of bad rows reported in full
Stamps = tuple[tuple[Path, int, int], ...]


def dataset_problems(spec: RunSpec) -> list[Problem]:
    """Unknown, broken or unsuitable data sets, and bad rows among their first ones."""
    folder = Path(spec.data.dataset_dir)
    if not os.path.isdir(folder):
        return [problem("data-folder-missing", "data.dataset_dir", folder=folder)]
    catalogue, broken = read_dataset_info(folder)
    if broken:
        return [replace(problem, field="data.datasets") for problem in broken]
    known = {dataset.name: dataset for dataset in catalogue}
    problems = []
    chosen = {"data.datasets": spec.data.datasets, "data.eval_datasets": spec.data.eval_datasets}
    for field, names in chosen.items():
        for name in names:
            if name in known:
                problems += _rows_problems(spec, known[name], folder, field)
            else:
                names_known = ", ".join(sound_names(catalogue)) or "—"
                problems.append(problem("data-unknown", field, name=name, folder=folder, known=names_known))
    there = [known[name] for names in chosen.values() for name in names if name in known]
    if any(check_first_rows(folder, dataset, spec.stage.kind).pictured for dataset in there):
        problems += _image_problems(spec)
    return problems or _label_problems(spec, known, folder) + _vision_problems(spec, known, folder)


def _rows_problems(spec: RunSpec, dataset: Dataset, folder: Path, field: str) -> list[Problem]:
    """Problems of the first rows of one data set."""
    report, skipped = check_first_rows(folder, dataset, spec.stage.kind), spec.data.skip_bad_rows
    problems = [problem for problem in report.warnings if problem.code == "encoding-unsure"]
    if not report.usable or not skipped:
        problems += report.problems[:MAX_BAD_ROWS_LISTED]
    problems = [replace(problem, field=field) for problem in problems]
    if report.bad and report.usable and not skipped:
        problems.insert(0, problem("bad-rows", field, name=dataset.name, bad=report.bad))
    return problems


def _image_problems(spec: RunSpec) -> list[Problem]:
    """Problems that prevent training on rows with images."""
    problems, model = [], Path(spec.model.model_name_or_path)
    least, most = spec.data.image_min_pixels, spec.data.image_max_pixels
    if spec.data.packing:
        problems.append(problem("packing-with-images", "data.packing"))
    if "reward_model" in getattr(spec.stage, "rewards", ()):
        problems.append(problem("reward-model-images", "stage.rewards"))
    if spec.extra.get("use_vllm"):
        problems.append(problem("images-with-vllm", "extra.use_vllm"))
    if (strategy := spec.hardware.strategy.kind) in LIMITS:
        problems.append(problem("strategy-images", "hardware.strategy", strategy=NAMES[strategy]))
    if model.is_dir() and not has_image_processor(model):
        problems.append(problem("model-without-images", "model.model_name_or_path"))
    elif model.is_dir() and (least or most):
        if (limits := pixel_limits(model)) is None:
            problems.append(problem("image-size-fixed", "data.image_max_pixels", processor=model.name))
        elif (least or limits[0]) > (most or limits[1]):
            values = {"least": least or limits[0], "most": most or limits[1]}
            problems.append(problem("image-pixels-crossed", "data.image_min_pixels", **values))
    return problems


def _vision_problems(spec: RunSpec, known: Mapping[str, Dataset], folder: Path) -> list[Problem]:
    """`vision_rows_problem` of the training data, unless it is too large to be read here, or partly unused."""
    if spec.stage.kind != "sft" or not spec.vision.trains_beside_language:
        return []
    reports = [check_first_rows(folder, known[name], spec.stage.kind) for name in spec.data.datasets]
    if spec.data.max_samples or any(report.good + report.bad >= ROWS_CHECKED for report in reports):
        return []
    counts = sum(report.good for report in reports), sum(report.pictured for report in reports)
    wrong = vision_rows_problem(spec.vision, *counts)
    return [wrong] if wrong else []


def vision_rows_problem(vision: Vision, rows: int, pictured: int) -> Problem | None:
    """The problem that a trained vision part has nothing to learn from, because none of the training rows, or not
    every one, has an image. A batch without images trains neither tower nor projector: if they are all that is trained,
    it has no gradient at all."""
    if not vision.trains_beside_language or pictured == rows:
        return None
    if not pictured:
        return problem("vision-without-images", f"vision.{vision.first_change}", rows=rows)
    if vision.language_part == "frozen":
        return problem("vision-rows-without-images", "vision.language_part", without=rows - pictured, rows=rows)
    return None


def _label_problems(spec: RunSpec, known: Mapping[str, Dataset], folder: Path) -> list[Problem]:
    """The problem that KTO's data sets have only good, or only bad answers."""
    if spec.stage.kind != "kto":
        return []
    counts = (_label_counts(folder, name, _dataset_stamps(folder, known[name])) for name in spec.data.datasets)
    marks = sum(counts, Counter())
    # Larger sets are checked completely when the run begins.
    if len(marks) == 1 and marks.total() < ROWS_CHECKED:
        return [single_label_problem(True in marks, marks.total())]
    return []


@lru_cache(maxsize=256)
def _label_counts(folder: Path, name: str, _of: Stamps) -> Counter[bool]:
    """The numbers of answers rated good and bad, counted until there is one of each."""
    dataset = next(dataset for dataset in read_dataset_info(folder)[0] if dataset.name == name)
    marks: Counter[bool] = Counter()
    for row in islice(examples(dataset, lambda _: None, "thumbs"), ROWS_CHECKED):
        marks[row["label"]] += 1
        if len(marks) == 2:
            break
    return marks


def single_label_problem(good: bool, rows: int) -> Problem:
    """KTO has nothing to distinguish."""
    return problem("thumbs-all-good" if good else "thumbs-all-bad", "data.datasets", rows=rows)


def images_per_row(spec: RunSpec) -> tuple[Size, ...]:
    """The sizes of the images of the row with the most pixels, among the first rows of the data sets that are trained
    on; () if there are none, or the data cannot be read."""
    folder = Path(spec.data.dataset_dir)
    if not STAGES[spec.stage.kind].images or not spec.data.datasets or not folder.is_dir():
        return ()
    known = {dataset.name: dataset for dataset in read_dataset_info(folder)[0]}
    there = [known[name] for name in spec.data.datasets if name in known]
    pictured = [dataset for dataset in there if check_first_rows(folder, dataset, spec.stage.kind).pictured]
    rows = [_largest_images(folder, each.name, spec.stage.kind, _dataset_stamps(folder, each)) for each in pictured]
    return max(rows, key=_pixels, default=())


@lru_cache(maxsize=256)
def _largest_images(folder: Path, name: str, stage: str, _of: Stamps) -> tuple[Size, ...]:
    dataset = next(dataset for dataset in read_dataset_info(folder)[0] if dataset.name == name)
    rows = islice(examples(dataset, lambda _: None, STAGES[stage].form), ROWS_CHECKED)
    return max((tuple(image.size for image in images_of(row)) for row in rows), key=_pixels, default=())


def _pixels(sizes: Iterable[Size]) -> int:
    return sum(width * height for width, height in sizes)


def check_first_rows(folder: Path, dataset: Dataset, stage: str) -> ValidationReport:
    """The result of `check` for the first rows of a data set and a stage; cached until one of the files changes."""
    return _check_first_rows(folder, dataset.name, stage, _dataset_stamps(folder, dataset))


@lru_cache(maxsize=256)
def _check_first_rows(folder: Path, name: str, stage: str, _of: Stamps) -> ValidationReport:
    """`check`, cached until one of the files changes, because the page calls it at every key press."""
    catalogue, _ = read_dataset_info(folder)
    dataset = next(dataset for dataset in catalogue if dataset.name == name)
    if dataset.problem:
        return ValidationReport(0, 0, (dataset.problem,))
    facts = STAGES[stage]
    return check(dataset, facts.form, limit=ROWS_CHECKED, datasets=catalogue, images=facts.images)


def any_dataset_has_answers(spec: RunSpec) -> bool:
    """Whether any of the data sets has an answer; also True if that is unknown, which other checks report."""
    folder = Path(spec.data.dataset_dir)
    catalogue = {dataset.name: dataset for dataset in read_dataset_info(folder)[0]}
    chosen = [catalogue[name] for name in spec.data.datasets if name in catalogue]
    usable = [dataset for dataset in chosen if dataset.problem is None and dataset.kind in KINDS_BY_FORM["prompts"]]
    return not usable or any(_has_answers(folder, dataset.name, _dataset_stamps(folder, dataset)) for dataset in usable)


@lru_cache(maxsize=256)
def _has_answers(folder: Path, name: str, _of: Stamps) -> bool:
    """Whether one of the first rows has an answer, cached like `_looked_at`."""
    dataset = next(dataset for dataset in read_dataset_info(folder)[0] if dataset.name == name)
    rows = examples(dataset, lambda _bad: None, "prompts")
    return any(row["answer"] is not None for row in islice(rows, ROWS_CHECKED))


def _dataset_stamps(folder: Path, dataset: Dataset) -> Stamps:
    """A value that changes when one of its files does, or dataset_info.json, which says how they are read."""
    return tuple((file, *version(file)) for file in (folder / INFO_FILE, *dataset.files))
