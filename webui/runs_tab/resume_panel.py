"""Where an ended training continues, if not as before: on how many machines, with how many processes, on which GPUs."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.runs import resumption, runs
from engine.runs.runs import Run
from webui import notices
from webui.events import LATEST, QUIET
from webui.panels import Updates
from webui.runs_tab.buttons_panel import ButtonsPanel
from webui.runs_tab.panel import Context, CurveView, Panel
from webui.runs_tab.run_actions import RunActions


class ResumePanel(Panel):
    """A question that a button of `buttons` asks."""

    def __init__(self, context: Context, buttons: ButtonsPanel):
        super().__init__(context)
        self.buttons = buttons

    def layout(self) -> None:
        words = self.words
        with gr.Row(visible=False, elem_classes="elsewhere") as self.row:
            gr.HTML(f"<p>{escape(words('elsewhere-help'))}</p>")
            self.machines = gr.Dropdown(
                [], label=words("elsewhere-machines"), scale=0, min_width=130, elem_id="elsewhere-machines"
            )
            self.processes = gr.Dropdown(
                [], label=words("elsewhere-processes"), scale=0, min_width=130, elem_id="elsewhere-processes"
            )
            self.gpus = gr.Dropdown(
                [], label=words("elsewhere-gpus"), multiselect=True, scale=0, min_width=260, elem_id="elsewhere-gpus"
            )
            self.yes = gr.Button(
                words("resume"),
                variant="primary",
                size="sm",
                scale=0,
                min_width=90,
                elem_id="elsewhere-yes",
                elem_classes="owned",
            )
            self.no = gr.Button(words("cancel"), size="sm", scale=0, min_width=90)

    def wire_actions(self, actions: RunActions) -> None:
        """`actions` resume the run and show it again."""
        self.actions = actions
        shown = [self.row, self.machines, self.processes, self.gpus, self.message]
        self.buttons.resume_elsewhere.click(self.ask, self.selected, shown, **QUIET)
        numbers = [self.machines, self.processes]
        self.machines.input(self.for_machines, [self.selected, *numbers], [self.processes, self.message], **LATEST)
        self.no.click(lambda: gr.update(visible=False), None, self.row, **QUIET)
        inputs = [self.selected, *numbers, self.gpus, *actions.run_view.view]
        self.yes.click(self.resume, inputs, actions.run_view.outputs, **QUIET)

    def ask(self, run_id: str) -> Updates:
        """Show what can be chosen, with what the run has."""
        try:
            run = runs.get(self.saves, run_id)
            spec, gpus = run.spec, resumption.selectable_gpus(run)
            machines, counts = resumption.possible_machines(run), resumption.possible_processes(run)
        except Refusal as refusal:
            return {self.message: notices.refused(refusal.problems, self.words)}
        named = [(f"{gpu.index} · {gpu.name}", gpu.index) for gpu in gpus]
        there = [index for index in spec.hardware.devices if index in {gpu.index for gpu in gpus}]
        return {
            self.row: gr.update(visible=True),
            self.machines: gr.update(choices=machines, value=spec.hardware.num_machines, visible=len(machines) > 1),
            self.processes: gr.update(choices=counts, value=spec.hardware.num_processes),
            self.gpus: gr.update(choices=named, value=there, visible=bool(gpus)),
        }

    def for_machines(self, run_id: str, machines: Any, processes: Any) -> Updates:
        """Show the numbers of processes that can be divided among so many machines."""
        try:
            counts = resumption.possible_processes(runs.get(self.saves, run_id), int(machines or 1))
        except (Refusal, ValueError, TypeError) as error:
            return {self.message: notices.refused(error.problems, self.words)} if isinstance(error, Refusal) else {}
        value = processes if processes in counts else next(iter(counts), None)
        return {self.processes: gr.update(choices=counts, value=value)}

    def resume(self, request: gr.Request, run_id: str, machines: Any, processes: Any, gpus: Any, *view: Any) -> Updates:
        """Continue as chosen."""

        def act(run: Run) -> None:
            spec = resumption.moved(run, processes or None, gpus or [], machines or None)
            runs.resume(run, self.context.user(request), spec, self.context.workplace.data)

        return self.actions.act("resume", act, "told-resume", run_id, view)

    @property
    def moving(self) -> list[Block]:
        return [self.buttons.resume_elsewhere]

    @property
    def still(self) -> list[Block]:
        return [self.row]

    def now(self, run: Run, view: CurveView) -> Updates:
        return {self.buttons.resume_elsewhere: gr.update(visible="resume" in run.can and _has_choice(run))}

    def gone(self, run_id: str) -> Updates:
        return {self.buttons.resume_elsewhere: gr.update(visible=False), self.row: gr.update(visible=False)}

    def opened(self, run: Run) -> Updates:
        return {self.row: gr.update(visible=False)}


def _has_choice(run: Run) -> bool:
    """Whether there is another number of processes or machines, or another GPU, with which the run could continue."""
    if run.kind != "training":
        return False
    try:
        choices = resumption.selectable_gpus(run), resumption.possible_processes(run), resumption.possible_machines(run)
        return any(len(choice) > 1 for choice in choices)
    except Refusal:  # its spec cannot be read
        return False
