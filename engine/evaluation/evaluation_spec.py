"""EvaluationSpec: which models are evaluated on which rows, and what prevents an evaluation.

The evaluation itself is done by `engine.worker.evaluate`, and its results are read by `engine.evaluation.report`.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import RunDir
from engine.data import dataset_info_edits
from engine.data.columns import USUAL_COLUMN_NAMES
from engine.data.datasets import Dataset, examples, read_dataset_info
from engine.data.soundness import flaw, sound_names
from engine.evaluation import harness
from engine.evaluation.evaluation_settings import Generation, Harness, Judge, Questions
from engine.evaluation.judge import judge_model
from engine.evaluation.trained_results import model_part_of_base, trained_result
from engine.launch.workspace import Workplace, absolute_path, is_inside
from engine.models.adapters import ADAPTER_FILES
from engine.models.discovery import identity, is_hub_id
from engine.models.facts import inspect_model
from engine.preflight import checks
from engine.spec.hardware_settings import Hardware
from engine.spec.model_settings import Model
from engine.spec.parts import setting
from engine.spec.run_spec import MAX_NAME_LENGTH, RunSpec, Spec

BASE_FIELD, RESULTS_FIELD, DATASETS_FIELD = "model.model_name_or_path", "results", "data.datasets"
JUDGE_FIELD, RATINGS_FIELD = "judge.model", "judge.ratings"
REFERENCE_ROWS_SAMPLED = 2000  # first rows of a set, read to see whether it has references
NEEDED_ROWS_CODES = {
    "answers": "evaluate-needs-answers",
    "pairs": "evaluate-needs-pairs",
}  # the refusal of data sets of other kinds
DATASET_KINDS = {
    "answers": ("chat",),
    "pairs": ("pairs",),
}  # for models that answer, and for reward models
RATING_KINDS = ("thumbs", "pairs")  # of data sets with a person's ratings


class EvaluationSpec(Spec):
    """Everything needed to repeat an evaluation."""

    kind: ClassVar[str] = "evaluation"

    name: str = setting("", "Name", "A few words to help you find it later. Optional.", max_length=MAX_NAME_LENGTH)
    model: Model = Field(default_factory=Model)
    with_base: bool = setting(True, "Evaluate the base model too", "The results are compared with it.")
    results: list[str] = setting(
        [],
        "Results",
        "IDs of finished runs, or their result folders: adapters of this base model, or full models.",
        max_length=16,
    )
    data: Questions = Field(default_factory=Questions)
    generation: Generation = Field(default_factory=Generation)
    harness: Harness = Field(default_factory=Harness)
    judge: Judge = Field(default_factory=Judge)
    hardware: Hardware = Field(default_factory=Hardware)

    def to_yaml(self, *, brief: bool = False) -> str:
        """As for every spec. If the model is loaded in a special way, nothing is left out, because that kind would be
        taken for the default."""
        plain = self.model.quantization.kind == self.model.rope_scaling.kind == "none"
        return super().to_yaml(brief=brief and plain)

    @property
    def sources(self) -> list[str]:
        """Where the questions come from: data sets and tasks; or the answers that a person has rated."""
        return [*self.data.datasets, *self.harness.tasks] or list(self.judge.ratings)

    @property
    def only_compares_judge(self) -> bool:
        """Whether nothing is evaluated, but the judge compared with a person's ratings."""
        return bool(self.judge.ratings) and not (self.data.datasets or self.harness.tasks or self.results)


# ------------------------------------------------------------------------------------- frozen, and sound


