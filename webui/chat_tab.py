"""The Chat tab: one question, and the answers of a base model and of adapters of it side by side.

Handlers hold nothing: the conversation is kept by the browser, and the model by a server that `engine.chat` finds
again. An answer comes through a handler that goes on until it ends; Stop asks the server to end it.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from engine import asking, chat, talk
from engine.chat import Choice, Server
from engine.manner import Manner
from engine.models import chat_template, identity
from engine.problems import Problem, Refusal, problem
from engine.results import Result, results
from engine.results import titles as called
from engine.runs import Run
from engine.vllm import ENGINES, program
from engine.workplace import Workplace
from webui import answers, boxes, notices
from webui.events import QUIET, going
from webui.words import Words

SECONDS = 2  # between two looks at the chosen model
ADAPTERS = 15  # asked at once, beside the base
AT_ONCE = 12  # answers that this page has in the making for all its readers: each holds a thread
# What each setting of Manner is called here.
NAMES = {
    "temperature": "chat-temperature", "top_p": "chat-top-p", "top_k": "chat-top-k", "seed": "chat-seed",
    "max_tokens": "chat-longest", "repetition_penalty": "chat-penalty",
}  # fmt: skip
THINKING = "enable_thinking"  # what templates of reasoning models call the switch
TOOLS = "tools"  # what templates call the tools that they are given

DO_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-do]');
  if (!button || button.disabled) return;
  trigger('select', { ...button.dataset });
  if (button.dataset.do === 'edit') document.querySelector('#prompt textarea')?.focus();
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

    # Each holds what is each user's own, by name: several may share a browser.
    history = gr.BrowserState({}, storage_key="athanor-talk", secret="athanor")
    earlier = gr.BrowserState({}, storage_key="athanor-talks", secret="athanor")
    timer = gr.Timer(SECONDS, active=False)
    with gr.Row(elem_classes="split chat", equal_height=False):
        with gr.Column(scale=8, min_width=420, elem_classes="talk"):
            past = gr.HTML(answers.nothing(words), js_on_load=DO_JS, elem_id="talk")
            live = gr.HTML(js_on_load=LIVE_JS, elem_id="live")
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
            with gr.Accordion(
                words("chat-tools"), open=False, visible=False, elem_classes="fold", elem_id="chat-tools-fold"
            ) as tools_fold:
                tools = gr.Textbox(
                    label=words("chat-tools"), show_label=False, info=words("chat-tools-help"), placeholder=talk.TOOL, lines=4,
                    max_lines=16, elem_classes="field mono", elem_id="chat-tools",
                )  # fmt: skip
            with gr.Accordion(
                words("chat-earlier"), open=False, visible=False, elem_classes="fold", elem_id="chat-earlier"
            ) as shelf_fold:
                shelf = gr.HTML(js_on_load=DO_JS, elem_id="chat-shelf")
            with gr.Accordion(words("chat-program"), open=False, elem_classes="fold"):
                text = gr.HTML()

    settings = [greedy, temperature, top_p, top_k, seed, longest, penalty, thinking]
    buttons = [send, stop, load, unload]
    conversation = [past, export, result]
    outputs = [told, prompt, history, *conversation, live, held, *buttons]
    who = [base, adapters, engine]

    def mine(kept: Any, request: gr.Request) -> Any:
        """What of `kept` is the asker's own."""
        return kept.get(user(request)) if isinstance(kept, dict) else None

    def keep(kept: Any, request: gr.Request, value: Any) -> dict[str, Any]:
        return {**(kept if isinstance(kept, dict) else {}), user(request): value}

    def chosen(base: str | None, ids: Sequence[str] | None, writer: str) -> Choice:
        return chat.choose(workplace, base or "", list(ids or ())[:ADAPTERS], writer or ENGINES[0])

    def titles(choice: Choice | None = None) -> dict[str, str]:
        """What each voice is called: a run by its name."""
        named = called(results(saves))
        if choice:
            named[choice.name] = words("chat-base-named", name=named.get(choice.name, choice.name))
        return named

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
        return answers.status(server, others, titles(), since, words)

    def look(base: str | None, ids: Sequence[str] | None, writer: str) -> list[Any]:
        """What is true of the chosen model now."""
        try:
            server = chat.find(saves, chosen(base, ids, writer))
        except Refusal as refusal:
            wrong = notices.listed(refusal.problems, words) if base or ids else ""
            return [wrong, *model_buttons(there(base, ids))[2:]]
        return [held_html(server), *model_buttons(server)[2:]]

    def arrive(
        request: gr.Request, kept: Any, before: Any, base: str | None, ids: Sequence[str] | None, writer: str
    ) -> list[Any]:
        """The lists as they are now, and the conversations that the browser has kept."""
        known, now = models(), talk.read(mine(kept, request))
        wanted = ids or now.voices()
        base = base or _spoken_on(results(saves), wanted) or next((folder for _, folder in known), None)
        fits = adapters_of(base)
        ids = [one.run.id for one in fits if one.run.id in wanted]
        return [
            gr.Timer(active=True), gr.update(choices=known, value=base), *of_base(base, ids, writer), *look(base, ids, writer),
            *drawn(now, base, ids, writer), *shelf_shown(mine(before, request)),
        ]  # fmt: skip

    def adapters_of(base: str | None) -> list[Result]:
        """What finished runs have left that can be talked to on this base."""
        return [one for one in results(saves) if one.adapter and one.stage != "rm" and _same(one, base)]

    def of_base(base: str | None, ids: Sequence[str] | None, writer: str) -> list[Any]:
        """The adapters of a base, whether it can think aloud and use tools, and how a program would ask the same."""
        fits = adapters_of(base)
        named = titles()
        known = [(f"{named[one.run.id]} · {words.choice('stage', one.stage)}", one.run.id) for one in fits]
        kept = [one for one in fits if one.run.id in (ids or ())]
        chosen_ids = [one.run.id for one in kept]
        thinks, uses = (gr.update(visible=speaks_of(word, base, kept)) for word in (THINKING, TOOLS))
        return [
            gr.update(choices=known, value=chosen_ids), thinks, uses, judge_update(),
            notices.code("serve-text", _command(base, chosen_ids, writer, saves), words),
        ]  # fmt: skip

    def speaks_of(word: str, base: str | None, kept: Sequence[Result]) -> bool:
        """Whether a chat template of what is chosen has the `word`."""
        folders = [Path(base or ""), *(one.folder for one in kept)]
        return any(word in (chat_template(folder) or ("", ""))[1] for folder in folders)

    def judge_update() -> Any:
        named = titles()
        known = [(named[one.run.id], one.run.id) for one in chat.judges(saves)]
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

    def drawn(
        now: talk.Talk, base: str | None, ids: Sequence[str] | None, writer: str, answering: bool = False
    ) -> list[Any]:
        """The conversation on the page and as a file, and whether a tool's result may follow."""
        try:
            named = titles(chosen(base, ids, writer))
        except Refusal:
            named = titles()
        page = answers.past(now, named, words, answering) or ("" if answering else answers.nothing(words))
        called = not answering and any(one.calls for turn in now.told()[-1:] for one in turn.said.values())
        return [page, export_html(now, words), gr.update(visible=called, value=True)]

    def ask(
        request: gr.Request, kept: Any, now: talk.Talk, question: talk.Turn, base: str | None, ids: Sequence[str] | None,
        writer: str, judge: str | None, *held: Any,
    ) -> Iterator[list[Any]]:  # fmt: skip
        """The answers to a turn that follows the tip of `now`, as they come; at last the conversation with them in it.
        Answers into `outputs`."""
        resting = [gr.skip()] * len(outputs)
        before = now.told()

        def shown(live: Any, server: Server, first: bool = False) -> list[Any]:
            if not first:
                return [*resting[:6], live, *resting[:5]]
            page = drawn(now, base, ids, writer, answering=True)
            # Whoever leaves the page now finds the question when he comes back.
            asked = keep(kept, request, talk.kept(now.add(question)))
            return ["", "", asked, *page, live, held_html(server), *model_buttons(server, answering=True)]

        try:
            given = _given(*held) | {"request_id": request.session_hash}
            if question.tools:
                given["tools"] = question.tools
            choice = chosen(base, ids, writer)
            voices = _spoken_to([choice.name, *choice.adapters], question, before)
            server = chat.start(workplace, choice, by=user(request))
            yield shown(answers.waiting(question, words("chat-loading-first"), words), server, first=True)
            chat.wait(server)
            asking.add(server, choice.adapters)
            named, asked = titles(choice), {voice: talk.asked(before, voice, question) for voice in voices}
            told: list[asking.Answer] = []
            for told in asking.ask(server, asked, given):
                told = [_titled(one, named) for one in told]
                yield shown(answers.live(question, told, named, words), server)
        except Refusal as refusal:
            server = there(base, ids)
            yield [
                notices.refused(boxes.named(refusal.problems, NAMES, words), words), question.question, kept,
                *drawn(talk.read(mine(kept, request)), base, ids, writer), "", held_html(server) if server else gr.skip(),
                *model_buttons(server),
            ]  # fmt: skip
            return
        scores, wrong = judged(server, judge, asked, told)
        wrong = [one.problem for one in told if one.problem] + wrong
        turn = talk.turn(question, told, scores)
        now = now.add(turn) if turn else talk.read(mine(kept, request))
        yield [
            notices.refused(wrong[:1], words) if wrong else gr.skip(), gr.skip() if turn else question.question,
            keep(kept, request, talk.kept(now)), *drawn(now, base, ids, writer), "", held_html(server), *model_buttons(server),
        ]  # fmt: skip

    def judged(
        server: Server, judge: str | None, asked: Mapping[str, Any], told: Sequence[asking.Answer]
    ) -> tuple[dict[str, float], list[Problem]]:
        """What the chosen reward model thinks of each answer, if there is one; and what kept it from thinking."""
        whole = {
            one.voice: [*asked[one.voice], talk.Said(one.text, calls=one.calls).message]
            for one in told
            if one.text or one.calls
        }
        if not judge or not whole:
            return {}, []
        try:
            return asking.score(server, saves, judge, whole), []
        except Refusal as refusal:
            return {}, refusal.problems

    def sent(
        request: gr.Request, typed: str, kept: Any, base: str | None, ids: Sequence[str] | None, writer: str, system: str,
        tools: str, is_result: bool, remember: bool, *rest: Any, again: bool = False,
    ) -> Iterator[list[Any]]:  # fmt: skip
        """Ask what is typed or, if `again`, what was asked last, as the settings are now."""
        now, idle = talk.read(mine(kept, request)), [gr.skip()] * len(outputs)
        if again and now.turns and now.tip >= 0:
            last = now.turns[now.tip]
            now, asked, result = now.again(), last.question, last.role == "tool"
        else:
            called = any(one.calls for turn in now.told()[-1:] for one in turn.said.values())
            asked, result = "" if again else (typed or "").strip(), bool(is_result and called)
        if not asked:
            yield idle
            return
        try:
            kept_results = [one for one in adapters_of(base) if one.run.id in (ids or ())]
            # What the page does not show, where no template knows tools, is not sent.
            given = talk.tools_of(tools or "") if speaks_of(TOOLS, base, kept_results) else ()
        except Refusal as refusal:
            yield [notices.refused(refusal.problems, words), *idle[1:]]
            return
        question = talk.Turn(
            asked,
            system or "",
            alone=not remember and not result,
            role="tool" if result else "user",
            tools=given,
        )
        yield from ask(request, kept, now, question, base, ids, writer, *rest)

    def once_more(request: gr.Request, *held: Any) -> Iterator[list[Any]]:
        yield from sent(request, *held, again=True)

    def stopped(request: gr.Request) -> None:
        for server in chat.servers(saves):
            if server.state == "ready":
                asking.cancel(server, request.session_hash)

    def cleared(
        request: gr.Request, kept: Any, base: str | None, ids: Sequence[str] | None, writer: str
    ) -> list[Any]:
        return [keep(kept, request, None), *drawn(talk.Talk(), base, ids, writer)]

    def done(
        event: gr.EventData,
        request: gr.Request,
        kept: Any,
        base: str | None,
        ids: Sequence[str] | None,
        writer: str,
    ) -> list[Any]:
        """What was clicked at a turn: a mark at an answer, and a row of it in the data folder; the question back in the
        box; another branch. Answers into told, prompt, history and the conversation."""
        now, what = talk.read(mine(kept, request)), str(event._data.get("do", ""))
        number, voice = str(event._data.get("turn", "")), str(event._data.get("voice", ""))
        place = int(number) if number.isdecimal() and len(number) < 6 else -1
        said, asked = gr.skip(), gr.skip()
        try:
            if what in ("edit", "go") and not 0 <= place < len(now.turns):
                raise Refusal(problem("rating-unknown"))
            if what == "edit":
                now, asked = now.before(place), now.turns[place].question
            elif what == "go":
                now = now.onward(place)
            elif what == "better":
                now, said = talk.prefer(workplace.data, now, place, voice), talk.PAIRS
            else:
                now, said = talk.thumb(workplace.data, now, place, voice, up=what == "up"), talk.THUMBS
        except Refusal as refusal:
            return [notices.refused(refusal.problems, words), *[gr.skip()] * 5]
        said = notices.toast(words("rated", name=said)) if isinstance(said, str) else said
        return [said, asked, keep(kept, request, talk.kept(now)), *drawn(now, base, ids, writer)]

    # ---- earlier conversations

    def shelf_shown(before: Any) -> list[Any]:
        known = [talk.read(one) for one in before or ()]
        return [gr.update(visible=bool(known)), answers.shelf(known, words)]

    def put_away(
        request: gr.Request, kept: Any, before: Any, base: str | None, ids: Sequence[str] | None, writer: str
    ) -> list[Any]:
        """A new conversation; the one that was is among the earlier ones."""
        later = talk.shelved(mine(before, request) or (), talk.read(mine(kept, request)))
        return [*cleared(request, kept, base, ids, writer), keep(before, request, later), *shelf_shown(later)]

    def from_shelf(
        event: gr.EventData, request: gr.Request, kept: Any, before: Any, base: str | None, ids: Sequence[str] | None, writer: str
    ) -> list[Any]:  # fmt: skip
        """An earlier conversation goes on, or goes for good."""
        known, number = list(mine(before, request) or ()), str(event._data.get("turn", ""))
        place = int(number) if number.isdecimal() and len(number) < 6 else len(known)
        now, model = talk.read(mine(kept, request)), [gr.skip()] * 6
        if place < len(known):
            opened = talk.read(known.pop(place))
            if event._data.get("do") == "open":
                known, now = talk.shelved(known, now), opened
                # It goes on with those who answered in it.
                base = _spoken_on(results(saves), now.voices()) or base
                ids = [one.run.id for one in adapters_of(base) if one.run.id in now.voices()]
                model = [gr.update(value=base), *of_base(base, ids, writer)]
        return [
            *model, keep(kept, request, talk.kept(now)), *drawn(now, base, ids, writer), keep(before, request, known), *shelf_shown(known),
        ]  # fmt: skip

    question = [prompt, history, *who, system, tools, result, remember, judge, *settings]
    gr.on([send.click, prompt.submit], sent, question, outputs, **going("answers", AT_ONCE))
    again.click(once_more, question, outputs, **going("answers", AT_ONCE))
    stop.click(stopped, None, None, **QUIET)
    clear.click(cleared, [history, *who], [history, *conversation], **QUIET)
    past.select(done, [history, *who], [told, prompt, history, *conversation], **QUIET)
    kept = [history, *conversation, earlier, shelf_fold, shelf]
    new.click(put_away, [history, earlier, *who], kept, **QUIET)
    voices = [base, adapters, thinking, tools_fold, judge, text]
    shelf.select(from_shelf, [history, earlier, *who], [*voices, *kept], **QUIET)
    greedy.change(lambda on: gr.update(visible=not on), greedy, chance, **QUIET)
    look_at = [held, load, unload]
    gr.on(
        [base.input, adapters.input, engine.input],
        of_base,
        who,
        [adapters, thinking, tools_fold, judge, text],
        **QUIET,
    ).then(look, who, look_at, **QUIET)
    timer.tick(look, who, look_at, **QUIET)
    load.click(loaded, who, [told, *look_at], **QUIET)
    unload.click(unloaded, who, [told, *look_at], **QUIET)
    shown = [
        timer, base, adapters, thinking, tools_fold, judge, text, *look_at, *conversation, shelf_fold, shelf,
    ]  # fmt: skip

    def pick(run: Run) -> tuple[str, list[str]]:
        """Raises Refusal if there is nothing to talk to."""
        choice = chat.choose(workplace, "", [run.id])
        return str(choice.base), list(choice.adapters)

    return ChatTab(timer, arrive, [history, earlier, *who], shown, pick)


