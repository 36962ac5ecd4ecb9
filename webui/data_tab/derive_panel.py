"""Deriving new sets from the open one: without duplicate rows, or split in two."""

from __future__ import annotations

from functools import partial
from html import escape

import gradio as gr

from engine.core.problems import Refusal, problem
from webui.data_tab.job_panel import JobPanel
from webui.data_tab.panel import Context, Panel
from webui.data_tab.set_list import SetList
from webui.events import QUIET
from webui.panels import Updates, refusal_as_message
from webui.people import asking


class DerivePanel(Panel):
    def __init__(self, context: Context, sets: SetList, jobs: JobPanel):
        super().__init__(context)
        self.sets, self.jobs = sets, jobs

    def layout(self) -> None:
        words = self.words
        field = partial(gr.Textbox, max_lines=1, elem_classes="field", scale=0)
        button = partial(gr.Button, size="sm", scale=0, min_width=150)
        with gr.Column(elem_classes="derive"):
            gr.HTML(f"<h2>{escape(words('derive'))}</h2><p class='quiet'>{escape(words('derive-help'))}</p>")
            with gr.Row(elem_classes="tools-row"):
                self.deduplicate_button = button(words("deduplicate"), elem_id="deduplicate", elem_classes="acts")
                self.share = field("0.1", label=words("split-share"), min_width=150)
                self.seed = field("42", label=words("split-seed"), min_width=110)
                self.split_button = button(words("split-off"), elem_id="split-off", elem_classes="acts")

    def wire(self) -> None:
        for what in ("deduplicate", "split"):
            self.jobs.when_done(what, self.sets.sets_made, [self.chosen, self.sets.html])
        outputs = self.jobs.start_outputs
        self.deduplicate_button.click(self.deduplicate, self.chosen, outputs, **QUIET)
        self.split_button.click(self.split, [self.chosen, self.share, self.seed], outputs, **QUIET)

    @refusal_as_message
    def deduplicate(self, id: str) -> Updates:
        return self.jobs.start_on("derive", id, "deduplicate", by=asking().name)

    @refusal_as_message
    def split(self, id: str, share: str, seed: str) -> Updates:
        share_of_rows, number = split_settings(share, seed)
        settings = {"share": share_of_rows, "seed": number, "by": asking().name}
        return self.jobs.start_on("derive", id, "split", **settings)


def split_settings(share: str, seed: str) -> tuple[float, int]:
    """The share of the rows and the seed as numbers. Raises Refusal if the share is not a number, or the seed not an
    integer ≥ 0."""
    try:
        fraction = float(str(share).strip().replace("%", "e-2"))
    except ValueError:
        raise Refusal(problem("split-share", share=share or "—")) from None
    if not (str(seed).strip().isdecimal() and len(str(seed)) < 19):
        raise Refusal(problem("split-seed", seed=str(seed)[:40] or "—"))
    return fraction, int(seed)
