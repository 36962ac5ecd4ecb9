"""Ask the judge: a score for each answer, the better of two answers in both orders, and the same for rated answers.

Each judgement is a line of `report/judgements.jsonl`, written as soon as it is known, so that a resumed run asks the
judge nothing twice. What the judge is asked is in `report/judge.json`. What follows from its judgements is left to
`engine.worker.evaluation.judgements`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.core.reasoning import without_reasoning
from engine.core.rundir import RunDir, append_lines, read_lines, read_object, write_json
from engine.data.row_images import readable
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.worker.evaluation.loaded_judge import Item, Key, LoadedJudge
from engine.worker.evaluation.metrics import answer_parts
from engine.worker.evaluation.questions import Question, load_ratings, prompt_text
from engine.worker.runtime.process_lifecycle import ProgressReport

RATINGS_FILE, JUDGEMENTS_FILE, JUDGE_FILE = "ratings.jsonl", "judgements.jsonl", "judge.json"
UNUSABLE_FILE = "unusable_ratings.json"
AT_A_TIME = 64  # judgements between two progress reports


@dataclass
class Judgements:
    """The known judgements by kind, model and row; and the answers of the evaluation that a person has rated."""

    lines: dict[Key, dict[str, Any]]
    ratings: list[Question]
    facts: Mapping[str, Any]  # what judge.json contains
    unusable: Sequence[str] = ()  # where the rated rows are that cannot be used


def judge_answers(
    run: RunDir,
    spec: EvaluationSpec,
    report: ProgressReport,
    names: Sequence[str],
    questions: Sequence[Question],
    outputs: Mapping[tuple[str, int], Mapping[str, Any]],
) -> Judgements | None:
    """Every judgement that is not known yet; the judge is loaded only if there is one. `questions` are the rows that
    every model has answered. None without a judge."""
    if not spec.judge.model.strip():
        return None
    files = run.report / RATINGS_FILE, run.report / UNUSABLE_FILE
    ratings, unusable = load_ratings(spec, *files) if spec.judge.ratings else ([], [])
    items = [*_answers(spec, names, questions, outputs), *_rated(ratings)]
    file = run.report / JUDGEMENTS_FILE
    lines = {(line["kind"], line["voice"], line["row"]): line for line in read_lines(file)}
    owed = [item for item in items if item.key not in lines]
    if owed or not (run.report / JUDGE_FILE).exists():
        report("judging", len(lines), len(items), "answers")
        with LoadedJudge.load(spec.judge, spec.generation.batch_size) as judge:
            write_json(run.report / JUDGE_FILE, judge.facts())
            for start in range(0, len(owed), AT_A_TIME):
                batch = judge.judge(owed[start : start + AT_A_TIME])
                append_lines(file, batch)
                lines |= {(line["kind"], line["voice"], line["row"]): line for line in batch}
                report("judging", len(lines), len(items), "answers")
    return Judgements(lines, ratings, read_object(run.report / JUDGE_FILE), unusable)


def _answers(
    spec: EvaluationSpec,
    names: Sequence[str],
    questions: Sequence[Question],
    outputs: Mapping[tuple[str, int], Mapping[str, Any]],
) -> Iterator[Item]:
    """The answers of all models to score, then those to compare with the first model's. Two equal answers are not
    compared: whichever is preferred depends on the order alone."""
    for kind, others in (("score", names), ("comparison", names[1:] if spec.judge.compare else ())):
        for name in others:
            for question in questions:
                ours, first = (answer_parts(outputs[model, question.row]).answer.strip() for model in (name, names[0]))
                answers = (ours,) if kind == "score" else (ours, first)
                if len(set(answers)) == len(answers):
                    reference = None if question.reference is None else without_reasoning(question.reference)
                    yield Item(kind, name, question.row, _question_text(question), reference, answers)


def _rated(ratings: Sequence[Question]) -> Iterator[Item]:
    for rating in ratings:
        sides = (rating.chosen,) if rating.up is not None else (rating.chosen, rating.rejected)
        kind = "thumb" if rating.up is not None else "preference"
        answers = tuple(without_reasoning(side).strip() for side in sides)
        yield Item(kind, "", rating.row, _question_text(rating), None, answers)


def _question_text(question: Question) -> str:
    return prompt_text(readable(question.messages))
