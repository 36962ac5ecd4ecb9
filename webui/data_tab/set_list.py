"""The list of data sets, and of files that are in none of them."""

from __future__ import annotations

import gradio as gr
from gradio.blocks import Block

from engine.data.data_jobs import DataJob
from engine.data.owners import set_id
from engine.data.soundness import flaw
from webui import clicks, notices
from webui.data_tab import set_html
from webui.data_tab.data_folder import Selection, row_count
from webui.data_tab.panel import Panel
from webui.panels import Updates, hidden_value


class SetList(Panel):
    def layout(self) -> None:
        self.html = gr.HTML(elem_id="sets", js_on_load=clicks.kept_rows_of("set"))
        self.first = hidden_value()  # the set that the tab opens if nothing is open

    def wire(self) -> None:
        clicks.on_row_click(self.html, self.chosen)

    @property
    def outputs(self) -> list[Block]:
        return [self.html]

    def opened(self, selection: Selection) -> Updates:
        return self.marking(selection.id)

    def closed(self) -> Updates:
        return self.marking("")

    def marking(self, id: str) -> Updates:
        """The current list, with one entry marked as open."""
        sets, broken = self.folder.catalogue()
        counts = {dataset.name: None if flaw(dataset) else row_count(dataset) for dataset in sets}
        return {self.html: set_html.listed(sets, counts, broken, self.folder.loose_files(), id, self.words)}

    def opening(self, id: str) -> Updates:
        """The current list, and that set or file to be opened."""
        return {self.chosen: id} | self.marking(id)

    def arrive(self, id: str) -> Updates:
        """The current list, or the first usable set if nothing is open. The page opens that set itself, since the
        reader may have clicked another one before this answer arrives."""
        usable = [] if id else self.folder.sound_names()
        if usable:
            return {self.first: set_id(usable[0])}
        return {self.first: ""} | self.marking(id)

    def sets_made(self, job: DataJob, here: bool, more: str = "") -> Updates:
        """The result of a job that creates sets; the first is opened if the reader is still `here`, where it was
        started. `more`: what else is said of it."""
        names, counts = job.result["made"], job.result["counts"]
        text = self.words(
            "sets-made",
            sets=", ".join(f"{name} ({counts[name]:,})" for name in names),
            out=f"{counts.get('left out', 0):,}",
        )
        updates = self.opening(set_id(names[0])) if here else self.marking("")
        return updates | {self.message: notices.toast(f"{text} {more}".strip())}
