"""What a chat template writes around an answer, learned from the template itself, and where answers are in a text.

No list of model families is kept: a few conversations of sentinels are rendered, and what surrounds the sentinels is
what the template writes. Tokens are left to `engine.worker.conversations`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from engine.problems import Refusal, problem

Span = tuple[int, int]
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template's own marks around what is to be trained


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around an answer, learned by rendering a few conversations of sentinels.

    `anchor` opens every answer ("<|im_start|>assistant\\n"); `opening` is what only the generation prompt adds to it
    (reasoning models: "<think>\\n"). `stops` are the control tokens that may end an answer, `ends` those of them that
    end one which nothing follows.
    """

    anchor: str
    opening: str
    stops: tuple[str, ...]
    ends: tuple[str, ...]
    stop: re.Pattern[str]
    calls: bool  # the template writes tool calls, and their end is among the stops
    unforgeable: bool  # the anchor holds a control token, so data cannot write it

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, template: str) -> Frame:
        """Raises Refusal if the template does not show where an answer ends."""
        try:
            return cls._learn(tokenizer, template)
        except Refusal:
            raise
        except Exception as error:  # a template is a program of its own, and may raise anything
            raise Refusal(problem("template-fails", reason=str(error))) from error

    @classmethod
    def _learn(cls, tokenizer: PreTrainedTokenizerFast, template: str) -> Frame:
        control = control_tokens(tokenizer, template)
        any_control, special = any_of(control), any_of([token for token in control if control[token]])
        # Private-use characters: no template writes them, so whatever differs around them is the template's.
        question, answer, question_2, answer_2, argument = map(chr, range(0xE000, 0xE005))
        ask, ask_again = ({"role": "user", "content": text} for text in (question, question_2))
        reply, reply_again = ({"role": "assistant", "content": text} for text in (answer, answer_2))

        def after(mark: str, messages: list[dict[str, Any]], generate: bool = False) -> str:
            return render(tokenizer, template, messages, generate=generate)[0].partition(mark)[2]

        bare, prompt = after(question, [ask]), after(question, [ask], generate=True)
        full = after(question, [ask, reply, ask_again, reply_again])
        opens, shared = agree(prompt, bare, any_control), agree(prompt, full, any_control)
        anchor = prompt[opens:shared]
        if not anchor and any_control.search(prompt[:shared]):
            anchor = prompt[:shared]  # nothing opens an answer, but something closes each question (Mistral)

        # What follows an answer in the middle may already be the next turn; what it has in common with the end is not.
        run = re.compile(f"(?:{any_control.pattern})+")
        tails = (full.partition(answer_2)[2], full.partition(answer)[2].partition(question_2)[0])
        runs = [found[0] for found in map(run.search, tails) if found]
        common = agree(*runs, any_control) if len(runs) == 2 else 0
        stops = [runs[0][:common]] if common else [any_control.findall(each)[0] for each in runs]
        if not stops:
            raise Refusal(problem("template-without-end"))

        calls: list[str] = []
        for arguments in ({"x": argument}, argument):  # some templates want an object, some its JSON
            function = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            call = {"role": "assistant", "content": "", "tool_calls": [function]}
            try:
                alone = after(argument, [ask, call])
                followed = after(argument, [ask, call, {"role": "tool", "content": "x"}, reply])
            except Exception:  # a template may refuse tools in any way it likes
                continue
            own = re.search(rf"({special.pattern})\s*\Z", alone)  # or else what opens the tool's result (GLM)
            end = own or re.compile(rf"\s*({special.pattern})").match(followed, len(alone))
            if end and alone and not calls:
                calls.append(end[1])

        return cls(
            anchor=anchor,
            opening=prompt[max(opens, shared) :],
            stops=tuple(dict.fromkeys(stops + calls)),
            ends=tuple(dict.fromkeys(any_control.findall(stop)[-1] for stop in stops[:1] + calls)),
            stop=any_of(stops + calls),
            calls=bool(calls),
            unforgeable=any_control.search(anchor) is not None,
        )

    def starts(self, text: str) -> list[int]:
        """Where the answers of a rendered conversation begin, going by the anchor alone."""
        found = text.find(self.anchor) if self.anchor else -1
        starts = []
        while found >= 0:
            starts.append(self.after_anchor(text, found))
            found = text.find(self.anchor, found + len(self.anchor))
        return starts

    def after_anchor(self, text: str, found: int) -> int:
        start = found + len(self.anchor)
        return start + len(self.opening) if text.startswith(self.opening, start) else start


