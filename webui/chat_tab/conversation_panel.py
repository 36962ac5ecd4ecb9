"""The conversation so far, with buttons to rate answers, edit questions and switch branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal, problem
from engine.serving import conversation_tree
from engine.serving.conversation_tree import Conversation
from webui import notices
from webui.chat_tab import turns_html
from webui.chat_tab.chat_models import ModelSelection
from webui.chat_tab.model_panel import ModelPanel
from webui.chat_tab.panel import Context, Panel
from webui.chat_tab.question_panel import QuestionPanel
from webui.events import QUIET
from webui.panels import Updates, refusal_as_message

CLICK_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-do]');
  if (!button || button.disabled) return;
  if (button.dataset.do === 'again') return document.querySelector('#chat-again')?.click();
  trigger('select', { ...button.dataset });
  if (button.dataset.do === 'edit') document.querySelector('#prompt textarea')?.focus();
});
"""


@dataclass(frozen=True)
class Click:
    """A click on a button: its action, the place of the turn (-1 for none), and
    the model whose answer it belongs to."""

    action: str
    place: int
    model: str

    @classmethod
    def of(cls, event: gr.EventData) -> Click:
        number = str(event._data.get("turn", ""))
        place = int(number) if number.isdecimal() and len(number) < 6 else -1
        return cls(str(event._data.get("do", "")), place, str(event._data.get("voice", "")))


class ConversationPanel(Panel):
    def __init__(self, context: Context, question: QuestionPanel):
        super().__init__(context)
        self.question = question

    def layout(self) -> None:
        self.turns = gr.HTML(turns_html.empty_html(self.words), js_on_load=CLICK_JS, elem_id="talk")

    def wire(self, model: ModelPanel) -> None:
        kept = [self.current.component, *model.inputs]
        shown = [self.current.component, *self.outputs]
        self.question.clear.click(self.clear, kept, shown, **QUIET)
        changed = [self.message, self.question.prompt, self.question.images, *shown]
        self.turns.select(self.click, kept, changed, **QUIET)

    @property
    def outputs(self) -> list[Block]:
        return [self.turns, *self.question.outputs]

    def show(self, conversation: Conversation, selection: ModelSelection, answering: bool = False) -> Updates:
        """Show a conversation; `answering` means that a question which follows it is being answered."""
        turns = turns_html.past_turns(conversation, self.models.titles(selection), self.words, answering)
        empty = "" if answering else turns_html.empty_html(self.words)
        return {self.turns: turns or empty, **self.question.for_conversation(conversation, answering)}

    def clear(self, request: gr.Request, stored: Any, *selected: Any) -> Updates:
        shown = self.show(Conversation(), ModelSelection(*selected))
        return {**self.current.cleared(stored, request), **shown}

    @refusal_as_message
    def click(self, event: gr.EventData, request: gr.Request, stored: Any, *selected: Any) -> Updates:
        """Rate an answer, which also adds a row to a data set; put a question back into the box; or switch branches."""
        conversation, updates = self._clicked(self.current.read(stored, request), Click.of(event))
        shown = self.show(conversation, ModelSelection(*selected))
        return {**updates, **self.current.saved(stored, request, conversation), **shown}

    def _clicked(self, conversation: Conversation, click: Click) -> tuple[Conversation, Updates]:
        """The conversation after a click, and further updates. Raises Refusal."""
        data, place = self.workplace.data, click.place
        if click.action in ("edit", "go") and not 0 <= place < len(conversation.turns):
            raise Refusal(problem("rating-unknown"))
        match click.action:
            case "edit":
                return conversation.before(place), self.question.put_back(conversation.turns[place])
            case "go":
                return conversation.to_newest_tip(place), {}
            case "better":
                rated = conversation_tree.prefer(data, conversation, place, click.model)
                return rated, self._rated(conversation_tree.PREFERENCES_DATASET)
            case "up" | "down":
                up = click.action == "up"
                rated = conversation_tree.rate(data, conversation, place, click.model, up=up)
                return rated, self._rated(conversation_tree.RATINGS_DATASET)
        return conversation, {}

    def _rated(self, dataset: str) -> Updates:
        return {self.message: notices.toast(self.words("rated", name=dataset))}
