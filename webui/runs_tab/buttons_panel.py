"""Actions on the open run: the buttons, and the confirmations."""

from __future__ import annotations

from functools import partial
from html import escape
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.runs.notify import choice_of
from engine.runs.remedies import remedy
from engine.runs.results import possible_next_stages, result_of
from engine.runs.run import Run, sweep_of
from webui import notices
from webui.events import QUIET
from webui.panels import Updates
from webui.people import hindrance
from webui.runs_tab.panel import CurveView, Panel


class ButtonsPanel(Panel):
    """Buttons that change the run are handled by `RunActions`; the others lead to another tab."""

    def layout(self) -> None:
        with gr.Row(elem_classes="buttons actions"):
            self._layout_of_buttons()
        self.rights = gr.HTML(elem_id="run-rights")
        self.sure_kill, self.yes_kill, self.no_kill = self._question("sure-kill", "yes-kill")
        self.sure_delete, self.yes_delete, self.no_delete = self._question("sure-delete", "yes-delete")

    def _layout_of_buttons(self) -> None:
        words, button = self.words, partial(gr.Button, size="sm")
        self.stop = button(words("stop-save"), elem_id="stop", elem_classes="owned")
        self.kill = button(words("kill"), elem_id="kill", elem_classes="owned hurts")
        self.stop_sweep = button(words("sweep-stop"), elem_id="stop-sweep", visible=False, elem_classes="owned")
        self.resume = button(words("resume"), elem_id="resume", variant="primary", elem_classes="owned")
        self.resume_elsewhere = button(
            words("resume-elsewhere"), elem_id="resume-elsewhere", elem_classes="owned", visible=False
        )
        self.chat = button(words("chat-with"), elem_id="chat-with", variant="primary", visible=False)
        self.export = button(words("export-it"), elem_id="export-it", visible=False)
        self.evaluate = button(words("evaluate-it"), elem_id="evaluate-it", visible=False)
        self.follow = gr.Dropdown(
            [],
            value=None,
            show_label=False,
            container=False,
            visible=False,
            elem_id="follow",
            scale=0,
            min_width=190,
            interactive=True,
            label=words("follow"),
        )
        self.clone_changed = button("", elem_id="clone-changed", variant="primary", visible=False)
        self.clone = button(words("clone"), elem_id="clone")
        self.compare = button(words("compare"), elem_id="compare")
        self.mute = button(words("mute"), elem_id="mute", visible=False, elem_classes="owned")
        self.unmute = button(words("unmute"), elem_id="unmute", visible=False, elem_classes="owned")
        self.delete = button(words("delete"), elem_id="delete", elem_classes="owned hurts")

    def _question(self, question: str, confirm: str) -> tuple[gr.Row, gr.Button, gr.Button]:
        """A confirmation: the row, and its buttons for yes and no, by the codes of their labels."""
        words = self.words
        with gr.Row(visible=False, elem_classes="sure") as row:
            gr.HTML(f"<p>{escape(words(question))}</p>")
            yes = gr.Button(words(confirm), variant="stop", size="sm", elem_id=confirm, scale=0)
            no = gr.Button(words("cancel"), size="sm", scale=0)
        return row, yes, no

    def wire(self) -> None:
        for button, row in ((self.kill, self.sure_kill), (self.delete, self.sure_delete)):
            button.click(lambda: gr.update(visible=True), None, row, **QUIET)
        for button, row in ((self.no_kill, self.sure_kill), (self.no_delete, self.sure_delete)):
            button.click(lambda: gr.update(visible=False), None, row, **QUIET)

    @property
    def moving(self) -> list[Block]:
        return [
            self.stop,
            self.kill,
            self.stop_sweep,
            self.resume,
            self.clone_changed,
            self.clone,
            self.mute,
            self.unmute,
            self.delete,
            self.chat,
            self.export,
            self.evaluate,
            self.follow,
        ]

    @property
    def still(self) -> list[Block]:
        return [self.sure_kill, self.sure_delete, self.compare, self.rights]

    def now(self, run: Run, view: CurveView) -> Updates:
        can, left = run.can, gr.update(visible=result_of(run) is not None)
        return {
            self.stop: gr.update(visible="stop" in can),
            self.kill: gr.update(visible="kill" in can),
            self.stop_sweep: gr.update(visible=not run.final and bool(sweep_of(run))),
            self.resume: gr.update(visible="resume" in can),
            self.clone_changed: self._changed_clone(run),
            self.clone: gr.update(visible="clone" in can and run.kind == "training"),
            self.mute: gr.update(visible=not run.final and choice_of(run).on),
            self.unmute: gr.update(visible=not run.final and not choice_of(run).on),
            self.delete: gr.update(visible="delete" in can),
            self.chat: gr.update(visible=can_chat(run)),
            self.export: left,
            self.evaluate: left,
            self.follow: self._next_stages(run),
        }

    def gone(self, run_id: str) -> Updates:
        parts = [*self.moving, self.compare, self.rights]
        return self.without_questions() | dict.fromkeys(parts, gr.update(visible=False))

    def opened(self, run: Run) -> Updates:
        rights = notices.denied(hindrance("stop", run.by), ".one-run .owned", self.words)
        return self.without_questions() | {
            self.compare: gr.update(visible=True, value=self.words("sweep-compare" if sweep_of(run) else "compare")),
            self.rights: gr.update(value=rights, visible=bool(rights)),
        }

    def without_questions(self) -> Updates:
        return dict.fromkeys([self.sure_kill, self.sure_delete], gr.update(visible=False))

    def _changed_clone(self, run: Run) -> dict[str, Any]:
        """The changes with which a failed run would probably have worked."""
        changed = remedy(run)
        if changed is None:
            return gr.update(visible=False)
        changes = notices.changes(run.spec, changed, self.words)
        return gr.update(value=self.words("clone-changed", changes=changes), visible=True)

    def _next_stages(self, run: Run) -> dict[str, Any]:
        """The stages that can continue from the run's result, if it has one."""
        words, stages = self.words, possible_next_stages(run)
        named = [(words("follow-with", stage=words.choice("stage", stage)), stage) for stage in stages]
        return gr.update(choices=[(words("follow"), ""), *named], value="", visible=bool(stages))


def can_chat(run: Run) -> bool:
    """Whether the run has a result that generates answers."""
    result = result_of(run)
    return result is not None and result.stage != "rm"