def frozen(spec: EvaluationSpec, workplace: Workplace) -> EvaluationSpec:
    """The spec with absolute paths, and run IDs replaced by result folders. The default base is that of the first
    result, and the default name consists of the models. A judge that is only compared with ratings is the model."""
    folders = [_folder(text, workplace) for text in spec.results]
    spec = spec.change(RESULTS_FIELD, list(dict.fromkeys(folders)))
    results = [result for folder in folders if (result := trained_result(folder))]
    if not spec.model.model_name_or_path.strip() and results:
        spec = spec.change("model", model_part_of_base(results[0]).model_dump())
    if spec.judge.model.strip():
        judge = _folder(spec.judge.model, workplace)
        spec = spec.change(JUDGE_FIELD, absolute_path(judge, workplace.model_roots, "config.json"))
        if spec.only_compares_judge and not spec.model.model_name_or_path.strip():
            known = judge_model(spec.judge)
            spec = spec.change("model", known.model.model_dump()).change("with_base", False).named(known.title)
    spec = spec.change(BASE_FIELD, absolute_path(spec.model.model_name_or_path, workplace.model_roots, "config.json"))
    if spec.with_base and results and all(result.is_reward_model for result in results):
        spec = spec.change("with_base", False)  # its head would be random
    titles = [result.title for result in results] or [Path(spec.model.model_name_or_path).name]
    spec = spec.named(", ".join(titles))
    data = workplace.data if Path(spec.data.dataset_dir) == Path("data") else spec.data.dataset_dir
    return spec.change("data.dataset_dir", os.path.abspath(data))


def _folder(text: str, workplace: Workplace) -> str:
    """The result folder of a run ID or a path; the text itself if it is neither."""
    run = RunDir(workplace.saves / text)
    if text.count("/") == 2 and ".." not in text and (folder := run.result()):
        return str(folder)
    return absolute_path(text, workplace.model_roots, ADAPTER_FILES[0])


def problems(spec: EvaluationSpec, workplace: Workplace) -> list[Problem]:
    """Everything that prevents it from running here."""
    all_problems = _result_problems(spec, workplace)
    scores = [result.is_reward_model for folder in spec.results if (result := trained_result(folder))]
    form = "pairs" if scores and all(scores) else "answers"
    if any(scores) and not all(scores):
        all_problems.append(problem("evaluate-mixed", RESULTS_FIELD))
    if not (spec.with_base or spec.results or spec.only_compares_judge):
        all_problems.append(problem("evaluate-nobody", RESULTS_FIELD))
    if not spec.model.model_name_or_path.strip():
        return [*all_problems, problem("model-not-chosen", BASE_FIELD)]
    if spec.generation.samples > 1 and not spec.generation.temperature:
        all_problems.append(problem("evaluate-samples-alike", "generation.samples", given=spec.generation.samples))
    adapted = bool(spec.results or (spec.only_compares_judge and judge_model(spec.judge).adapter))
    return (
        all_problems
        + checks.engine_problems(spec.hardware, workplace.saves)
        + _machine_problems(spec, spec.model, workplace, adapted)
        + _data_problems(spec, workplace, form)
        + _judge_problems(spec, workplace, form)
        + _context_problems(spec)
    )


def _task_problems(spec: EvaluationSpec, form: str) -> list[Problem]:
    if spec.harness.tasks and form == "pairs":
        return [problem("harness-judges", harness.TASKS_FIELD)]
    return harness.problems(spec.harness.tasks, Path(spec.data.dataset_dir))


def _result_problems(spec: EvaluationSpec, workplace: Workplace) -> list[Problem]:
    problems = []
    roots = ", ".join(map(str, workplace.model_roots))
    for folder in spec.results:
        if not is_inside(Path(folder), workplace.model_roots):
            problems.append(problem("path-outside", RESULTS_FIELD, path=folder, roots=roots))
        elif (result := trained_result(folder)) is None:
            problems.append(problem("evaluate-no-result", RESULTS_FIELD, given=folder))
        elif result.run.alive():
            problems.append(problem("evaluate-alive", RESULTS_FIELD, name=result.title))
        elif spec.model.model_name_or_path.strip() and result.adapter and not _same_base(result.base, spec):
            values = {"name": result.title, "theirs": result.base, "base": spec.model.model_name_or_path}
            problems.append(problem("chat-other-base", RESULTS_FIELD, **values))
    return problems


