"""The outcome of an import of settings, as HTML."""

from __future__ import annotations

from html import escape

from engine import importer
from engine.spec.run_spec import RunSpec
from webui import notices
from webui.words import Words


def imported(loaded: importer.Imported, words: Words) -> str:
    """What an import has left out or changed, and folded below it what was not needed; and the spec of an evaluation or
    export, as a file to be submitted."""
    needless = [problem for problem in loaded.left_out if problem not in loaded.lost]
    html = notices.listed(loaded.lost, words) if loaded.lost else ""
    if needless:
        title = escape(words("loaded-needless", count=len(needless)))
        html += f'<details class="needless"><summary>{title}</summary>{notices.listed(needless, words)}</details>'
    if not isinstance(loaded.spec, RunSpec):
        help = escape(words(f"loaded-{loaded.spec.kind}-help"))
        yaml = notices.code("imported-yaml", loaded.spec.to_yaml(brief=True), words, save=True)
        html = f'<p class="quiet">{help}</p>{yaml}{html}'
    return html
