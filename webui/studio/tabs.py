"""The tabs of the page, laid out side by side, with what surrounds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.blocks import Block

from engine.launch.workspace import Workplace
from webui import chat_tab, compare_tab, data_tab, evaluate_tab, export_tab, people, runs_tab, system_tab, train_tab
from webui.chat_tab import ChatTab
from webui.compare_tab import CompareTab
from webui.data_tab import DataTab
from webui.evaluate_tab import EvaluateTab
from webui.export_tab import ExportTab
from webui.gpus_panel import GpusPanel
from webui.panels import hidden_value
from webui.runs_tab import RunsTab, head_html
from webui.studio.header import header, user
from webui.train_tab import TrainTab
from webui.train_tab.choices import model_choices, models_and_results
from webui.words import Words


@dataclass(frozen=True)
class Frame:
    """What surrounds the tabs, and what the page remembers."""

    words: Words
    workplace: Workplace
    root: str  # prefix of each address
    users_file: Path | None  # None without a login
    head: gr.HTML
    message: gr.HTML  # shows that something was done, or why it was not
    selected: gr.Textbox  # id of the open run; "" = none
    address: Sequence[Block]  # what it says: the run, the tab, the data set, the query of a comparison, the report
    form: gr.Textbox  # the form as the browser has kept it


@dataclass(frozen=True)
class Tabs:
    """The tabs and, by the id of each, the item that shows it."""

    tabs: gr.Tabs
    items: dict[str, gr.Tab]
    train: TrainTab
    runs: RunsTab
    data: DataTab
    chat: ChatTab
    evaluate: EvaluateTab
    compare: CompareTab
    export: ExportTab
    gpus: dict[str, GpusPanel]  # by the tab that shows them


def lay_out_frame(words: Words, workplace: Workplace, root: str, users_file: Path | None = None) -> Frame:
    """The frame in the current context, above the tabs."""
    head = gr.HTML(header(words, people.asking(), root), elem_id="head")
    selected, form, *address = (hidden_value(by_reader=True) for _ in range(7))
    message = gr.HTML(elem_id="told")
    return Frame(words, workplace, root, users_file, head, message, selected, address, form)


def lay_out_tabs(frame: Frame) -> Tabs:
    """The tabs in the current context."""
    words, workplace, root, message = frame.words, frame.workplace, frame.root, frame.message
    items: dict[str, gr.Tab] = {}

    def item(id: str, render_children: bool = False) -> gr.Tab:
        items[id] = gr.Tab(words(f"tab-{id}"), id=id, render_children=render_children)
        return items[id]

    with gr.Tabs(elem_id="tabs") as tabs:
        with item("train"):
            train = train_tab.build(words, workplace, message, user, frame.selected)
        with item("runs", render_children=True):
            runs = runs_tab.build(words, workplace, root, frame.selected, message, user)
        with item("data"):
            data = data_tab.build(
                words,
                workplace,
                root,
                message,
                train.inputs,
                train.read,
                lambda: model_choices(workplace),
                lambda: models_and_results(workplace, words),
            )
        with item("chat"):
            chat = chat_tab.build(words, workplace, message, user, lambda: models_and_results(workplace, words))
        with item("evaluate"):
            evaluate = evaluate_tab.build(
                words,
                workplace,
                root,
                message,
                user,
                lambda: models_and_results(workplace, words),
                lambda run: head_html.status(run, words),
            )
        with item("compare", render_children=True):
            compare = compare_tab.build(words, workplace, root)
        with item("export"):
            export = export_tab.build(words, workplace, root, message, user)
        with item("system"):
            gpus = system_tab.build(words, workplace, message, root, frame.users_file)
    return Tabs(tabs, items, train, runs, data, chat, evaluate, compare, export, {"train": train.gpus, "system": gpus})
