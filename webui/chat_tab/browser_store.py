"""Conversations stored by the browser, separately for each user, since several users may share a browser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from engine.serving import conversation_tree
from engine.serving.conversation_tree import Conversation
from webui.panels import Updates


class BrowserStore:
    """One value per user. `stored` is the value of the component for all users; it comes from the browser, so it may be
    anything."""

    def __init__(self, storage_key: str, user: Callable[[gr.Request], str]):
        self.component = gr.BrowserState({}, storage_key=storage_key, secret="athanor")
        self.user = user

    def _own(self, stored: Any, request: gr.Request) -> Any:
        return stored.get(self.user(request)) if isinstance(stored, dict) else None

    def _saved(self, stored: Any, request: gr.Request, value: Any) -> Updates:
        others = stored if isinstance(stored, dict) else {}
        return {self.component: {**others, self.user(request): value}}


class ConversationStore(BrowserStore):
    """The current conversation."""

    def read(self, stored: Any, request: gr.Request) -> Conversation:
        return conversation_tree.read(self._own(stored, request))

    def saved(self, stored: Any, request: gr.Request, conversation: Conversation) -> Updates:
        return self._saved(stored, request, conversation_tree.as_plain(conversation))

    def cleared(self, stored: Any, request: gr.Request) -> Updates:
        return self._saved(stored, request, None)


class EarlierStore(BrowserStore):
    """Earlier conversations, newest first, each as `conversation_tree.as_plain` has it."""

    def read(self, stored: Any, request: gr.Request) -> list[Any]:
        conversations = self._own(stored, request)
        return list(conversations) if isinstance(conversations, list) else []

    def saved(self, stored: Any, request: gr.Request, conversations: Sequence[Any]) -> Updates:
        return self._saved(stored, request, list(conversations))
