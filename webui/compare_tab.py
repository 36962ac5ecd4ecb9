"""The Compare tab: the curves of several runs in one picture, their figures, and the settings that differ.

Nothing is kept here: which runs, and how one looks at them, is in the controls and in the page's address.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

import gradio as gr
import numpy as np

from engine.core.csvtext import as_csv
from engine.core.smoothing import SMOOTHING
from engine.core.stages import STAGES
from engine.launch.workspace import Workplace
from engine.runs import compare
from engine.runs.compare import ABSENT, Difference, Figure, Group
from engine.runs.progress import Series
from engine.runs.runs import Run
from webui import charts
from webui.events import QUIET
from webui.numbers import duration, human, size
from webui.words import Words

CURVES_POLL_SECONDS = 4  # between two refreshes of runs that are still going
NO_VALUE = "—"
# Also names the parameters of the address in which page.js keeps them.
REMEMBER_JS = "(...held) => athanorCompare(held)"

Row = tuple[str, Sequence[tuple[str, str]]]  # label, and (HTML, CSS class) of each cell


@dataclass(frozen=True)
class CompareTab:
    """The parts of the tab that the rest of the page is wired to."""

    timer: gr.Timer
    chosen: list[Any]  # runs, curve, axis, smoothing, log scale, group
    arrive: Callable[..., list[Any]]  # answers the six into `outputs`
    outputs: list[Any]
    from_address: Callable[[str], list[Any]]  # what an address says, into `chosen`
    siblings: Callable[[Run], list[Any]]  # a run and those like it, into `chosen`


@dataclass(frozen=True)
class View:
    """How one looks at the runs."""

    metric: str = ""
    x: str = "step"
    smoothing: float = SMOOTHING
    log: bool = False
    by: str = ""


def build(words: Words, workplace: Workplace, root: str) -> CompareTab:
    """The tab in the current context."""
    saves = workplace.saves
    timer, stamp = (
        gr.Timer(CURVES_POLL_SECONDS, active=False),
        gr.Textbox(elem_classes="unseen", container=False),
    )
    picked = gr.Dropdown(
        [], value=[], label=words("compare-runs"), info=words("compare-runs-help", most=compare.MAX_RUNS_COMPARED),
        multiselect=True, max_choices=compare.MAX_RUNS_COMPARED, interactive=True, elem_id="compare-runs", elem_classes="field",
    )  # fmt: skip
    note = gr.HTML(elem_id="compare-note")
    with gr.Row(elem_classes="chart-tools", visible=False) as tools:
        metric = gr.Dropdown(
            [], value=None, label=words("compare-metric"), elem_id="compare-metric", interactive=True, min_width=220,
        )  # fmt: skip
        by = gr.Dropdown(
            [], value=None, label=words("compare-group"), elem_id="compare-by", interactive=True, min_width=180,
        )  # fmt: skip
        across = gr.Radio(
            [(words(f"x-{axis}"), axis) for axis in charts.AXES], value="step", label=words("x-axis"),
            elem_classes="field-union", elem_id="compare-x", scale=0, min_width=300,
        )  # fmt: skip
        smoothing = gr.Slider(0, 0.99, SMOOTHING, step=0.01, label=words("smoothing"), scale=0, min_width=220)
        log = gr.Checkbox(False, label=words("log-scale"), scale=0, min_width=120, elem_id="compare-log")
    chart = gr.HTML(elem_id="compare-chart")
    tables = gr.HTML(elem_id="compare-tables")

    view = [metric, across, smoothing, log, by]
    chosen = [picked, *view]
    moving = [stamp, timer, note, tools, metric, by, chart, tables]

    def draw(ids: Sequence[str] | None, *held: Any) -> list[Any]:
        """Everything about the chosen runs as it is now."""
        runs, gone = compare.select_runs(saves, ids or ())
        going = gr.Timer(active=any(not run.final for run in runs))
        if not runs:
            return [
                "", going, notes({"compare-gone": gone}, words) + empty(words), gr.update(visible=False), gr.skip(),
                gr.skip(), "", "",
            ]  # fmt: skip
        logged, titles = compare.curves(runs), compare.display_names(runs)
        specs = [compare.spec_of(run) for run in runs]
        differing = compare.differences(specs)
        known, ways = metrics(specs, logged), ways_to_group(differing, words)
        seen = view_of(held, known, ways)
        groups = compare.group_runs(runs, seen.by) if seen.by else []
        classes = [charts.run_classes(place) for place in range(len(runs))]
        if groups:
            classes = [
                charts.run_classes(number)
                for place in range(len(runs))
                for number, group in enumerate(groups)
                if place in group.places
            ]
        figure = figure_html(seen, titles, classes, logged, groups, words)
        silent = [name for name, curves in zip(titles, logged, strict=True) if seen.metric not in curves]
        unread = [name for name, spec in zip(titles, specs, strict=True) if spec is None]
        names_by_code = {
            "compare-gone": gone,
            "compare-unread": unread,
            "compare-without": silent if known else [],
        }
        link = address(runs, seen.metric, root) if known else ""
        return [
            compare.stamp(runs), going, notes(names_by_code, words), gr.update(visible=bool(known)),
            gr.update(choices=[(charts.title(name, words), name) for name in known], value=seen.metric or None),
            gr.update(choices=[(label, path) for path, label in ways.items()], value=seen.by),
            figure + save_html(link, words, picture=figure.startswith("<figure")),
            tables_html(runs, titles, classes, compare.figures(runs, logged), differing, groups, seen.by, words),
        ]  # fmt: skip

    def arrive(ids: Sequence[str] | None, *held: Any) -> list[Any]:
        """The list of runs as it is now, and the chosen ones beside each other."""
        known = choices()
        here = {id for _, id in known}
        kept = [id for id in ids or () if id in here]
        return [gr.update(choices=known, value=kept), *draw(ids, *held)]

    def tick(known: str, ids: Sequence[str] | None, *held: Any) -> list[Any]:
        """What has changed since `known`; nothing if nothing has."""
        try:
            runs, _ = compare.select_runs(saves, ids or ())
            return [gr.skip()] * len(moving) if compare.stamp(runs) == known else draw(ids, *held)
        except FileNotFoundError:  # a file went away while it was looked at; the next look sees what is left
            return [gr.skip()] * len(moving)

    def choices() -> list[tuple[str, str]]:
        runs = compare.training_runs(saves)
        return [
            (f"{name} · {run.id.split('/')[0]}", run.id)
            for run, name in zip(runs, compare.display_names(runs), strict=True)
        ]

    def into(ids: Sequence[str], seen: View) -> list[Any]:
        known = choices()
        here = {id for _, id in known}
        # A run that is gone stays among the choices, so that the tab can say that it is gone.
        known += [(id, id) for id in ids if id not in here]
        alone = [
            gr.update(choices=[(choice, choice)], value=choice) if choice else gr.skip()
            for choice in (seen.metric, seen.by)
        ]
        return [
            gr.update(choices=known, value=list(ids)),
            alone[0],
            seen.x,
            seen.smoothing,
            seen.log,
            alone[1],
        ]

    def from_address(query: str) -> list[Any]:
        parameters = parse_qs(query)
        if not parameters.get("runs"):
            return [gr.skip()] * len(chosen)
        last = {name: values[-1] for name, values in parameters.items()}
        x, smooth = last.get("x", "step"), last.get("smooth", "")
        return into(
            parameters["runs"][: compare.MAX_RUNS_COMPARED],
            View(
                last.get("curve", ""),
                x if x in charts.AXES else "step",
                smoothing_of(smooth),
                "log" in last,
                last.get("by", ""),
            ),
        )

    def siblings_of(run: Run) -> list[Any]:
        siblings = compare.siblings(run, compare.training_runs(saves))
        return into([sibling.id for sibling in siblings], View())

    gr.on(
        [picked.input, metric.input, across.input, log.input, by.input, smoothing.input], draw, chosen, moving,
        js=REMEMBER_JS, trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    timer.tick(tick, [stamp, *chosen], moving, **QUIET)
    return CompareTab(timer, chosen, arrive, [picked, *moving], from_address, siblings_of)


def smoothing_of(text: str) -> float:
    """A smoothing as an address has it; the usual one if it is none."""
    try:
        value = float(text)
    except ValueError:
        return SMOOTHING
    return min(max(value, 0.0), 0.99) if np.isfinite(value) else SMOOTHING


def view_of(held: Sequence[Any], known: Sequence[str], ways: Mapping[str, str]) -> View:
    """The controls as they can be followed: what these runs do not have is replaced by the first that they do."""
    metric, x, smoothing, log, by = held
    return View(
        metric if metric in known else next(iter(known), ""),
        x if x in charts.AXES else "step",
        smoothing_of(str(smoothing)),
        bool(log),
        by if by in ways else "",
    )


def metrics(specs: Sequence[Any], logged: Sequence[Mapping[str, Series]]) -> list[str]:
    """What can be drawn: first what the stages are about, each with its validation, then the rest by name."""
    known = {name for curves in logged for name in curves}
    stages = dict.fromkeys(spec.stage.kind for spec in specs if spec)
    first = [name for stage in stages if stage in STAGES for name in STAGES[stage].curves]
    ahead = [metric for name in (*first, *charts.COMMON_CURVES) for metric in (name, f"eval_{name}")]
    ordered = dict.fromkeys(name for name in ahead if name in known)
    return list(ordered | dict.fromkeys(sorted(known)))


def ways_to_group(differing: Sequence[Difference], words: Words) -> dict[str, str]:
    """What runs can be grouped by → what it is called: any setting that differs, or how their names begin."""
    settings = {difference.path: words.label(difference.path) for difference in differing}
    return {"": words("compare-group-none"), compare.BY_NAME: words("compare-group-name")} | settings


# ------------------------------------------------------------------------------------------ what is shown


def empty(words: Words) -> str:
    return f'<div class="empty"><b>{escape(words("compare-none"))}</b><p>{escape(words("compare-none-help"))}</p></div>'


def notes(names_by_code: Mapping[str, Sequence[str]], words: Words) -> str:
    """What cannot be shown, and of which runs."""
    return "".join(
        f'<p class="quiet">{escape(words(code, names=", ".join(names)))}</p>'
        for code, names in names_by_code.items()
        if names
    )


def figure_html(
    seen: View, titles: Sequence[str], classes: Sequence[str], logged: Sequence[Mapping[str, Series]],
    groups: Sequence[Group], words: Words,
) -> str:  # fmt: skip
    """The curves in one picture, or why there is none."""
    drawn = [
        (name, look, curves[seen.metric])
        for name, look, curves in zip(titles, classes, logged, strict=True)
        if seen.metric in curves
    ]
    legend = [
        (words.value(seen.by, group.value), charts.run_classes(number)) for number, group in enumerate(groups)
    ]
    figure = charts.overlay(seen.metric, drawn, words, seen.x, seen.smoothing, seen.log, legend)
    if figure or not drawn:
        return figure or f'<p class="quiet">{escape(words("compare-no-curves"))}</p>'
    return f'<p class="quiet">{escape(words(charts.no_curves_word([series for *_, series in drawn], seen.x)))}</p>'


def address(runs: Sequence[Run], metric: str, root: str) -> str:
    """Where the curve of these runs is downloaded from."""
    query = urlencode({"runs": [run.id for run in runs], "curve": metric}, doseq=True, quote_via=quote)
    return f"{root}/compare/curves.csv?{query}"


def save_html(link: str, words: Words, picture: bool) -> str:
    buttons = [
        f'<button type="button" class="plain" data-png="#compare-chart .chart" data-name="compare.png">{escape(words("compare-png"))}</button>'
        if picture
        else "",
        f'<a class="plain" id="compare-curves-csv" download href="{escape(link)}">{escape(words("compare-curves-csv"))}</a>'
        if link
        else "",
        f'<button type="button" class="plain" data-save="#compare-csv" data-name="compare.csv">{escape(words("compare-table-csv"))}</button>',
    ]
    return f'<div class="save-row">{"".join(buttons)}</div>'


def tables_html(
    runs: Sequence[Run], titles: Sequence[str], classes: Sequence[str], figures: Sequence[Figure],
    differing: Sequence[Difference], groups: Sequence[Group], by: str, words: Words,
) -> str:  # fmt: skip
    """Groups if there are any, figures, settings that differ; and the last two as CSV."""
    heads = [
        f'<a class="key {look}" href="?run={quote(run.id)}">{escape(name)}</a>'
        for run, look, name in zip(runs, classes, titles, strict=True)
    ]
    settings = [setting_row(difference, words) for difference in differing]
    same = f'<p class="quiet">{escape(words("compare-same" if len(runs) > 1 else "compare-one"))}</p>'
    parts = [
        section("compare-figures", table(heads, figure_rows(runs, figures, words)), words, help=True),
        section("compare-settings", table(heads, settings) if settings else same, words),
    ]
    if groups:
        heads = [
            f'<span class="key {charts.run_classes(number)}">{escape(words.value(by, group.value))}</span>'
            for number, group in enumerate(groups)
        ]
        parts.insert(
            0, section("compare-groups", table(heads, group_rows(groups, figures, words)), words, help=True)
        )
    return (
        "".join(parts)
        + f'<pre id="compare-csv" hidden>{escape(csv_text(runs, titles, figures, differing, words))}</pre>'
    )


def section(code: str, body: str, words: Words, help: bool = False) -> str:
    help_html = f'<p class="quiet">{escape(words(f"{code}-help"))}</p>' if help else ""
    return f'<section class="beside {code}"><h2>{escape(words(code))}</h2>{help_html}{body}</section>'


def table(heads: Sequence[str], rows: Sequence[Row]) -> str:
    """A row for each label, a column for each head (HTML)."""
    head = "".join(f"<th>{heading}</th>" for heading in heads)
    body = "".join(
        f"<tr><th>{escape(label)}</th>"
        + "".join(f'<td class="{role}">{text}</td>' if role else f"<td>{text}</td>" for text, role in cells)
        + "</tr>"
        for label, cells in rows
    )
    return f'<table class="compared"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


def figure_rows(runs: Sequence[Run], figures: Sequence[Figure], words: Words) -> list[Row]:
    states = [
        (f'<span class="dot {escape(run.state)}"></span>{escape(words(f"state-{run.state}"))}', "")
        for run in runs
    ]
    rows: list[Row] = [(words("compare-state"), states)]
    rows.append(
        (
            words("compare-result"),
            [(escape(words("compare-yes" if has_weights(run) else "compare-no")), "") for run in runs],
        )
    )
    for figure in figures:
        cells = [
            (
                escape(number(figure, value, words)),
                "best" if place in figure.best else "" if np.isfinite(value) else "none",
            )
            for place, value in enumerate(figure.values)
        ]
        rows.append((figure_title(figure, words), cells))
    return rows


def has_weights(run: Run) -> bool:
    """Whether the run has left weights."""
    return run.dir.result() is not None


def figure_title(figure: Figure, words: Words) -> str:
    if not figure.of:
        return words(f"figure-{figure.name}")
    return words(f"figure-{figure.of}", title=charts.title(figure.name, words))


def number(figure: Figure, value: float, words: Words) -> str:
    """A figure as people read it."""
    if not np.isfinite(value):
        return NO_VALUE
    write: Mapping[str, Callable[[float], str]] = {
        "steps": "{:,.0f}".format, "epochs": "{:.2f}".format, "tokens": human, "tokens_per_s": human,
        "duration": lambda seconds: duration(seconds, words), "peak_memory": size, "peak_device_memory": size,
    }  # fmt: skip
    return write.get(figure.name, charts.short)(value)


def group_rows(groups: Sequence[Group], figures: Sequence[Figure], words: Words) -> list[Row]:
    """How many runs each group has, and mean ± spread of each figure in it."""
    rows: list[Row] = [(words("compare-count"), [(str(len(group.places)), "") for group in groups])]
    for figure in figures:
        cells = []
        for group in groups:
            mean, spread, _ = compare.mean_and_spread(figure.values, group)
            text = number(figure, mean, words)
            cells.append((escape(f"{text} ± {number(figure, spread, words)}" if spread > 0 else text), ""))
        rows.append((figure_title(figure, words), cells))
    return rows


def setting_row(difference: Difference, words: Words) -> Row:
    """A setting and its values; folders by their last name where that tells them apart."""
    whole = [words.value(difference.path, value, brief=False) for value in difference.values]
    brief = [words.value(difference.path, value) for value in difference.values]
    shown = brief if len(set(brief)) == len(set(whole)) else whole
    cells = [
        (f'<span title="{escape(full)}">{escape(text)}</span>', "none" if value is ABSENT else "")
        for text, full, value in zip(shown, whole, difference.values, strict=True)
    ]
    return words.label(difference.path), cells


def csv_text(
    runs: Sequence[Run],
    titles: Sequence[str],
    figures: Sequence[Figure],
    differing: Sequence[Difference],
    words: Words,
) -> str:
    """The tables as CSV: a line for each figure, its numbers as they are, and one for each setting that differs."""
    rows: list[Sequence[Any]] = [("", *titles)]
    rows.append((words("compare-state"), *(words(f"state-{run.state}") for run in runs)))
    rows.append(
        (
            words("compare-result"),
            *(words("compare-yes" if has_weights(run) else "compare-no") for run in runs),
        )
    )
    rows += [(figure_title(figure, words), *figure.values) for figure in figures]
    rows += [
        (
            words.label(difference.path),
            *(words.value(difference.path, value, brief=False) for value in difference.values),
        )
        for difference in differing
    ]
    return as_csv(rows)
