"""An evaluation, top to bottom: `python -m engine.worker.evaluate FOLDER`.

It writes to the run's report/: questions.jsonl, the sampled rows; answers.jsonl, a line for each model and row;
tasks.jsonl, a line for each task and model; and judgements.jsonl, a line for each judgement. Each line is written as
soon as it is known, so that a resumed run asks nothing twice. Finally it writes the findings of
`engine.worker.evaluation.findings`, with result.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.core.problems import Refusal, problem
from engine.core.rundir import RunDir, append_lines, read_lines
from engine.evaluation.evaluation_spec import EvaluationSpec, as_training
from engine.evaluation.judge import judge_model
from engine.evaluation.report import QUESTIONS_FILE
from engine.evaluation.trained_results import (
    TrainedResult,
    model_part_of_base,
    model_part_of_whole,
    trained_result,
)
from engine.preflight.package_checks import quantized
from engine.runs.kinds import read
from engine.spec.model_settings import Model
from engine.worker.runtime.optional_packages import hide_unused_packages
from engine.worker.runtime.process_lifecycle import ProgressReport, library_imports, run_lifecycle

BASE_NAME = "base"  # the name of the base itself
SCORE_BATCH_SIZE = 64  # pairs that a reward model scores between two progress reports


def evaluate(run: RunDir) -> None:
    """Evaluate what the run in its folder specifies, continuing after an earlier attempt."""
    report = ProgressReport(run)
    report("loading")
    with library_imports():
        from engine.worker.evaluation.findings import comparable_rows, write_findings
        from engine.worker.evaluation.harness import Tasks
        from engine.worker.evaluation.judging import judge_answers
        from engine.worker.evaluation.questions import load_questions

    spec = spec_of(run)
    results = [result for folder in spec.results if (result := trained_result(folder))]
    if len(results) < len(spec.results):
        gone = next(folder for folder in spec.results if not trained_result(folder))
        raise Refusal(problem("evaluate-no-result", "results", given=gone))
    form = "pairs" if results and all(result.is_reward_model for result in results) else "answers"
    run.report.mkdir(exist_ok=True)
    questions = load_questions(spec, run.report / QUESTIONS_FILE, form)
    log = AnswerLog(run, report, total=_answer_count(spec, len(results), len(questions), form))
    models: list[TrainedResult | str] = [*([BASE_NAME] if spec.with_base else []), *results]
    names = [model if isinstance(model, str) else model.id for model in models]
    tasks = Tasks(spec, run, report, names)
    MEASURE[form](spec, results, questions, log, tasks)
    judged = judge_answers(run, spec, report, names, comparable_rows(names, questions, log.lines), log.lines)
    report("saving")
    write_findings(run, spec, form, models, questions, log.lines, tasks.lines, judged)


def _answer_count(spec: EvaluationSpec, results: int, rows: int, form: str) -> int:
    samples = spec.generation.samples if form == "answers" else 1
    return (spec.with_base + results) * rows * samples


def spec_of(run: RunDir) -> EvaluationSpec:
    spec = read(run.spec.read_text(encoding="utf-8"))
    assert isinstance(spec, EvaluationSpec)
    return spec


class AnswerLog:
    """The known results of each model on each row, in answers.jsonl; "more" has further answers to a row, by number. It
    reports the progress of the run, counted in answers."""

    def __init__(self, run: RunDir, report: ProgressReport, total: int):
        self.file, self.report, self.total = run.report / "answers.jsonl", report, total
        self.lines: dict[tuple[str, int], dict[str, Any]] = {}
        self.done = 0
        for line in read_lines(self.file):
            self._record(line)
        self._report_progress()

    def add(self, *lines: dict[str, Any]) -> None:
        append_lines(self.file, lines)
        for line in lines:
            self._record(line)
        self._report_progress()

    def missing(self, model: str, questions: list[Any], key: str) -> list[Any]:
        """The rows for which this is not known yet."""
        return [question for question in questions if key not in self.lines.get((model, question.row), ())]

    def missing_samples(self, model: str, questions: list[Any], sample: int) -> list[Any]:
        """The rows whose further answer with this number is not known yet."""
        return [
            question
            for question in questions
            if sample not in self.lines.get((model, question.row), {}).get("more", {})
        ]

    def _record(self, line: dict[str, Any]) -> None:
        known = self.lines.setdefault((line["voice"], line["row"]), {})
        if sample := line.get("sample"):
            known.setdefault("more", {})[sample] = line
        else:
            known.update(line)
        self.done += "answer" in line or "margin" in line

    def _report_progress(self) -> None:
        self.report("evaluating", self.done, self.total, "answers")


@dataclass(frozen=True)
class ModelGroup:
    """Models that are evaluated with one base in memory."""

    model: Model
    adapters: dict[str, str]
    base: str | None  # the name of the model itself


def model_groups(spec: EvaluationSpec, results: list[TrainedResult]) -> Iterator[ModelGroup]:
    """The base with all its adapters, then the full models one by one."""
    adapters = {result.id: str(result.folder) for result in results if result.adapter}
    if spec.with_base or adapters:
        yield ModelGroup(spec.model, adapters, BASE_NAME if spec.with_base else None)
    for result in results:
        if not result.adapter:
            yield ModelGroup(model_part_of_whole(result), {}, result.id)


def answer_questions(
    spec: EvaluationSpec, results: list[TrainedResult], questions: list[Any], log: AnswerLog, tasks: Any
) -> None:
    """Every answer, every loss and every task that is not known yet. A model without open questions is not loaded."""
    with library_imports():
        from engine.worker.evaluation.respond import LoadedModels

    with_answer = [question for question in questions if question.chat]
    further = range(1, spec.generation.samples)
    for group in model_groups(spec, results):
        names = [*group.adapters, *([group.base] if group.base else [])]
        owed = [log.missing(name, questions, "answer") + log.missing(name, with_answer, "loss") for name in names]
        owed += [log.missing_samples(name, questions, sample) for name in names for sample in further]
        if not any(owed) and not tasks.missing(names):
            continue
        path = model_path(spec, group.model, log.report)
        loaded = LoadedModels.load(group.model, path, group.adapters, group.base, spec.generation.batch_size)
        for name in names if questions else ():
            for batch in loaded.losses(name, log.missing(name, with_answer, "loss")):
                log.add(
                    *(
                        {"voice": name, "row": question.row, "loss": loss, "loss_tokens": tokens}
                        for question, loss, tokens in batch
                    )
                )
            for question, reply in loaded.answers(name, log.missing(name, questions, "answer"), spec.generation):
                log.add(_answer_line(name, question, reply))
            for sample in further:
                rest = log.missing_samples(name, questions, sample)
                for question, reply in loaded.answers(name, rest, spec.generation, sample):
                    log.add({**_answer_line(name, question, reply), "sample": sample})
        for name in names:
            tasks.measure(loaded, name)
        loaded.end()


def _answer_line(name: str, question: Any, reply: Any) -> dict[str, Any]:
    """An answer as a line of answers.jsonl."""
    why = reply.problem and {"code": reply.problem.code, "values": _as_text(reply.problem.values)}
    return {
        "voice": name,
        "row": question.row,
        "answer": reply.text,
        "tokens": reply.tokens,
        "ended": reply.ended,
        **({"opened": True} if reply.opened else {}),
        **({"problem": why} if why else {}),
    }


def score_pairs(
    _spec: EvaluationSpec, results: list[TrainedResult], questions: list[Any], log: AnswerLog, _tasks: Any
) -> None:
    """How far each reward model scores the better answer of a pair above the worse one."""
    from engine.worker.data.examples import Encoder
    from engine.worker.models.reward_model import load_reward_model, score_conversations

    for result in results:
        owed = log.missing(result.id, questions, "margin")
        if not owed:
            continue
        model, tokenizer = load_reward_model(result.folder)
        encoder = Encoder.of(result.spec, tokenizer)
        for start in range(0, len(owed), SCORE_BATCH_SIZE):
            batch = owed[start : start + SCORE_BATCH_SIZE]
            encoded = [example.values for example in encoder.examples([pair.chat for pair in batch])]
            sound = [values for values in encoded if len(values[0])]
            better, worse = (
                score_conversations(model, [[*values[0], *values[side]] for values in sound]).tolist() if sound else []
                for side in (1, 2)
            )
            pair_scores = iter(zip(better, worse, strict=True))
            for pair, values in zip(batch, encoded, strict=True):
                good, bad = next(pair_scores) if len(values[0]) else (None, None)
                margin = None if good is None else good - bad
                log.add(
                    {"voice": result.id, "row": pair.row, "chosen_score": good, "rejected_score": bad, "margin": margin}
                )
        del model


MEASURE = {"answers": answer_questions, "pairs": score_pairs}


def model_path(spec: EvaluationSpec, model: Model, report: ProgressReport) -> str:
    """The path of the model, which is downloaded first if it is on a hub."""
    if os.path.isdir(model.model_name_or_path):
        return model.model_name_or_path
    from engine.worker.models.fetch import fetch_model

    return fetch_model(as_training(spec), report)


def may_use_quantized(spec: EvaluationSpec) -> bool:
    """Whether a model under evaluation, or the judge, may have quantized weights."""
    results = [result for folder in spec.results if (result := trained_result(folder))]
    judge = [judge_model(spec.judge).model] if spec.judge.model.strip() else []
    parts = [spec.model, *map(model_part_of_base, results), *map(model_part_of_whole, results), *judge]
    return any(map(quantized, parts))


def _as_text(values: Any) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


if __name__ == "__main__":
    with run_lifecycle(sys.argv[1]) as evaluation_run:
        hide_unused_packages(may_use_quantized(spec_of(evaluation_run)))
        evaluate(evaluation_run)
