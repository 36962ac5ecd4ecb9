"""The place of the open run in the queue: why it waits, and buttons that change its turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.runs import queue_order
from engine.runs.runs import Run
from webui import queue_html
from webui.events import on_chosen
from webui.panels import Updates
from webui.runs_tab.panel import Context, CurveView, Panel
from webui.runs_tab.run_actions import RunActions


class QueuePanel(Panel):
    """Visible only while the run waits."""

    def __init__(self, context: Context):
        super().__init__(context)
        self.buttons: dict[str, gr.Button] = {}

    def layout(self) -> None:
        words, button = self.words, partial(gr.Button, size="sm", scale=0)
        with gr.Column(visible=False, elem_classes="queue") as self.column:
            self.reason = gr.HTML(elem_id="queue-reason")
            with gr.Row(elem_classes="buttons"):
                for action in ("start-now", "hold", "release", *queue_order.MOVES):
                    self.buttons[action] = button(
                        words(f"queue-{action}"), elem_id=f"queue-{action}", elem_classes="owned"
                    )
                self.priority = gr.Dropdown(
                    [(words(f"priority-{name}"), name) for name in queue_order.PRIORITIES],
                    value="normal",
                    label=words("queue-priority"),
                    show_label=False,
                    container=False,
                    scale=0,
                    min_width=170,
                    elem_id="queue-priority",
                    elem_classes="owned",
                    interactive=True,
                )

    def wire_actions(self, actions: RunActions) -> None:
        """`actions` change the run and show it again."""
        functions: dict[str, Callable[..., object]] = {
            "start-now": queue_order.start_now,
            "hold": queue_order.hold,
            "release": queue_order.release,
            **{where: partial(queue_order.move, where=where) for where in queue_order.MOVES},
        }
        for action, function in functions.items():
            actions.wire_action(self.buttons[action], "reorder", function, f"told-queue-{action}")

        def set_priority(request: gr.Request, run_id: str, name: str | None, *view: Any) -> Updates:
            change = partial(queue_order.set_priority, priority=name or "", by=self.context.user(request))
            return actions.act("reorder", change, "told-queue-priority", run_id, view)

        # Only the user's own choice counts; what the page sets when it opens a run changes nothing.
        inputs = [actions.selected, self.priority, *actions.run_view.view]
        on_chosen(self.priority, set_priority, inputs, actions.run_view.outputs)

    @property
    def moving(self) -> list[Block]:
        return [self.column, self.reason, *self.buttons.values(), self.priority]

    def gone(self, run_id: str) -> Updates:
        return {self.column: gr.update(visible=False)}

    def now(self, run: Run, view: CurveView) -> Updates:
        waits, possible = run.state == "queued", queue_order.possible(run)
        held, priority = bool(run.request.get("held")), run.request.get("priority", 0)
        names = {number: name for name, number in queue_order.PRIORITIES.items()}
        return {
            self.column: gr.update(visible=waits),
            self.reason: queue_html.reason(run, self.words) if waits else "",
            **{button: gr.update(visible=action in possible) for action, button in self.buttons.items()},
            self.buttons["hold"]: gr.update(visible=not held),
            self.buttons["release"]: gr.update(visible=held),
            self.priority: gr.update(value=names.get(priority, "normal")),
        }