def export_html(now: talk.Talk, words: Words) -> str:
    """The conversation as JSON lines, to save."""
    if now.tip < 0:
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


def _spoken_to(voices: Sequence[str], question: talk.Turn, before: Sequence[talk.Turn]) -> list[str]:
    """Who is asked: all, but the result of a tool is for those who called one. Raises Refusal if none of them is here."""
    if question.role == "user":
        return list(voices)
    called = [one for one in voices for turn in before[-1:] if one in turn.said and turn.said[one].calls]
    if not called:
        raise Refusal(problem("chat-nobody-called"))
    return called


def _spoken_on(known: Sequence[Result], voices: Sequence[str]) -> str | None:
    """The model that a run among `voices` has left, if one has: it was the base of what they said."""
    return next((str(one.folder) for one in known if not one.adapter and one.run.id in voices), None)


def _titled(one: asking.Answer, named: Mapping[str, str]) -> asking.Answer:
    """The answer, with a voice that its problem speaks of called as on the page."""
    voice = one.problem.values.get("voice") if one.problem else None
    if not voice:
        return one
    values = {**one.problem.values, "voice": named.get(voice, voice)}
    return replace(one, problem=replace(one.problem, values=values))


def _same(one: Result, base: str | None) -> bool:
    return identity(one.run.spec.model.model_name_or_path) == identity(base or "")


def _command(base: str | None, ids: Sequence[str], writer: str, saves: Path) -> str:
    """How a program would be served the same."""
    words = ["python", "-m", "engine", "serve", *(ids or ["--base", base or "MODEL"])]
    words += ["--engine", writer] if writer != ENGINES[0] else []
    return shlex.join(words + (["--saves", str(saves)] if saves != Workplace().saves else []))
