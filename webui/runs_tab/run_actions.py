"""Stopping, killing, resuming and deleting the open run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from engine.core.problems import Refusal
from engine.runs import notification_choice, runs, sweeps
from engine.runs.run import Run, sweep_of
from webui import notices
from webui.events import QUIET
from webui.panels import Updates
from webui.people import acting
from webui.runs_tab.buttons_panel import ButtonsPanel
from webui.runs_tab.panel import Context, Panel
from webui.runs_tab.run_view import RunView


class RunActions(Panel):
    """Each requests one action of the engine, reports the result and shows the run in its new state."""

    def __init__(self, context: Context, buttons: ButtonsPanel, run_view: RunView):
        super().__init__(context)
        self.buttons, self.run_view = buttons, run_view

    def wire(self) -> None:
        buttons, inputs = self.buttons, [self.selected, *self.run_view.view]
        actions = {
            buttons.stop: self.stop,
            buttons.yes_kill: self.kill,
            buttons.stop_sweep: self.stop_sweep,
            buttons.resume: self.resume,
            buttons.yes_delete: self.delete,
        }
        for button, action in actions.items():
            button.click(action, inputs, self.run_view.outputs, **QUIET)
        for button, on in ((buttons.mute, False), (buttons.unmute, True)):
            done = "told-unmute" if on else "told-mute"
            self.wire_action(button, "mute", partial(notification_choice.choose, on=on), done)

    def wire_action(self, button: gr.Button, right: str, action: Callable[..., object], done: str) -> None:
        """A click on the button does `action` to the open run, with the user as `by`, if the user has the `right` to,
        and reports `done`."""

        def act(request: gr.Request, run_id: str, *view: Any) -> Updates:
            by = self.context.user(request)
            return self.act(right, lambda run: action(run, by=by), done, run_id, view)

        button.click(act, [self.selected, *self.run_view.view], self.run_view.outputs, **QUIET)

    def stop(self, request: gr.Request, run_id: str, *view: Any) -> Updates:
        by = self.context.user(request)
        return self.act("stop", lambda run: runs.stop(run, "save", by), "told-stop", run_id, view)

    def kill(self, request: gr.Request, run_id: str, *view: Any) -> Updates:
        by = self.context.user(request)
        return self.act("kill", lambda run: runs.stop(run, "kill", by), "told-kill", run_id, view)

    def stop_sweep(self, request: gr.Request, run_id: str, *view: Any) -> Updates:
        by = self.context.user(request)
        return self.act(
            "stop",
            lambda run: sweeps.stop(self.saves, sweep_of(run).get("id", ""), by),
            "told-sweep-stop",
            run_id,
            view,
        )

    def resume(self, request: gr.Request, run_id: str, *view: Any) -> Updates:
        by = self.context.user(request)
        data = self.context.workplace.data
        return self.act("resume", lambda run: runs.resume(run, by, data=data), "told-resume", run_id, view)

    def delete(self, run_id: str, *view: Any) -> Updates:
        try:
            run = runs.get(self.saves, run_id)
            with acting(self.saves, "delete", run.id, run.by):
                runs.delete(run)
        except Refusal as refusal:
            return self.run_view.open(run_id, *view) | self._refused(refusal)
        done = {self.message: notices.toast(self.words("told-delete")), self.selected: ""}
        return self.run_view.open("", *view) | done

    def act(
        self, right: str, action: Callable[[Run], object], done: str, run_id: str, view: tuple[Any, ...]
    ) -> Updates:
        """Do something to the run, report `done` or why it was refused, and show the run again. `right` is an action of
        `engine.core.rights`."""
        try:
            run = runs.get(self.saves, run_id)
            with acting(self.saves, right, run.id, run.by):
                action(run)
        except Refusal as refusal:
            return self.run_view.open(run_id, *view) | self._refused(refusal)
        return self.run_view.open(run_id, *view) | {self.message: notices.toast(self.words(done))}

    def _refused(self, refusal: Refusal) -> Updates:
        return {self.message: notices.refused(refusal.problems, self.words)}
