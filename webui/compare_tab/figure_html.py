"""The curves of the compared runs in one picture, what cannot be shown, and what can be saved, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote, urlencode

from webui import charts
from webui.compare_tab.comparison import Comparison
from webui.words import Words


def empty(words: Words) -> str:
    """The page before any run is chosen."""
    return f'<div class="empty"><b>{escape(words("compare-none"))}</b><p>{escape(words("compare-none-help"))}</p></div>'


def notes(names_by_code: Mapping[str, Sequence[str]], words: Words) -> str:
    """What cannot be shown, and of which runs: a sentence for each word's code that has names."""
    return "".join(
        f'<p class="quiet">{escape(words(code, names=", ".join(names)))}</p>'
        for code, names in names_by_code.items()
        if names
    )


def figure(comparison: Comparison, root: str, words: Words) -> str:
    """The curves, or why there are none, and buttons that save them; `root` goes before the path of an address."""
    curves = _curves(comparison, words)
    link = _csv_address(comparison, root) if comparison.metrics else ""
    return curves + _save_row(link, words, picture=curves.startswith("<figure"))


def _curves(comparison: Comparison, words: Words) -> str:
    view, logged = comparison.view, comparison.curves
    drawn = [
        (title, classes, curves[view.metric])
        for title, classes, curves in zip(comparison.titles, comparison.classes, logged, strict=True)
        if view.metric in curves
    ]
    legend = [
        (words.value(view.by, group.value), charts.run_classes(number))
        for number, group in enumerate(comparison.groups)
    ]
    picture = charts.overlay(view.metric, drawn, words, view.x, view.smoothing, view.log, legend)
    if picture:
        return picture
    series = [series for *_, series in drawn]
    code = charts.no_curves_word(series, view.x) if series else "compare-no-curves"
    return f'<p class="quiet">{escape(words(code))}</p>'


def _csv_address(comparison: Comparison, root: str) -> str:
    """The address from which the curve of these runs is downloaded."""
    query = {"runs": [run.id for run in comparison.runs], "curve": comparison.view.metric}
    return f"{root}/compare/curves.csv?{urlencode(query, doseq=True, quote_via=quote)}"


def _save_row(link: str, words: Words, picture: bool) -> str:
    png, curves, tables = (escape(words(f"compare-{code}")) for code in ("png", "curves-csv", "table-csv"))
    buttons = [
        f'<button type="button" class="plain" data-save="#compare-csv" data-name="compare.csv">{tables}</button>'
    ]
    if link:
        buttons.insert(
            0, f'<a class="plain" id="compare-curves-csv" download href="{escape(link)}">{curves}</a>'
        )
    if picture:
        buttons.insert(
            0,
            f'<button type="button" class="plain" data-png="#compare-chart .chart" data-name="compare.png">{png}</button>',
        )
    return f'<div class="save-row">{"".join(buttons)}</div>'
