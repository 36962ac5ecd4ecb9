"""Tasks of lm-evaluation-harness, run on a model that is in memory already; the only place that imports the package.

What each task has found of each model is a line of `report/tasks.jsonl`, written when it is known, so that a resumed run
measures no task of a model twice. Nothing is asked of a network: `engine.evaluation.harness` has refused what would be.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from jinja2.sandbox import SandboxedEnvironment

from engine.core.problems import Refusal, problem
from engine.core.rundir import RunDir, append_lines, read_lines
from engine.evaluation import harness
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.worker.evaluation.bootstrap import FEWEST
from engine.worker.evaluation.respond import Speakers
from engine.worker.runtime.process_lifecycle import Report

RESAMPLES = 1000  # for the standard error of measures that have no formula of it
CERTAIN = 1.96  # standard errors: the middle 95 % of a normal distribution
TOLD = 300  # characters of what the package says is wrong
DIRECTIONS = {True: "higher", False: "lower", None: "neither"}


class Tasks:
    """The tasks of an evaluation, and what is known of them. Raises Refusal if one of them cannot be run."""

    def __init__(self, spec: EvaluationSpec, run: RunDir, report: Report, voices: Sequence[str]):
        self.how, self.generation, self.report, self.voices = spec.harness, spec.generation, report, voices
        self.file = run.report / "tasks.jsonl"
        self.lines = {(one["task"], one["voice"]): one for one in read_lines(self.file)}
        if not self.missing():
            return
        data = Path(spec.data.dataset_dir)
        if found := harness.problems(spec.harness.tasks, data):
            raise Refusal(found)
        self.configs = {
            one.name: dict(one.config) for one in harness.tasks(data) if one.name in self.how.tasks
        }
        self.cache = (
            tempfile.TemporaryDirectory()
        )  # of datasets, which would keep a copy of every file in the home
        with alone():
            for name in self.how.tasks:
                self._task(name)

    def missing(self, voices: Sequence[str] | None = None) -> list[tuple[str, str]]:
        """Tasks and voices (all, or some) of which nothing is known yet."""
        wanted = self.voices if voices is None else voices
        return [(task, one) for one in wanted for task in self.how.tasks if (task, one) not in self.lines]

    def measure(self, speakers: Speakers, voice: str) -> None:
        """Whatever is not known yet of a voice."""
        total = len(self.how.tasks) * len(self.voices)
        for name, _ in self.missing([voice]):
            self.report("tasks", len(self.lines), total, "tasks")
            print(f"task {name}: {voice}", flush=True)
            try:
                with alone():
                    found = speakers.with_model(voice, lambda name=name: self._measure(name, speakers, voice))
            except Exception as error:
                raise Refusal(problem("harness-failed", name=name, voice=voice, why=_short(error))) from error
            line = {"task": name, "voice": voice, **found}
            append_lines(self.file, [line])
            self.lines[name, voice] = line

    def _task(self, name: str) -> Any:
        """The package's own object for a task. Raises Refusal with what it says is wrong."""
        from lm_eval.api.task import ConfigurableTask

        config = deepcopy(self.configs[name])
        config["dataset_kwargs"]["cache_dir"] = self.cache.name
        try:
            task = ConfigurableTask(config=config)
            shown = task.get_config("num_fewshot")
            if shown is None or (shown and self.how.num_fewshot is not None):
                task.set_config(key="num_fewshot", value=self.how.num_fewshot or 0)
            task.set_fewshot_seed(seed=self.generation.seed)
        except Exception as error:  # whatever a task's file has made it stumble over
            raise Refusal(problem("harness-broken", harness.TASKS, name=name, why=_short(error))) from error
        return task

    def _measure(self, name: str, speakers: Speakers, voice: str) -> dict[str, Any]:
        """{"rows", "shown", "measures": [{"name", "value", "stderr", "better"}]} of one task and the model as it is."""
        from lm_eval.evaluator import evaluate

        task, tokenizer = self._task(name), speakers.tokenizer(voice)
        if task.OUTPUT_TYPE == "generate_until":
            greedy = {"do_sample": False, "temperature": 0.0}
            task.set_config(key="generation_kwargs", value=greedy, update=True)
        found = evaluate(
            lm=asked(speakers, tokenizer, self.generation.max_new_tokens, self.generation.batch_size),
            task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}}, limit=self.how.limit,
            bootstrap_iters=RESAMPLES, log_samples=False, fewshot_as_multiturn=True,
            apply_chat_template=bool(tokenizer.chat_template) and self.how.apply_chat_template,
        )  # fmt: skip
        better = found["higher_is_better"].get(name, {})
        return {
            "rows": found["n-samples"][name]["effective"], "shown": found["n-shot"].get(name) or 0,
            "measures": list(_measures(found["results"][name], better)),
        }  # fmt: skip


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The package imported, and kept from asking any network, from starting processes, and from running code that a
    template in a file holds."""
    os.environ |= {"HF_EVALUATE_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
    import datasets
    import huggingface_hub
    from lm_eval import utils

    theirs, hub = utils.env, huggingface_hub.constants
    ours = SandboxedEnvironment(
        undefined=theirs.undefined, keep_trailing_newline=theirs.keep_trailing_newline
    )
    ours.filters.update(theirs.filters)
    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    utils.env = ours
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        utils.env = theirs


def asked(speakers: Speakers, tokenizer: Any, longest: int, batch_size: int) -> Any:
    """The model in memory as the package asks it."""
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):
        max_gen_toks = property(lambda self: longest)  # where a task does not say

    model = speakers.writer.model
    model.tie_weights = lambda *_, **__: (
        None
    )  # they are tied; once more would undo what adapters put in their place
    try:
        return InMemory(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    finally:
        del model.tie_weights


def _measures(found: Mapping[str, Any], better: Mapping[str, bool | None]) -> Any:
    for key, value in found.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = found.get(f"{name}_stderr,{filtered}")
        yield {
            "name": name if filtered == "none" else f"{name} ({filtered})", "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None,
            "better": DIRECTIONS[better.get(name)],
        }  # fmt: skip


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:TOLD]


# ----------------------------------------------------------------------------------------- what they say


def told(
    names: Sequence[str], voices: Sequence[str], lines: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[Any]:
    """Of each measure of each task the values of all voices, and the differences to the base, if that is the first."""
    found = []
    for task in names:
        first = lines[task, voices[0]]
        for at, measure in enumerate(first["measures"]):
            values = {one: lines[task, one]["measures"][at] for one in voices}
            base = values[voices[0]] if voices[0] == "base" else None
            found.append({
                "task": task, "measure": measure["name"], "rows": first["rows"], "shown": first["shown"],
                "better": measure["better"],
                "values": {name: {"value": one["value"], "stderr": one["stderr"]} for name, one in values.items()},
                "differences": {
                    name: difference(one, base, measure["better"], first["rows"]) for name, one in values.items()
                    if base and name != "base"
                },
            })  # fmt: skip
    return found


def difference(ours: Mapping[str, Any], base: Mapping[str, Any], better: str, rows: int) -> dict[str, Any]:
    """Ours minus the base's, its standard error as of two samples drawn apart, and a verdict where the difference is
    beyond 1.96 of it and the questions are not too few. They are the same for both, so this is careful: it overlooks
    rather than invents."""
    apart = (ours["value"] or 0.0) - (base["value"] or 0.0)
    if None in (ours["value"], base["value"], ours["stderr"], base["stderr"]):
        return {"value": apart, "stderr": None, "verdict": "same"}
    stderr = math.hypot(ours["stderr"], base["stderr"])
    ways = {"higher": ("better", "worse"), "lower": ("worse", "better"), "neither": ("more", "less")}
    verdict = ways[better][apart < 0] if abs(apart) > CERTAIN * stderr and rows >= FEWEST else "same"
    return {"value": apart, "stderr": stderr, "verdict": verdict}
