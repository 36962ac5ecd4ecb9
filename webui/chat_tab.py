"""The Chat tab: one question, and the answers of a base model and of adapters of it side by side.

Handlers hold nothing: the conversation is kept by the browser, and the model by a server that `engine.chat` finds
again. An answer comes through a handler that goes on until it ends; Stop asks the server to end it.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from engine import asking, chat, talk
from engine.chat import Choice, Server
from engine.manner import Manner
from engine.models import chat_template, identity
from engine.problems import Problem, Refusal
from engine.results import Result, results
from engine.runs import Run
from engine.vllm import ENGINES, program
from engine.workplace import Workplace
from webui import answers, boxes, notices
from webui.events import QUIET, going
from webui.words import Words

SECONDS = 2  # between two looks at the chosen model
ADAPTERS = 3  # asked at once, beside the base
AT_ONCE = 12  # answers that this page has in the making for all its readers: each holds a thread
# What each setting of Manner is called here.
NAMES = {
    "temperature": "chat-temperature", "top_p": "chat-top-p", "top_k": "chat-top-k", "seed": "chat-seed",
    "max_tokens": "chat-longest", "repetition_penalty": "chat-penalty",
}  # fmt: skip
THINKING = "enable_thinking"  # what templates of reasoning models call the switch

RATE_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-rate]');
  if (button && !button.disabled) trigger('select', { ...button.dataset });
});
"""
# Who reads at the end of the page stays there while it grows.
LIVE_JS = """
watch('value', () => {
  const page = document.scrollingElement;
  if (page.scrollHeight - innerHeight - page.scrollTop < 300) page.scrollTo({ top: page.scrollHeight });
});
"""


@dataclass(frozen=True)
class ChatTab:
    """The parts of the tab that the rest of the page is wired to."""

    timer: gr.Timer
    arrive: Callable[..., list[Any]]  # answers the base and the adapters into `shown`
    given: list[Any]
    shown: list[Any]
    pick: Callable[[Run], tuple[str, list[str]]]  # the base and the adapters to talk with a run


