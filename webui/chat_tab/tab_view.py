"""Opening the tab: every panel is refreshed."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.serving.conversation_tree import Conversation
from webui.chat_tab.chat_models import ModelSelection
from webui.chat_tab.conversation_panel import ConversationPanel
from webui.chat_tab.history_panel import HistoryPanel
from webui.chat_tab.model_panel import ModelPanel
from webui.chat_tab.panel import Context, Panel
from webui.panels import Updates


class TabView(Panel):
    """`timer` ticks while the tab is open."""

    def __init__(
        self,
        context: Context,
        timer: gr.Timer,
        model: ModelPanel,
        conversation: ConversationPanel,
        history: HistoryPanel,
    ):
        super().__init__(context)
        self.timer, self.model = timer, model
        self.conversation, self.history = conversation, history

    @property
    def inputs(self) -> list[Block]:
        return [self.current.component, self.earlier.component, *self.model.inputs]

    @property
    def outputs(self) -> list[Block]:
        return [
            self.timer,
            *self.model.outputs,
            *self.model.memory_outputs,
            *self.conversation.outputs,
            *self.history.outputs,
        ]

    def arrive(self, request: gr.Request, stored: Any, earlier: Any, *selected: Any) -> Updates:
        """Refresh the lists, and show the conversations stored by the browser."""
        conversation = self.current.read(stored, request)
        selection = self._selection(conversation, ModelSelection(*selected))
        return {
            self.timer: gr.Timer(active=True),
            **self.model.show(*selection),
            **self.model.show_memory(*selection),
            **self.conversation.show(conversation, selection),
            **self.history.show(self.earlier.read(earlier, request)),
        }

    def _selection(self, conversation: Conversation, selection: ModelSelection) -> ModelSelection:
        """If no run is selected, the runs that answered last in the conversation; if no base is selected either, their
        base or the default."""
        if selection.run_ids:
            return selection
        first = selection if selection.base else self.models.first(selection.engine)
        last = self.models.of_models(conversation.last_models(), first)
        return selection._replace(run_ids=last.run_ids) if selection.base else last
