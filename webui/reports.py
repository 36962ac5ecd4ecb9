"""Evaluations and their reports as HTML: pure functions from the engine's results to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from engine.core.problems import Problem
from engine.data.images import ImageSource
from engine.evaluation.harness import PACKAGE, Task
from engine.evaluation.report import Page, tasks_of
from engine.runs.runs import Run
from webui import notices
from webui.judge_html import judge_section, judgement
from webui.numbers import ago, moment, short
from webui.text_html import folded_reasoning
from webui.thumbnails import pictures
from webui.words import Words

CHARACTERS_BEFORE_FOLD = 400  # number of characters of a text before it is folded
ROW_SCORES = (
    "judge",
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
PERCENT_MEASURES = ("accuracy", "exact", "f1", "pair_accuracy", "ended")


# ------------------------------------------------------------------------------------------- the list


def listed(evaluations: Sequence[Run], opened: str, words: Words) -> str:
    """Every evaluation, newest first."""
    if not evaluations:
        return f'<p class="quiet">{escape(words("reports-none"))}</p>'
    items = "".join(_item(run, opened, words) for run in evaluations)
    return f'<ul class="sets">{items}</ul>'


def _item(run: Run, opened: str, words: Words) -> str:
    spec = run.spec
    facts = " · ".join(
        filter(
            None,
            [
                words(f"state-{run.state}"),
                ", ".join(spec.sources),
                run.by,
                ago(run.submitted, words),
            ],
        )
    )
    on = "on" if run.id == opened else ""
    return (
        f'<li><a href="{escape(link(run.id))}" data-run="{escape(run.id)}" class="{on}">'
        f'<b><span class="dot {escape(run.state)}"></span> '
        f"{escape(run.title)}</b><small>{escape(facts)}</small></a></li>"
    )


def link(id: str) -> str:
    """The address of a report."""
    return f"?tab=evaluate&report={quote(id, safe='')}"


# ------------------------------------------------------------------------------------------ the summary


def head(run: Run, progress: str, state: str, words: Words) -> str:
    """The evaluation and its progress; `progress` and `state` as on the Runs tab."""
    spec = run.spec
    chips = "".join(f"<span>{escape(chip)}</span>" for chip in (*spec.sources, run.by, moment(run.submitted)) if chip)
    return (
        f'<div class="run-title"><h1>{escape(run.title)}</h1><span class="badge">{state}</span></div>{progress}'
        f'<p class="chips">{chips}<a class="quiet" href="?run={quote(run.id)}">{escape(words("report-run"))}</a></p>'
    )


def summary(report: Mapping[str, Any], words: Words, notes: Sequence[Problem] = ()) -> str:
    """The verdicts in words, each metric of each model with its interval, then the judge with the notes on it."""
    rows_html = _rows_summary(report, words) if report["rows"] or report["left_out"] else ""
    return rows_html + _tasks_summary(report, words) + judge_section(report, notes, words)


def _rows_summary(report: Mapping[str, Any], words: Words) -> str:
    models = report["voices"]
    titles = {model["id"]: model["title"] for model in models}
    # With too few rows, there are no verdicts and no marks.
    verdicts = (
        ""
        if too_few(report)
        else "".join(_verdict(titles[id], differences, words) for id, differences in report["differences"].items())
    )
    heads = _heads(models, words)
    body = "".join(_measure_row(name, measure, report, words) for name, measure in report["measures"].items())
    for model in models:
        if sets := model.get("trained_on"):
            remark = words("report-remembers", sets=words("comma").join(sets))
            verdicts += f'<p class="verdict caution"><b>{escape(model["title"])}</b> {escape(remark)}</p>'
    notes = [words("report-rows", count=f"{report['rows']:,}")]
    if report["left_out"]:
        notes.append(words("report-left-out", count=f"{report['left_out']:,}"))
    few = too_few(report)
    notes.append(
        words("report-few", count=report["fewest"])
        if few
        else words("report-interval", count=f"{report['resamples']:,}")
    )
    for id, counts in report.get("reasoning", {}).items():
        notes.append(words("report-reasoning", name=titles[id], count=f"{counts['rows']:,}"))
        if counts["unfinished"]:
            cut = words("report-reasoning-cut", name=titles[id], count=f"{counts['unfinished']:,}")
            verdicts += f'<p class="verdict caution">{escape(cut)}</p>'
    if report["form"] == "answers" and not report["references"]:
        notes.append(words("report-no-references"))
    graphs = "".join(_histogram(titles[id], histogram, words) for id, histogram in report.get("histograms", {}).items())
    return (
        f'{verdicts}<div class="wide"><table class="report"><thead>'
        f"<tr><th>{escape(words('report-measure'))}</th>{heads}</tr>"
        f'</thead><tbody>{body}</tbody></table></div>{graphs}<p class="quiet">{escape(" ".join(notes))}</p>'
    )


def too_few(report: Mapping[str, Any]) -> bool:
    return report["rows"] < report["fewest"]


def _heads(models: Sequence[Mapping[str, Any]], words: Words) -> str:
    return "".join(
        f"<th>{escape(words('report-base', name=model['title']) if model['base'] else model['title'])}</th>"
        for model in models
    )


def _tasks_summary(report: Mapping[str, Any], words: Words) -> str:
    """Each metric of each task of lm-evaluation-harness, with its standard error and the difference from the base."""
    lines = tasks_of(report)
    if not lines:
        return ""
    body = "".join(_task_row(line, report["voices"], words) for line in lines)
    return (
        f'<div class="wide"><table class="report tasks"><thead><tr><th>{escape(words("report-task"))}</th>'
        f"{_heads(report['voices'], words)}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="quiet">{escape(words("report-tasks"))}</p>'
    )


def _task_row(line: Mapping[str, Any], models: Sequence[Mapping[str, Any]], words: Words) -> str:
    help = escape(words("report-task-help", rows=f"{line['rows']:,}", shown=line["shown"]))
    cells = "".join(_task_cell(line, model["id"], words) for model in models)
    return f'<tr><th title="{help}">{escape(line["task"])} · {escape(line["measure"])}</th>{cells}</tr>'


def _task_cell(line: Mapping[str, Any], id: str, words: Words) -> str:
    result, difference = line["values"][id], line["differences"].get(id)
    error = "" if result["stderr"] is None else f"<small>± {short(result['stderr'])}</small>"
    value = "—" if result["value"] is None else short(result["value"])
    difference_html = ""
    if difference:
        within = "" if difference["stderr"] is None else f" ± {short(difference['stderr'])}"
        verdict = difference["verdict"]
        difference_html = (
            f'<em class="{escape(verdict)}">{_signed(difference["value"])}{escape(within)} '
            f"{escape(words(f'verdict-{verdict}'))}</em>"
        )
    return f"<td><b>{value}</b>{error}{difference_html}</td>"


def task_notes(tasks: Sequence[Task], folder: Path, installed: bool, words: Words) -> str:
    """What has to be known before a task can be chosen: the package, the folder, and the files that cannot be run."""
    notes = []
    if not installed:
        notes.append(words("tasks-package", package=PACKAGE))
    if not tasks:
        notes.append(words("tasks-none", folder=folder))
    items = "".join(
        f"<li><b>{escape(task.name)}</b> {escape(notices.sentence(task.problem, words))}</li>"
        for task in tasks
        if task.problem
    )
    notes_html = "".join(f'<p class="quiet">{escape(note)}</p>' for note in notes)
    return notes_html + (f'<ul class="problems">{items}</ul>' if items else "")


def _verdict(title: str, differences: Mapping[str, Any], words: Words) -> str:
    """One sentence about a result and the base."""
    parts = []
    for verdict in ("better", "worse"):
        names = [
            words(f"measure-{name}") for name, difference in differences.items() if difference["verdict"] == verdict
        ]
        if names:
            parts.append(words(f"report-{verdict}", names=words("comma").join(names)))
    kind = (
        "both"
        if len(parts) == 2
        else "same"
        if not parts
        else "worse"
        if "better" not in {difference["verdict"] for difference in differences.values()}
        else "better"
    )
    sentence = words("semicolon").join(parts) if parts else words("report-same")
    return f'<p class="verdict {kind}"><b>{escape(title)}</b> {escape(sentence)}</p>'


def _measure_row(name: str, measure: Mapping[str, Any], report: Mapping[str, Any], words: Words) -> str:
    values = {id: result["value"] for id, result in measure["values"].items() if result["value"] is not None}
    best = None
    if len(values) > 1 and measure["better"] != "neither" and not too_few(report):
        choose = max if measure["better"] == "higher" else min
        top = choose(values.values())
        winners = [id for id, value in values.items() if value == top]
        best = winners[0] if len(winners) == 1 else None
    cells = "".join(_cell(name, id, result, report, words, id == best) for id, result in measure["values"].items())
    help = escape(words(f"measure-{name}-help"))
    return f'<tr><th title="{help}">{escape(words(f"measure-{name}"))}</th>{cells}</tr>'


def _cell(name: str, id: str, result: Mapping[str, Any], report: Mapping[str, Any], words: Words, best: bool) -> str:
    between = ""
    if result["low"] is not None:
        between = f"<small>{score(name, result['low'])} – {score(name, result['high'])}</small>"
    difference = report["differences"].get(id, {}).get(name)
    difference_html = ""
    if difference:
        verdict = difference["verdict"]
        sign = _signed(difference["value"]) if difference["value"] is not None else ""
        title = ""
        if difference["low"] is not None:
            title = words("report-difference", low=_signed(difference["low"]), high=_signed(difference["high"]))
        verdict_word = "" if too_few(report) else words(f"verdict-{verdict}")
        difference_html = (
            f'<em class="{escape(verdict)}" title="{escape(title)}">{escape(f"{sign} {verdict_word}".strip())}</em>'
        )
    mark = f' class="best" title="{escape(words("report-best"))}"' if best else ""
    return f"<td{mark}><b>{score(name, result['value'])}</b>{between}{difference_html}</td>"


def _signed(value: float) -> str:
    return ("-" if value < 0 else "+") + short(abs(value))


def score(name: str, value: float | None) -> str:
    """A number in the format of its metric: shares in percent, the rest in three or four digits."""
    if value is None:
        return "—"
    if name in PERCENT_MEASURES:
        return f"{value:.1f} %"
    return f"{value:.1f}" if name in ("chrf", "bleu", "rouge1", "rouge2", "rougeL", "tokens") else short(value)


def _histogram(title: str, histogram: Mapping[str, Sequence[float]], words: Words) -> str:
    """A histogram of margins: pairs left of zero are ranked wrongly."""
    counts, edges = histogram["counts"], histogram["edges"]
    top, wide, high = max(counts) or 1, 480, 120
    step = wide / len(counts)
    bars = "".join(
        f'<rect class="{"wrong" if edges[at + 1] <= 0 else "right"}" '
        f'x="{at * step + 1:.1f}" y="{high - high * count / top:.1f}" '
        f'width="{step - 2:.1f}" height="{high * count / top:.1f}">'
        f"<title>{edges[at]:.2g} … {edges[at + 1]:.2g}: {count}</title></rect>"
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
        f'<svg viewBox="0 0 {wide} {high + 20}" role="img">{bars}'
        f'<line x1="{wide / 2}" x2="{wide / 2}" y1="0" y2="{high}"/>{labels}'
        "</svg></figure>"
    )


# --------------------------------------------------------------------------------------------- the rows


def rows(
    page: Page,
    models: Sequence[Mapping[str, Any]],
    words: Words,
    images: Mapping[int, Sequence[ImageSource]] = MappingProxyType({}),
) -> str:
    """Each row with its question, the reference, and each model's answer; `images` are those of the questions, by the
    number of the row."""
    if not page.total:
        return f'<p class="quiet">{escape(words("report-no-match"))}</p>'
    articles = (_row(row, models, words, images.get(row["row"], ())) for row in page.rows)
    return f'<div class="rows report-rows">{"".join(articles)}</div>'


def _row(
    row: Mapping[str, Any], models: Sequence[Mapping[str, Any]], words: Words, images: Sequence[ImageSource]
) -> str:
    place = f"<header><b>{row['row']:,}</b><span>{escape(row['set'])} · {escape(row['place'])}</span></header>"
    texts = [("prompt", _question_text(row["messages"]))]
    texts += [(name, row[name]) for name in ("reference", "chosen", "rejected") if row.get(name)]
    texts_html = "".join(
        (
            f'<div class="speech {name}"><span>{escape(words(f"report-{name}"))}</span>'
            f'<div class="said">{_folded(text)}{pictures(images) if name == "prompt" else ""}</div></div>'
        )
        for name, text in texts
    )
    base = next((row["answers"].get(model["id"]) for model in models if model["base"]), None)
    answers = "".join(
        _answer(model, row["answers"][model["id"]], base, words, is_pair="chosen" in row)
        for model in models
        if model["id"] in row["answers"]
    )
    return f"<article>{place}{texts_html}{answers}</article>"


def _question_text(messages: Sequence[Mapping[str, Any]]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _answer(
    model: Mapping[str, Any],
    answer: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    words: Words,
    is_pair: bool,
) -> str:
    scores = answer["scores"]
    facts = [
        f"{escape(words(f'measure-{name}'))} {score(name, scores[name])}"
        for name in ROW_SCORES
        if scores.get(name) is not None
    ]
    if scores.get("ended") == 0:
        facts.append(escape(words("answer-cut")))
    if answer.get("problem"):
        text = notices.sentence(Problem(answer["problem"]["code"], "", answer["problem"]["values"]), words)
        body = f'<p class="wrong">{escape(text)}</p>'
    else:
        body = "" if is_pair else _folded(answer["text"]) or f'<i class="quiet">{escape(words("samples-empty"))}</i>'
        body = folded_reasoning(answer.get("reasoning", ""), words) + body
    changed = base is not None and not model["base"] and base["text"] != answer["text"] and not is_pair
    mark = f"<em>{escape(words('report-changed-mark'))}</em>" if changed else ""
    return (
        f'<div class="speech{"" if model["base"] else " assistant"}"><span>{escape(model["title"])}{mark}</span>'
        f'<div class="said">{body}{judgement(answer, words)}<small>{" · ".join(facts)}</small></div></div>'
    )


def _folded(text: str) -> str:
    if len(text) <= CHARACTERS_BEFORE_FOLD:
        return escape(text)
    rest = f"<i>… {len(text) - CHARACTERS_BEFORE_FOLD:,}</i>"
    return (
        f"<details><summary>{escape(text[:CHARACTERS_BEFORE_FOLD])}{rest}</summary>"
        f"{escape(text[CHARACTERS_BEFORE_FOLD:])}</details>"
    )
