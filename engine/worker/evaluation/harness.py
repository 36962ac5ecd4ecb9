"""Run tasks of lm-evaluation-harness on a model that is already in memory; the only place that imports the package.

The result of each task and model is a line of `report/tasks.jsonl`, written as soon as it is known, so that a resumed
run repeats no task. Nothing is downloaded: `engine.evaluation.harness` has rejected tasks that would need it.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from jinja2.sandbox import SandboxedEnvironment

from engine.core.problems import Refusal, problem
from engine.core.rundir import RunDir, append_lines, read_lines
from engine.evaluation import harness
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.worker.evaluation.bootstrap import MIN_ROWS
from engine.worker.evaluation.respond import LoadedModels
from engine.worker.runtime.process_lifecycle import ProgressReport

RESAMPLES = 1000  # for the standard error of metrics without a formula for it
Z_95 = 1.96  # standard errors: the middle 95 % of a normal distribution
MAX_ERROR_CHARS = 300  # of a message from the package
DIRECTIONS = {True: "higher", False: "lower", None: "neither"}


class Tasks:
    """The tasks of an evaluation, and their known results. Raises Refusal if one of them cannot be run."""

    def __init__(self, spec: EvaluationSpec, run: RunDir, report: ProgressReport, models: Sequence[str]):
        self.settings, self.generation = spec.harness, spec.generation
        self.report, self.models = report, models
        self.file = run.report / "tasks.jsonl"
        self.lines = {(line["task"], line["voice"]): line for line in read_lines(self.file)}
        if not self.missing():
            return
        data = Path(spec.data.dataset_dir)
        if problems := harness.problems(spec.harness.tasks, data):
            raise Refusal(problems)
        self.configs = {
            task.name: dict(task.config) for task in harness.tasks(data) if task.name in self.settings.tasks
        }
        # Of the datasets library, which would otherwise keep a copy of every file in the home folder.
        self.cache = tempfile.TemporaryDirectory()
        with isolated_harness():
            for name in self.settings.tasks:
                self._task(name)

    def missing(self, models: Sequence[str] | None = None) -> list[tuple[str, str]]:
        """Pairs of task and model (of all models, or of some) without a result yet."""
        selected = self.models if models is None else models
        return [(task, model) for model in selected for task in self.settings.tasks if (task, model) not in self.lines]

    def measure(self, loaded: LoadedModels, model: str) -> None:
        """Run the tasks that have no result for this model yet."""
        total = len(self.settings.tasks) * len(self.models)
        for name, _ in self.missing([model]):
            self.report("tasks", len(self.lines), total, "tasks")
            print(f"task {name}: {model}", flush=True)
            try:
                with isolated_harness():
                    result = loaded.with_model(model, partial(self._measure, name, loaded, model))
            except Exception as error:
                raise Refusal(problem("harness-failed", name=name, voice=model, why=_error_line(error))) from error
            line = {"task": name, "voice": model, **result}
            append_lines(self.file, [line])
            self.lines[name, model] = line

    def _task(self, name: str) -> Any:
        """The package's own object for a task. Raises Refusal with the package's error."""
        from lm_eval.api.task import ConfigurableTask

        config = deepcopy(self.configs[name])
        config["dataset_kwargs"]["cache_dir"] = self.cache.name
        try:
            task = ConfigurableTask(config=config)
            num_fewshot = task.get_config("num_fewshot")
            if num_fewshot is None or (num_fewshot and self.settings.num_fewshot is not None):
                task.set_config(key="num_fewshot", value=self.settings.num_fewshot or 0)
            task.set_fewshot_seed(seed=self.generation.seed)
        except Exception as error:  # whatever error a task file causes
            raise Refusal(problem("harness-broken", harness.TASKS_FIELD, name=name, why=_error_line(error))) from error
        return task

    def _measure(self, name: str, loaded: LoadedModels, model: str) -> dict[str, Any]:
        """{"rows", "shown", "measures": [{"name", "value", "stderr", "better"}]} of one task and the current model."""
        from lm_eval.evaluator import evaluate

        task, tokenizer = self._task(name), loaded.tokenizer(model)
        if task.OUTPUT_TYPE == "generate_until":
            greedy = {"do_sample": False, "temperature": 0.0}
            task.set_config(key="generation_kwargs", value=greedy, update=True)
        results = evaluate(
            lm=harness_model(loaded, tokenizer, self.generation.max_new_tokens, self.generation.batch_size),
            task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=self.settings.limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
            fewshot_as_multiturn=True,
            apply_chat_template=bool(tokenizer.chat_template) and self.settings.apply_chat_template,
        )
        better = results["higher_is_better"].get(name, {})
        return {
            "rows": results["n-samples"][name]["effective"],
            "shown": results["n-shot"].get(name) or 0,
            "measures": list(_measures(results["results"][name], better)),
        }


@contextlib.contextmanager
def isolated_harness() -> Iterator[None]:
    """Import the package, and prevent it from using the network, starting processes, and running code in templates."""
    os.environ |= {"HF_EVALUATE_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
    import datasets
    import huggingface_hub
    from lm_eval import utils

    theirs, hub = utils.env, huggingface_hub.constants
    ours = SandboxedEnvironment(undefined=theirs.undefined, keep_trailing_newline=theirs.keep_trailing_newline)
    ours.filters.update(theirs.filters)
    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    utils.env = ours
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        utils.env = theirs


def harness_model(loaded: LoadedModels, tokenizer: Any, max_new_tokens: int, batch_size: int) -> Any:
    """The model in memory in the form that the package expects."""
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):
        max_gen_toks = property(lambda self: max_new_tokens)  # if a task does not say

    model = loaded.generator.model
    # They are already tied; tying them again would undo what adapters put in their place.
    model.tie_weights = lambda *_, **__: None  # type: ignore[method-assign]  # of this model alone
    try:
        return InMemory(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    finally:
        del model.tie_weights


def _measures(results: Mapping[str, Any], better: Mapping[str, bool | None]) -> Any:
    for key, value in results.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = results.get(f"{name}_stderr,{filtered}")
        yield {
            "name": name if filtered == "none" else f"{name} ({filtered})",
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None,
            "better": DIRECTIONS[better.get(name)],
        }


def _error_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:MAX_ERROR_CHARS]


# ----------------------------------------------------------------------------------------- the report


def task_comparisons(
    names: Sequence[str], models: Sequence[str], lines: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[Any]:
    """For each metric of each task, the values of all models, and the differences from the base, if that is the
    first."""
    comparisons = []
    for task in names:
        first = lines[task, models[0]]
        for at, measure in enumerate(first["measures"]):
            values = {model: lines[task, model]["measures"][at] for model in models}
            base = values[models[0]] if models[0] == "base" else None
            comparisons.append(
                {
                    "task": task,
                    "measure": measure["name"],
                    "rows": first["rows"],
                    "shown": first["shown"],
                    "better": measure["better"],
                    "values": {
                        name: {"value": result["value"], "stderr": result["stderr"]} for name, result in values.items()
                    },
                    "differences": {
                        name: difference(result, base, measure["better"], first["rows"])
                        for name, result in values.items()
                        if base and name != "base"
                    },
                }
            )
    return comparisons


def difference(ours: Mapping[str, Any], base: Mapping[str, Any], better: str, rows: int) -> dict[str, Any]:
    """Our value minus the base's, its standard error as for independent samples, and a verdict if the difference
    exceeds 1.96 of it and there are enough questions. Since both have the same questions, this is conservative."""
    delta = (ours["value"] or 0.0) - (base["value"] or 0.0)
    if None in (ours["value"], base["value"], ours["stderr"], base["stderr"]):
        return {"value": delta, "stderr": None, "verdict": "same"}
    stderr = math.hypot(ours["stderr"], base["stderr"])
    ways = {"higher": ("better", "worse"), "lower": ("worse", "better"), "neither": ("more", "less")}
    verdict = ways[better][delta < 0] if abs(delta) > Z_95 * stderr and rows >= MIN_ROWS else "same"
    return {"value": delta, "stderr": stderr, "verdict": verdict}
