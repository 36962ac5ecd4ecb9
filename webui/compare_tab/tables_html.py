"""Tables of groups, final figures and differing settings, as HTML and as CSV."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np

from engine.core.csvtext import as_csv
from engine.runs import compare
from engine.runs.compare import ABSENT, Difference, Figure
from engine.runs.runs import Run
from webui import charts, stars
from webui.compare_tab.comparison import Comparison
from webui.numbers import duration, human, short, size
from webui.words import Words

NO_VALUE = "—"

Row = tuple[str, Sequence[tuple[str, str]]]  # label, and (HTML, CSS class) of each cell


def tables(comparison: Comparison, words: Words) -> str:
    """All tables, followed by a hidden element with figures and settings as CSV for the download button."""
    heads = [
        f'<a class="key {classes}" href="?run={quote(run.id)}">'
        + (f"<span>{escape(title)} {stars.star(words)}</span>" if run.id in comparison.best else escape(title))
        + "</a>"
        for run, classes, title in zip(comparison.runs, comparison.classes, comparison.titles, strict=True)
    ]
    figures = _table(heads, _figure_rows(comparison, words))
    return (
        _groups_section(comparison, words)
        + _section("compare-figures", figures, words, help=True)
        + _section("compare-settings", _settings(comparison, heads, words), words)
        + f'<pre id="compare-csv" hidden>{escape(_csv_text(comparison, words))}</pre>'
    )


def _section(code: str, body: str, words: Words, help: bool = False) -> str:
    help_html = f'<p class="quiet">{escape(words(f"{code}-help"))}</p>' if help else ""
    return f'<section class="beside {code}"><h2>{escape(words(code))}</h2>{help_html}{body}</section>'


def _table(heads: Sequence[str], rows: Sequence[Row]) -> str:
    """A table with one row per label and one column per head; heads and cells are HTML."""
    head = "".join(f"<th>{heading}</th>" for heading in heads)
    body = "".join(
        f"<tr><th>{escape(label)}</th>"
        + "".join(f'<td class="{role}">{text}</td>' if role else f"<td>{text}</td>" for text, role in cells)
        + "</tr>"
        for label, cells in rows
    )
    return f'<table class="compared"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


# ---- final figures


def _figure_rows(comparison: Comparison, words: Words) -> list[Row]:
    states = [
        (f'<span class="dot {escape(run.state)}"></span>{escape(words(f"state-{run.state}"))}', "")
        for run in comparison.runs
    ]
    weights = [(escape(_has_weights(run, words)), "") for run in comparison.runs]
    rows: list[Row] = [(words("compare-state"), states), (words("compare-result"), weights)]
    for figure in comparison.figures:
        cells = [
            (escape(_number(figure, value, words)), _figure_class(figure, place))
            for place, value in enumerate(figure.values)
        ]
        rows.append((_figure_title(figure, words), cells))
    return rows


def _figure_class(figure: Figure, place: int) -> str:
    if place in figure.best:
        return "best"
    return "" if np.isfinite(figure.values[place]) else "none"


def _has_weights(run: Run, words: Words) -> str:
    """Whether the run has left weights."""
    return words("compare-no" if run.dir.result() is None else "compare-yes")


def _figure_title(figure: Figure, words: Words) -> str:
    if not figure.of:
        return words(f"figure-{figure.name}")
    return words(f"figure-{figure.of}", title=charts.title(figure.name, words))


def _number(figure: Figure, value: float, words: Words) -> str:
    """A figure with its unit, for people to read."""
    if not np.isfinite(value):
        return NO_VALUE
    write: Mapping[str, Callable[[float], str]] = {
        "steps": "{:,.0f}".format,
        "epochs": "{:.2f}".format,
        "tokens": human,
        "tokens_per_s": human,
        "duration": lambda seconds: duration(seconds, words),
        "peak_memory": size,
        "peak_device_memory": size,
    }
    return write.get(figure.name, short)(value)


# ---- groups


def _groups_section(comparison: Comparison, words: Words) -> str:
    """The number of runs in each group, and the mean ± standard deviation of each figure; "" without groups."""
    groups, by = comparison.groups, comparison.view.by
    if not groups:
        return ""
    heads = [
        f'<span class="key {charts.run_classes(number)}">{escape(words.value(by, group.value))}</span>'
        for number, group in enumerate(groups)
    ]
    rows: list[Row] = [(words("compare-count"), [(str(len(group.places)), "") for group in groups])]
    for figure in comparison.figures:
        cells, best = [], compare.best_groups(figure, groups)
        for place, group in enumerate(groups):
            mean, deviation, _ = compare.mean_and_spread(figure.values, group)
            text = _number(figure, mean, words)
            if deviation > 0:
                text += f" ± {_number(figure, deviation, words)}"
            cells.append((escape(text), "best" if place in best else ""))
        rows.append((_figure_title(figure, words), cells))
    return _section("compare-groups", _table(heads, rows), words, help=True)


# ---- differing settings


def _settings(comparison: Comparison, heads: Sequence[str], words: Words) -> str:
    rows = [_setting_row(difference, words) for difference in comparison.differences]
    if rows:
        return _table(heads, rows)
    code = "compare-same" if len(comparison.runs) > 1 else "compare-one"
    return f'<p class="quiet">{escape(words(code))}</p>'


def _setting_row(difference: Difference, words: Words) -> Row:
    """A setting and its values; paths are shortened to their last part if that keeps them distinct."""
    whole = [words.value(difference.path, value, brief=False) for value in difference.values]
    brief = [words.value(difference.path, value) for value in difference.values]
    shown = brief if len(set(brief)) == len(set(whole)) else whole
    cells = [
        (f'<span title="{escape(full)}">{escape(text)}</span>', "none" if value is ABSENT else "")
        for text, full, value in zip(shown, whole, difference.values, strict=True)
    ]
    return words.label(difference.path), cells


# ---- CSV


def _csv_text(comparison: Comparison, words: Words) -> str:
    """One line per figure, with unrounded numbers, and one per setting that differs."""
    runs = comparison.runs
    rows: list[Sequence[Any]] = [
        ("", *comparison.titles),
        (words("compare-state"), *(words(f"state-{run.state}") for run in runs)),
        (words("compare-result"), *(_has_weights(run, words) for run in runs)),
    ]
    rows += [(_figure_title(figure, words), *figure.values) for figure in comparison.figures]
    for difference in comparison.differences:
        values = (words.value(difference.path, value, brief=False) for value in difference.values)
        rows.append((words.label(difference.path), *values))
    return as_csv(rows)
