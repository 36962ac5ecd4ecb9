"""Making rows from documents by a model of one's own, and the list of such drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
from gradio.blocks import Block

from engine.documents import drafts
from engine.documents.document_reader import READERS
from engine.documents.prompts import LANGUAGES
from engine.documents.settings import MAX_ROWS, DraftSettings, whole_number
from engine.runs import recent, results
from webui import clicks
from webui.data_tab import draft_html
from webui.data_tab.data_folder import Selection, draft_id, name_of
from webui.data_tab.panel import Context, Panel
from webui.events import QUIET
from webui.panels import Updates, refusal_as_message
from webui.people import acting, asking, hindrance
from webui.pickers import MAX_OFFERED

RUN = "run:"  # before the id of a run among the choices of a model


class DocumentsPanel(Panel):
    """`models`: the possible bases as (label, folder)."""

    def __init__(self, context: Context, models: Callable[[], list[tuple[str, str]]]):
        super().__init__(context)
        self.models = models

    def layout(self) -> None:
        words, usual = self.words, DraftSettings()
        with gr.Accordion(
            words("documents"), open=False, elem_classes="fold", elem_id="from-documents"
        ) as self.accordion:
            self.files = gr.File(
                label=words("documents-files"), file_count="multiple", file_types=list(READERS), elem_id="documents"
            )
            self.model = gr.Dropdown(
                [], label=words("documents-model"), info=words("documents-model-help"), elem_classes="field",
                elem_id="documents-model",
            )  # fmt: skip
            self.language = gr.Dropdown(
                [(words(f"documents-language-{language}"), language) for language in LANGUAGES],
                value=usual.language,
                label=words("documents-language"),
                elem_classes="field",
            )
            self.rows = gr.Textbox(
                str(usual.rows), label=words("documents-rows"), max_lines=1, elem_classes="field",
                elem_id="documents-rows",
            )  # fmt: skip
            self.instruction = gr.Textbox(
                label=words("documents-instruction"), info=words("documents-instruction-help"), lines=2,
                elem_classes="field", elem_id="documents-instruction",
            )  # fmt: skip
            self.name = gr.Textbox(
                label=words("documents-name"), placeholder=words("documents-name-help"), max_lines=1,
                elem_classes="field", elem_id="documents-name",
            )  # fmt: skip
            self.start = gr.Button(words("documents-start"), size="sm", elem_id="documents-start", elem_classes="acts")
        self.list = gr.HTML(elem_id="drafts", js_on_load=clicks.row_click_js("draft"))

    def wire(self) -> None:
        self.accordion.expand(self.offer, [self.model, self.chosen], [self.model, self.list], **QUIET)
        clicks.on_row_click(self.list, self.chosen, draft_id(""))
        settings = [self.files, self.model, self.language, self.rows, self.instruction, self.name]
        self.start.click(self.make, settings, [self.message, self.chosen, self.files, self.name], **QUIET)

    @property
    def outputs(self) -> list[Block]:
        return [self.list]

    def opened(self, selection: Selection) -> Updates:
        return self.marking("")

    def closed(self) -> Updates:
        return self.marking("")

    def marking(self, id: str) -> Updates:
        """The drafts that the person who is asking may see, with the one that is open marked."""
        every = drafts.every_draft(self.workplace.saves)
        visible = [draft for draft in every if not hindrance("review-draft", draft.owner)]
        return {self.list: draft_html.listed(visible, name_of(id), self.words)}

    def offer(self, model: str | None, id: str) -> Updates:
        """The models and drafts that there are now; the model used last is chosen if none is."""
        choices = self.models() + self._adapters()
        values = [value for _, value in choices]
        last = recent.first_model(self.workplace)
        preferred = [model, str(last.path) if last else None, *values]
        chosen = next((value for value in preferred if value in values), None)
        return {self.model: gr.update(choices=choices, value=chosen)} | self.marking(id)

    def _adapters(self) -> list[tuple[str, str]]:
        known = results.results(self.workplace.saves)
        titles = results.titles(known)
        adapters = [result for result in known if result.adapter and result.stage != "rm"][:MAX_OFFERED]
        return [(titles[result.run.id], f"{RUN}{result.run.id}") for result in adapters]

    @refusal_as_message
    def make(
        self,
        files: Sequence[str] | None,
        model: str | None,
        language: str,
        rows: str,
        instruction: str,
        name: str,
    ) -> Updates:
        """Make a draft of the uploaded documents, and open it."""
        documents = [(Path(file), Path(file).name) for file in files or ()]
        name = name.strip() or (documents[0][0].stem if documents else "")
        with acting(self.workplace.saves, "make-draft", name):
            usual, chosen = DraftSettings(), model or ""
            is_run = chosen.startswith(RUN)
            settings = DraftSettings(
                "" if is_run else chosen,
                chosen.removeprefix(RUN) if is_run else "",
                next((known for known in LANGUAGES if known == language), usual.language),
                whole_number(rows, MAX_ROWS),
                instruction or "",
            )
            draft = drafts.make(self.workplace, name, documents, settings, asking().name)
        for file, _ in documents:
            file.unlink(missing_ok=True)
        return {self.chosen: draft_id(draft.id), self.files: None, self.name: ""}
