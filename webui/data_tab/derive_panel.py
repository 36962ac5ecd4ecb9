"""Deriving new sets from the open one: without duplicate rows, or split in two."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from engine.core.problems import Refusal, problem
from engine.data import derive
from engine.data.data_jobs import DataJob
from webui.data_tab.job_panel import JobPanel
from webui.data_tab.panel import Context, Panel
from webui.data_tab.set_list import SetList
from webui.events import QUIET
from webui.panels import Updates, refusal_as_message
from webui.people import asking
from webui.words import Words

EXAMPLES = 3  # similar rows that a message names


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
                self.similarity = field("1", label=words("similarity"), min_width=110, elem_id="similarity")
                self.deduplicate_button = button(words("deduplicate"), elem_id="deduplicate", elem_classes="acts")
            gr.HTML(f"<p class='quiet'>{escape(words('similarity-help'))}</p>")
            with gr.Row(elem_classes="tools-row apart"):
                self.share = field("0.1", label=words("split-share"), min_width=150)
                self.seed = field("42", label=words("split-seed"), min_width=110)
                self.split_button = button(words("split-off"), elem_id="split-off", elem_classes="acts")

    def wire(self) -> None:
        self.jobs.when_done("split", self.sets.sets_made, [self.chosen, self.sets.html])
        self.jobs.when_done("deduplicate", self.deduplicated, [self.chosen, self.sets.html])
        outputs = self.jobs.start_outputs
        self.deduplicate_button.click(self.deduplicate, [self.chosen, self.similarity], outputs, **QUIET)
        self.split_button.click(self.split, [self.chosen, self.share, self.seed], outputs, **QUIET)

    @refusal_as_message
    def deduplicate(self, id: str, similarity: str) -> Updates:
        return self.jobs.start_on("derive", id, "deduplicate", similarity=similarity_of(similarity), by=asking().name)

    def deduplicated(self, job: DataJob, here: bool) -> Updates:
        """The new set, with examples of the rows that were removed because they are similar."""
        return self.sets.sets_made(job, here, similar_rows(job.result, self.words))

    @refusal_as_message
    def split(self, id: str, share: str, seed: str) -> Updates:
        share_of_rows, number = split_settings(share, seed)
        settings = {"share": share_of_rows, "seed": number, "by": asking().name}
        return self.jobs.start_on("derive", id, "split", **settings)


def similar_rows(result: Mapping[str, Any], words: Words) -> str:
    """How many rows were removed because they are similar to an earlier one, and a few of them; "" for none."""
    if not result.get("pairs"):
        return ""
    examples = (
        words("similar-pair", row=row, earlier=earlier, share=f"{100 * share:.0f} %")
        for row, earlier, share in result["pairs"][:EXAMPLES]
    )
    return " ".join([words("similar-removed", count=result["similar"]), "; ".join(examples)])


def similarity_of(text: str) -> float:
    """The similarity as a number. Raises Refusal if it is none, or out of range."""
    try:
        similarity = float(str(text).strip().replace("%", "e-2"))
    except ValueError:
        raise Refusal(problem("similarity-range", given=str(text)[:40] or "—")) from None
    derive.check_similarity(similarity)
    return similarity


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
