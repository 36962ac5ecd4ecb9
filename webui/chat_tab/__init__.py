"""The Chat tab: one question, and the answers of a base model and of adapters of it side by side.

    conversation_panel  the turns so far, rated, edited    model_panel     which models answer, and whether in memory
    answers_panel       a question is asked and answered   settings_panel  how they are to answer
    question_panel      where it is typed                  history_panel   earlier conversations
    tab_view            all of it, as one comes to it      api_panel       the same models for other programs

Handlers hold nothing: the conversation is kept by the browser, and the models by a server that `engine.serving.servers`
finds again. `chat_models`, `chat_settings`, `questions`, `exchange` and the modules that write HTML hold no components.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr
from gradio.blocks import Block

from engine.launch.workspace import Workplace
from engine.runs.runs import Run
from webui.chat_tab.answers_panel import AnswersPanel
from webui.chat_tab.api_panel import ApiPanel
from webui.chat_tab.browser_store import ConversationStore, EarlierStore
from webui.chat_tab.chat_models import ChatModels
from webui.chat_tab.conversation_panel import ConversationPanel
from webui.chat_tab.history_panel import HistoryPanel
from webui.chat_tab.model_panel import ModelPanel
from webui.chat_tab.panel import Context
from webui.chat_tab.question_panel import QuestionPanel
from webui.chat_tab.settings_panel import SettingsPanel
from webui.chat_tab.tab_view import TabView
from webui.panels import Updates
from webui.words import Words

SERVER_POLL_SECONDS = 2  # between two looks at the chosen model


@dataclass(frozen=True)
class ChatTab:
    """The parts of the tab that the rest of the page is wired to."""

    timer: gr.Timer
    arrive: Callable[..., Updates]  # the tab as it is now, answered into `outputs`
    inputs: list[Block]  # what `arrive` is given: two that the browser keeps, then base, adapters and engine
    outputs: list[Block]
    pick: Callable[
        [Run], tuple[str, list[str]]
    ]  # the base and the adapters to talk with a run; raises Refusal


def build(
    words: Words,
    workplace: Workplace,
    message: gr.HTML,
    user: Callable[[gr.Request], str],
    bases: Callable[[], list[tuple[str, str]]],
) -> ChatTab:
    """The tab in the current context. `bases` lists what can be a base, as (label, folder)."""
    current = ConversationStore("athanor-talk", user)
    earlier = EarlierStore("athanor-talks", user)
    models = ChatModels(words, workplace, bases)
    context = Context(words, workplace, message, user, models, current, earlier)
    timer = gr.Timer(SERVER_POLL_SECONDS, active=False)

    question, settings, api = QuestionPanel(context), SettingsPanel(context), ApiPanel(context)
    model, conversation = ModelPanel(context, settings, api), ConversationPanel(context, question)
    history = HistoryPanel(context, model, conversation)
    answers = AnswersPanel(context, question, conversation, model, settings)

    with gr.Row(elem_classes="split chat", equal_height=False):
        with gr.Column(scale=8, min_width=420, elem_classes="talk"):
            conversation.layout()
            answers.layout()
            question.layout()
        with gr.Column(scale=4, min_width=300, elem_classes="side"), gr.Column(elem_classes="card chat-card"):
            for panel in (model, settings, history, api):
                panel.layout()

    settings.wire()
    model.wire(timer)
    conversation.wire(model)
    history.wire(question.new)
    answers.wire()

    view = TabView(context, timer, model, conversation, history)
    return ChatTab(timer, view.arrive, view.inputs, view.outputs, models.of_run)
