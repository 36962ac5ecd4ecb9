"""A conversation with several voices as HTML: pure functions from what engine says to text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from engine.serving.chat_client import Answer
from engine.serving.conversation_tree import Conversation, Reply, Turn
from engine.serving.servers import Server
from webui import notices
from webui.numbers import duration
from webui.words import Words

Titles = Mapping[str, str]  # what a voice is called on the page
# A thumb, drawn here: not every system has a font with one.
THUMB_SVG = (
    '<svg viewBox="0 0 20 20" width="15" height="15" aria-hidden="true"><path d="M3 9h3v8H3zM6 16.2 8 17h5.6a2 2 0 0 0 '
    '1.9-1.4l1.4-4.4A1.7 1.7 0 0 0 15.3 9H11.7l.7-3.6A1.7 1.7 0 0 0 10.8 3.3L6 9.6"/></svg>'
)


def past_turns(conversation: Conversation, titles: Titles, words: Words, answering: bool = False) -> str:
    """All turns that are read and over, each with what can be done with it; or only read, while one is `answering`."""
    turns = "".join(_turn(conversation, place, titles, words) for place in conversation.path())
    later = conversation.children(conversation.tip)
    if not later or answering:
        return turns
    onward = f'<button type="button" class="plain" data-do="go" data-turn="{later[-1]}">{escape(words("chat-onward"))}</button>'
    return f'{turns}<p class="onward">{onward}</p>'


def live_turn(question: Turn, answers: Sequence[Answer], titles: Titles, words: Words) -> str:
    """The turn that is being answered."""
    cells = "".join(
        f'<article class="answer"><header><b>{escape(titles.get(answer.model, answer.model))}</b>{_first_token_html(answer, words)}</header>'
        f"{_body(answer.text, answer.calls, words, writing=not answer.finish)}{_problem_html(answer, words)}</article>"
        for answer in answers
    )
    return f'<section class="turn">{_question(question, words)}<div class="answers">{cells}</div></section>'


def waiting_turn(question: Turn, message: str, words: Words) -> str:
    """A question before there are answers to it."""
    return f'<section class="turn">{_question(question, words)}<p class="quiet loading">{escape(message)}</p></section>'


def empty_html(words: Words) -> str:
    """The page before the first question."""
    return f'<div class="empty"><b>{escape(words("chat-empty"))}</b><p>{escape(words("chat-empty-help"))}</p></div>'


def conversation_list(conversations: Sequence[Conversation], words: Words) -> str:
    """Earlier conversations by their first questions, each to be opened or removed."""
    return "".join(
        f'<div class="earlier"><button type="button" class="plain" data-do="open" data-turn="{number}">'
        f"{escape(_first_question(conversation))}</button>{_small_button('drop', number, '×', words('chat-drop'))}</div>"
        for number, conversation in enumerate(conversations)
    )


def _first_question(conversation: Conversation) -> str:
    turns = conversation.turns_on_path() or conversation.turns
    return turns[0].question[:120] if turns else ""


def _small_button(do: str, place: int, label: str, title: str, off: bool = False) -> str:
    return (
        f'<button type="button" data-do="{do}" data-turn="{place}" title="{escape(title)}" aria-label="{escape(title)}"'
        f"{' disabled' if off else ''}>{escape(label)}</button>"
    )


def _question(turn: Turn, words: Words, tools: str = "") -> str:
    """What was asked, or what a tool answered; `tools` is what can be done with it."""
    kind = f"<small>{escape(words('chat-tool-said'))}</small>" if turn.role == "tool" else ""
    return (
        f'<div class="asked"><div class="question {turn.role}">{kind}{escape(turn.question)}</div>'
        f'{f"""<div class="tools">{tools}</div>""" if tools else ""}</div>'
    )


def _turn(conversation: Conversation, place: int, titles: Titles, words: Words) -> str:
    turn = conversation.turns[place]
    several = len(turn.said) > 1
    cells = "".join(
        _answer(turn, place, voice, reply, titles, words, several) for voice, reply in turn.said.items()
    )
    alike = conversation.children(turn.after)
    tools, number = "", alike.index(place)
    if len(alike) > 1:
        back, on = alike[max(number - 1, 0)], alike[min(number + 1, len(alike) - 1)]
        tools = _small_button("go", back, "‹", words("branch-back"), off=back == place)
        tools += f"<span>{number + 1} / {len(alike)}</span>"
        tools += _small_button("go", on, "›", words("branch-on"), off=on == place)
    tools += _small_button("edit", place, words("chat-edit"), words("chat-edit-title"))
    return (
        f'<section class="turn">{_question(turn, words, tools)}<div class="answers">{cells}</div></section>'
    )


def _answer(
    turn: Turn, place: int, voice: str, reply: Reply, titles: Titles, words: Words, several: bool
) -> str:  # fmt: skip
    id = f"said-{place}-{list(turn.said).index(voice)}"
    rated = any(other.preferred for other in turn.said.values())
    at = f'data-turn="{place}" data-voice="{escape(voice)}"'

    def button(what: str, label: str, on: bool, off: bool) -> str:
        state = ' class="on" aria-pressed="true"' if on else ""
        return (
            f'<button type="button" {at} data-do="{what}"{state}{" disabled" if off else ""} '
            f'title="{escape(words(f"rate-{what}"))}" aria-label="{escape(words(f"rate-{what}"))}">{label}</button>'
        )

    # From an empty one nothing can be learned.
    tools = button("up", THUMB_SVG, reply.rating == "up", reply.empty or bool(reply.rating))
    tools += button("down", THUMB_SVG, reply.rating == "down", reply.empty or bool(reply.rating))
    if several:
        tools += button("better", escape(words("rate-better-short")), reply.preferred, reply.empty or rated)
    copy = f'<button type="button" data-copy="#{id}" data-done="{escape(words("copied"))}">{escape(words("copy"))}</button>'
    cut = f'<span class="cut">{escape(words("answer-cut"))}</span>' if reply.finish == "length" else ""
    whole = "\n".join(filter(str.strip, [reply.text, *map(call_text, reply.calls)]))
    return (
        f'<article class="answer{" best" if reply.preferred else ""}"><header><b>{escape(titles.get(voice, voice))}</b>'
        f"<small>{escape(speed(reply, words))}</small></header>{_body(reply.text, reply.calls, words)}"
        f'<pre id="{id}" hidden>{escape(whole)}</pre><div class="tools">{tools}{copy}{cut}</div></article>'
    )


def call_text(call: Mapping[str, Any]) -> str:
    """A call of a tool as one writes it in a program."""
    arguments = call["arguments"] if isinstance(call["arguments"], dict) else {}
    arguments_text = ", ".join(
        f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items()
    )
    return f"{call['name']}({arguments_text})"


def speed(reply: Reply, words: Words) -> str:
    """Tokens, tokens a second, and seconds to the first of them."""
    parts = [words("answer-tokens", count=reply.tokens)]
    if reply.tokens_per_s:
        parts.append(words("answer-speed", count=f"{reply.tokens_per_s:.3g}"))
    if reply.first_s is not None:
        parts.append(words("answer-first", seconds=f"{reply.first_s:.2f}"))
    if reply.score is not None:
        parts.append(words("answer-score", score=f"{reply.score:.2f}"))
    return " · ".join(parts)


def _first_token_html(answer: Answer, words: Words) -> str:
    if answer.finish or answer.first_s is None:
        return ""
    return f"<small>{escape(words('answer-first', seconds=f'{answer.first_s:.2f}'))}</small>"


def _body(text: str, calls: Sequence[Mapping[str, Any]], words: Words, writing: bool = False) -> str:
    """The answer as it is, its reasoning folded once it is over, and the tools it calls."""
    thought, answer, thinking = reasoning(text)
    folded = ""
    if thought.strip():
        folded = (
            f"<details{' open' if thinking and writing else ''}><summary>{escape(words('answer-thinking'))}</summary>"
            f"<div>{escape(thought.strip())}</div></details>"
        )
    shown = escape(answer.strip("\n") if thought or calls else answer)
    nothing = not text and not calls and not writing
    empty = f'<i class="quiet">{escape(words("samples-empty"))}</i>' if nothing else ""
    called = "".join(f'<code class="call">{escape(call_text(tool_call))}</code>' for tool_call in calls)
    return f'<div class="said{" writing" if writing else ""}">{folded}{shown}{called}{empty}</div>'


def reasoning(text: str) -> tuple[str, str, bool]:
    """What a model thought, what it answered, and whether it is still thinking. A template may have opened the
    thought already, so only its end need be there."""
    opened = text.lstrip().startswith("<think>")
    rest = text.partition("<think>")[2] if opened else text
    if "</think>" in rest:
        thought, _, answer = rest.partition("</think>")
        return thought, answer, False
    return (rest, "", True) if opened else ("", text, False)


def _problem_html(answer: Answer, words: Words) -> str:
    return notices.listed([answer.problem], words) if answer.problem else ""


def _holder(server: Server, words: Words) -> str:
    """Who has loaded it; one that was started from a shell is nobody's to unload here."""
    return words("chat-from-shell") if server.settings.get("shell") else server.settings.get("by") or ""


def status(
    server: Server | None, others: Sequence[Server], titles: Titles, seconds: float, words: Words
) -> str:
    """Whether the chosen model is in memory, why not, and what else is."""
    state = server.state if server else "ended"
    dot = {"loading": "running", "ready": "finished", "failed": "failed", "ended": "queued"}[state]
    state_text = words(f"chat-{state}", time=duration(seconds, words))
    wrong = notices.listed(server.problems, words) if server and state == "failed" else ""
    rows = "".join(
        f"<li><b>{escape(titles.get(other.name, other.name))}</b> {escape(_holder(other, words))}</li>"
        for other in others
        if other.alive
    )
    beside = (
        f'<p class="quiet">{escape(words("chat-others"))}</p><ul class="plain">{rows}</ul>' if rows else ""
    )
    return f'<p class="held"><span class="dot {dot}"></span>{escape(state_text)}</p>{wrong}{beside}'
