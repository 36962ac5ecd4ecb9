"""The choice of runs to compare, with a note on those that cannot be shown."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from engine.launch.workspace import Workplace
from engine.runs import compare
from webui.panels import Panel, Updates
from webui.pickers import picker
from webui.words import Words


class RunsPanel(Panel):
    def __init__(self, words: Words, workplace: Workplace):
        self.words, self.workplace = words, workplace

    def layout(self) -> None:
        words, most = self.words, compare.MAX_RUNS_COMPARED
        self.runs = gr.Dropdown(
            [],
            value=[],
            label=words("compare-runs"),
            info=words("compare-runs-help", most=most),
            multiselect=True,
            max_choices=most,
            interactive=True,
            elem_id="compare-runs",
            elem_classes="field",
        )
        self.note = gr.HTML(elem_id="compare-note")

    def choices(self) -> list[tuple[str, str]]:
        """Every training run as (label, id)."""
        runs = compare.training_runs(self.workplace.saves)
        return [
            (f"{name} · {run.id.split('/')[0]}", run.id)
            for run, name in zip(runs, compare.display_names(runs), strict=True)
        ]

    def refresh(self, ids: Sequence[str] | None) -> Updates:
        """Update the choices; runs that no longer exist are deselected."""
        choices = self.choices()
        there = {id for _, id in choices}
        return self._offer(choices, [id for id in ids or () if id in there])

    def choose(self, ids: Sequence[str]) -> Updates:
        """Choose these runs. A run that no longer exists is kept, so that the note can name it."""
        choices = self.choices()
        there = {id for _, id in choices}
        choices += [(id, id) for id in ids if id not in there]
        return self._offer(choices, ids)

    def _offer(self, choices: list[tuple[str, str]], ids: Sequence[str]) -> Updates:
        info = self.words("compare-runs-help", most=compare.MAX_RUNS_COMPARED)
        return {self.runs: picker(choices, ids, info, self.words)}
