"""The sweep of the open run as HTML: how far it has come, what it has used of its budget, and its best run."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path
from urllib.parse import quote

from engine.runs import sweep_standing
from engine.runs.run import Run
from engine.runs.sweep_standing import Budget
from webui import charts, stars
from webui.numbers import short
from webui.words import Words


def line(run: Run, saves: Path, words: Words) -> str:
    """One line below the head of a run; "" if it belongs to no sweep."""
    sweep = sweep_standing.sweep_with(run, saves)
    if not sweep:
        return ""
    ended = sum(member.final for member in sweep)
    parts = [
        f"<b>{escape(words('sweep-of-run'))}</b>",
        escape(words("sweep-runs", count=len(sweep), ended=ended)),
        escape(_hours(sweep_standing.budget(saves, sweep, time.time()), words)),
        *_best(run, sweep, words),
    ]
    return f'<p class="told sweep">{" · ".join(f"<span>{part}</span>" for part in parts)}</p>'


def _hours(budget: Budget, words: Words) -> str:
    used = sweep_standing.hours_text(budget.used)
    if budget.hours is None:
        return words("sweep-hours", used=used)
    return words("sweep-hours-of", used=used, hours=f"{budget.hours:g}")


def _best(run: Run, sweep: list[Run], words: Words) -> list[str]:
    """The best run and its measure, if there is one among several."""
    best = sweep_standing.best_of(sweep) if len(sweep) > 1 else None
    reached = sweep_standing.measure(best) if best else None
    if best is None or reached is None:
        return []
    value = escape(f"{charts.title(reached.curve, words)} {short(reached.value)}")
    if best.id == run.id:
        return [f"{stars.star(words)} {escape(words('sweep-best-is-this'))}", value]
    link = f'<a href="?run={quote(best.id)}" data-run="{escape(best.id)}">{escape(best.title)}</a>'
    return [f"{escape(words('sweep-best-is'))} {link}", value]