def _same_base(base: str, spec: EvaluationSpec) -> bool:
    return identity(base) == identity(spec.model.model_name_or_path)


def _machine_problems(spec: EvaluationSpec, model: Model, workplace: Workplace, adapted: bool) -> list[Problem]:
    """The problems that a training of this model on the same devices would have: model, GPUs, packages, disk.
    `adapted`: it is used with adapters."""
    obstacles = checks.preflight_problems(as_training(spec, model), workplace)
    # A base without a template uses that of its adapters; if there are none, loading reports it. And an adapter may
    # contain the embeddings that the base lacks.
    templates = ("no-template", "tokens-beyond-embeddings") if adapted else ()
    relevant = [
        obstacle
        for obstacle in obstacles
        if obstacle.field in (BASE_FIELD, "model.trust_remote_code", "model.quantization", "")
        or obstacle.field.startswith(("hardware.", "model."))
    ]
    return [obstacle for obstacle in relevant if obstacle.code not in (*templates, checks.NO_GRADIENT_CODE)]


def as_training(spec: EvaluationSpec, model: Model | None = None) -> RunSpec:
    """A training of the base (or of another `model`) on the same devices, for modules that take a training's spec."""
    return RunSpec.read(
        {
            "model": (model or spec.model).model_dump(),
            "hardware": spec.hardware.model_dump() | {"num_processes": 1},
            "data": {"dataset_dir": spec.data.dataset_dir, "max_length": 8},
            "stage": "sft",
            "method": "lora",
        }
    )


def _data_problems(spec: EvaluationSpec, workplace: Workplace, form: str) -> list[Problem]:
    folder = Path(spec.data.dataset_dir)
    if not is_inside(folder, (workplace.data,)):
        return [problem("path-outside", "data.dataset_dir", path=folder, roots=workplace.data)]
    problems = _task_problems(spec, form)
    if not (spec.data.datasets or spec.harness.tasks or (spec.only_compares_judge and not spec.with_base)):
        return [problem("evaluate-no-data", DATASETS_FIELD)]
    usable, obstacles = _datasets(folder, spec.data.datasets, DATASETS_FIELD)
    for dataset in usable:
        if dataset.kind not in DATASET_KINDS[form]:
            obstacles.append(problem(NEEDED_ROWS_CODES[form], DATASETS_FIELD, name=dataset.name))
        elif form == "answers":
            obstacles += _reference_problems(spec, dataset)
    rated, unusable = _datasets(folder, spec.judge.ratings, RATINGS_FIELD)
    unrated = [dataset.name for dataset in rated if dataset.kind not in RATING_KINDS]
    return [*problems, *obstacles, *unusable, *(problem("judge-no-ratings", RATINGS_FIELD, name=x) for x in unrated)]


def _datasets(folder: Path, names: list[str], field: str) -> tuple[list[Dataset], list[Problem]]:
    """The data sets with these names, and what is wrong with the others."""
    if not names:
        return [], []
    sets, broken = read_dataset_info(folder)
    known = {dataset.name: dataset for dataset in sets}
    usable, problems = list[Dataset](), [replace(issue, field=field) for issue in broken]
    for name in names if not broken else ():
        if name not in known:
            values = {"name": name, "folder": folder, "known": ", ".join(sound_names(sets)) or "—"}
            problems.append(problem("data-unknown", field, **values))
        elif fault := known[name].problem:
            problems.append(replace(fault, field=field))
        elif not known[name].files:
            problems.append(problem("dataset-on-hub", field, name=name, hub=known[name].hub))
        else:
            usable.append(known[name])
    return usable, problems


