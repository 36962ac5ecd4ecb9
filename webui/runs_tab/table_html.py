"""The table of runs as HTML."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from urllib.parse import quote

from engine.runs import progress
from engine.runs.runs import Run
from webui import charts, stars
from webui.numbers import ago, moment, short
from webui.runs_tab.run_facts import kind_of, run_facts, state_html
from webui.words import Words


def table(runs: Sequence[Run], words: Words, text: str = "", best: Collection[str] = ()) -> str:
    """The runs, one per row; without any, the reason: `text` is the search text. `best`: the ids of those that are the
    best of their sweeps."""
    if not runs:
        if text.strip():
            return f'<p class="empty">{escape(words("runs-no-match", text=text.strip()))}</p>'
        return f'<div class="empty"><b>{escape(words("runs-none"))}</b><p>{escape(words("runs-none-help"))}</p></div>'
    owners = any(run.by for run in runs)
    columns = ["state", "run", "stage", "data", *(["owner"] if owners else []), "when", "last", "curve"]
    head = "".join(f'<th class="c-{column}">{escape(words(f"column-{column}"))}</th>' for column in columns)
    body = "".join(_row(run, columns, words, run.id in best) for run in runs)
    return f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _row(run: Run, columns: Sequence[str], words: Words, is_best: bool) -> str:
    facts, star = run_facts(run), f" {stars.star(words)}" if is_best else ""
    link = f'<a href="?run={quote(run.id)}">{escape(facts["title"])}</a>'
    cells = {
        "state": state_html(run, words),
        "run": f"{link}{star}<small>{escape(facts['model'])}</small>",
        "stage": escape(kind_of(run, facts, words)),
        "data": escape(facts["data"]),
        "owner": escape(run.by),
        "when": f'<time title="{moment(run.submitted)}">{escape(ago(run.submitted, words))}</time>',
        "last": _last_value(run, words),
        "curve": charts.sparkline(progress.sparkline(run)),
    }
    return (
        f'<tr data-run="{escape(run.id)}">'
        + "".join(f'<td class="c-{column}">{cells[column]}</td>' for column in columns)
        + "</tr>"
    )


def _last_value(run: Run, words: Words) -> str:
    """The newest value and the name of a run's main curve."""
    value = run.facts.headline
    if value is None:
        return ""
    return f"{short(value)}<small>{escape(words(f'brief-{progress.headline_curve(run)}'))}</small>"
