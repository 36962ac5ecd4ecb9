"""HTML of the chart, of notes on what cannot be shown, and of the download buttons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote, urlencode

from webui import charts
from webui.compare_tab.comparison import Comparison
from webui.words import Words


def empty(words: Words) -> str:
    """Shown before any run is chosen."""
    return f'<div class="empty"><b>{escape(words("compare-none"))}</b><p>{escape(words("compare-none-help"))}</p></div>'


def notes(names_by_code: Mapping[str, Sequence[str]], words: Words) -> str:
    """What cannot be shown, and for which runs: a sentence for each code in page.yaml that has run names."""
    return "".join(note(words(code, names=", ".join(names))) for code, names in names_by_code.items() if names)


def note(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


def figure(comparison: Comparison, root: str, words: Words) -> str:
    """The chart, or the reason why there is none, and the download buttons; `root` is the path prefix of the studio."""
    curves = _curves(comparison, words)
    link = _csv_address(comparison, root) if comparison.metrics else ""
    return curves + _save_row(link, words, picture="<figure" in curves)


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
    part = charts.part_of(view.zoom, view.x)
    picture = charts.overlay(view.metric, drawn, words, view.x, view.smoothing, view.log, legend, part)
    if picture:
        return charts.zoomable(picture, "compare-zoom", view.x, part, words)
    series = [series for *_, series in drawn]
    code = charts.no_curves_word(series, view.x) if series else "compare-no-curves"
    return f'<p class="quiet">{escape(words(code))}</p>'


def _csv_address(comparison: Comparison, root: str) -> str:
    """The address of the CSV file with the selected curve of these runs."""
    query = {"runs": [run.id for run in comparison.runs], "curve": comparison.view.metric}
    return f"{root}/compare/curves.csv?{urlencode(query, doseq=True, quote_via=quote)}"


def _save_row(link: str, words: Words, picture: bool) -> str:
    png, curves, tables = (escape(words(f"compare-{code}")) for code in ("png", "curves-csv", "table-csv"))
    buttons = [
        f'<button type="button" class="plain" data-save="#compare-csv" data-name="compare.csv">{tables}</button>'
    ]
    if link:
        buttons.insert(0, f'<a class="plain" id="compare-curves-csv" download href="{escape(link)}">{curves}</a>')
    if picture:
        buttons.insert(
            0,
            (
                '<button type="button" class="plain" data-png="#compare-chart .chart" data-name="compare.png">'
                f"{png}</button>"
            ),
        )
    return f'<div class="save-row">{"".join(buttons)}</div>'
