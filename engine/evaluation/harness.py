"""Tasks of lm-evaluation-harness: YAML files in the data folder, and whether each can run here without a network.

The package is optional, and only `engine.worker.evaluation.harness` imports it. The checks before the start use only
the files: a task consists of its own keys on top of those of the files it includes.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.core import regular_files
from engine.core.problems import Problem, Refusal, problem
from engine.launch.workspace import is_inside
from engine.spec.yaml_text import read_yaml

TASKS_FOLDER = "harness"  # in the data folder
PACKAGE = "lm-eval==0.4.13"  # the package to install
TASKS_FIELD = "harness.tasks"
BUILDERS = ("json", "csv", "parquet", "text")  # of the datasets library, which read files
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
METRICS = (
    "acc", "acc_all", "acc_bytes", "acc_mutual_info", "acc_norm", "bits_per_byte",
    "bleu", "brier_score", "byte_perplexity", "chrf", "chrf++", "exact_match",
    "f1", "likelihood", "mcc", "perplexity", "ter", "word_perplexity",
)  # fmt: skip
PYTHON_FUNCTION = re.compile(r"!function\b")
UNSUPPORTED_KEYS = ("doc_to_image", "doc_to_audio", "use_prompt", "custom_dataset")


@dataclass(frozen=True)
class Task:
    """The content of a task file. `config` is as the package expects it, with absolute paths of data files; empty if
    `problem` says why it cannot run here."""

    name: str
    file: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    problem: Problem | None = None


def installed() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("lm_eval") is not None


def tasks(data: Path) -> list[Task]:
    """The tasks in the harness folder of the data folder `data`, by name. A sound file that others include and that
    names no task is not a task; every other file is one, sound or not."""
    folder = data / TASKS_FOLDER
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml") and path.is_file())
    read = [_TaskFile(data, folder, file) for file in files]
    included = {file for task_file in read for file in task_file.included}
    described = [
        task_file.task()
        for task_file in read
        if task_file.name or task_file.problem or task_file.file.resolve() not in included
    ]
    counts = Counter(task.name for task in described)
    checked = [
        replace(task, config={}, problem=problem("harness-twice", TASKS_FIELD, name=task.name))
        if counts[task.name] > 1
        else task
        for task in described
    ]
    return sorted(checked, key=lambda task: task.name)


def problems(names: list[str], data: Path) -> list[Problem]:
    """What prevents these tasks from running."""
    if not names:
        return []
    missing = (
        [] if installed() else [problem("package-missing", TASKS_FIELD, what="lm-evaluation-harness", package=PACKAGE)]
    )
    known = {task.name: task for task in tasks(data)}
    for name in names:
        if name not in known:
            values = {"name": name, "folder": data / TASKS_FOLDER, "known": ", ".join(known) or "—"}
            missing.append(problem("harness-unknown", TASKS_FIELD, **values))
        elif why := known[name].problem:
            missing.append(why)
    return missing


def _within(root: Path, path: Path) -> Path:
    """The path with links resolved. Raises Refusal if it is outside `root`, or is not a valid path."""
    if not is_inside(path, (root,)):
        raise Refusal(problem("path-outside", TASKS_FIELD, path=path, roots=root))
    return path.resolve()


class _TaskFile:
    """One file, with its includes."""

    def __init__(self, data: Path, folder: Path, file: Path):
        self.data, self.folder, self.file = data, folder, file
        self.included: set[Path] = set()
        self.config: dict[str, Any] = {}
        self.problem: Problem | None = None
        try:
            self.config = self._read(file, ())
        except Refusal as refusal:
            self.problem = refusal.problems[0]
        named = self.config.get("task")
        self.name = named.strip() if isinstance(named, str) else ""

    def task(self) -> Task:
        name = self.name or str(self.file.relative_to(self.folder))
        try:
            if self.problem:
                raise Refusal(self.problem)
            return Task(name, self.file, self._sound())
        except Refusal as refusal:
            return Task(name, self.file, problem=replace(refusal.problems[0], field=TASKS_FIELD))

    def _read(self, file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
        """The keys of a file on top of those of its includes. Data files are relative to the file that names them."""
        name = file.name
        if file in above:
            raise Refusal(problem("harness-circle", TASKS_FIELD, file=name))
        _within(self.folder, file)
        try:
            text = regular_files.read_text(file, "utf-8-sig")
        except OSError as error:
            raise Refusal(problem("file-unreadable", TASKS_FIELD, file=file, why=error.strerror)) from error
        except UnicodeDecodeError as error:
            raise Refusal(problem("file-not-text", TASKS_FIELD, file=name)) from error
        if PYTHON_FUNCTION.search(text):
            raise Refusal(problem("harness-code", TASKS_FIELD, file=name))
        try:
            keys = read_yaml(text, TASKS_FIELD)
        except Refusal as refusal:
            first = refusal.problems[0]
            if first.code != "spec-not-yaml":
                raise
            raise Refusal(problem("harness-not-yaml", TASKS_FIELD, file=name, **first.values)) from None
        if not isinstance(keys, dict):
            raise Refusal(problem("harness-no-task", TASKS_FIELD, file=name))
        config: dict[str, Any] = {}
        includes = keys.pop("include", None) or []
        for include in includes if isinstance(includes, list) else [includes]:
            other = _within(self.folder, file.parent / str(include))
            self.included.add(other)
            config |= self._read(other, (*above, file))
        arguments = keys.get("dataset_kwargs")
        if isinstance(arguments, dict) and "data_files" in arguments:
            keys["dataset_kwargs"] = arguments | {"data_files": self._files(arguments["data_files"], file)}
        return config | {str(key): value for key, value in keys.items()}

    def _files(self, value: Any, file: Path) -> Any:
        """The same with absolute paths."""
        if isinstance(value, dict):
            return {split: self._files(entry, file) for split, entry in value.items()}
        if isinstance(value, list):
            return [self._files(entry, file) for entry in value]
        text = str(value)
        if "://" in text:
            raise Refusal(problem("harness-hub", TASKS_FIELD, name=file.name, given=text))
        path = _within(self.data, file.parent / text)
        if not os.path.isfile(path):  # False also for an invalid file name, for which Path.is_file raises
            raise Refusal(problem("harness-file", TASKS_FIELD, name=file.name, given=text, folder=file.parent))
        return str(path)

    def _sound(self) -> dict[str, Any]:
        """The keys, if they describe a task that needs nothing from elsewhere. Raises Refusal."""
        keys, file = self.config, self.file.name
        if "group" in keys or isinstance(keys.get("task"), list):
            raise Refusal(problem("harness-group", TASKS_FIELD, file=file))
        if not self.name:
            raise Refusal(problem("harness-no-task", TASKS_FIELD, file=file))
        arguments = keys.get("dataset_kwargs")
        if keys.get("dataset_path") not in BUILDERS or not isinstance(arguments, dict) or "data_files" not in arguments:
            raise Refusal(problem("harness-hub", TASKS_FIELD, name=self.name, given=keys.get("dataset_path") or "—"))
        output = keys.get("output_type", OUTPUT_TYPES[-1])
        if output not in OUTPUT_TYPES:
            raise Refusal(
                problem("harness-output", TASKS_FIELD, name=self.name, given=output, known=", ".join(OUTPUT_TYPES))
            )
        if other := next((key for key in UNSUPPORTED_KEYS if keys.get(key)), None):
            raise Refusal(problem("harness-key", TASKS_FIELD, name=self.name, given=other))
        metrics = [] if keys.get("metric_list") is None else keys["metric_list"]
        if not isinstance(metrics, list) or not all(isinstance(entry, dict) for entry in metrics):
            raise Refusal(problem("harness-metrics", TASKS_FIELD, name=self.name))
        for entry in metrics:
            metric = entry.get("metric")
            if metric not in METRICS or entry.get("hf_evaluate"):
                raise Refusal(
                    problem("harness-metric", TASKS_FIELD, name=self.name, given=metric, known=", ".join(METRICS))
                )
        if keys.get("unsafe_code"):
            raise Refusal(problem("harness-code", TASKS_FIELD, file=file))
        return keys
