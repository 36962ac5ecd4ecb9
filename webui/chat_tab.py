"""The Chat tab: one question, and the answers of a base model and of adapters of it side by side.

Handlers hold nothing: the conversation is kept by the browser, and the model by a server that `engine.serving.servers` finds
again. An answer comes through a handler that goes on until it ends; Stop asks the server to end it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import gradio as gr

from engine.core.problems import Problem, Refusal, problem
from engine.launch.workspace import Workplace
from engine.runs.runs import Run
from engine.serving import chat_client, conversation_tree, servers
from engine.serving.servers import Server
from engine.serving.vllm import ENGINES, program
from engine.spec.generation_settings import GenerationSettings
from webui import answers, boxes, notices
from webui.chat_models import MAX_ADAPTERS_ASKED, TOOLS_VARIABLE, ChatModels, ModelSelection
from webui.events import QUIET, concurrent
from webui.words import Words

SERVER_POLL_SECONDS = 2  # between two looks at the chosen model
MAX_CONCURRENT_ANSWERS = 12  # of this page, for all its readers: each holds a thread
# The label of each of GenerationSettings here.
SETTING_LABELS = {
    "temperature": "chat-temperature", "top_p": "chat-top-p", "top_k": "chat-top-k", "seed": "chat-seed",
    "max_tokens": "chat-longest", "repetition_penalty": "chat-penalty",
}  # fmt: skip

CLICK_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-do]');
  if (!button || button.disabled) return;
  trigger('select', { ...button.dataset });
  if (button.dataset.do === 'edit') document.querySelector('#prompt textarea')?.focus();
});
"""
# Who reads at the end of the page stays there while it grows.
FOLLOW_END_JS = """
watch('value', () => {
  const page = document.scrollingElement;
  if (page.scrollHeight - innerHeight - page.scrollTop < 300) page.scrollTo({ top: page.scrollHeight });
});
"""


@dataclass(frozen=True)
class ChatTab:
    """The parts of the tab that the rest of the page is wired to."""

    timer: gr.Timer
    arrive: Callable[..., list[Any]]  # answers the base and the adapters into `outputs`
    inputs: list[Any]  # what `arrive` is given
    outputs: list[Any]
    pick: Callable[[Run], tuple[str, list[str]]]  # the base and the adapters to talk with a run


