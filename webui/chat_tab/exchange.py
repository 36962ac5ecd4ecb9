"""A question that is being answered: who asked it, after which conversation, which models, with which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from engine.core.problems import Problem, Refusal
from engine.serving import chat_client, conversation_tree
from engine.serving.chat_client import Answer
from engine.serving.conversation_tree import Conversation, Message, Reply, Turn
from engine.serving.server import Server
from webui.chat_tab.chat_models import ModelSelection
from webui.chat_tab.chat_settings import ChatSettings


@dataclass(frozen=True)
class Exchange:
    """Everything that asking a question needs."""

    request: gr.Request
    stored: Any  # the conversations of all users in the browser when the question was asked
    before: Conversation
    turn: Turn
    selection: ModelSelection
    settings: ChatSettings

    def options(self) -> dict[str, Any]:
        """The settings that `chat_client.ask` takes. Raises Refusal."""
        options = self.settings.generation() | {"request_id": self.request.session_hash}
        return options | ({"tools": self.turn.tools} if self.turn.tools else {})

    def prompts(self, models: Sequence[str]) -> dict[str, list[Message]]:
        """The messages for each served model."""
        before = self.before.turns_on_path()
        return {model: conversation_tree.messages_before_answer(before, model, self.turn) for model in models}

    def scores(
        self, server: Server, saves: Path, prompts: Mapping[str, list[Message]], replies: Sequence[Answer]
    ) -> tuple[dict[str, float], list[Problem]]:
        """The scores of the answers by the selected reward model, if any, and
        the problems if it could not score them."""
        conversations = {
            reply.model: [*prompts[reply.model], Reply(reply.text, calls=reply.calls).message]
            for reply in replies
            if reply.text or reply.calls
        }
        if not self.settings.reward_model or not conversations:
            return {}, []
        try:
            return chat_client.score(server, saves, self.settings.reward_model, conversations), []
        except Refusal as refusal:
            return {}, refusal.problems
