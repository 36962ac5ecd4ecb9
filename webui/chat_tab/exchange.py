"""A question on its way: who asks, after which conversation, and whom, how; as the server takes it."""

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
from engine.serving.servers import Server
from webui.chat_tab.chat_models import ModelSelection
from webui.chat_tab.chat_settings import ChatSettings


@dataclass(frozen=True)
class Exchange:
    """A turn that is being answered."""

    request: gr.Request
    stored: Any  # the conversations of the browser when it was asked
    before: Conversation
    turn: Turn
    selection: ModelSelection
    settings: ChatSettings

    def options(self) -> dict[str, Any]:
        """As `chat_client.ask` takes them. Raises Refusal."""
        options = self.settings.generation() | {"request_id": self.request.session_hash}
        return options | ({"tools": self.turn.tools} if self.turn.tools else {})

    def prompts(self, models: Sequence[str]) -> dict[str, list[Message]]:
        """What each served model is sent."""
        before = self.before.turns_on_path()
        return {model: conversation_tree.messages_before_answer(before, model, self.turn) for model in models}

    def scores(
        self, server: Server, saves: Path, prompts: Mapping[str, list[Message]], replies: Sequence[Answer]
    ) -> tuple[dict[str, float], list[Problem]]:
        """The score of each answer by the chosen reward model, if there is one; and what kept it from scoring."""
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
