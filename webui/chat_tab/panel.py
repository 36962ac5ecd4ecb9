"""What the panels of the Chat tab have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr

from engine.launch.workspace import Workplace
from webui import panels
from webui.chat_tab.browser_store import ConversationStore, EarlierStore
from webui.chat_tab.chat_models import ChatModels
from webui.words import Words


@dataclass(frozen=True)
class Context:
    """What every panel is given."""

    words: Words
    workplace: Workplace
    message: gr.HTML  # shows what was done, or why it was refused
    user: Callable[[gr.Request], str]  # the name of the user; "" without login
    models: ChatModels
    current: ConversationStore  # the current conversation
    earlier: EarlierStore


class Panel(panels.Panel):
    def __init__(self, context: Context):
        self.context = context
        self.words, self.workplace = context.words, context.workplace
        self.message, self.models = context.message, context.models
        self.current, self.earlier = context.current, context.earlier
