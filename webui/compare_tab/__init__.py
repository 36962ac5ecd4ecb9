"""The Compare tab: the curves of several runs in one picture, their final figures, and the settings that differ.

    runs_panel        which runs            view           how one looks at them, as a value
    view_panel        how one looks at them comparison     what their folders say of them
    comparison_panel  what there is to see  figure_html, tables_html

Nothing is kept here: which runs, and how one looks at them, is in the controls and in the page's address.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr
from gradio.blocks import Block

from engine.launch.workspace import Workplace
from engine.runs.runs import Run
from webui.compare_tab.comparison_panel import ComparisonPanel
from webui.compare_tab.runs_panel import RunsPanel
from webui.compare_tab.view_panel import ViewPanel
from webui.panels import Updates
from webui.words import Words

CURVES_POLL_SECONDS = 4  # between two refreshes of runs that are still going


@dataclass(frozen=True)
class CompareTab:
    """The parts of the tab that the rest of the page is wired to."""

    timer: gr.Timer
    chosen: list[
        Block
    ]  # runs, curve, axis, smoothing, log scale, group: in the order of the address in page.js
    arrive: Callable[..., Updates]  # given `chosen`, answers into `outputs`
    outputs: list[Block]
    from_address: Callable[[str], Updates]  # what an address says, into `chosen`
    siblings: Callable[[Run], Updates]  # a run and those like it, into `chosen`


def build(words: Words, workplace: Workplace, root: str) -> CompareTab:
    """The tab in the current context. `root` goes before the path of each address."""
    timer = gr.Timer(CURVES_POLL_SECONDS, active=False)
    runs, view = RunsPanel(words, workplace), ViewPanel(words)
    comparison = ComparisonPanel(words, workplace, root, timer, runs, view)
    for panel in (runs, view, comparison):
        panel.layout()
    comparison.wire()
    return CompareTab(
        timer, comparison.inputs, comparison.arrive, [runs.runs, *comparison.outputs], comparison.from_address,
        comparison.with_siblings,
    )  # fmt: skip