def build(
    words: Words,
    workplace: Workplace,
    message_html: gr.HTML,
    user: Callable[[gr.Request], str],
    models: Callable[[], list[tuple[str, str]]],
) -> ChatTab:
    """The tab in the current context. `models` lists what can be a base, as (label, folder)."""
    saves, chat_models = workplace.saves, ChatModels(words, workplace, models)

    def box(what: str, value: str = "", **about: Any) -> gr.Textbox:
        code = SETTING_LABELS[what]
        return boxes.number(value, label=words(code), elem_id=code, **about)

    # Each holds what is each user's own, by name: several may share a browser.
    history = gr.BrowserState({}, storage_key="athanor-talk", secret="athanor")
    earlier = gr.BrowserState({}, storage_key="athanor-talks", secret="athanor")
    timer = gr.Timer(SERVER_POLL_SECONDS, active=False)
    with gr.Row(elem_classes="split chat", equal_height=False):
        with gr.Column(scale=8, min_width=420, elem_classes="talk"):
            past = gr.HTML(answers.empty_html(words), js_on_load=CLICK_JS, elem_id="talk")
            live = gr.HTML(js_on_load=FOLLOW_END_JS, elem_id="live")
            with gr.Column(elem_classes="ask"):
                prompt = gr.Textbox(
                    placeholder=words("chat-prompt"), show_label=False, container=False, lines=1, max_lines=10,
                    elem_id="prompt", label=words("chat-prompt"),
                )  # fmt: skip
                result = gr.Checkbox(True, label=words("chat-result"), visible=False, elem_id="chat-result")
                with gr.Row(elem_classes="buttons"):
                    send = gr.Button(words("chat-send"), variant="primary", size="sm", elem_id="send")
                    stop = gr.Button(words("chat-stop"), size="sm", visible=False, elem_id="chat-stop")
                    again = gr.Button(words("chat-again"), size="sm", elem_id="chat-again")
                    new = gr.Button(words("chat-new"), size="sm", elem_id="chat-new")
                    clear = gr.Button(words("chat-clear"), size="sm", elem_id="chat-clear")
                    export = gr.HTML(elem_id="chat-export")
        with gr.Column(scale=4, min_width=300, elem_classes="side"), gr.Column(elem_classes="card chat-card"):
            base = gr.Dropdown(
                [], value=None, label=words("chat-base"), elem_classes="field", elem_id="chat-base",
                allow_custom_value=True, interactive=True,
            )  # fmt: skip
            adapters = gr.Dropdown(
                [], value=[], label=words("chat-adapters"), info=words("chat-adapters-help"), multiselect=True,
                max_choices=MAX_ADAPTERS_ASKED, elem_classes="field", elem_id="chat-adapters", interactive=True,
            )  # fmt: skip
            engine = gr.Radio(
                list(ENGINES), value=ENGINES[0], label=words("chat-engine"), info=words("chat-engine-help"),
                visible=program() is not None, elem_classes="field", elem_id="chat-engine", interactive=True,
            )  # fmt: skip
            with gr.Row(elem_classes="held-row"):
                held = gr.HTML(elem_id="held")
                load = gr.Button(words("chat-load"), size="sm", elem_id="chat-load", scale=0)
                unload = gr.Button(
                    words("chat-unload"), size="sm", visible=False, elem_id="chat-unload", scale=0
                )
            system = gr.Textbox(
                label=words("chat-system"), lines=2, max_lines=8, elem_classes="field", elem_id="chat-system"
            )
            greedy = gr.Checkbox(
                True, label=words("chat-greedy"), info=words("chat-greedy-help"), elem_id="chat-greedy"
            )
            with gr.Column(visible=False, elem_classes="grid grid-2") as chance:
                temperature, top_p = box("temperature", "0.7"), box("top_p", "0.9")
                top_k, seed = box("top_k", "0"), box("seed", placeholder=words("chat-seed-none"))
            with gr.Column(elem_classes="grid grid-2"):
                longest, penalty = box("max_tokens", "512"), box("repetition_penalty", "1")
            remember = gr.Checkbox(
                True, label=words("chat-remember"), info=words("chat-remember-help"), elem_id="chat-remember"
            )
            thinking = gr.Checkbox(True, label=words("chat-thinking"), visible=False, elem_id="chat-thinking")
            reward_model = gr.Dropdown(
                [], value=None, label=words("chat-judge"), info=words("chat-judge-help"), visible=False,
                elem_classes="field", elem_id="chat-judge", interactive=True,
            )  # fmt: skip
            with gr.Accordion(
                words("chat-tools"), open=False, visible=False, elem_classes="fold", elem_id="chat-tools-fold"
            ) as tools_fold:
                tools = gr.Textbox(
                    label=words("chat-tools"), show_label=False, info=words("chat-tools-help"), placeholder=conversation_tree.TOOL_EXAMPLE, lines=4,
                    max_lines=16, elem_classes="field mono", elem_id="chat-tools",
                )  # fmt: skip
            with gr.Accordion(
                words("chat-earlier"), open=False, visible=False, elem_classes="fold", elem_id="chat-earlier"
            ) as earlier_fold:
                earlier_list = gr.HTML(js_on_load=CLICK_JS, elem_id="chat-shelf")
            with gr.Accordion(words("chat-program"), open=False, elem_classes="fold"):
                text = gr.HTML()

    settings = [greedy, temperature, top_p, top_k, seed, longest, penalty, thinking]
    buttons = [send, stop, load, unload]
    conversation = [past, export, result]
    outputs = [message_html, prompt, history, *conversation, live, held, *buttons]
    who = [base, adapters, engine]
    # what `chat_models.updates` answers into
    model = [base, adapters, thinking, tools_fold, reward_model, text]

    def own_value(kept: Any, request: gr.Request) -> Any:
        """What of `kept` is the asker's own."""
        return kept.get(user(request)) if isinstance(kept, dict) else None

    def with_own_value(kept: Any, request: gr.Request, value: Any) -> dict[str, Any]:
        return {**(kept if isinstance(kept, dict) else {}), user(request): value}

    def own_conversations(before: Any, request: gr.Request) -> list[Any]:
        """The asker's earlier conversations, as they are kept."""
        conversations = own_value(before, request)
        return list(conversations) if isinstance(conversations, list) else []

    # ---- which model

    def arrive(request: gr.Request, kept: Any, before: Any, *who: Any) -> list[Any]:
        """The lists as they are now, and the conversations that the browser has kept."""
        now, picked = conversation_tree.read(own_value(kept, request)), ModelSelection(*who)
        if not picked.ids:
            spoke = chat_models.of_voices(
                now.last_models(), picked if picked.base else chat_models.first(picked.writer)
            )
            picked = spoke if not picked.base else picked._replace(ids=spoke.ids)
        return [
            gr.Timer(active=True), *chat_models.updates(picked), *chat_models.look(picked), *conversation_updates(now, picked),
            *earlier_updates(own_conversations(before, request)),
        ]  # fmt: skip

    def load_model(request: gr.Request, *who: Any) -> list[Any]:
        try:
            server = servers.start(workplace, chat_models.choice(ModelSelection(*who)), by=user(request))
        except Refusal as refusal:
            return [notices.refused(refusal.problems, words), *[gr.skip()] * len(look_at)]
        return [gr.skip(), chat_models.held(server), *chat_models.loading(server)]

    def unload_model(*who: Any) -> list[Any]:
        if server := chat_models.server(ModelSelection(*who)):
            servers.end(server)
        return [notices.toast(words("chat-unloaded")), *chat_models.look(ModelSelection(*who))]

    # ---- the conversation

    def conversation_updates(
        now: conversation_tree.Conversation, picked: ModelSelection, answering: bool = False
    ) -> list[Any]:
        """The conversation on the page and as a file, and whether a tool's result may follow."""
        page = answers.past_turns(now, chat_models.titles(picked), words, answering)
        called = not answering and _called_tool_last(now)
        return [
            page or ("" if answering else answers.empty_html(words)), export_html(now, words), gr.update(visible=called, value=True),
        ]  # fmt: skip

    def asking_buttons(answering: bool) -> list[Any]:
        """Send and Stop."""
        return [gr.update(visible=not answering), gr.update(visible=answering)]

    def ask(
        request: gr.Request, kept: Any, now: conversation_tree.Conversation, question: conversation_tree.Turn, picked: ModelSelection, reward_model: str | None, *held: Any
    ) -> Iterator[list[Any]]:  # fmt: skip
        """The answers to a turn that follows the tip of `now`, as they come; at last the conversation with them in it.
        Answers into `outputs`."""
        before, named = now.turns_on_path(), chat_models.titles(picked)

        def begun(server: Server) -> list[Any]:
            # Whoever leaves the page now finds the question when he comes back.
            saved = with_own_value(kept, request, conversation_tree.as_plain(now.add(question)))
            return [
                "", "", saved, *conversation_updates(now, picked, answering=True), answers.waiting_turn(question, words("chat-loading-first"), words),
                chat_models.held(server), *asking_buttons(True), *chat_models.loading(server),
            ]  # fmt: skip

        def ended(
            wrong: Sequence[Problem],
            now: conversation_tree.Conversation,
            prompt_value: Any,
            server: Server | None,
        ) -> list[Any]:
            """`left`: what stands in the box."""
            return [
                notices.refused(wrong, words) if wrong else gr.skip(), prompt_value, with_own_value(kept, request, conversation_tree.as_plain(now)),
                *conversation_updates(now, picked), "", chat_models.held(server) if server else gr.skip(), *asking_buttons(False),
                *chat_models.loading(server),
            ]  # fmt: skip

        try:
            options = _generation_settings(*held) | {"request_id": request.session_hash}
            if question.tools:
                options["tools"] = question.tools
            choice = chat_models.choice(picked)
            spoken_to = _models_to_ask([choice.name, *choice.adapters], question, before)
            server = servers.start(workplace, choice, by=user(request))
            yield begun(server)
            servers.wait(server)
            chat_client.add(server, choice.adapters)
            prompts = {
                voice: conversation_tree.messages_before_answer(before, voice, question)
                for voice in spoken_to
            }
            replies: list[chat_client.Answer] = []
            for replies in chat_client.ask(server, prompts, options):
                replies = [_with_model_title(reply, named) for reply in replies]
                written = answers.live_turn(question, replies, named, words)
                yield [written if part is live else gr.skip() for part in outputs]
        except Refusal as refusal:
            wrong = boxes.with_labels(refusal.problems, SETTING_LABELS, words)
            yield ended(
                wrong,
                conversation_tree.read(own_value(kept, request)),
                question.question,
                chat_models.server(picked),
            )
            return
        scores, wrong = reward_scores(server, reward_model, prompts, replies)
        wrong = [reply.problem for reply in replies if reply.problem] + wrong
        turn = conversation_tree.answered_turn(question, replies, scores)
        if turn:
            yield ended(wrong[:1], now.add(turn), gr.skip(), server)
        else:
            yield ended(
                wrong[:1], conversation_tree.read(own_value(kept, request)), question.question, server
            )

    def reward_scores(
        server: Server,
        reward_model: str | None,
        prompts: Mapping[str, Any],
        replies: Sequence[chat_client.Answer],
    ) -> tuple[dict[str, float], list[Problem]]:
        """What the chosen reward model thinks of each answer, if there is one; and what kept it from thinking."""
        whole = {
            reply.model: [
                *prompts[reply.model],
                conversation_tree.Reply(reply.text, calls=reply.calls).message,
            ]
            for reply in replies
            if reply.text or reply.calls
        }
        if not reward_model or not whole:
            return {}, []
        try:
            return chat_client.score(server, saves, reward_model, whole), []
        except Refusal as refusal:
            return {}, refusal.problems

    def send_question(
        request: gr.Request, typed: str, kept: Any, base: str | None, ids: Sequence[str] | None, writer: str, system: str,
        tools: str, is_result: bool, remember: bool, *rest: Any, again: bool = False,
    ) -> Iterator[list[Any]]:  # fmt: skip
        """Ask what is typed or, if `again`, what was asked last, as the settings are now."""
        now, picked = conversation_tree.read(own_value(kept, request)), ModelSelection(base, ids, writer)
        idle = [gr.skip()] * len(outputs)
        if again and now.tip >= 0:
            last = now.turns[now.tip]
            now, question_text, result = now.without_tip(), last.question, last.role == "tool"
        else:
            question_text, result = (
                "" if again else (typed or "").strip(),
                bool(is_result) and _called_tool_last(now),
            )
        if not question_text:
            yield idle
            return
        try:
            # What the page does not show, where no template knows tools, is not sent.
            tool_definitions = (
                conversation_tree.parse_tools(tools or "") if chat_models.know(TOOLS_VARIABLE, picked) else ()
            )
        except Refusal as refusal:
            yield [notices.refused(refusal.problems, words), *idle[1:]]
            return
        question = conversation_tree.Turn(
            question_text, system or "", alone=not remember and not result, role="tool" if result else "user", tools=tool_definitions
        )  # fmt: skip
        yield from ask(request, kept, now, question, picked, *rest)

    def ask_again(request: gr.Request, *held: Any) -> Iterator[list[Any]]:
        yield from send_question(request, *held, again=True)

    def stop_answers(request: gr.Request) -> None:
        for server in servers.servers(saves):
            if server.state == "ready":
                chat_client.cancel(server, request.session_hash)

    def clear_conversation(request: gr.Request, kept: Any, *who: Any) -> list[Any]:
        return [
            with_own_value(kept, request, None),
            *conversation_updates(conversation_tree.Conversation(), ModelSelection(*who)),
        ]

    def turn_clicked(event: gr.EventData, request: gr.Request, kept: Any, *who: Any) -> list[Any]:
        """What was clicked at a turn: a mark at an answer, and a row of it in the data folder; the question back in the
        box; another branch. Answers into told, prompt, history and the conversation."""
        now, what = conversation_tree.read(own_value(kept, request)), str(event._data.get("do", ""))
        number, voice = str(event._data.get("turn", "")), str(event._data.get("voice", ""))
        place = int(number) if number.isdecimal() and len(number) < 6 else -1
        message, prompt_value = gr.skip(), gr.skip()
        try:
            if what in ("edit", "go") and not 0 <= place < len(now.turns):
                raise Refusal(problem("rating-unknown"))
            if what == "edit":
                now, prompt_value = now.before(place), now.turns[place].question
            elif what == "go":
                now = now.to_newest_tip(place)
            elif what == "better":
                now, message = (
                    conversation_tree.prefer(workplace.data, now, place, voice),
                    conversation_tree.PREFERENCES_DATASET,
                )
            elif what in ("up", "down"):
                now, message = (
                    conversation_tree.rate(workplace.data, now, place, voice, up=what == "up"),
                    conversation_tree.RATINGS_DATASET,
                )
        except Refusal as refusal:
            return [notices.refused(refusal.problems, words), *[gr.skip()] * 5]
        message = notices.toast(words("rated", name=message)) if isinstance(message, str) else message
        return [
            message,
            prompt_value,
            with_own_value(kept, request, conversation_tree.as_plain(now)),
            *conversation_updates(now, ModelSelection(*who)),
        ]

    # ---- earlier conversations

    def earlier_updates(conversations: list[Any]) -> list[Any]:
        return [
            gr.update(visible=bool(conversations)),
            answers.conversation_list(list(map(conversation_tree.read, conversations)), words),
        ]

    def start_new(request: gr.Request, kept: Any, before: Any, *who: Any) -> list[Any]:
        """A new conversation; the one that was is among the earlier ones."""
        later = conversation_tree.with_archived(
            own_conversations(before, request), conversation_tree.read(own_value(kept, request))
        )
        return [
            *clear_conversation(request, kept, *who),
            with_own_value(before, request, later),
            *earlier_updates(later),
        ]

    def open_earlier(
        event: gr.EventData, request: gr.Request, kept: Any, before: Any, *who: Any
    ) -> list[Any]:
        """An earlier conversation goes on, with those who answered in it; or goes for good."""
        conversations, number = own_conversations(before, request), str(event._data.get("turn", ""))
        place = int(number) if number.isdecimal() and len(number) < 6 else len(conversations)
        now, picked = conversation_tree.read(own_value(kept, request)), ModelSelection(*who)
        what = event._data.get("do")
        if place < len(conversations) and what in ("open", "drop"):
            gone = conversation_tree.read(conversations.pop(place))
            if what == "open":
                conversations, now = conversation_tree.with_archived(conversations, now), gone
                picked = chat_models.of_voices(now.last_models(), picked)
        return [
            *chat_models.updates(picked), with_own_value(kept, request, conversation_tree.as_plain(now)), *conversation_updates(now, picked), with_own_value(before, request, conversations),
            *earlier_updates(conversations),
        ]  # fmt: skip

    ask_inputs = [prompt, history, *who, system, tools, result, remember, reward_model, *settings]
    gr.on(
        [send.click, prompt.submit],
        send_question,
        ask_inputs,
        outputs,
        **concurrent("answers", MAX_CONCURRENT_ANSWERS),
    )
    again.click(ask_again, ask_inputs, outputs, **concurrent("answers", MAX_CONCURRENT_ANSWERS))
    stop.click(stop_answers, None, None, **QUIET)
    clear.click(clear_conversation, [history, *who], [history, *conversation], **QUIET)
    past.select(turn_clicked, [history, *who], [message_html, prompt, history, *conversation], **QUIET)
    shelved = [history, *conversation, earlier, earlier_fold, earlier_list]
    new.click(start_new, [history, earlier, *who], shelved, **QUIET)
    earlier_list.select(open_earlier, [history, earlier, *who], [*model, *shelved], **QUIET)
    greedy.change(lambda on: gr.update(visible=not on), greedy, chance, **QUIET)
    look_at = [held, load, unload]
    look = (lambda *who: chat_models.look(ModelSelection(*who)), who, look_at)
    gr.on(
        [base.input, engine.input], lambda *who: chat_models.updates(ModelSelection(*who)), who, model, **QUIET
    ).then(*look, **QUIET)  # fmt: skip
    adapters.input(
        lambda *who: chat_models.updates(chat_models.of_run(ModelSelection(*who))), who, model, **QUIET
    ).then(*look, **QUIET)  # fmt: skip
    timer.tick(lambda *who: chat_models.look(ModelSelection(*who)), who, look_at, **QUIET)
    load.click(load_model, who, [message_html, *look_at], **QUIET)
    unload.click(unload_model, who, [message_html, *look_at], **QUIET)
    open_outputs = [timer, *model, *look_at, *conversation, earlier_fold, earlier_list]

    def pick(run: Run) -> tuple[str, list[str]]:
        """Raises Refusal if there is nothing to talk to."""
        choice = servers.choose(workplace, "", [run.id])
        return str(choice.base), list(choice.adapters)

    return ChatTab(timer, arrive, [history, earlier, *who], open_outputs, pick)


