"""Downloading data sets from Hugging Face or ModelScope: new ones, and the rows of entries that only name a hub."""

from __future__ import annotations

import gradio as gr

from engine.data import dataset_info_edits
from webui.data_tab.job_panel import JobPanel
from webui.data_tab.panel import Context, Panel
from webui.data_tab.set_list import SetList
from webui.events import QUIET
from webui.panels import Updates, refusal_as_message
from webui.people import asking


class HubPanel(Panel):
    def __init__(self, context: Context, sets: SetList, jobs: JobPanel):
        super().__init__(context)
        self.sets, self.jobs = sets, jobs

    def layout(self) -> None:
        words = self.words
        with gr.Accordion(words("hub-set"), open=False, elem_classes="fold", elem_id="hub-set"):
            self.hub_id = gr.Textbox(
                label=words("hub-id"), info=words("hub-id-help"), max_lines=1, elem_classes="field"
            )
            self.hub = gr.Radio(
                [("Hugging Face", "huggingface"), ("ModelScope", "modelscope")],
                value="huggingface",
                label=words("hub-which"),
                elem_classes="field-union",
            )
            self.subset = gr.Textbox(
                label=words("hub-subset"), info=words("hub-subset-help"), max_lines=1, elem_classes="field"
            )
            self.split = gr.Textbox("train", label=words("hub-split"), max_lines=1, elem_classes="field")
            self.fetch_button = gr.Button(words("hub-fetch"), size="sm", elem_id="hub-fetch", elem_classes="acts")

    def wire(self, fetch_rows_button: gr.Button) -> None:
        """`fetch_rows_button` is that of an open set whose rows are still on a hub."""
        self.jobs.when_done("download", self.sets.sets_made, [self.chosen, self.sets.html])
        self.fetch_button.click(
            self.fetch, [self.hub_id, self.hub, self.subset, self.split], self.jobs.start_outputs, **QUIET
        )
        fetch_rows_button.click(self.fetch_rows, self.chosen, self.jobs.start_outputs, **QUIET)

    @refusal_as_message
    def fetch(self, hub_id: str, hub: str, subset: str, split: str) -> Updates:
        """Start downloading a data set by its id on a hub."""
        settings = {"hub": hub, "subset": subset.strip(), "split": split.strip() or "train", "into": ""}
        id = hub_id.strip()
        return self.jobs.start("fetch", "download", id, id=id, by=asking().name, **settings)

    @refusal_as_message
    def fetch_rows(self, id: str) -> Updates:
        """Start downloading the rows of a set whose entry names their source."""
        dataset = self.folder.saved_set(id)
        entry = dataset_info_edits.entry_of(self.folder.path, dataset.name)
        owner = self.folder.owner(id)
        return self.jobs.start(
            "describe" if owner else "fetch",
            "download",
            dataset.name,
            owner,
            id=dataset.hub,
            hub="modelscope" if entry.get("ms_hub_url") else "huggingface",
            folder=dataset.folder,
            subset=dataset.subset,
            split=dataset.split,
            into=dataset.name,
            by=owner,
        )
