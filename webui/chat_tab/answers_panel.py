"""Asking a question, and showing the answers while they are generated.

The handler runs until all answers are complete; Stop asks the server to end them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Problem, Refusal
from engine.serving import chat_client, conversation_tree, servers
from engine.serving.attachments import attached_images
from engine.serving.chat_client import Answer
from engine.serving.conversation_tree import Conversation
from engine.serving.server import Server
from webui import boxes, notices
from webui.chat_tab import turns_html
from webui.chat_tab.chat_models import TOOLS_VARIABLE
from webui.chat_tab.chat_settings import SETTING_LABELS
from webui.chat_tab.conversation_panel import ConversationPanel
from webui.chat_tab.exchange import Exchange
from webui.chat_tab.model_panel import ModelPanel
from webui.chat_tab.panel import Context, Panel
from webui.chat_tab.question_panel import QuestionPanel
from webui.chat_tab.questions import (
    Question,
    models_to_ask,
    repeated_question,
    typed_question,
    with_model_title,
)
from webui.chat_tab.settings_panel import SettingsPanel
from webui.events import QUIET, concurrent
from webui.panels import Updates
from webui.people import acting

MAX_CONCURRENT_ANSWERS = 12  # of all users together; each occupies a thread
# Send in place of Stop.
ANSWERED_JS = "() => [true, false].map((visible) => ({ __type__: 'update', visible }))"
# Keeps the end of the page in view while it grows, if the reader is there.
FOLLOW_END_JS = """
watch('value', () => {
  const page = document.scrollingElement;
  if (page.scrollHeight - innerHeight - page.scrollTop < 300) page.scrollTo({ top: page.scrollHeight });
});
"""


class AnswersPanel(Panel):
    def __init__(
        self,
        context: Context,
        question: QuestionPanel,
        conversation: ConversationPanel,
        model: ModelPanel,
        settings: SettingsPanel,
    ):
        super().__init__(context)
        self.question, self.conversation = question, conversation
        self.model, self.settings = model, settings
        self.waiting: set[str] = set()  # sessions whose question waits until its model is loaded

    def layout(self) -> None:
        self.live = gr.HTML(js_on_load=FOLLOW_END_JS, elem_id="live")

    def wire(self) -> None:
        question, answers = self.question, concurrent("answers", MAX_CONCURRENT_ANSWERS)
        inputs = {
            self.current.component,
            question.prompt,
            question.images,
            question.is_tool_result,
            *self.model.inputs,
            *self.settings.inputs,
        }
        event = gr.on([question.send.click, question.prompt.submit], self.ask, inputs, self.outputs, **answers)
        again = question.again.click(self.ask_again, inputs, self.outputs, **answers)
        # The page drops a question while one is being answered, so Send is shown only after the last piece was taken.
        for ended in (event.then, event.failure, again.then, again.failure):
            ended(None, None, [question.send, question.stop], js=ANSWERED_JS, **QUIET)
        question.stop.click(self.stop, None, None, **QUIET)

    @property
    def outputs(self) -> list[Block]:
        return [
            self.message,
            self.current.component,
            self.live,
            self.question.prompt,
            self.question.images,
            self.question.send,
            self.question.stop,
            *self.conversation.outputs,
            *self.model.memory_outputs,
        ]

    # ---- asking

    def ask(self, values: Mapping[Block, Any], request: gr.Request) -> Iterator[Updates]:
        """Ask the question in the box."""
        conversation = self.current.read(values[self.current.component], request)
        is_tool_result = bool(values[self.question.is_tool_result])
        try:
            images = attached_images(values[self.question.images] or ())
        except Refusal as refusal:
            yield {self.message: notices.refused(refusal.problems, self.words)}
            return
        question = typed_question(conversation, values[self.question.prompt] or "", is_tool_result, images)
        yield from self._ask(question, values, request)

    def ask_again(self, values: Mapping[Block, Any], request: gr.Request) -> Iterator[Updates]:
        """Ask the last question again, with the models and settings that are selected now."""
        conversation = self.current.read(values[self.current.component], request)
        yield from self._ask(repeated_question(conversation), values, request)

    def _ask(self, question: Question, values: Mapping[Block, Any], request: gr.Request) -> Iterator[Updates]:
        if not question.text:
            yield gr.skip()
            return
        selection, settings = self.model.selection(values), self.settings.read(values)
        try:
            # Tools are hidden, and not sent, unless the template of one of the models supports them.
            knows_tools = self.models.template_has(TOOLS_VARIABLE, selection)
            tools = conversation_tree.parse_tools(settings.tools) if knows_tools else ()
        except Refusal as refusal:
            yield {self.message: notices.refused(refusal.problems, self.words)}
            return
        stored, turn = values[self.current.component], question.turn(settings, tools)
        yield from self._answers(Exchange(request, stored, question.before, turn, selection, settings))

    def stop(self, request: gr.Request) -> None:
        self.waiting.discard(request.session_hash or "")
        chat_client.cancel_everywhere(servers.servers(self.workplace.saves), request.session_hash or "")

    # ---- answering

    def _answers(self, exchange: Exchange) -> Iterator[Updates]:
        """Show the answers while they are generated, then the conversation with the complete answers."""
        titles = self.models.titles(exchange.selection)
        replies: list[Answer] = []
        try:
            options, choice = exchange.options(), self.models.choice(exchange.selection)
            models = models_to_ask([choice.name, *choice.adapters], exchange.turn, exchange.before)
            with acting(self.workplace.saves, "ask", ", ".join(models)):
                pass  # what becomes of the answers is the reader's own
            server = servers.start(self.workplace, choice, by=self.context.user(exchange.request))
            yield self._begun(exchange, server)
            if not (yield from self._is_ready(exchange, server)):
                yield self._unanswered(exchange, [], server)
                return
            chat_client.add(server, choice.adapters)
            prompts = exchange.prompts(models)
            for replies in chat_client.ask(server, prompts, options):
                replies = [with_model_title(reply, titles) for reply in replies]
                yield {self.live: turns_html.live_turn(exchange.turn, replies, titles, self.words)}
        except Refusal as refusal:
            problems = boxes.with_labels(refusal.problems, SETTING_LABELS, self.words)
            yield self._unanswered(exchange, problems, self.models.server(exchange.selection))
            return
        scores, problems = exchange.scores(server, self.workplace.saves, prompts, replies)
        problems = [reply.problem for reply in replies if reply.problem] + problems
        turn = conversation_tree.answered_turn(exchange.turn, replies, scores)
        if turn:
            yield self._ended(exchange, exchange.before.add(turn), problems[:1], server)
        else:
            yield self._unanswered(exchange, problems[:1], server)

    def _is_ready(self, exchange: Exchange, server: Server) -> Generator[Updates, None, bool]:
        """Show what the model waits for until it is loaded; False if Stop was pressed meanwhile. Raises Refusal."""
        session = exchange.request.session_hash or ""
        self.waiting.add(session)
        try:
            for waits_for in servers.until_ready(server, goes_on=lambda: session in self.waiting):
                yield {self.live: self._waiting(exchange, waits_for)}
            return session in self.waiting
        finally:
            self.waiting.discard(session)

    # ---- updates

    def _begun(self, exchange: Exchange, server: Server) -> Updates:
        # The question is stored at once, so that a reload does not lose it.
        asked_so_far = exchange.before.add(exchange.turn)
        return {
            self.message: "",
            self.question.prompt: "",
            self.question.images: None,
            self.live: self._waiting(exchange, None),
            **self.current.saved(exchange.stored, exchange.request, asked_so_far),
            **self.conversation.show(exchange.before, exchange.selection, answering=True),
            self.question.send: gr.update(visible=False),
            self.question.stop: gr.update(visible=True),
            **self.model.memory(server),
        }

    def _waiting(self, exchange: Exchange, waits_for: Problem | None) -> str:
        """The question, and what its model waits for; None: it is being loaded."""
        message = waits_for.text(self.words.language) if waits_for else self.words("chat-loading-first")
        return turns_html.waiting_turn(exchange.turn, message, self.words)

    def _ended(
        self, exchange: Exchange, conversation: Conversation, problems: Sequence[Problem], server: Server | None
    ) -> Updates:
        refused: Updates = {self.message: notices.refused(problems, self.words)} if problems else {}
        memory = self.model.memory(server) if server else self.model.memory_buttons(None)
        return {
            self.live: "",
            **refused,
            **self.current.saved(exchange.stored, exchange.request, conversation),
            **self.conversation.show(conversation, exchange.selection),
            **memory,
        }

    def _unanswered(self, exchange: Exchange, problems: Sequence[Problem], server: Server | None) -> Updates:
        """Restore the conversation, and put the question back into the box."""
        conversation = self.current.read(exchange.stored, exchange.request)
        ended = self._ended(exchange, conversation, problems, server)
        return {**ended, **self.question.put_back(exchange.turn)}
