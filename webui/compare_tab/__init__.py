"""The Compare tab: curves of several runs in one chart, their final figures, and the settings in which they differ.

    runs_panel        the runs to compare           view         how they are shown, as a value
    view_panel        how they are shown            comparison   what there is to know about them
    comparison_panel  curves and tables             figure_html, tables_html

The server keeps no state: the chosen runs and the view are in the controls and in the page's address.
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

CURVES_POLL_SECONDS = 4  # how often curves are refreshed while a run is in progress


@dataclass(frozen=True)
class CompareTab:
    """The parts of the tab that the rest of the page is wired to."""

    timer: gr.Timer
    # The controls for runs, curve, axis, smoothing, log scale and group, in the order of the parameters in page.js.
    chosen: list[Block]
    arrive: Callable[..., Updates]  # takes the values of `chosen`, updates `outputs`
    outputs: list[Block]
    from_address: Callable[[str], Updates]  # sets `chosen` to what an address says
    siblings: Callable[[Run], Updates]  # sets `chosen` to a run and similar ones


def build(words: Words, workplace: Workplace, root: str) -> CompareTab:
    """The tab in the current context. `root` is the path prefix of the studio."""
    timer = gr.Timer(CURVES_POLL_SECONDS, active=False)
    runs, view = RunsPanel(words, workplace), ViewPanel(words)
    comparison = ComparisonPanel(words, workplace, root, timer, runs, view)
    for panel in (runs, view, comparison):
        panel.layout()
    comparison.wire()
    return CompareTab(
        timer,
        comparison.inputs,
        comparison.arrive,
        [runs.runs, *comparison.outputs],
        comparison.from_address,
        comparison.with_siblings,
    )
