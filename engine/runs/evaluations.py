"""The findings of an evaluation, with what earlier ones say about its judge: how far it agrees with a person."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core.problems import Problem
from engine.evaluation import judge, report
from engine.evaluation.evaluation_settings import Judge
from engine.evaluation.judge_notes import judge_notes
from engine.runs import runs
from engine.runs.queue import saves_of
from engine.runs.run import Run


def last_agreement(saves: Path, settings: Judge) -> Mapping[str, Any] | None:
    """That of the newest evaluation that compared this judge, asked in the same way; None if there is none."""
    known = (judge.agreement(run.dir, settings) for run in runs.find(saves, "evaluation"))
    return next(filter(None, known), None)


def notes_of(run: Run, summary: Mapping[str, Any]) -> list[Problem]:
    """What has to be known about the scores of the judge in a finished evaluation; none without a judge."""
    if not summary.get("judge"):
        return []
    own = summary["judge"]["agreement"]
    return judge_notes(summary, own or last_agreement(saves_of(run.path), run.spec.judge))


def findings(run: Run, language: str = "en") -> str | None:
    """The findings as text for the command line; None if it has not finished."""
    summary = report.summary(run.dir)
    if not summary:
        return None
    return report.as_text(summary, [note.text(language) for note in notes_of(run, summary)])
