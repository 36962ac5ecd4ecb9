"""Tasks of lm-evaluation-harness: YAML files in the data folder, each read, and whether it can run here without a network.

The package itself is optional and only `engine.worker.evaluation.harness` imports it. What is told before a start is told of the
files alone: a task is what its own keys say, on top of those of the files that it includes.
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

from engine.core.problems import Problem, Refusal, problem
from engine.launch.workspace import inside
from engine.spec.yaml_text import read_yaml

FOLDER = "harness"  # in the data folder
PACKAGE = "lm-eval==0.4.13"  # what to install
TASKS = "harness.tasks"
BUILDERS = ("json", "csv", "parquet", "text")  # of datasets, that read files
OUTPUTS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
METRICS = (
    "acc", "acc_all", "acc_bytes", "acc_mutual_info", "acc_norm", "bits_per_byte", "bleu", "brier_score",
    "byte_perplexity", "chrf", "chrf++", "exact_match", "f1", "likelihood", "mcc", "perplexity", "ter", "word_perplexity",
)  # fmt: skip
CODE = re.compile(r"!function\b")
NOT_HERE = ("doc_to_image", "doc_to_audio", "use_prompt", "custom_dataset")


@dataclass(frozen=True)
class Task:
    """What a file says. `config` is as the package takes it, its data files by full paths; empty where `problem` says
    why it cannot run here."""

    name: str
    file: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    problem: Problem | None = None


def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("lm_eval") is not None


def tasks(data: Path) -> list[Task]:
    """What the files in the harness folder of the data folder `data` describe, by name. A sound file that others include
    and that names no task is none; every other is one, sound or not."""
    folder = data / FOLDER
    files = sorted(one for one in folder.rglob("*") if one.suffix in (".yaml", ".yml") and one.is_file())
    read = [_Reading(data, folder, file) for file in files]
    included = {file for one in read for file in one.included}
    found = [one.task() for one in read if one.name or one.problem or one.file.resolve() not in included]
    often = Counter(one.name for one in found)
    twice = [
        replace(one, config={}, problem=problem("harness-twice", TASKS, name=one.name)) if often[one.name] > 1 else one
        for one in found
    ]  # fmt: skip
    return sorted(twice, key=lambda one: one.name)


def problems(names: list[str], data: Path) -> list[Problem]:
    """What keeps these tasks from running."""
    if not names:
        return []
    missing = (
        []
        if installed()
        else [problem("package-missing", TASKS, what="lm-evaluation-harness", package=PACKAGE)]
    )
    known = {one.name: one for one in tasks(data)}
    for name in names:
        if name not in known:
            values = {"name": name, "folder": data / FOLDER, "known": ", ".join(known) or "—"}
            missing.append(problem("harness-unknown", TASKS, **values))
        elif why := known[name].problem:
            missing.append(why)
    return missing


def _within(root: Path, path: Path) -> Path:
    """The path without links. Raises Refusal if it does not lie in `root`, or can be no path at all."""
    if not inside(path, (root,)):
        raise Refusal(problem("path-outside", TASKS, path=path, roots=root))
    return path.resolve()


class _Reading:
    """One file, with what it includes."""

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
            return Task(name, self.file, problem=replace(refusal.problems[0], field=TASKS))

    def _read(self, file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
        """The keys of a file on top of those of its includes. Data files are looked for beside the file that names them."""
        shown = file.name
        if file in above:
            raise Refusal(problem("harness-circle", TASKS, file=shown))
        _within(self.folder, file)
        try:
            text = file.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise Refusal(problem("file-unreadable", TASKS, file=file, why=error.strerror)) from error
        except UnicodeDecodeError as error:
            raise Refusal(problem("file-not-text", TASKS, file=shown)) from error
        if CODE.search(text):
            raise Refusal(problem("harness-code", TASKS, file=shown))
        try:
            said = read_yaml(text, TASKS)
        except Refusal as refusal:
            first = refusal.problems[0]
            if first.code != "spec-not-yaml":
                raise
            raise Refusal(problem("harness-not-yaml", TASKS, file=shown, **first.values)) from None
        if not isinstance(said, dict):
            raise Refusal(problem("harness-no-task", TASKS, file=shown))
        config: dict[str, Any] = {}
        includes = said.pop("include", None) or []
        for one in includes if isinstance(includes, list) else [includes]:
            other = _within(self.folder, file.parent / str(one))
            self.included.add(other)
            config |= self._read(other, (*above, file))
        how = said.get("dataset_kwargs")
        if isinstance(how, dict) and "data_files" in how:
            said["dataset_kwargs"] = how | {"data_files": self._files(how["data_files"], file)}
        return config | {str(key): value for key, value in said.items()}

    def _files(self, given: Any, file: Path) -> Any:
        """The same with full paths."""
        if isinstance(given, dict):
            return {split: self._files(one, file) for split, one in given.items()}
        if isinstance(given, list):
            return [self._files(one, file) for one in given]
        text = str(given)
        if "://" in text:
            raise Refusal(problem("harness-hub", TASKS, name=file.name, given=text))
        path = _within(self.data, file.parent / text)
        if not os.path.isfile(path):  # False, too, of a name that no file can have, where Path.is_file raises
            raise Refusal(problem("harness-file", TASKS, name=file.name, given=text, folder=file.parent))
        return str(path)

    def _sound(self) -> dict[str, Any]:
        """The keys, if they describe a task that needs nothing from elsewhere. Raises Refusal."""
        said, file = self.config, self.file.name
        if "group" in said or isinstance(said.get("task"), list):
            raise Refusal(problem("harness-group", TASKS, file=file))
        if not self.name:
            raise Refusal(problem("harness-no-task", TASKS, file=file))
        how = said.get("dataset_kwargs")
        if said.get("dataset_path") not in BUILDERS or not isinstance(how, dict) or "data_files" not in how:
            raise Refusal(
                problem("harness-hub", TASKS, name=self.name, given=said.get("dataset_path") or "—")
            )
        output = said.get("output_type", OUTPUTS[-1])
        if output not in OUTPUTS:
            raise Refusal(
                problem("harness-output", TASKS, name=self.name, given=output, known=", ".join(OUTPUTS))
            )
        if other := next((one for one in NOT_HERE if said.get(one)), None):
            raise Refusal(problem("harness-key", TASKS, name=self.name, given=other))
        metrics = [] if said.get("metric_list") is None else said["metric_list"]
        if not isinstance(metrics, list) or not all(isinstance(one, dict) for one in metrics):
            raise Refusal(problem("harness-metrics", TASKS, name=self.name))
        for one in metrics:
            metric = one.get("metric")
            if metric not in METRICS or one.get("hf_evaluate"):
                raise Refusal(
                    problem("harness-metric", TASKS, name=self.name, given=metric, known=", ".join(METRICS))
                )
        if said.get("unsafe_code"):
            raise Refusal(problem("harness-code", TASKS, file=file))
        return said
