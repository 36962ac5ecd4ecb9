"""The next question in a conversation, and the models that it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.core.problems import Refusal, problem
from engine.serving.chat_client import Answer
from engine.serving.conversation_tree import Conversation, Tools, Turn
from webui.chat_tab.chat_settings import ChatSettings


@dataclass(frozen=True)
class Question:
    """A question that follows the tip of the conversation `before`. The text "" means none."""

    before: Conversation
    text: str
    is_tool_result: bool  # the text is the result of a tool
    images: tuple[str, ...] = ()  # data URLs

    def turn(self, settings: ChatSettings, tools: Tools) -> Turn:
        """The question as a turn without answers."""
        return Turn(
            self.text,
            settings.system,
            alone=not settings.remember and not self.is_tool_result,
            role="tool" if self.is_tool_result else "user",
            tools=tools,
            images=() if self.is_tool_result else self.images,
        )


def typed_question(
    conversation: Conversation, text: str, is_tool_result: bool, images: tuple[str, ...] = ()
) -> Question:
    """The question in the box. It can be the result of a tool only if one was called last."""
    return Question(conversation, text.strip(), is_tool_result and called_tool_last(conversation), images)


def repeated_question(conversation: Conversation) -> Question:
    """The last question, to be asked again as another branch."""
    if conversation.tip < 0:
        return Question(conversation, "", False)
    last = conversation.turns[conversation.tip]
    return Question(conversation.without_tip(), last.question, last.role == "tool", last.images)


def called_tool_last(conversation: Conversation) -> bool:
    """Whether any of the last answers calls a tool."""
    return any(reply.calls for turn in conversation.turns_on_path()[-1:] for reply in turn.said.values())


def models_to_ask(models: Sequence[str], turn: Turn, before: Conversation) -> list[str]:
    """All of the served `models`; for the result of a tool, those that called
    one in the last turn. Raises Refusal if there are none."""
    if turn.role == "user":
        return list(models)
    replies = {model: reply for last in before.turns_on_path()[-1:] for model, reply in last.said.items()}
    called = [model for model in models if model in replies and replies[model].calls]
    if not called:
        raise Refusal(problem("chat-nobody-called"))
    return called


def with_model_title(answer: Answer, titles: Mapping[str, str]) -> Answer:
    """The answer, with the model id in its problem replaced by the title."""
    if answer.problem is None or not (model := answer.problem.values.get("voice")):
        return answer
    values = {**answer.problem.values, "voice": titles.get(model, model)}
    return replace(answer, problem=replace(answer.problem, values=values))