def export_html(now: conversation_tree.Conversation, words: Words) -> str:
    """The conversation as JSON lines, to save."""
    if now.tip < 0:
        return ""
    return (
        f'<pre id="talk-jsonl" hidden>{escape(conversation_tree.jsonl(now))}</pre><button type="button" class="plain" '
        f'data-save="#talk-jsonl" data-name="chat.jsonl">{escape(words("chat-export"))}</button>'
    )


def _generation_settings(
    greedy: bool, temperature: Any, top_p: Any, top_k: Any, seed: Any, longest: Any, penalty: Any, thinking: bool
) -> dict[str, Any]:  # fmt: skip
    """The controls as the server takes them. An empty one is left to the model's own settings. Raises Refusal."""
    chance = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    drawn = {"temperature": 0} if greedy else chance  # what greedy hides is not looked at
    typed = boxes.typed_values(drawn | {"max_tokens": longest, "repetition_penalty": penalty})
    return GenerationSettings.read(typed).model_dump(exclude_unset=True) | {"thinking": bool(thinking)}


def _models_to_ask(
    model_ids: Sequence[str], question: conversation_tree.Turn, before: Sequence[conversation_tree.Turn]
) -> list[str]:
    """Who is asked: all, but the result of a tool is for those who called one. Raises Refusal if none of them is here."""
    if question.role == "user":
        return list(model_ids)
    called = [
        model_id
        for model_id in model_ids
        for turn in before[-1:]
        if model_id in turn.said and turn.said[model_id].calls
    ]
    if not called:
        raise Refusal(problem("chat-nobody-called"))
    return called


def _called_tool_last(now: conversation_tree.Conversation) -> bool:
    """Whether a tool was called last."""
    return any(reply.calls for turn in now.turns_on_path()[-1:] for reply in turn.said.values())


def _with_model_title(answer: chat_client.Answer, titles: Mapping[str, str]) -> chat_client.Answer:
    """The answer, with a voice that its problem speaks of called as on the page."""
    voice = answer.problem.values.get("voice") if answer.problem else None
    if not voice:
        return answer
    values = {**answer.problem.values, "voice": titles.get(voice, voice)}
    return replace(answer, problem=replace(answer.problem, values=values))
