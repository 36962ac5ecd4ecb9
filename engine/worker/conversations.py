"""Conversations → token ids, and where in them the answers are.

The ids are exactly those `tokenizer.apply_chat_template` gives, with one exception: where a *value* of the data contains
the text of a control token, that text stays text. A conversation is rendered once and tokenized once, in batches. Most
take the short way (`engine.worker.shapes`), which writes what the template would write without running it; whatever
that way is not sure to do right is rendered by the template itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from engine.problems import Problem, Refusal, problem
from engine.worker.frame import Frame, Span, answers_in, render
from engine.worker.shapes import Group, Shapes
from engine.worker.shield import Shield

TRIED = 8  # conversations of each shape that are compared with what the template gives
Row = dict[str, Any]  # {"messages": [...], "tools": [...] | None}


class Tokens(NamedTuple):
    """One conversation: its ids (int32), the token spans of its answers, each up to and including the token that ends
    the turn, and whether each has such a token: a model never shown one never stops."""

    ids: np.ndarray
    answers: list[Span]
    ended: bool


class Conversations:
    """A tokenizer and its chat template, and what is known about the two.

    Raises Refusal if the template writes nothing at the end of an answer that a model could learn to stop with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None):
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template(chat_template)
        self.frame = Frame.of(tokenizer, self.template)
        self.shield = Shield(tokenizer, self.template, self.frame)
        self.shapes = Shapes(tokenizer, self.template, self.frame)

    def encode(self, rows: Sequence[Row], *, generate: bool = False) -> list[Tokens | Problem]:
        """One result per row, in the same order; a Problem for a row that the template or the tokenizer cannot write.

        `generate`: the conversation ends with the opening of an answer that is yet to be written.
        """
        results: list[Tokens | Problem | None] = [None] * len(rows)
        for group in self.shapes.encode(rows, generate):
            if not self._proven(group, rows, generate):
                continue
            shape, numbers, ids, bounds, answers = group
            for at, number in enumerate(numbers):
                results[number] = Tokens(ids[bounds[at] : bounds[at + 1]], answers[at], shape.ended)
        left = [number for number, result in enumerate(results) if result is None]
        plainly = self._plainly([rows[number] for number in left], generate)
        for number, result in zip(left, plainly, strict=True):
            results[number] = result
        return results

    def _proven(self, group: Group, rows: Sequence[Row], generate: bool) -> bool:
        """Whether the short way gives what the template gives, tried once on the first conversations of each shape."""
        shape = group.shape
        if not shape.proven and shape.plan:
            some = range(min(len(group.rows), TRIED))
            plainly = self._plainly([rows[group.rows[at]] for at in some], generate, template_only=True)
            shape.proven = all(
                isinstance(one, Tokens)
                and one.ids.tolist() == group.ids[group.bounds[at] : group.bounds[at + 1]].tolist()
                and tuple(one.answers) == group.answers[at]
                and one.ended == shape.ended
                for at, one in zip(some, plainly, strict=True)
            )
            if not shape.proven:
                shape.plan = None
        return shape.proven

    def _plainly(
        self, rows: Sequence[Row], generate: bool, *, template_only: bool = False
    ) -> list[Tokens | Problem]:
        """Rendered as a whole and tokenized as a whole."""
        results: list[Tokens | Problem | None] = [None] * len(rows)
        drafts: list[tuple[int, str, list[Span], dict[str, str]]] = []
        for number, (row, hidden) in enumerate(map(self.shield.row, rows)):
            try:
                known = None if template_only else self.shapes.text(row, generate)
                text, spans = known or self._rendered(row, generate)
            except Refusal as refusal:
                results[number] = refusal.problems[0]
            except (
                Exception
            ) as error:  # a template is a program of its own; whatever it raises is about this row
                results[number] = problem("template-refuses-row", reason=str(error))
            else:
                drafts.append((number, text, spans, hidden))
        encodings = self.tokenizer.backend_tokenizer.encode_batch(
            [text for _, text, _, _ in drafts], add_special_tokens=False
        )
        for (number, text, spans, hidden), encoding in zip(drafts, encodings, strict=True):
            ids, answers = encoding.ids, [_tokens_of(encoding, span, self.shield.control) for span in spans]
            ended = all(self.frame.stop.search(text, *span) for span in spans)
            try:
                if hidden:
                    ids, answers = self.shield.restore(text, encoding, answers, hidden)
            except Refusal as refusal:
                results[number] = refusal.problems[0]
            else:
                results[number] = Tokens(np.array(ids, dtype=np.int32), answers, ended)
        return results

    def _rendered(self, row: Row, generate: bool) -> tuple[str, list[Span]]:
        messages, tools = row["messages"], row.get("tools") or None
        text, marked = render(self.tokenizer, self.template, messages, tools, generate)
        if generate:
            return text, []
        return text, answers_in(self.tokenizer, self.template, text, marked, row, self.frame)


def _tokens_of(encoding: Any, span: Span, control: Collection[int]) -> Span:
    """The tokens that hold any of the characters of an answer.

    So an ordinary token that answer and prompt share (" yes" after "A: ") is the answer's: without it the answer
    would lose its beginning. A control token is the prompt's even if it swallows the answer's leading spaces (Phi).
    """
    start, end = span
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:  # slower, but right also where a tokenizer leaves characters out
        offsets = encoding.offsets
        first = next((token for token, (_, ends) in enumerate(offsets) if ends > start), len(offsets))
        last = bisect_left(offsets, (end,)) - 1
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1)[0] < end:
        last += 1  # several tokens may share one character
    if first <= last and encoding.ids[first] in control and encoding.token_to_chars(first)[0] < start:
        first += 1
    return first, max(first, last + 1)
