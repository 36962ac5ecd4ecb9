"""What opens and what ends an answer in a chat template, determined with probes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.worker.templates.chat_template import (
    PROBE,
    PROBE_2,
    QUESTION,
    ChatTemplate,
    Message,
    common_prefix_length,
)

EndPair = tuple[str | None, str | None]  # the end of a last answer, and of one that is followed by something
PROBE_CALL = {"id": "A" * 9, "type": "function", "function": {"name": "f", "arguments": {"key": PROBE}}}


class MaskSettings(NamedTuple):
    """`end_last_answer`: if the template ends a last answer with no token, one at which generation stops is added.
    `train_empty_thoughts`: the <think></think> that a template writes before an answer without reasoning is trained."""

    end_last_answer: bool = True
    train_empty_thoughts: bool = True


DEFAULT_MASK = MaskSettings()


@dataclass(frozen=True)
class Endings:
    """The tokens that end answers: `stops` are those that the template writes; if it writes none after a last answer,
    `added` is added after a text and `added_call` after a call."""

    stops: tuple[str, ...]
    added: str | None
    added_call: str | None

    def all(self) -> list[str]:
        return list(dict.fromkeys(token for token in (*self.stops, self.added, self.added_call) if token))


class EndingProbes:
    """Determines what ends an answer. `generation_stops`: the tokens at which generation stops according to the model's
    configuration.

    `opening`: what the generation prompt adds to a question. `openers`: the control tokens that open a turn. Whatever
    the template raises is raised.
    """

    def __init__(self, template: ChatTemplate, generation_stops: Sequence[str], settings: MaskSettings):
        self.template, self.generation_stops = template, tuple(generation_stops)
        self.settings = settings
        self.openers = self._openers()

    def _openers(self) -> frozenset[str]:
        """Control tokens that open a turn: those at the very beginning, and those that only the generation prompt
        adds."""
        control, ask = self.template.any_control, [user_message(QUESTION)]
        text, prompt = self.template.render(ask), self.template.render(ask, add_generation_prompt=True)
        head = re.match(rf"\s*(?:(?:{control.pattern})\s*)*", text)
        self.opening = prompt[common_prefix_length(text, prompt, control) :]
        eos = self.template.tokenizer.eos_token
        return frozenset({*control.findall(head[0] if head else ""), *control.findall(self.opening)}) - {eos}

    def endings(self) -> Endings:
        plain = self._ending(assistant_message(PROBE), user_message(QUESTION))
        if plain is None:  # nothing can be determined from a template that does not even render this
            return Endings((), None, None)
        call = None
        for arguments in ({"key": PROBE}, PROBE):
            message = assistant_message(
                "", tool_calls=[{**PROBE_CALL, "function": {"name": "f", "arguments": arguments}}]
            )
            try:
                call = self._ending(
                    message,
                    {"role": "tool", "content": "r", "name": "f", "tool_call_id": PROBE_CALL["id"]},
                    plain,
                )
            except Exception:  # a template may reject tools in any way
                continue
            if call:
                break
        return self._chosen(plain, call)

    def _ending(self, answer: Message, following: Message, known: EndPair = (None, None)) -> EndPair | None:
        """The token that ends `answer` if it is the last message, and if `following` follows it; None if the template
        leaves the answer out."""
        messages = [user_message(QUESTION), answer]
        last = self.template.render(messages)
        middle = self.template.render([*messages, following, assistant_message(PROBE_2)])
        if PROBE not in last or PROBE not in middle:
            return None
        last, middle = (text[text.rindex(PROBE) + len(PROBE) :] for text in (last, middle))
        middle = re.split(f"[{QUESTION}{PROBE_2}]", middle, maxsplit=1)[0]
        for stop in (*known, *self.generation_stops):
            if stop and stop in last and stop in middle:
                return stop, stop
        # What both have in common is the end of this turn; the next one begins with what opens turns.
        common = self._closing(last[: common_prefix_length(last, middle, self.template.any_control)], answer)
        if common:
            return common, common
        return self._closing(last, answer), next(iter(self._controls(middle, answer)), None)

    def _closing(self, text: str, answer: Message) -> str | None:
        """The last control token of a turn's closing text, which ends where a turn opens."""
        closing = None
        for token in self._controls(text, answer):
            if token in self.openers:
                break
            closing = token
        return closing

    def _controls(self, text: str, answer: Message) -> list[str]:
        """Control tokens in the text after an answer; after a call only special ones, because others close the call."""
        control = self.template.control
        return [
            token for token in self.template.any_control.findall(text) if control[token] or not answer.get("tool_calls")
        ]

    def _chosen(self, plain: EndPair, call: EndPair | None) -> Endings:
        (last, middle), (call_last, call_middle) = plain, call or plain
        stops = dict.fromkeys(token for token in (last, call_last) if token)
        # A last answer without an end: the mark of the next speaker ends the others, and generation stops at it.
        stops |= dict.fromkeys(
            token for token in ((middle if not last else None), (call_middle if not call_last else None)) if token
        )
        stops |= dict.fromkeys(token for token in self.generation_stops if token in self.template.source)

        def added(own: str | None, following: str | None) -> str | None:
            if own or not self.settings.end_last_answer:
                return None
            if following in self.generation_stops:
                return following
            return next(iter(self.generation_stops), following)

        return Endings(tuple(stops), added(last, middle), added(call_last, call_middle))


def user_message(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant_message(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}
