"""A cache of what a template writes: the template is not run again and its frame is not tokenized again, only the
contents.

Conversations in which the same roles speak in the same order have one shape: what the template writes around the
contents (`engine.worker.templates.template_tracing`) and, if a control token separates every content from the frame,
the frame's ids. Then only the contents are tokenized, many at a time, and joined with the ids of the frame.

This is exact, and not by luck: a tokenizer splits a text at control tokens before it does anything else, so what is
between two of them is tokenized as if it were alone. A content that follows text of the frame ("user\\n") is accepted
only if the tokenizer also splits between the two, which is tested for each first character. A conversation for which
this is not known is left to `engine.worker.templates.conversations`; so is a whole shape, if its first conversations do
not equal the output of the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from engine.worker.templates.answer_spans import Answers, AnswerSpans
from engine.worker.templates.chat_template import ChatTemplate, Row, Span
from engine.worker.templates.provenance import Piece, Provenance, losses_in
from engine.worker.templates.template_shapes import (
    EdgeCheck,
    TemplateShape,
    TokenizedGroup,
    TokenPlan,
    assembled,
)
from engine.worker.templates.template_tracing import Outline, TemplateTracer, sentinel
from engine.worker.templates.word_cache import WordCache

MAX_TURNS, MAX_SHAPES = 64, 512
CONVERSATIONS_PER_BATCH = 1024  # conversations that are assembled at a time
MAX_TOKENIZER_THREADS = 16
# What may follow a character: a pre-tokenizer's regular expression looks at most at the next character.
TEXTS_AFTER = ("", "a", " a", "\n", "1", ".", "'s")
TEXTS_BEFORE = ("", "a", " ", "\n", ".")
LOOKBEHIND = re.compile(r"\(\?<[=!]|\\[AbBGZ]|(?<![\[\\])\^|\$")


class TemplateCache:
    """The shapes of a template's conversations, learned as they occur."""

    def __init__(self, template: ChatTemplate, spans: AnswerSpans):
        tokenizer = template.tokenizer
        self.template, self.spans = template, spans
        self.backend = tokenizer.backend_tokenizer
        self.known: dict[tuple[bool, tuple[str, ...]], TemplateShape | None] = {}
        self.edges: dict[str, EdgeCheck] = {}
        self.any_control = template.any_control
        self.is_control = np.zeros(max([len(tokenizer), *tokenizer.added_tokens_decoder]) + 1, dtype=bool)
        self.is_control[tokenizer.convert_tokens_to_ids(list(template.control))] = True
        # A control token that separates one content from the next, and has no other effect on either.
        self.fence, self.fence_id = next(
            (
                (token.content, number)
                for number, token in tokenizer.added_tokens_decoder.items()
                if token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
            ),
            ("", -1),
        )
        self.words = WordCache.of(tokenizer)
        self.splits_at_breaks = _splits_at_line_breaks(tokenizer)

    @cached_property
    def tracer(self) -> TemplateTracer:
        return TemplateTracer(self.template.source, self.template.tokenizer.special_tokens_map)

    def of(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> TemplateShape | None:
        """The shape of a conversation of plain messages; None if the template has to be run each time."""
        key = add_generation_prompt, tuple([message["role"] for message in messages])
        if key not in self.known:
            if len(messages) > MAX_TURNS or len(self.known) >= MAX_SHAPES:
                return None
            self.known[key] = self._learn(key[1], add_generation_prompt)
        return self.known[key]

    def text(self, row: Row, add_generation_prompt: bool = False) -> tuple[str, Answers] | None:
        """The output of the template for a row, and the answers in it; None if the template has to be run."""
        contents = _plain_contents(row)
        shape = self.of(row["messages"], add_generation_prompt) if contents else None
        return shape.text(contents) if shape and contents else None

    def encode(self, rows: Sequence[Row], add_generation_prompt: bool = False) -> Iterator[TokenizedGroup]:
        """The rows whose contents can be tokenized separately from the frame, in groups of one shape."""
        of_shape: dict[TemplateShape, tuple[list[int], list[list[str]]]] = {}
        for index, row in enumerate(rows):
            contents = _plain_contents(row)
            if not contents:
                continue
            shape = self.of(row["messages"], add_generation_prompt)
            if shape is None or shape.plan is None or not shape.plan.takes(contents):
                continue
            if all([check(contents[number]) for number, check in shape.checks]):
                indices, row_contents = of_shape.setdefault(shape, ([], []))
                indices.append(index)
                row_contents.append(contents)
        for shape, (indices, row_contents) in of_shape.items():
            yield from self._tokenized(shape, indices, row_contents)

    def _tokenized(
        self, shape: TemplateShape, indices: list[int], row_contents: list[list[str]]
    ) -> Iterator[TokenizedGroup]:
        plan = shape.plan
        assert plan is not None  # `encode` leaves out the others
        for start in range(0, len(row_contents), CONVERSATIONS_PER_BATCH):
            block, rows = (
                row_contents[start : start + CONVERSATIONS_PER_BATCH],
                indices[start : start + CONVERSATIONS_PER_BATCH],
            )
            contents = [row[slot] for row in block for slot in plan.slots]
            if ids_and_lengths := (self.words and self.words.ids(contents)) or self._fenced(contents):
                yield assembled(shape, plan, rows, *ids_and_lengths)
                continue
            # There is a control token in the data. The others are assembled all the same.
            honest = [at for at, row in enumerate(block) if not any(map(self.any_control.search, row))]
            if 0 < len(honest) < len(block):
                yield from self._tokenized(shape, [rows[at] for at in honest], [block[at] for at in honest])

    def _fenced(self, contents: list[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """The ids of all contents, one after another, and the number for each, with one call of the tokenizer.

        None if there is a control token in one of them.
        """
        # Several texts, because the tokenizer has several threads.
        step = -(-len(contents) // MAX_TOKENIZER_THREADS)
        texts = [[*contents[at : at + step], ""] for at in range(0, len(contents), step)]
        encodings = self.backend.encode_batch_fast(
            [self.fence + self.fence.join(some) for some in texts], add_special_tokens=False
        )
        ids = np.concatenate([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])
        fences = np.flatnonzero(self.is_control[ids])
        if len(fences) != len(contents) + len(texts) or (ids[fences] != self.fence_id).any():
            return None
        lengths = np.diff(fences) - 1
        # Between two texts there are two fences, and nothing.
        ends = np.cumsum([len(some) for some in texts])[:-1] - 1
        return np.delete(ids, fences), np.delete(lengths, ends)

    def _learn(self, roles: tuple[str, ...], add_generation_prompt: bool) -> TemplateShape | None:
        contents = [sentinel(number) for number in range(len(roles))]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            outline = self.tracer.outline(roles, add_generation_prompt=add_generation_prompt)
            text = self.template.render(messages, add_generation_prompt=add_generation_prompt)
            if outline is None or outline.text(contents) != text:
                return None
            row, traced = {"messages": messages}, _provenance(outline.parts, contents)
            if add_generation_prompt:
                return self._shape(outline, contents, text, Answers([], lost=losses_in(row, text, traced)))
            whole, answers = self.spans.find(row, text, traced)
            end = (whole[len(text) :],) if whole != text else ()
            answered = [number for number, role in enumerate(roles) if role == "assistant"]
            checks = (*outline.checks, *((number, self.spans.are_independent_of) for number in answered))
            return self._shape(Outline((*outline.parts, *end), checks), contents, whole, answers)
        except Exception:  # a template is a program, and may reject these roles in any way
            return None

    def _shape(self, outline: Outline, contents: list[str], text: str, answers: Answers) -> TemplateShape | None:
        """None if an answer begins or ends within a content, or is empty."""
        cut = _cut_at_answers(outline.parts, contents, answers.spans)
        if cut is None:
            return None
        parts, spans = cut
        if any(begin >= end for begin, end in spans):
            return None
        return TemplateShape(parts, outline.checks, spans, answers.is_ended, answers.lost, self._plan(parts))

    def _plan(self, parts: tuple[str | int, ...]) -> TokenPlan | None:
        """None if control tokens do not separate every content from the frame."""
        runs, numbers = _text_runs_and_contents(parts)
        texts = ["".join(run) for run in runs]
        if not self.fence or not all([self._closes(at, texts) for at in range(len(texts))]):
            return None
        ids: list[int] = []
        planned: list[Span | int] = []
        edges: list[tuple[int, EdgeCheck, EdgeCheck]] = []
        for at, run in enumerate(runs):
            for some in self._ids_of(run):
                planned.append((len(ids), len(ids) + len(some)))
                ids += some
            if at < len(numbers):
                tail = texts[at][self._controls(texts[at])[-1].start() :]
                behind = self._controls(texts[at + 1])[:1]
                edges.append((numbers[at], self._first(tail), self._last(behind[0][0] if behind else "")))
                planned.append(at)
        return TokenPlan(np.array(ids, dtype=np.int32), tuple(planned), tuple(numbers), tuple(edges))

    def _controls(self, text: str) -> list[re.Match[str]]:
        return list(self.any_control.finditer(text))

    def _closes(self, at: int, texts: list[str]) -> bool:
        """Whether this text of the frame closes off the content before it, and opens the one after it."""
        text, controls = texts[at], self._controls(texts[at])
        closes = at == 0 or not (text or at < len(texts) - 1) or (controls and controls[0].start() == 0)
        opens = at == len(texts) - 1 or (
            controls and (controls[-1].end() == len(text) or (self.splits_at_breaks and text.endswith("\n")))
        )
        return bool(closes and opens and (not text or self._ids_of([text]) is not None))

    def _ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each of several texts that the template writes one after another.

        A control token that swallows the following spaces is where it begins.
        """
        encoding = self.backend.encode("".join(texts), add_special_tokens=False)
        cuts = [0]
        for end in accumulate(map(len, texts)):
            cut = next((n for n, (_, ends) in enumerate(encoding.offsets) if ends > end), len(encoding.ids))
            swallowed = cut < len(encoding.ids) and encoding.offsets[cut][0] < end
            cuts.append(cut + swallowed)
        return [encoding.ids[begin:end] for begin, end in pairwise(cuts)]

    def _first(self, tail: str) -> EdgeCheck:
        """The boundary of a content after `tail`, which begins with a control token."""
        control = self.any_control.match(tail)
        assert control is not None
        head, text = self._ids(tail), tail != control[0]

        def ask(character: str) -> bool:
            alone = [self._ids(self.fence + character + after)[1:] for after in TEXTS_AFTER]
            together = [self._ids(tail + character + after) for after in TEXTS_AFTER]
            return not (text and character.isspace()) and together == [head + ids for ids in alone]

        return self.edges.setdefault(tail, EdgeCheck(ask))

    def _last(self, head: str) -> EdgeCheck:
        """The boundary of a content before the control token `head`, or at the end of the text."""

        def ask(character: str) -> bool:
            alone = [self._ids(self.fence + before + character + self.fence)[:-1] for before in TEXTS_BEFORE]
            together = [self._ids(self.fence + before + character + head) for before in TEXTS_BEFORE]
            return together == [ids + self._ids(head) for ids in alone]

        return self.edges.setdefault("\0" + head, EdgeCheck(ask))

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids


def _provenance(parts: Sequence[str | int], contents: Sequence[str]) -> Provenance:
    pieces, at = [], 0
    for part in parts:
        text = contents[part] if isinstance(part, int) else part
        if isinstance(part, int):
            pieces.append(Piece(part, "content", at, at + len(text), part))
        at += len(text)
    return Provenance(pieces, {(number, "content") for number in range(len(contents)) if number not in parts})


def _plain_contents(row: Row) -> list[str] | None:
    """The contents of a row, if each message is a role and a content, and there are no tools."""
    messages = row["messages"]
    contents = [message["content"] for message in messages if len(message) == 2]
    return contents if len(contents) == len(messages) and not row.get("tools") else None


def _cut_at_answers(
    parts: Sequence[str | int], contents: Sequence[str], spans: Sequence[Span]
) -> tuple[tuple[str | int, ...], tuple[Span, ...]] | None:
    """The parts with texts cut where an answer begins or ends, and the answers as spans of parts.

    None if that is within a content.
    """
    cuts = sorted({at for span in spans for at in span})
    made: list[str | int] = []
    starts: dict[int, int] = {}  # character → part
    at = 0
    for part in parts:
        text = contents[part] if isinstance(part, int) else part
        inside = [cut - at for cut in cuts if at < cut < at + len(text)]
        if inside and isinstance(part, int):
            return None
        for begin, end in zip([0, *inside], [*inside, len(text)], strict=True):
            starts[at + begin] = len(made)
            made.append(part if isinstance(part, int) else text[begin:end])
        at += len(text)
    starts[at] = len(made)
    return tuple(made), tuple((starts[begin], starts[end]) for begin, end in spans)


def _text_runs_and_contents(parts: Sequence[str | int]) -> tuple[list[list[str]], list[int]]:
    """Runs of texts, one more than there are contents, and the contents between them."""
    runs: list[list[str]] = [[]]
    numbers: list[int] = []
    for part in parts:
        if isinstance(part, int):
            numbers.append(part)
            runs.append([])
        else:
            runs[-1].append(part)
    return runs, numbers


def _splits_at_line_breaks(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether text is split into words by regular expressions that look at nothing after them.

    Then a line break and a non-space character are in different words, or a test shows that they are not.
    """
    backend = tokenizer.backend_tokenizer
    steps = [json.loads(backend.pre_tokenizer.__getstate__())] if backend.pre_tokenizer else []
    while any(step["type"] == "Sequence" for step in steps):
        steps = [inner for step in steps for inner in step.get("pretokenizers", [step])]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    words = any(step["type"] == "Split" or step.get("use_regex") for step in steps)
    known = all(step["type"] in ("Split", "ByteLevel", "Digits") for step in steps)
    return words and known and not any(map(LOOKBEHIND.search, patterns))
