"""What is shown when the page or one of its tabs is opened: the address determines it and is kept up to date."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from engine.core import hardware
from engine.data import preview_client
from webui import people
from webui.events import LATEST, QUIET
from webui.panels import Updates
from webui.studio.first_steps import known_of
from webui.studio.header import header
from webui.studio.tabs import Frame, Tabs

# The open run is in the page's address, so that a reload or a link shows the same.
ARRIVE_JS = "() => athanorArrive()"
ARRIVED_JS = "() => athanorArrived()"
# A run that is opened is shown by the browser at once: by the late answer, the reader may be at another tab. When
# gradio asks again, it sends the change again, to all that listen to it.
SELECTED_JS = """(run) => {
  if (run === window.athanorSelected) return [{ __type__: 'update' }];
  window.athanorSelected = run;
  athanorAddress(run, 'runs');
  return [{ __type__: 'update', ...(run && { selected: 'runs' }) }];
}"""
RUNS_JS = "(run, ...rest) => { athanorAddress(run, 'runs'); return [run, ...rest]; }"
TRAIN_JS = "() => { athanorAddress('', 'train'); return []; }"
CHAT_JS = "(...held) => { athanorAddress('', 'chat'); return held; }"
COMPARE_JS = "(...held) => { athanorAddress('', 'compare'); return athanorCompare(held); }"
EXPORT_JS = "(...held) => { athanorAddress('', 'export'); return held; }"
EVALUATE_JS = "(...held) => { athanorAddress('', 'evaluate'); athanorReport(held[1]); return held; }"
PAUSE_JS = "() => Array(%d).fill({ __type__: 'update', active: false })"
DATA_JS = "(set) => { athanorAddress('', 'data'); return [set]; }"
FIRST_SET_JS = "(set, first) => [set || first]"


class Navigation:
    """Each tab is filled when it is shown, and the timers of the others pause."""

    def __init__(self, frame: Frame, tabs: Tabs):
        self.frame, self.tabs = frame, tabs

    def wire(self, blocks: gr.Blocks) -> None:
        self._wire_arrival(blocks)
        if hardware.may_have_gpus():
            gpus = self.tabs.gpus["train"]
            blocks.load(gpus.now, None, gpus.shown, **QUIET)
        self._wire_timers()
        self._wire_tabs()

    def _wire_arrival(self, blocks: gr.Blocks) -> None:
        frame, tabs = self.frame, self.tabs
        train = tabs.train
        outputs = [
            frame.head,
            frame.selected,
            tabs.data.chosen,
            tabs.evaluate.opened,
            *train.begins,
            *tabs.compare.chosen,
            tabs.tabs,
        ]
        loaded = blocks.load(train.list_choices, None, train.lists, **QUIET)
        arrived = loaded.then(self.arrive, [*frame.address, frame.form], outputs, js=ARRIVE_JS, **QUIET)
        for ended in (loaded.failure, arrived.then, arrived.failure):
            ended(None, js=ARRIVED_JS, **QUIET)

    def _wire_tabs(self) -> None:
        frame, tabs, items = self.frame, self.tabs, self.tabs.items
        run = [frame.selected, *tabs.runs.view]
        followed = [frame.selected, tabs.runs.stamp, *tabs.runs.view]
        frame.selected.change(None, frame.selected, tabs.tabs, js=SELECTED_JS, **QUIET)
        # One event: the late answer of a refresh would show the run that was open before.
        gr.on(
            [frame.selected.change, tabs.runs.timer.tick],
            tabs.runs.catch_up,
            followed,
            tabs.runs.outputs,
            **LATEST,
        )
        items["train"].select(tabs.train.list_choices, None, tabs.train.lists, js=TRAIN_JS, **QUIET)
        items["runs"].select(tabs.runs.open, run, tabs.runs.outputs, js=RUNS_JS, **QUIET)
        shown = items["data"].select(self.open_data, tabs.data.chosen, tabs.data.listed, js=DATA_JS, **QUIET)
        shown.then(None, [tabs.data.chosen, tabs.data.first], tabs.data.chosen, js=FIRST_SET_JS, **QUIET)
        items["compare"].select(tabs.compare.arrive, tabs.compare.chosen, tabs.compare.outputs, js=COMPARE_JS, **QUIET)
        items["chat"].select(tabs.chat.arrive, tabs.chat.inputs, tabs.chat.outputs, js=CHAT_JS, **QUIET)
        evaluate, export = tabs.evaluate, tabs.export
        held = [frame.selected, *evaluate.inputs]
        items["evaluate"].select(evaluate.arrive, held, evaluate.outputs, js=EVALUATE_JS, **QUIET)
        held = [frame.selected, *export.inputs]
        items["export"].select(self.open_export, held, export.outputs, js=EXPORT_JS, **QUIET)
        for id, panel in tabs.gpus.items():
            items[id].select(panel.open, None, panel.outputs, **QUIET)

    def _wire_timers(self) -> None:
        """Only what is visible is refreshed."""
        tabs = self.tabs
        timers = {id: [getattr(tabs, id).timer] for id in ("chat", "compare", "export", "evaluate")}
        timers["runs"] = tabs.runs.timers
        timers |= {id: [panel.timer] for id, panel in tabs.gpus.items()}
        for id, item in tabs.items.items():
            others = [timer for other, own in timers.items() if other != id for timer in own]
            # In the browser alone, and before the tab is filled: a late answer would stop its own timers.
            item.select(None, None, others, js=PAUSE_JS % len(others), **QUIET)

    def arrive(
        self, request: gr.Request, run_id: str, tab: str, chosen: str, query: str, report: str, form: str
    ) -> Updates:
        """The page according to its address: the form as it was left, a run, several runs, a data set, or a
        report."""
        frame, tabs = self.frame, self.tabs
        tab = "runs" if run_id else tab
        person = people.person_of(request)
        account_pages = getattr(request.state, "account_pages", ())
        updates: Updates = {
            frame.head: header(frame.words, person, frame.root, account_pages, known_of(frame.workplace, person)),
            frame.selected: run_id,
            tabs.data.chosen: chosen,
            tabs.evaluate.opened: report,
        }
        updates |= tabs.train.begin(form) | tabs.compare.from_address(query)
        known = tab in tabs.items and tab != "train"
        return updates | ({tabs.tabs: gr.Tabs(selected=tab)} if known else {})

    def open_export(self, run_id: str, chosen: Sequence[str] | None, *held: Any) -> Updates:
        """The form begins with the open run."""
        return self.tabs.export.arrive(chosen or [run_id], *held)

    def open_data(self, chosen: str) -> Updates:
        preview_client.start_child()  # whoever comes here will want to see tokens
        return self.tabs.data.arrive(chosen)