def _judge_problems(spec: EvaluationSpec, workplace: Workplace, form: str) -> list[Problem]:
    """What prevents the judge from judging here."""
    chosen = spec.judge.model
    if not chosen.strip():
        return [problem("judge-missing", JUDGE_FIELD)] if spec.judge.ratings else []
    if form == "pairs":
        return [problem("judge-of-scores", JUDGE_FIELD)]
    if not is_inside(Path(chosen), workplace.model_roots):
        roots = ", ".join(map(str, workplace.model_roots))
        return [problem("path-outside", JUDGE_FIELD, path=chosen, roots=roots)]
    judge, result = judge_model(spec.judge), trained_result(chosen)
    if judge.is_reward_model:
        return [problem("judge-is-reward-model", JUDGE_FIELD, name=judge.title)]
    if result and result.run.alive():
        return [problem("evaluate-alive", JUDGE_FIELD, name=judge.title)]
    if spec.only_compares_judge:
        return []  # it is the model of the evaluation, whose problems are known
    problems = _machine_problems(spec, judge.model, workplace, adapted=bool(judge.adapter))
    return [replace(issue, field=JUDGE_FIELD) for issue in problems if issue.field.startswith("model.")]


def _reference_problems(spec: EvaluationSpec, dataset: Dataset) -> list[Problem]:
    questions, answered = references(dataset)
    if not questions:
        return [problem("evaluate-no-questions", DATASETS_FIELD, name=dataset.name)]
    if not answered and not spec.data.without_references:
        return [problem("evaluate-no-references", DATASETS_FIELD, name=dataset.name)]
    return []


def references(dataset: Dataset) -> tuple[int, int]:
    """How many of the first rows of a set are questions, and how many of these have a reference answer."""
    rows = list(islice(examples(dataset, lambda _: None, "prompts"), REFERENCE_ROWS_SAMPLED))
    return len(rows), sum(row["answer"] is not None for row in rows)


def fitting_datasets(sets: list[Dataset], form: str = "answers") -> list[str]:
    """Names of the sets on which models of this `form` (a key of DATASET_KINDS) can be evaluated."""
    return [
        dataset.name for dataset in sets if not flaw(dataset) and dataset.files and dataset.kind in DATASET_KINDS[form]
    ]


def rated_datasets(sets: list[Dataset]) -> list[str]:
    """Names of the sets with a person's ratings."""
    return [dataset.name for dataset in sets if not flaw(dataset) and dataset.files and dataset.kind in RATING_KINDS]


def add_questions(data_dir: Path, file: Path) -> str:
    """Add a file in the data folder as a data set of questions, with or without answers; returns its name. Raises
    Refusal if no column is a question."""
    rows, name = dataset_info_edits.first_rows(file), str(file.relative_to(data_dir))
    proposed = dataset_info_edits.propose(rows)
    if proposed.kind != "text":
        with contextlib.suppress(Refusal):
            return dataset_info_edits.add(
                data_dir, file.stem, dataset_info_edits.entry_for_mapping(name, proposed, rows)
            )
    columns = dataset_info_edits.columns_of(rows)
    known = {column.casefold().strip(): column for column in columns}
    usual = next((known[heading] for heading in USUAL_COLUMN_NAMES["prompt"] if heading in known), None)
    question = usual or (columns[0] if len(columns) == 1 else None)
    if question is None or file.suffix == ".txt":
        listed = ", ".join(columns) or "—"
        raise Refusal(problem("evaluate-questions-column", DATASETS_FIELD, file=file.name, columns=listed))
    # An answer column that no row has, so that the rows are read as questions and not as plain text.
    return dataset_info_edits.add(
        data_dir, file.stem, {"file_name": name, "columns": {"prompt": question, "response": "answer"}}
    )


def _context_problems(spec: EvaluationSpec) -> list[Problem]:
    base = spec.model.model_name_or_path
    if spec.only_compares_judge or (is_hub_id(base) and not os.path.isdir(base)):
        return []  # nothing is answered; or it is not here yet, and the worker checks again
    stretched = getattr(spec.model.rope_scaling, "factor", 1)
    context = int((inspect_model(base).context_length or 0) * stretched)
    if context and spec.generation.max_new_tokens >= context:
        values = {"given": spec.generation.max_new_tokens, "context": context}
        return [problem("evaluate-context", "generation.max_new_tokens", **values)]
    return []