def end_of_turn_ids(tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None) -> list[int]:
    """The tokens that end an answer according to the template: what generation has to stop at. Never empty."""
    frame = Frame.of(tokenizer, tokenizer.get_chat_template(chat_template))
    return [tokenizer.convert_tokens_to_ids(token) for token in frame.ends]


def control_tokens(tokenizer: PreTrainedTokenizerFast, template: str) -> dict[str, bool]:
    """Text of each control token → whether it is special: all special tokens and the added ones the template writes.

    Other added tokens are ordinary vocabulary, such as Gemma's runs of spaces and HTML tags.
    """
    return {
        token.content: token.special
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in template and not token.content.isspace())
    }


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


def render(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    generate: bool = False,
) -> tuple[str, list[Span]]:
    """The text of one conversation and the character spans its template itself marks with {% generation %}."""
    texts, marked = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        add_generation_prompt=generate,
        return_assistant_tokens_mask=MARKS.search(template) is not None,
        **tokenizer.special_tokens_map,
    )
    return texts[0], marked[0] if marked else []


def answers_in(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    text: str,
    marked: list[Span],
    row: dict[str, Any],
    frame: Frame,
) -> list[Span]:
    """Character spans of the answers in a rendered conversation. Raises Refusal where they cannot be told.

    `marked`: the spans that the template marks itself, which are believed.

    Data cannot write the anchor if that holds a control token; so where there are as many anchors as answers, those
    are the answers. Otherwise (no such token, several anchors to one answer, none after a tool's result) an answer
    begins where the conversation before it, rendered with the generation prompt, ends.
    """
    if marked:
        return _marked(text, marked, frame)
    messages = row["messages"]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not frame.calls and any(messages[turn].get("tool_calls") for turn in turns):
        raise Refusal(problem("template-without-tool-calls"))
    starts = frame.starts(text)
    if not frame.unforgeable or len(starts) != len(turns):
        starts = []
        for turn in turns:
            before = ""
            if turn:
                before, _ = render(
                    tokenizer, template, messages[:turn], row.get("tools") or None, generate=True
                )
            found = text.find(frame.anchor, starts[-1] if starts else 0) if frame.anchor else -1
            if before and text.startswith(before):
                starts.append(len(before))
            elif found >= 0:  # the template renders history differently (without its reasoning, say)
                starts.append(frame.after_anchor(text, found))
            else:
                raise Refusal(problem("answer-start-hidden", message=turn + 1))
    spans: list[Span] = []
    for start, limit in zip(starts, [*starts[1:], len(text)], strict=True):
        stop = frame.stop.search(text, start, limit)
        # An answer may consist of several framed parts (gpt-oss: analysis, then the final channel).
        while stop and 0 < _end_of(frame.anchor, text, stop.end()) < limit:
            stop = frame.stop.search(text, stop.end(), limit)
        if stop:
            spans.append((start, stop.end()))
        elif limit == len(text) and turns[-1] == len(messages) - 1:
            spans.append((start, limit))
        else:
            raise Refusal(problem("answer-end-hidden"))
    return spans


def _end_of(part: str, text: str, at: int) -> int:
    """Where `part` ends if it stands in `text` at `at`; 0 if it does not, or is empty."""
    return at + len(part) if part and text.startswith(part, at) else 0


def _marked(text: str, marked: list[Span], frame: Frame) -> list[Span]:
    """The spans a template marks itself, but each ending just behind the token that ends the turn."""
    spans = []
    for start, end in marked:
        trimmed = start + len(
            text[start:end].rstrip()
        )  # a mark may include the line break, or lack the token
        included = any(text[start:trimmed].endswith(stop) for stop in frame.stops)
        behind = frame.stop.match(text, end)
        spans.append((start, trimmed if included else behind.end() if behind else end))
    return spans


def agree(a: str, b: str, control: re.Pattern[str] | None = None) -> int:
    """Length of the common beginning of `a` and `b`, no control token cut in two ("<|end|>" against "<|user|>")."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    tokens = control.finditer if control else lambda _: ()
    cut = [m.start() for text in (a, b) for m in tokens(text) if m.start() < length < m.end()]
    return min([length, *cut])
