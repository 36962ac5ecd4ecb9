"""HTML of one answer: text, folded reasoning, tool calls, speed, and buttons to rate and copy it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from engine.core.reasoning import split_reasoning
from engine.serving.chat_client import Answer
from engine.serving.conversation_tree import Reply, Turn
from webui import notices
from webui.text_html import folded_reasoning
from webui.words import Words

Titles = Mapping[str, str]  # the title of each served model by its id
# A thumb, drawn here: not every system has a font with one.
THUMB_SVG = (
    '<svg viewBox="0 0 20 20" width="15" height="15" aria-hidden="true"><path d="M3 9h3v8H3zM6 16.2 8 17h5.6a2 2 0 0 0 '
    '1.9-1.4l1.4-4.4A1.7 1.7 0 0 0 15.3 9H11.7l.7-3.6A1.7 1.7 0 0 0 10.8 3.3L6 9.6"/></svg>'
)


def live(answer: Answer, titles: Titles, words: Words) -> str:
    """An answer that is being generated."""
    started = ""
    if not answer.finish and answer.first_s is not None:
        started = f"<small>{escape(words('answer-first', seconds=f'{answer.first_s:.2f}'))}</small>"
    wrong = notices.listed([answer.problem], words) if answer.problem else ""
    return (
        f'<article class="answer"><header><b>{escape(titles.get(answer.model, answer.model))}</b>{started}</header>'
        f"{_body(answer, words, writing=not answer.finish)}{wrong}</article>"
    )


def finished(turn: Turn, place: int, model: str, titles: Titles, words: Words) -> str:
    """The complete answer of a model to the turn in `place`, with its buttons."""
    reply, id = turn.said[model], f"said-{place}-{list(turn.said).index(model)}"
    copy = (
        f'<button type="button" data-copy="#{id}" data-done="{escape(words("copied"))}">'
        f"{escape(words('copy'))}</button>"
    )
    cut = f'<span class="cut">{escape(words("answer-cut"))}</span>' if reply.finish == "length" else ""
    whole = "\n".join(filter(str.strip, [reply.text, *map(_call_text, reply.calls)]))
    return (
        f'<article class="answer{" best" if reply.preferred else ""}"><header><b>{escape(titles.get(model, model))}</b>'
        f"<small>{escape(_speed(reply, words))}</small></header>{_body(reply, words)}"
        f'<pre id="{id}" hidden>{escape(whole)}</pre>'
        f'<div class="tools">{_rating_buttons(turn, place, model, words)}{copy}{cut}</div></article>'
    )


def _rating_buttons(turn: Turn, place: int, model: str, words: Words) -> str:
    reply = turn.said[model]
    preferred = any(other.preferred for other in turn.said.values())
    at = f'data-turn="{place}" data-voice="{escape(model)}"'

    def button(action: str, label: str, on: bool, off: bool) -> str:
        state, title = ' class="on" aria-pressed="true"' if on else "", escape(words(f"rate-{action}"))
        return (
            f'<button type="button" {at} data-do="{action}"{state}{" disabled" if off else ""} '
            f'title="{title}" aria-label="{title}">{label}</button>'
        )

    # An empty answer cannot be rated: nothing could be learned from it.
    rated = reply.empty or bool(reply.rating)
    buttons = button("up", THUMB_SVG, reply.rating == "up", rated)
    buttons += button("down", THUMB_SVG, reply.rating == "down", rated)
    if len(turn.said) > 1:
        better = escape(words("rate-better-short"))
        buttons += button("better", better, reply.preferred, reply.empty or preferred)
    return buttons


def _body(answer: Answer | Reply, words: Words, writing: bool = False) -> str:
    """The text of an answer and its tool calls; the reasoning is folded once it is complete."""
    text, calls = answer.text, answer.calls
    parts = split_reasoning(text, opened=answer.opened or None)
    folded = folded_reasoning(parts.reasoning, words, is_open=parts.unfinished and writing)
    shown = escape(parts.answer.strip("\n") if parts.reasoning or calls else parts.answer)
    nothing = not text and not calls and not writing
    empty = f'<i class="quiet">{escape(words("samples-empty"))}</i>' if nothing else ""
    called = "".join(f'<code class="call">{escape(_call_text(call))}</code>' for call in calls)
    return f'<div class="said{" writing" if writing else ""}">{folded}{shown}{called}{empty}</div>'


def _call_text(call: Mapping[str, Any]) -> str:
    """A tool call as it would be written in Python."""
    arguments = call["arguments"] if isinstance(call["arguments"], dict) else {}
    arguments_text = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
    return f"{call['name']}({arguments_text})"


def _speed(reply: Reply, words: Words) -> str:
    """Tokens, tokens per second, seconds to the first token, and the score of the reward model if there is one."""
    parts = [words("answer-tokens", count=reply.tokens)]
    if reply.tokens_per_s:
        parts.append(words("answer-speed", count=f"{reply.tokens_per_s:.3g}"))
    if reply.first_s is not None:
        parts.append(words("answer-first", seconds=f"{reply.first_s:.2f}"))
    if reply.score is not None:
        parts.append(words("answer-score", score=f"{reply.score:.2f}"))
    return " · ".join(parts)
