"""The Chat tab: the answers of a base model and of its adapters to the same question, side by side.

    conversation_panel  past turns, ratings, branches       model_panel     the models to ask, loading and unloading
    answers_panel       asking, and answers as they come    settings_panel  sampling, system prompt, tools
    question_panel      the box for the question            history_panel   earlier conversations
    tab_view            opening the tab                     api_panel       how other programs use the same models

The web process keeps no state: the browser stores the conversations, and the models are in
the process of a server that `engine.serving.servers` finds again. `chat_models`,
`chat_settings`, `questions`, `exchange` and the modules that write HTML have no components.
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

SERVER_POLL_SECONDS = 2  # how often the state of the server is refreshed


@dataclass(frozen=True)
class ChatTab:
    """The parts of the tab that the rest of the page is wired to."""

    timer: gr.Timer
    arrive: Callable[..., Updates]  # refreshes the tab: takes the values of `inputs`, updates `outputs`
    inputs: list[Block]  # two values stored by the browser, then base, adapters and engine
    outputs: list[Block]
    # The base and the adapters with which to chat with a run. Raises Refusal.
    pick: Callable[[Run], tuple[str, list[str]]]


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
    model, conversation = ModelPanel(context, settings, api, question), ConversationPanel(context, question)
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
