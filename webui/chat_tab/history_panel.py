"""Earlier conversations: archiving the current one, opening and deleting archived ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.serving import conversation_tree
from webui.chat_tab import turns_html
from webui.chat_tab.chat_models import ModelSelection
from webui.chat_tab.conversation_panel import CLICK_JS, Click, ConversationPanel
from webui.chat_tab.model_panel import ModelPanel
from webui.chat_tab.panel import Context, Panel
from webui.events import QUIET
from webui.panels import Updates


class HistoryPanel(Panel):
    def __init__(self, context: Context, model: ModelPanel, conversation: ConversationPanel):
        super().__init__(context)
        self.model, self.conversation = model, conversation

    def layout(self) -> None:
        title = self.words("chat-earlier")
        with gr.Accordion(title, open=False, visible=False, elem_classes="fold", elem_id="chat-earlier") as self.fold:
            self.list = gr.HTML(js_on_load=CLICK_JS, elem_id="chat-shelf")

    def wire(self, new: gr.Button) -> None:
        """`new` is the button for a new conversation."""
        kept = [self.current.component, self.earlier.component, *self.model.inputs]
        changed = [self.current.component, *self.conversation.outputs, self.earlier.component, *self.outputs]
        new.click(self.start_new, kept, changed, **QUIET)
        self.list.select(self.click, kept, [*self.model.outputs, *changed], **QUIET)

    @property
    def outputs(self) -> list[Block]:
        return [self.fold, self.list]

    def show(self, conversations: Sequence[Any]) -> Updates:
        known = [conversation_tree.read(entry) for entry in conversations]
        return {
            self.fold: gr.update(visible=bool(conversations)),
            self.list: turns_html.conversation_list(known, self.words),
        }

    def start_new(self, request: gr.Request, stored: Any, earlier: Any, *selected: Any) -> Updates:
        """Archive the current conversation, and start a new one."""
        conversations = conversation_tree.with_archived(
            self.earlier.read(earlier, request), self.current.read(stored, request)
        )
        return {
            **self.conversation.clear(request, stored, *selected),
            **self.earlier.saved(earlier, request, conversations),
            **self.show(conversations),
        }

    def click(self, event: gr.EventData, request: gr.Request, stored: Any, earlier: Any, *selected: Any) -> Updates:
        """Open an earlier conversation with the models that answered in it, or delete it."""
        conversations, click = self.earlier.read(earlier, request), Click.of(event)
        conversation, selection = self.current.read(stored, request), ModelSelection(*selected)
        if 0 <= click.place < len(conversations) and click.action in ("open", "drop"):
            chosen = conversation_tree.read(conversations.pop(click.place))
            if click.action == "open":
                conversations = conversation_tree.with_archived(conversations, conversation)
                conversation = chosen
                selection = self.models.of_models(conversation.last_models(), selection)
        return {
            **self.model.show(*selection),
            **self.current.saved(stored, request, conversation),
            **self.conversation.show(conversation, selection),
            **self.earlier.saved(earlier, request, conversations),
            **self.show(conversations),
        }
