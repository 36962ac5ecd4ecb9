"""Evaluations and their reports as HTML: pure functions from what engine says to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from engine.core.problems import Problem
from engine.evaluation.harness import PACKAGE, Task
from engine.evaluation.report import Page, tasks_of
from engine.runs.runs import Run
from webui import charts, notices
from webui.numbers import ago, moment
from webui.words import Words

LONG = 400  # characters of a text that are shown before it is folded
ROW_SCORES = (
    "accuracy",
    "exact",
    "chrf",
    "bleu",
    "rougeL",
    "loss",
    "margin",
    "chosen_score",
    "rejected_score",
    "tokens",
)
PERCENT = ("accuracy", "exact", "f1", "pair_accuracy", "ended")


# ------------------------------------------------------------------------------------------- the list


def listed(found: Sequence[Run], opened: str, words: Words) -> str:
    """Every evaluation there is, newest first."""
    if not found:
        return f'<p class="quiet">{escape(words("reports-none"))}</p>'
    items = "".join(_item(run, opened, words) for run in found)
    return f'<ul class="sets">{items}</ul>'


def _item(run: Run, opened: str, words: Words) -> str:
    spec = run.spec
    facts = " · ".join(filter(None, [
        words(f"state-{run.state}"), ", ".join([*spec.data.datasets, *spec.harness.tasks]), run.by, ago(run.submitted, words),
    ]))  # fmt: skip
    on = "on" if run.id == opened else ""
    return (
        f'<li><a href="{escape(link(run.id))}" data-run="{escape(run.id)}" class="{on}">'
        f'<b><span class="dot {escape(run.state)}"></span> {escape(run.title)}</b><small>{escape(facts)}</small></a></li>'
    )


def link(id: str) -> str:
    """The address of a report."""
    return f"?tab=evaluate&report={quote(id, safe='')}"


# ------------------------------------------------------------------------------------------ the summary


def head(run: Run, progress: str, state: str, words: Words) -> str:
    """Which evaluation this is, and how far; `progress` and `state` as the Runs tab shows them."""
    spec = run.spec
    chips = "".join(
        f"<span>{escape(one)}</span>"
        for one in (*spec.data.datasets, *spec.harness.tasks, run.by, moment(run.submitted))
        if one
    )
    return (
        f'<div class="run-title"><h1>{escape(run.title)}</h1><span class="badge">{state}</span></div>{progress}'
        f'<p class="chips">{chips}<a class="quiet" href="?run={quote(run.id)}">{escape(words("report-run"))}</a></p>'
    )


def summary(found: Mapping[str, Any], words: Words) -> str:
    """The verdicts in words, then each measure of each model with its interval."""
    return (_of_rows(found, words) if found["rows"] or found["left_out"] else "") + _of_tasks(found, words)


def _of_rows(found: Mapping[str, Any], words: Words) -> str:
    voices = found["voices"]
    titles = {one["id"]: one["title"] for one in voices}
    verdicts = "".join(_verdict(titles[id], told, words) for id, told in found["differences"].items())
    heads = _heads(voices, words)
    body = "".join(_measure(name, one, found, words) for name, one in found["measures"].items())
    for one in voices:
        if sets := one.get("trained_on"):
            told = words("report-remembers", sets=words("comma").join(sets))
            verdicts += f'<p class="verdict caution"><b>{escape(one["title"])}</b> {escape(told)}</p>'
    notes = [words("report-rows", count=f"{found['rows']:,}")]
    if found["left_out"]:
        notes.append(words("report-left-out", count=f"{found['left_out']:,}"))
    few = found["rows"] < found["fewest"]
    notes.append(
        words("report-few", count=found["fewest"])
        if few
        else words("report-interval", count=f"{found['resamples']:,}")
    )
    if found["form"] == "answers" and not found["references"]:
        notes.append(words("report-no-references"))
    graphs = "".join(_histogram(titles[id], one, words) for id, one in found.get("histograms", {}).items())
    return (
        f'{verdicts}<div class="wide"><table class="report"><thead><tr><th>{escape(words("report-measure"))}</th>{heads}</tr>'
        f'</thead><tbody>{body}</tbody></table></div>{graphs}<p class="quiet">{escape(" ".join(notes))}</p>'
    )


def _heads(voices: Sequence[Mapping[str, Any]], words: Words) -> str:
    return "".join(
        f"<th>{escape(words('report-base', name=one['title']) if one['base'] else one['title'])}</th>"
        for one in voices
    )


def _of_tasks(found: Mapping[str, Any], words: Words) -> str:
    """Each measure of each task of lm-evaluation-harness, with its standard error and the difference to the base."""
    lines = tasks_of(found)
    if not lines:
        return ""
    body = "".join(_task(one, found["voices"], words) for one in lines)
    return (
        f'<div class="wide"><table class="report tasks"><thead><tr><th>{escape(words("report-task"))}</th>'
        f"{_heads(found['voices'], words)}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="quiet">{escape(words("report-tasks"))}</p>'
    )


def _task(one: Mapping[str, Any], voices: Sequence[Mapping[str, Any]], words: Words) -> str:
    help = escape(words("report-task-help", rows=f"{one['rows']:,}", shown=one["shown"]))
    cells = "".join(_of_task(one, voice["id"], words) for voice in voices)
    return f'<tr><th title="{help}">{escape(one["task"])} · {escape(one["measure"])}</th>{cells}</tr>'


def _of_task(one: Mapping[str, Any], id: str, words: Words) -> str:
    told, apart = one["values"][id], one["differences"].get(id)
    error = "" if told["stderr"] is None else f"<small>± {charts.short(told['stderr'])}</small>"
    value = "—" if told["value"] is None else charts.short(told["value"])
    said = ""
    if apart:
        within = "" if apart["stderr"] is None else f" ± {charts.short(apart['stderr'])}"
        verdict = apart["verdict"]
        said = (
            f'<em class="{escape(verdict)}">{_signed(apart["value"])}{escape(within)} '
            f"{escape(words(f'verdict-{verdict}'))}</em>"
        )
    return f"<td><b>{value}</b>{error}{said}</td>"


def tasks_there(known: Sequence[Task], folder: Path, installed: bool, words: Words) -> str:
    """What there is to know before a task can be chosen: the package, the folder, and the files that cannot be run."""
    notes = []
    if not installed:
        notes.append(words("tasks-package", package=PACKAGE))
    if not known:
        notes.append(words("tasks-none", folder=folder))
    items = "".join(
        f"<li><b>{escape(one.name)}</b> {escape(notices.sentence(one.problem, words))}</li>"
        for one in known if one.problem
    )  # fmt: skip
    told = "".join(f'<p class="quiet">{escape(one)}</p>' for one in notes)
    return told + (f'<ul class="problems">{items}</ul>' if items else "")


def _verdict(title: str, told: Mapping[str, Any], words: Words) -> str:
    """One sentence about a result and the base."""
    parts = []
    for verdict in ("better", "worse"):
        names = [words(f"measure-{name}") for name, one in told.items() if one["verdict"] == verdict]
        if names:
            parts.append(words(f"report-{verdict}", names=words("comma").join(names)))
    kind = "both" if len(parts) == 2 else "same" if not parts else "worse" if "better" not in {
        one["verdict"] for one in told.values()} else "better"  # fmt: skip
    said = words("semicolon").join(parts) if parts else words("report-same")
    return f'<p class="verdict {kind}"><b>{escape(title)}</b> {escape(said)}</p>'


def _measure(name: str, one: Mapping[str, Any], found: Mapping[str, Any], words: Words) -> str:
    values = {id: told["value"] for id, told in one["values"].items() if told["value"] is not None}
    best = None
    if len(values) > 1 and one["better"] != "neither":
        choose = max if one["better"] == "higher" else min
        top = choose(values.values())
        winners = [id for id, value in values.items() if value == top]
        best = winners[0] if len(winners) == 1 else None
    cells = "".join(_cell(name, id, told, found, words, id == best) for id, told in one["values"].items())
    help = escape(words(f"measure-{name}-help"))
    return f'<tr><th title="{help}">{escape(words(f"measure-{name}"))}</th>{cells}</tr>'


def _cell(
    name: str, id: str, told: Mapping[str, Any], found: Mapping[str, Any], words: Words, best: bool
) -> str:
    between = ""
    if told["low"] is not None:
        between = f"<small>{score(name, told['low'])} – {score(name, told['high'])}</small>"
    apart = found["differences"].get(id, {}).get(name)
    said = ""
    if apart:
        verdict = apart["verdict"]
        sign = _signed(apart["value"]) if apart["value"] is not None else ""
        title = ""
        if apart["low"] is not None:
            title = words("report-difference", low=_signed(apart["low"]), high=_signed(apart["high"]))
        said = (
            f'<em class="{escape(verdict)}" title="{escape(title)}">{escape(sign)} '
            f"{escape(words(f'verdict-{verdict}'))}</em>"
        )
    mark = f' class="best" title="{escape(words("report-best"))}"' if best else ""
    return f"<td{mark}><b>{score(name, told['value'])}</b>{between}{said}</td>"


def _signed(value: float) -> str:
    return ("-" if value < 0 else "+") + charts.short(abs(value))


def score(name: str, value: float | None) -> str:
    """A number as its measure is written: shares in percent, the rest in three or four digits."""
    if value is None:
        return "—"
    if name in PERCENT:
        return f"{value:.1f} %"
    return (
        f"{value:.1f}"
        if name in ("chrf", "bleu", "rouge1", "rouge2", "rougeL", "tokens")
        else charts.short(value)
    )


def _histogram(title: str, found: Mapping[str, Sequence[float]], words: Words) -> str:
    """How many pairs have which margin: what is left of zero is ranked wrongly."""
    counts, edges = found["counts"], found["edges"]
    top, wide, high = max(counts) or 1, 480, 120
    step = wide / len(counts)
    bars = "".join(
        f'<rect class="{"wrong" if edges[at + 1] <= 0 else "right"}" x="{at * step + 1:.1f}" y="{high - high * count / top:.1f}" '
        f'width="{step - 2:.1f}" height="{high * count / top:.1f}"><title>{edges[at]:.2g} … {edges[at + 1]:.2g}: {count}</title></rect>'
        for at, count in enumerate(counts)
    )
    labels = "".join(
        f'<text x="{x}" y="{high + 16}" text-anchor="{anchor}">{escape(text)}</text>'
        for x, anchor, text in (
            (0, "start", f"{edges[0]:.2g}"),
            (wide / 2, "middle", "0"),
            (wide, "end", f"{edges[-1]:.2g}"),
        )
    )
    return (
        f'<figure class="margins"><figcaption>{escape(words("report-margins", name=title))}</figcaption>'
        f'<svg viewBox="0 0 {wide} {high + 20}" role="img">{bars}<line x1="{wide / 2}" x2="{wide / 2}" y1="0" y2="{high}"/>{labels}'
        "</svg></figure>"
    )


# --------------------------------------------------------------------------------------------- the rows


def rows(page: Page, voices: Sequence[Mapping[str, Any]], words: Words) -> str:
    """Each row with its question, what was wanted, and what each model said."""
    if not page.total:
        return f'<p class="quiet">{escape(words("report-no-match"))}</p>'
    return f'<div class="rows report-rows">{"".join(_row(row, voices, words) for row in page.rows)}</div>'


def _row(row: Mapping[str, Any], voices: Sequence[Mapping[str, Any]], words: Words) -> str:
    place = (
        f"<header><b>{row['row']:,}</b><span>{escape(row['set'])} · {escape(row['place'])}</span></header>"
    )
    texts = [("prompt", _asked(row["messages"]))]
    texts += [(name, row[name]) for name in ("reference", "chosen", "rejected") if row.get(name)]
    said = "".join(
        f'<div class="speech {name}"><span>{escape(words(f"report-{name}"))}</span><div class="said">{_folded(text)}</div></div>'
        for name, text in texts
    )
    base = next((row["answers"].get(one["id"]) for one in voices if one["base"]), None)
    answers = "".join(
        _answer(one, row["answers"][one["id"]], base, words, judged="chosen" in row)
        for one in voices
        if one["id"] in row["answers"]
    )
    return f"<article>{place}{said}{answers}</article>"


def _asked(messages: Sequence[Mapping[str, Any]]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{one['role']}: {one['content']}" for one in messages)


def _answer(
    voice: Mapping[str, Any],
    one: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    words: Words,
    judged: bool,
) -> str:
    scores = one["scores"]
    told = [
        f"{escape(words(f'measure-{name}'))} {score(name, scores[name])}"
        for name in ROW_SCORES if scores.get(name) is not None
    ]  # fmt: skip
    if scores.get("ended") == 0:
        told.append(escape(words("answer-cut")))
    if one.get("problem"):
        text = notices.sentence(Problem(one["problem"]["code"], "", one["problem"]["values"]), words)
        body = f'<p class="wrong">{escape(text)}</p>'
    else:
        body = (
            "" if judged else _folded(one["text"]) or f'<i class="quiet">{escape(words("samples-empty"))}</i>'
        )
    changed = base is not None and not voice["base"] and base["text"] != one["text"] and not judged
    mark = f"<em>{escape(words('report-changed-mark'))}</em>" if changed else ""
    return (
        f'<div class="speech{"" if voice["base"] else " assistant"}"><span>{escape(voice["title"])}{mark}</span>'
        f'<div class="said">{body}<small>{" · ".join(told)}</small></div></div>'
    )


def _folded(text: str) -> str:
    if len(text) <= LONG:
        return escape(text)
    rest = f"<i>… {len(text) - LONG:,}</i>"
    return f"<details><summary>{escape(text[:LONG])}{rest}</summary>{escape(text[LONG:])}</details>"
