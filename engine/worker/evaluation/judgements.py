"""What follows from a judge's judgements: the mean score and the win rate of each model, and agreement with a person.

A row counts only if every model's answer was scored. Answers that the judge could not score, and what was cut, are
counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from engine.core.rundir import RunDir, write_json
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.evaluation.judge import AGREEMENT_FILE, MIN_RATINGS, POINTS, same_judge
from engine.models.discovery import identity
from engine.worker.evaluation.agreement import preference_agreement, thumb_agreement
from engine.worker.evaluation.bootstrap import interval
from engine.worker.evaluation.judging import Judgements
from engine.worker.evaluation.metrics import Metric, mean
from engine.worker.evaluation.questions import Question

METRIC = "judge"  # the name of the score among metrics


def score_metrics(judged: Judgements, names: Sequence[str], questions: Sequence[Question]) -> dict[str, Metric]:
    """The mean score of each model, over the rows in which all have one; nothing if there is no such row."""
    scores = [[_score(judged, name, question) for name in names] for question in questions]
    complete = [None not in row for row in scores]
    if not any(complete):
        return {}
    return {
        name: mean([row[at] if whole else None for row, whole in zip(scores, complete, strict=True)])
        for at, name in enumerate(names)
    }


def _score(judged: Judgements, name: str, question: Question) -> float | None:
    return judged.lines.get(("score", name, question.row), {}).get("score")


def add_to_rows(judged: Judgements, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Put the judge's score and reason into each answer of the report's rows, and its verdict on the comparison."""
    for row in rows:
        for name, answer in row["answers"].items():
            line = judged.lines.get(("score", name, row["row"] - 1))
            if line is None:
                continue
            if line.get("score") is not None:
                answer["scores"][METRIC] = line["score"]
            answer["judgement"] = {key: line[key] for key in ("score", "reason", "cut", "problem") if key in line}
            comparison = judged.lines.get(("comparison", name, row["row"] - 1), {})
            if "verdict" in comparison:
                answer["judgement"]["verdict"] = comparison["verdict"]


def summary(
    spec: EvaluationSpec, judged: Judgements, names: Sequence[str], questions: Sequence[Question]
) -> dict[str, Any]:
    """The judge, what it could not do, and the win rate of each model against the first."""
    lines = {name: [judged.lines.get(("score", name, question.row), {}) for question in questions] for name in names}
    every = [line for own in lines.values() for line in own]
    shares = [line["share"] for line in every if "share" in line]
    unscored = {name: sum(line.get("score") is None for line in own) for name, own in lines.items()}
    used = [spec.judge.model, *([spec.model.model_name_or_path] if spec.with_base else []), *spec.results]
    return {
        **judged.facts,
        "unscored": {name: count for name, count in unscored.items() if count},
        "left_out": sum(any(_score(judged, name, question) is None for name in names) for question in questions),
        "cut": sum("cut" in line for line in judged.lines.values()),
        "images": sum(any("images" in message for message in question.messages) for question in questions),
        "share": sum(shares) / len(shares) if shares else None,
        "judges_itself": identity(used[0]) in map(identity, used[1:]),
        "comparisons": {name: _comparison(judged, names[0], name, questions) for name in names[1:]}
        if spec.judge.compare
        else {},
        "agreement": agreement(spec, judged),
    }


def _comparison(judged: Judgements, first: str, name: str, questions: Sequence[Question]) -> dict[str, Any]:
    """How often a model's answer was preferred to the first model's. A verdict that depends on the order, and two equal
    answers, count half for each."""
    lines = [judged.lines.get(("comparison", name, question.row)) for question in questions]
    verdicts = ["same" if line is None else line.get("verdict", "none") for line in lines]
    points = [POINTS.get(verdict) for verdict in verdicts]
    counts = Counter(verdicts)
    compared = counts["win"] + counts["loss"] + counts["inconsistent"]
    return {
        "against": first,
        **{verdict: counts[verdict] for verdict in (*POINTS, "none")},
        "inconsistent_share": 100 * counts["inconsistent"] / compared if compared else None,
        "rate": interval(mean(points, scale=100))._asdict() if any(point is not None for point in points) else None,
    }


def agreement(spec: EvaluationSpec, judged: Judgements) -> dict[str, Any] | None:
    """How far the judge agrees with a person's thumbs and preferences; None if there are none to compare with."""
    if not spec.judge.ratings:
        return None
    thumbs = [(judged.lines["thumb", "", rating.row], rating.up) for rating in judged.ratings if rating.up is not None]
    pairs = [judged.lines["preference", "", rating.row] for rating in judged.ratings if rating.up is None]
    scored = [(line["score"], up) for line, up in thumbs if line.get("score") is not None]
    verdicts = [line.get("verdict", "none") for line in pairs]
    chosen = [POINTS[verdict] for verdict in verdicts if verdict in POINTS]
    counts = Counter(verdicts)
    compared = counts["win"] + counts["loss"] + counts["inconsistent"]
    measured = thumb_agreement([score for score, _ in scored], [up for _, up in scored])
    preferences = preference_agreement(chosen)
    if compared:
        preferences["inconsistent_share"] = 100 * counts["inconsistent"] / compared
    return {
        "judge": same_judge(spec.judge),
        "title": judged.facts["title"],
        "sets": list(spec.judge.ratings),
        "fewest": MIN_RATINGS,
        "unusable": list(judged.unusable),
        "thumbs": measured | {"unscored": len(thumbs) - len(scored)},
        "preferences": preferences | {"unscored": len(verdicts) - len(chosen)},
    }


def write_agreement(run: RunDir, known: Mapping[str, Any] | None) -> None:
    """Keep the agreement where later evaluations with the same judge look for it."""
    if known:
        write_json(run.report / AGREEMENT_FILE, {**known, "compared": time.time()})
