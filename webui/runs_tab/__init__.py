"""The Runs tab: the list of runs, and one run in full.

    table_panel     all runs, and a search             curves_panel    its curves
    head_panel      the open run and its progress      output_panel    its log, answers, settings and files
    buttons_panel   actions on it                      run_view        opening a run, in all of these
    run_actions     stop, kill, resume, delete         queue_panel     why it waits, and its turn
    resume_panel    where it continues               import_panel    trainings of another program

`run_facts` and the modules that write HTML have no components: they are functions of their arguments. A short poll
every two seconds (every ten once the run has ended) returns nothing if nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr
from gradio.blocks import Block

from engine.launch.workspace import Workplace
from webui.panels import Updates
from webui.runs_tab.buttons_panel import ButtonsPanel
from webui.runs_tab.curves_panel import CurvesPanel
from webui.runs_tab.head_panel import HeadPanel
from webui.runs_tab.import_panel import ImportPanel
from webui.runs_tab.output_panel import OutputPanel
from webui.runs_tab.panel import Context
from webui.runs_tab.queue_panel import QueuePanel
from webui.runs_tab.resume_panel import ResumePanel
from webui.runs_tab.run_actions import RunActions
from webui.runs_tab.run_view import RunView
from webui.runs_tab.table_panel import TablePanel
from webui.words import Words


@dataclass(frozen=True)
class RunsTab:
    """The parts of the tab that the rest of the page is wired to."""

    open: Callable[..., Updates]  # the run with an id, or the table; its output is `outputs`
    catch_up: Callable[..., Updates]  # the same, if that is not what is shown; otherwise only what has changed of it
    stamp: gr.Textbox  # of what is shown: input of `catch_up` after the id
    view: list[Block]  # inputs of both after these
    outputs: list[Block]
    column: gr.Column  # with the open run; an update of it opens or closes one
    timer: gr.Timer  # when the open run has to be looked at again
    timers: list[gr.Timer]
    clone: gr.Button
    clone_changed: gr.Button  # with the change that would have helped
    compare: gr.Button
    chat: gr.Button
    export: gr.Button
    evaluate: gr.Button
    follow: gr.Dropdown  # the stage that is to continue from the open run


def build(
    words: Words,
    workplace: Workplace,
    root: str,
    selected: gr.Textbox,
    message: gr.HTML,
    user: Callable[[gr.Request], str],
) -> RunsTab:
    """The tab in the current context. `selected` holds the id of the open run ("" = the table)."""
    context = Context(words, workplace, root, message, user, selected)
    table, head, buttons = TablePanel(context), HeadPanel(context), ButtonsPanel(context)
    queue, curves, output = QueuePanel(context), CurvesPanel(context), OutputPanel(context)
    resume, imports = ResumePanel(context, buttons), ImportPanel(context)
    run_view = RunView(context, table, buttons, curves, [head, queue, buttons, resume, curves, output])
    actions = RunActions(context, buttons, run_view)

    table.layout()
    with table.column:
        imports.layout()
    with run_view.layout():
        head.layout()
        queue.layout()
        buttons.layout()
        resume.layout()
        head.layout_of_findings()
        curves.layout()
        output.layout()

    for panel in (table, imports, curves, head, buttons, actions):
        panel.wire()
    queue.wire_actions(actions)
    resume.wire_actions(actions)
    return RunsTab(
        run_view.open,
        run_view.catch_up,
        run_view.stamp,
        run_view.view,
        run_view.outputs,
        run_view.column,
        run_view.timer,
        [run_view.timer, table.timer],
        buttons.clone,
        buttons.clone_changed,
        buttons.compare,
        buttons.chat,
        buttons.export,
        buttons.evaluate,
        buttons.follow,
    )
