"""From one tab to another with the current choice: a run into the form, into a chat, an evaluation, and so on."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.export.export_spec import ExportSpec
from engine.runs import kinds, runs
from engine.runs.remedies import remedy
from engine.runs.results import next_spec
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from webui import notices, panels
from webui.events import QUIET
from webui.panels import Updates, refusal_as_message
from webui.studio.tabs import Frame, Tabs


class Transfer(panels.Panel):
    """The base of all transfers from one tab to another: handlers have the components of the other as outputs."""

    def __init__(self, frame: Frame, tabs: Tabs):
        self.frame, self.tabs = frame, tabs
        self.words, self.message = frame.words, frame.message

    def run(self, id: str) -> Run:
        """Raises Refusal if there is none with the id."""
        return runs.get(self.frame.workplace.saves, id)

    def showing(self, tab: str) -> Updates:
        return {self.tabs.tabs: gr.Tabs(selected=tab)}

    def into(self, outputs: list[Block]) -> list[Block]:
        """The components that change when the tab with these components is shown."""
        return [self.message, self.tabs.tabs, *outputs]


class IntoForm(Transfer):
    """Into the form of the Train tab."""

    def wire(self) -> None:
        tabs, selected = self.tabs, self.frame.selected
        train, outputs = tabs.train, self.into(tabs.train.filled)
        tabs.runs.clone.click(self.clone, selected, outputs, **QUIET)
        tabs.runs.clone_changed.click(self.clone_changed, selected, outputs, **QUIET)
        # A spec may contain names created since the lists were last refreshed.
        tabs.runs.follow.input(train.list_choices, None, train.lists, **QUIET).then(
            self.follow, [selected, tabs.runs.follow], outputs, **QUIET
        )
        tabs.data.use.click(train.list_choices, None, train.lists, **QUIET).then(
            self.use_set, [tabs.data.chosen, *train.inputs], outputs, **QUIET
        )
        tabs.export.exports.select(self.use_export, train.inputs, outputs, **QUIET)

    @refusal_as_message
    def clone(self, run_id: str) -> Updates:
        run = self.run(run_id)
        return self._filled(run.spec, self.words("cloned", run=run.title))

    @refusal_as_message
    def clone_changed(self, run_id: str) -> Updates:
        """A failed run with the change that would probably have helped."""
        run = self.run(run_id)
        changed = remedy(run)
        if changed is None:  # for example resumed meanwhile
            return self.clone(run_id)
        changes = notices.changes(run.spec, changed, self.words)
        return self._filled(changed, self.words("cloned-changed", run=run.title, changes=changes))

    @refusal_as_message
    def follow(self, run_id: str, stage: str) -> Updates:
        """A run of another stage that continues from the open one."""
        if not stage:
            return gr.skip()
        run = self.run(run_id)
        spec = next_spec(run, stage, self.frame.workplace)
        return self._filled(spec, self.words("followed", run=run.title))

    @refusal_as_message
    def use_set(self, chosen: str, *held: Any) -> Updates:
        """The open data set in place of those in the form."""
        spec = self.tabs.data.use_in(chosen, self.tabs.train.read(held))
        return self._filled(spec, self.words("set-used", name=next(iter(spec.data.datasets))))

    @refusal_as_message
    def use_export(self, event: gr.EventData, *held: Any) -> Updates:
        """An export in place of the model in the form."""
        id = event._data.get("run")
        if not id:  # a click on something else
            return gr.skip()
        spec = self.tabs.export.use(str(id), self.tabs.train.read(held))
        return self._filled(spec, self.words("export-used", name=self.run(str(id)).title))

    def _filled(self, spec: RunSpec, message: str) -> Updates:
        answer = {self.message: notices.toast(message)}
        return answer | self.showing("train") | self.tabs.train.fill(spec)


class FromRun(Transfer):
    """From the open run to the tabs that do something with it."""

    def wire(self) -> None:
        tabs, selected = self.tabs, self.frame.selected
        tabs.runs.chat.click(self.chat, [selected, *tabs.chat.inputs], self.into(tabs.chat.outputs), **QUIET)
        tabs.runs.compare.click(self.compare, selected, self.into(tabs.compare.chosen), **QUIET)
        tabs.runs.export.click(self.export, [selected, *tabs.export.inputs], [tabs.tabs, *tabs.export.outputs], **QUIET)
        tabs.runs.evaluate.click(
            self.evaluate, [selected, *tabs.evaluate.inputs], self.into(tabs.evaluate.outputs), **QUIET
        )

    @refusal_as_message
    def chat(
        self, request: gr.Request, run_id: str, kept: Any, earlier: Any, _base: Any, _adapters: Any, engine: str
    ) -> Updates:
        """The Chat tab with the run and its base chosen."""
        base, adapters = self.tabs.chat.pick(self.run(run_id))
        return self.showing("chat") | self.tabs.chat.arrive(request, kept, earlier, base, adapters, engine)

    @refusal_as_message
    def compare(self, run_id: str) -> Updates:
        """The Compare tab with the run and those like it chosen."""
        return self.showing("compare") | self.tabs.compare.siblings(self.run(run_id))

    def export(self, run_id: str, _chosen: Any, *held: Any) -> Updates:
        """The Export tab with the run chosen."""
        return self.showing("export") | self.tabs.export.arrive([run_id], *held)

    @refusal_as_message
    def evaluate(self, run_id: str, id: str, _base: Any, _results: Any, *rest: Any) -> Updates:
        """The Evaluate tab with the run and its base chosen."""
        base, results = self.tabs.evaluate.pick(self.run(run_id))
        return self.showing("evaluate") | self.tabs.evaluate.arrive("", id, base, results, *rest)


class FromLoaded(Transfer):
    """From an evaluation or an export that was loaded on the Train tab to the form of its own tab."""

    def wire(self) -> None:
        tabs = self.tabs
        outputs = [tabs.tabs, *tabs.evaluate.form, *tabs.export.filled]
        tabs.train.other.change(self.open, tabs.train.other, outputs, **QUIET)

    def open(self, text: str) -> Updates:
        spec = kinds.read(text) if text else None
        if isinstance(spec, EvaluationSpec):
            return self.showing("evaluate") | self.tabs.evaluate.fill(spec)
        if isinstance(spec, ExportSpec) and (filled := self.tabs.export.fill(spec)):
            return self.showing("export") | filled
        return gr.skip()
