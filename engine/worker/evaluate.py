"""An evaluation, top to bottom: `python -m engine.worker.evaluate FOLDER`.

Leaves in the run's report/: questions.jsonl, the rows that were drawn; answers.jsonl, a line for whatever is known of one
model on one row, and tasks.jsonl, one for each task and model, written as soon as it is known, so that a resumed run asks
nothing twice; and at last what `engine.worker.evaluation.findings` makes of them, with result.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.core.problems import Refusal, problem
from engine.core.rundir import RunDir, append_lines, read_lines
from engine.evaluation.evaluation_spec import EvaluationSpec, Left, as_training, base_of, left, whole_of
from engine.runs.kinds import read
from engine.spec.model_settings import Model
from engine.worker.runtime.optional_packages import leave_out_unused, quantized
from engine.worker.runtime.process_lifecycle import Report, edge

BASE = "base"  # the voice of the base itself
SCORED = 64  # pairs of a reward model between two looks at the progress


def evaluate(run: RunDir) -> None:
    """Measure what the run in its folder says, going on where an earlier attempt was."""
    report = Report(run)
    report("loading")
    from engine.worker.evaluation.findings import write_findings
    from engine.worker.evaluation.harness import Tasks
    from engine.worker.evaluation.questions import questions

    spec = read(run.spec.read_text(encoding="utf-8"))
    lefts = [one for folder in spec.results if (one := left(folder))]
    if len(lefts) < len(spec.results):
        gone = next(folder for folder in spec.results if not left(folder))
        raise Refusal(problem("evaluate-no-result", "results", given=gone))
    form = "pairs" if lefts and all(one.judges for one in lefts) else "answers"
    run.report.mkdir(exist_ok=True)
    asked = questions(spec, run.report / "questions.jsonl", form)
    known = Known(run, report, total=(spec.with_base + len(lefts)) * len(asked))
    voices = [*([BASE] if spec.with_base else []), *lefts]
    tasks = Tasks(spec, run, report, [one if isinstance(one, str) else one.id for one in voices])
    MEASURE[form](spec, lefts, asked, known, tasks)
    report("saving")
    write_findings(run, spec, form, voices, asked, known.lines, tasks.lines)


class Known:
    """What is known of each model on each row. It tells how far the run is: an answer is what takes time."""

    def __init__(self, run: RunDir, report: Report, total: int):
        self.file, self.report, self.total = run.report / "answers.jsonl", report, total
        self.lines: dict[tuple[str, int], dict[str, Any]] = {}
        self.done = 0
        for line in read_lines(self.file):
            self._take(line)
        self._tell()

    def add(self, *lines: dict[str, Any]) -> None:
        append_lines(self.file, lines)
        for line in lines:
            self._take(line)
        self._tell()

    def missing(self, voice: str, asked: list[Any], what: str) -> list[Any]:
        """The rows of which this is not known yet."""
        return [one for one in asked if what not in self.lines.get((voice, one.row), ())]

    def _take(self, line: dict[str, Any]) -> None:
        self.lines.setdefault((line["voice"], line["row"]), {}).update(line)
        self.done += "answer" in line or "margin" in line

    def _tell(self) -> None:
        self.report("evaluating", self.done, self.total, "answers")


@dataclass(frozen=True)
class Group:
    """Whoever speaks with one model in memory."""

    model: Model
    adapters: dict[str, str]
    base: str | None  # the name of the model itself


def groups(spec: EvaluationSpec, lefts: list[Left]) -> Iterator[Group]:
    """The base with all its adapters, then the whole models one by one."""
    adapters = {one.id: str(one.folder) for one in lefts if one.adapter}
    if spec.with_base or adapters:
        yield Group(spec.model, adapters, BASE if spec.with_base else None)
    for one in lefts:
        if not one.adapter:
            yield Group(whole_of(one), {}, one.id)


def ask(spec: EvaluationSpec, lefts: list[Left], asked: list[Any], known: Known, tasks: Any) -> None:
    """Every answer, every loss and every task that is not known yet. A model that owes none is not loaded."""
    from engine.worker.evaluation.respond import Speakers

    learned = [one for one in asked if one.chat]
    for group in groups(spec, lefts):
        names = [*group.adapters, *([group.base] if group.base else [])]
        owed = [known.missing(one, asked, "answer") + known.missing(one, learned, "loss") for one in names]
        if not any(owed) and not tasks.missing(names):
            continue
        path = model_path(spec, group.model, known.report)
        speakers = Speakers.load(group.model, path, group.adapters, group.base, spec.generation.batch_size)
        for name in names if asked else ():
            for batch in speakers.losses(name, known.missing(name, learned, "loss")):
                known.add(*(
                    {"voice": name, "row": question.row, "loss": loss, "loss_tokens": tokens}
                    for question, loss, tokens in batch
                ))  # fmt: skip
            for question, told in speakers.answers(
                name, known.missing(name, asked, "answer"), spec.generation
            ):
                why = told.problem and {"code": told.problem.code, "values": _plain(told.problem.values)}
                known.add({
                    "voice": name, "row": question.row, "answer": told.text, "tokens": told.tokens, "ended": told.ended,
                    **({"problem": why} if why else {}),
                })  # fmt: skip
        for name in names:
            tasks.measure(speakers, name)
        speakers.end()


def judge(_spec: EvaluationSpec, lefts: list[Left], asked: list[Any], known: Known, _tasks: Any) -> None:
    """How far each reward model puts the better answer of a pair above the worse one."""
    from engine.worker.data.examples import Encoder
    from engine.worker.models.reward_model import load_reward_model, scores

    for one in lefts:
        owed = known.missing(one.id, asked, "margin")
        if not owed:
            continue
        model, tokenizer = load_reward_model(one.folder)
        encoder = Encoder.of(one.spec, tokenizer)
        for start in range(0, len(owed), SCORED):
            some = owed[start : start + SCORED]
            made = [example.values for example in encoder.examples([pair.chat for pair in some])]
            sound = [values for values in made if len(values[0])]
            better, worse = (
                scores(model, [[*values[0], *values[side]] for values in sound]).tolist() if sound else []
                for side in (1, 2)
            )
            told = iter(zip(better, worse, strict=True))
            for pair, values in zip(some, made, strict=True):
                good, bad = next(told) if len(values[0]) else (None, None)
                margin = None if good is None else good - bad
                known.add({
                    "voice": one.id, "row": pair.row, "chosen_score": good, "rejected_score": bad, "margin": margin,
                })  # fmt: skip
        del model


MEASURE = {"answers": ask, "pairs": judge}


def model_path(spec: EvaluationSpec, model: Model, report: Report) -> str:
    """Where the model lies, fetched first if it is a hub's."""
    if os.path.isdir(model.model_name_or_path):
        return model.model_name_or_path
    from engine.worker.models.fetch import fetch_model

    return fetch_model(as_training(spec), report)


def meets_quantized(spec: EvaluationSpec) -> bool:
    """Whether a model that is measured may have quantized weights."""
    lefts = [one for folder in spec.results if (one := left(folder))]
    return any(map(quantized, [spec.model, *map(base_of, lefts), *map(whole_of, lefts)]))


def _plain(values: Any) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


if __name__ == "__main__":
    with edge(sys.argv[1]) as here:
        leave_out_unused(meets_quantized(read(here.spec.read_text(encoding="utf-8"))))
        evaluate(here)
