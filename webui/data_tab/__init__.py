"""The Data tab: the list of data sets and, for the open one, its rows, its problems, and what a model sees of it.

    set_list        the data sets and files             rows_panel      rows and search
    upload_panel    uploading a file                    check_panel     checking the whole set
    hub_panel       downloading a set from a hub        derive_panel    deriving new sets from it
    head_panel      the open set: name, use, remove     tokens_panel    what a model sees of it
    job_panel       a job in progress                   columns_panel   its description
    documents_panel making rows from documents          draft_panel     reviewing them
    set_view        opening a set, in all of these

`data_folder`, `set_entry`, `dataset_specs`, `token_facts`, `sources` and the modules that write HTML have no
components: they are functions of their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.launch.workspace import Workplace
from engine.spec.run_spec import RunSpec
from webui.data_tab.check_panel import CheckPanel
from webui.data_tab.columns_panel import ColumnsPanel
from webui.data_tab.data_folder import DataFolder
from webui.data_tab.dataset_specs import training_spec
from webui.data_tab.derive_panel import DerivePanel
from webui.data_tab.documents_panel import DocumentsPanel
from webui.data_tab.draft_panel import DraftPanel
from webui.data_tab.head_panel import HeadPanel
from webui.data_tab.hub_panel import HubPanel
from webui.data_tab.job_panel import JobPanel
from webui.data_tab.panel import Context
from webui.data_tab.rows_panel import RowsPanel
from webui.data_tab.set_list import SetList
from webui.data_tab.set_view import SetView
from webui.data_tab.tokens_panel import TokensPanel
from webui.data_tab.upload_panel import UploadPanel
from webui.panels import Updates, hidden_value
from webui.words import Words


@dataclass(frozen=True)
class DataTab:
    """The parts of the tab that the rest of the page is wired to."""

    chosen: gr.Textbox  # the open set or file, as `set:NAME` or `file:PATH`; "" = none
    arrive: Callable[[str], Updates]  # refreshes the list and `first`, its outputs are `listed`
    first: gr.Textbox  # the set to open if none is open
    listed: list[Block]
    use: gr.Button
    use_in: Callable[[str, RunSpec], RunSpec]  # the spec that trains on the open set; raises Refusal


def build(
    words: Words,
    workplace: Workplace,
    root: str,
    message: gr.HTML,
    form_inputs: Sequence[Block],
    read_form: Callable[[Sequence[Any]], RunSpec],
    models: Callable[[], list[tuple[str, str]]],
    models_and_results: Callable[[], list[tuple[str, str]]],
) -> DataTab:
    """The tab in the current context. The form of the Train tab determines what a model would see; `models_and_results`
    can be asked for rows."""
    context = Context(words, workplace, root, message, chosen=hidden_value(by_reader=True))
    sets, jobs, rows = SetList(context), JobPanel(context), RowsPanel(context)
    upload, hub, head = UploadPanel(context, sets), HubPanel(context, sets, jobs), HeadPanel(context, sets)
    check, derive = CheckPanel(context, jobs), DerivePanel(context, sets, jobs)
    tokens = TokensPanel(context, form_inputs, read_form, models)
    columns = ColumnsPanel(context, sets, head)
    documents, draft = DocumentsPanel(context, models_and_results), DraftPanel(context, sets)

    with gr.Row(elem_classes="split data", equal_height=False):
        with gr.Column(scale=3, min_width=250, elem_classes="shelf"):
            upload.layout()
            sets.layout()
            documents.layout()
            hub.layout()
        with gr.Column(scale=9, min_width=420, elem_classes="one-set"):
            head.layout()
            jobs.layout()
            draft.layout()
            with gr.Tabs(visible=False, elem_classes="below", elem_id="set-tabs") as tabs:
                with gr.Tab(words("part-rows"), id="rows"):
                    rows.layout()
                with gr.Tab(words("part-check"), id="check") as check_tab:
                    check.layout()
                    derive.layout()
                with gr.Tab(words("part-seen"), id="seen") as tokens_tab:
                    tokens.layout()
                with gr.Tab(words("part-columns"), id="columns"):
                    columns.layout()

    view = SetView(context, tabs, head, draft, documents, [check, tokens, rows, columns, sets])
    view.wire(columns.sheet)
    for panel in (sets, upload, head, rows, derive, columns, documents, draft):
        panel.wire()
    hub.wire(head.fetch)
    check.wire(check_tab)
    tokens.wire(tokens_tab)
    jobs.wire()  # last: its outputs belong to the other panels

    folder = DataFolder(workplace.data)
    return DataTab(
        context.chosen,
        sets.arrive,
        sets.first,
        [sets.first, sets.html],
        head.use,
        lambda id, spec: training_spec(spec, folder.saved_set(id)),
    )
