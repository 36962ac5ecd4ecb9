"""What the chosen export needs, and what prevents it, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from engine.core.problems import Problem
from engine.export import export_spec
from engine.export.export_spec import ExportSpec
from webui import notices
from webui.numbers import size
from webui.words import Words


def plan(spec: ExportSpec | None, problems: Sequence[Problem], words: Words) -> str:
    """What the chosen export needs, and what prevents it."""
    title = f"<h2>{escape(words('export-summary'))}</h2>"
    if spec is None and not problems:
        return f'{title}<p class="quiet">{escape(words("export-choose"))}</p>'
    stats = _stats(spec, words) if spec else ""
    if problems:
        count = escape(notices.counted(problems, words))
        state = (
            f'<p class="state wrong">{count}</p>'
            f"{notices.listed([_with_label(problem, words) for problem in problems], words)}"
        )
    else:
        state = f'<p class="state right">{escape(words("ready"))}</p>'
    return title + stats + state


def _stats(spec: ExportSpec, words: Words) -> str:
    """What would be exported, and the resources it takes."""
    values = {
        "export-base": Path(spec.model.model_name_or_path).name,
        "export-precision-stat": spec.precision,
        "export-disk": size(export_spec.disk_needed(spec)),
        "export-prompts-stat": str(spec.check_prompts + len(spec.prompts)),
    }
    cells = "".join(
        f"<div><dt>{escape(words(code))}</dt><dd>{escape(value)}</dd></div>" for code, value in values.items()
    )
    return f'<dl class="stats small">{cells}</dl>'


def _with_label(problem: Problem, words: Words) -> Problem:
    """The problem with its field under its label on this page, because other links lead to the form of a training."""
    name, _, inner = problem.field.partition(".")
    if name == "adapters" and inner:
        return replace(problem, field=words("export-weights"))
    label = (
        words.of_export(name, "label") if name in ExportSpec.model_fields and name not in ("model", "hardware") else ""
    )
    return replace(problem, field=label)