def build(
    words: Words,
    workplace: Workplace,
    told: gr.HTML,
    user: Callable[[gr.Request], str],
    models: Callable[[], list[tuple[str, str]]],
) -> ChatTab:
    """The tab in the current context. `models` lists what can be a base, as (label, folder)."""
    saves = workplace.saves

    def box(what: str, value: str = "", **about: Any) -> gr.Textbox:
        code = NAMES[what]
        return boxes.number(value, label=words(code), elem_id=code, **about)

    history = gr.BrowserState([], storage_key="athanor-talk", secret="athanor")
    timer = gr.Timer(SECONDS, active=False)
    with gr.Row(elem_classes="split chat", equal_height=False):
        with gr.Column(scale=8, min_width=420, elem_classes="talk"):
            past = gr.HTML(answers.nothing(words), js_on_load=RATE_JS, elem_id="talk")
            live = gr.HTML(js_on_load=LIVE_JS, elem_id="live")
            with gr.Column(elem_classes="ask"):
                prompt = gr.Textbox(
                    placeholder=words("chat-prompt"), show_label=False, container=False, lines=1, max_lines=10,
                    elem_id="prompt", label=words("chat-prompt"),
                )  # fmt: skip
                with gr.Row(elem_classes="buttons"):
                    send = gr.Button(words("chat-send"), variant="primary", size="sm", elem_id="send")
                    stop = gr.Button(words("chat-stop"), size="sm", visible=False, elem_id="chat-stop")
                    again = gr.Button(words("chat-again"), size="sm", elem_id="chat-again")
                    edit = gr.Button(words("chat-edit"), size="sm", elem_id="chat-edit")
                    clear = gr.Button(words("chat-clear"), size="sm", elem_id="chat-clear")
                    export = gr.HTML(elem_id="chat-export")
        with gr.Column(scale=4, min_width=300, elem_classes="side"), gr.Column(elem_classes="card chat-card"):
            base = gr.Dropdown(
                [], value=None, label=words("chat-base"), elem_classes="field", elem_id="chat-base",
                allow_custom_value=True, interactive=True,
            )  # fmt: skip
            adapters = gr.Dropdown(
                [], value=[], label=words("chat-adapters"), info=words("chat-adapters-help"), multiselect=True,
                max_choices=ADAPTERS, elem_classes="field", elem_id="chat-adapters", interactive=True,
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
            judge = gr.Dropdown(
                [], value=None, label=words("chat-judge"), info=words("chat-judge-help"), visible=False,
                elem_classes="field", elem_id="chat-judge", interactive=True,
            )  # fmt: skip
            with gr.Accordion(words("chat-program"), open=False, elem_classes="fold"):
                text = gr.HTML()

    settings = [greedy, temperature, top_p, top_k, seed, longest, penalty, thinking]
    buttons = [send, stop, load, unload]
    outputs = [told, prompt, history, past, live, export, held, *buttons]
    who = [base, adapters, engine]

    def chosen(base: str | None, ids: Sequence[str] | None, writer: str) -> Choice:
        return chat.choose(workplace, base or "", list(ids or ())[:ADAPTERS], writer or ENGINES[0])

    def titles(choice: Choice | None = None) -> dict[str, str]:
        """What each voice is called: a run by its name."""
        named = {one.run.id: one.run.title for one in results(saves)}
        return named | ({choice.name: words("chat-base-named", name=choice.name)} if choice else {})

    # ---- which model

    def there(base: str | None, ids: Sequence[str] | None) -> Server | None:
        """The server of the chosen model, whatever engine is chosen now and whether that would take it."""
        try:
            return chat.find(saves, chosen(base, ids, ENGINES[0]))
        except Refusal:
            return None

    def model_buttons(server: Server | None, answering: bool = False) -> list[Any]:
        alive = server is not None and server.alive
        failed = server is not None and server.state == "failed"
        label = words("chat-restart" if failed else "chat-load")
        return [
            gr.update(visible=not answering), gr.update(visible=answering),
            gr.update(visible=not alive, value=label), gr.update(visible=alive),
        ]  # fmt: skip

    def held_html(server: Server | None) -> str:
        others = [one for one in chat.servers(saves) if not server or one.path != server.path]
        since = time.time() - server.given["started"] if server else 0
        return answers.status(server, others, since, words)

    def look(base: str | None, ids: Sequence[str] | None, writer: str) -> list[Any]:
        """What is true of the chosen model now."""
        try:
            server = chat.find(saves, chosen(base, ids, writer))
        except Refusal as refusal:
            wrong = notices.listed(refusal.problems, words) if base or ids else ""
            return [wrong, *model_buttons(there(base, ids))[2:]]
        return [held_html(server), *model_buttons(server)[2:]]

    def arrive(kept: Any, base: str | None, ids: Sequence[str] | None, writer: str) -> list[Any]:
        """The lists as they are now, and the conversation that the browser has kept."""
        known, now = models(), talk.read(kept)
        base = base or next((folder for _, folder in known), None)
        fits = adapters_of(base)
        wanted = ids or (list(now[-1].said) if now else [])
        ids = [one.run.id for one in fits if one.run.id in wanted]
        return [
            gr.Timer(active=True), gr.update(choices=known, value=base), *of_base(base, ids, writer), *look(base, ids, writer),
            *drawn(now, base, ids, writer),
        ]  # fmt: skip

    def adapters_of(base: str | None) -> list[Result]:
        """What finished runs have left that can be talked to on this base."""
        return [one for one in results(saves) if one.adapter and one.stage != "rm" and _same(one, base)]

    def of_base(base: str | None, ids: Sequence[str] | None, writer: str) -> list[Any]:
        """The adapters of a base, whether it can think aloud, and how a program would ask the same."""
        fits = adapters_of(base)
        known = [(f"{one.run.title} · {words.choice('stage', one.stage)}", one.run.id) for one in fits]
        kept = [one for one in fits if one.run.id in (ids or ())]
        folders = [Path(base or ""), *(one.folder for one in kept)]
        thinks = any(THINKING in (chat_template(folder) or ("", ""))[1] for folder in folders)
        chosen_ids = [one.run.id for one in kept]
        return [
            gr.update(choices=known, value=chosen_ids), gr.update(visible=thinks), judge_update(),
            notices.code("serve-text", _command(base, chosen_ids, writer, saves), words),
        ]  # fmt: skip

    def judge_update() -> Any:
        known = [(one.run.title, one.run.id) for one in chat.judges(saves)]
        return gr.update(choices=[(words("chat-judge-none"), ""), *known], visible=bool(known))

    def loaded(request: gr.Request, base: str | None, ids: Sequence[str] | None, writer: str) -> list[Any]:
        try:
            server = chat.start(workplace, chosen(base, ids, writer), by=user(request))
        except Refusal as refusal:
            return [notices.refused(refusal.problems, words), *[gr.skip()] * 3]
        return [gr.skip(), held_html(server), *model_buttons(server)[2:]]

    def unloaded(base: str | None, ids: Sequence[str] | None, writer: str) -> list[Any]:
        if server := there(base, ids):
            chat.end(server)
        return [notices.toast(words("chat-unloaded")), *look(base, ids, writer)]

    # ---- the conversation

    def drawn(now: talk.Talk, base: str | None, ids: Sequence[str] | None, writer: str) -> list[Any]:
        """The conversation on the page, and as a file."""
        try:
            named = titles(chosen(base, ids, writer))
        except Refusal:
            named = titles()
        return [answers.past(now, named, words) or answers.nothing(words), export_html(now, words)]

    def ask(
        request: gr.Request, question: str, now: talk.Talk, base: str | None, ids: Sequence[str] | None, writer: str, system: str,
        judge: str | None, remember: bool, *held: Any,
    ) -> Iterator[list[Any]]:  # fmt: skip
        """The answers as they come; at last the conversation with them in it. Answers into `outputs`."""
        resting = [gr.skip()] * len(outputs)

        def shown(live: Any, server: Server, first: bool = False) -> list[Any]:
            begun = [gr.skip(), "", gr.skip(), *drawn(now, base, ids, writer)[:1]] if first else resting[:4]
            status = [held_html(server), *model_buttons(server, answering=True)] if first else resting[:5]
            return [*begun, live, gr.skip(), *status]

        try:
            given = _given(*held) | {"request_id": request.session_hash}
            choice = chosen(base, ids, writer)
            server = chat.start(workplace, choice, by=user(request))
            yield shown(answers.waiting(question, words("chat-loading-first")), server, first=True)
            chat.wait(server)
            asking.add(server, choice.adapters)
            yield shown(gr.skip(), server, first=True)
            named, voices = titles(choice), [choice.name, *choice.adapters]
            asked = {
                voice: [
                    *talk.messages(now if remember else (), voice, system),
                    {"role": "user", "content": question},
                ]
                for voice in voices
            }
            told = []
            for told in asking.ask(server, asked, given):
                yield shown(answers.live(question, told, named, words), server)
        except Refusal as refusal:
            server = there(base, ids)
            yield [
                notices.refused(boxes.named(refusal.problems, NAMES, words), words), question, gr.skip(), *drawn(now, base, ids, writer)[:1], "", gr.skip(),
                held_html(server) if server else gr.skip(), *model_buttons(server),
            ]  # fmt: skip
            return
        scores, wrong = judged(server, judge, asked, told)
        wrong = [one.problem for one in told if one.problem] + wrong
        turn = talk.turn(question, system or "", told, scores, alone=not remember)
        now = (*now, turn) if turn else now
        page, file = drawn(now, base, ids, writer)
        yield [
            notices.refused(wrong[:1], words) if wrong else gr.skip(), gr.skip() if turn else question, talk.kept(now), page, "",
            file, held_html(server), *model_buttons(server),
        ]  # fmt: skip

    def judged(
        server: Server, judge: str | None, asked: Mapping[str, Any], told: Sequence[asking.Answer]
    ) -> tuple[dict[str, float], list[Problem]]:
        """What the chosen reward model thinks of each answer, if there is one; and what kept it from thinking."""
        whole = {
            one.voice: [*asked[one.voice], {"role": "assistant", "content": one.text}]
            for one in told
            if one.text
        }
        if not judge or not whole:
            return {}, []
        try:
            return asking.score(server, saves, judge, whole), []
        except Refusal as refusal:
            return {}, refusal.problems

    def sent(request: gr.Request, question: str, kept: Any, *rest: Any) -> Iterator[list[Any]]:
        if (question or "").strip():
            yield from ask(request, question.strip(), talk.read(kept), *rest)
        else:
            yield [gr.skip()] * len(outputs)

    def once_more(request: gr.Request, _question: str, kept: Any, *rest: Any) -> Iterator[list[Any]]:
        now = talk.read(kept)
        if now:
            yield from ask(request, now[-1].question, now[:-1], *rest)
        else:
            yield [gr.skip()] * len(outputs)

    def stopped(request: gr.Request) -> None:
        for server in chat.servers(saves):
            if server.state == "ready":
                asking.cancel(server, request.session_hash)

    def edited(
        question: str, kept: Any, base: str | None, ids: Sequence[str] | None, writer: str
    ) -> list[Any]:
        """The last question back in the box, its answers gone."""
        now = talk.read(kept)
        if not now:
            return [gr.skip()] * 4
        return [now[-1].question, talk.kept(now[:-1]), *drawn(now[:-1], base, ids, writer)]

    def cleared(base: str | None, ids: Sequence[str] | None, writer: str) -> list[Any]:
        return [[], *drawn((), base, ids, writer)]

    def rated(
        event: gr.EventData, kept: Any, base: str | None, ids: Sequence[str] | None, writer: str
    ) -> list[Any]:
        """A mark at an answer, and a row of it in the data folder."""
        now, what = talk.read(kept), str(event._data.get("rate", ""))
        number, voice = str(event._data.get("turn", "")), str(event._data.get("voice", ""))
        turn = int(number) if number.isdecimal() and len(number) < 6 else -1
        try:
            if what == "better":
                now, file = talk.prefer(workplace.data, now, turn, voice), talk.PAIRS
            else:
                now, file = talk.thumb(workplace.data, now, turn, voice, up=what == "up"), talk.THUMBS
        except Refusal as refusal:
            return [notices.refused(refusal.problems, words), *[gr.skip()] * 3]
        return [notices.toast(words("rated", name=file)), talk.kept(now), *drawn(now, base, ids, writer)]

    question = [prompt, history, *who, system, judge, remember, *settings]
    gr.on([send.click, prompt.submit], sent, question, outputs, **going("answers", AT_ONCE))
    again.click(once_more, question, outputs, **going("answers", AT_ONCE))
    stop.click(stopped, None, None, **QUIET)
    edit.click(edited, [prompt, history, *who], [prompt, history, past, export], **QUIET)
    clear.click(cleared, who, [history, past, export], **QUIET)
    past.select(rated, [history, *who], [told, history, past, export], **QUIET)
    greedy.change(lambda on: gr.update(visible=not on), greedy, chance, **QUIET)
    look_at = [held, load, unload]
    gr.on(
        [base.input, adapters.input, engine.input], of_base, who, [adapters, thinking, judge, text], **QUIET
    ).then(look, who, look_at, **QUIET)
    timer.tick(look, who, look_at, **QUIET)
    load.click(loaded, who, [told, *look_at], **QUIET)
    unload.click(unloaded, who, [told, *look_at], **QUIET)
    shown = [timer, base, adapters, thinking, judge, text, *look_at, past, export]

    def pick(run: Run) -> tuple[str, list[str]]:
        """Raises Refusal if there is nothing to talk to."""
        choice = chat.choose(workplace, "", [run.id])
        return str(choice.base), list(choice.adapters)

    return ChatTab(timer, arrive, [history, *who], shown, pick)


def export_html(now: talk.Talk, words: Words) -> str:
    """The conversation as JSON lines, to save."""
    if not now:
        return ""
    return (
        f'<pre id="talk-jsonl" hidden>{escape(talk.jsonl(now))}</pre><button type="button" class="plain" '
        f'data-save="#talk-jsonl" data-name="chat.jsonl">{escape(words("chat-export"))}</button>'
    )


def _given(
    greedy: bool, temperature: Any, top_p: Any, top_k: Any, seed: Any, longest: Any, penalty: Any, thinking: bool
) -> dict[str, Any]:  # fmt: skip
    """The controls as the server takes them. An empty one is left to the model's own settings. Raises Refusal."""
    chance = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    drawn = {"temperature": 0} if greedy else chance  # what greedy hides is not looked at
    typed = boxes.given(drawn | {"max_tokens": longest, "repetition_penalty": penalty})
    return Manner.read(typed).model_dump(exclude_unset=True) | {"thinking": bool(thinking)}


def _same(one: Result, base: str | None) -> bool:
    return identity(one.run.spec.model.model_name_or_path) == identity(base or "")


def _command(base: str | None, ids: Sequence[str], writer: str, saves: Path) -> str:
    """How a program would be served the same."""
    words = ["python", "-m", "engine", "serve", *(ids or ["--base", base or "MODEL"])]
    words += ["--engine", writer] if writer != ENGINES[0] else []
    return shlex.join(words + (["--saves", str(saves)] if saves != Workplace().saves else []))
