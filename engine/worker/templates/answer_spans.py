"""The spans of the answers in a rendered conversation, from its provenance, and the proof that they are right.

`engine.worker.templates.provenance` tells which characters belong to an answer. The template's text around them is cut
where generation begins and ends:

    … question <|im_end|>\\n<|im_start|>assistant\\n   answer   <|im_end|>\\n<|im_start|>user\\n question …
                                                  └── start            └── end

An answer starts where the generation prompt of the conversation before it ends or, if history is rendered differently
from the generation prompt, where the two diverge. It ends after the token at which generation stops.

These spans are the loss mask (assistant mask): `engine.worker.data.examples.labels_from_spans` makes labels of them.
Whoever changes them has to raise `engine.worker.data.cache.PREPARATION_VERSION`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from engine.core.problems import Refusal, problem
from engine.worker.templates.answer_endings import EndingProbes, MaskSettings, assistant_message, user_message
from engine.worker.templates.chat_template import (
    PROBE,
    QUESTION,
    ChatTemplate,
    Row,
    Span,
    any_of,
    common_prefix_length,
)
from engine.worker.templates.mask_fallbacks import proposed_spans, verified_answers
from engine.worker.templates.provenance import Piece, Provenance, losses_in, trace_provenance
from engine.worker.templates.rendering import Rendering

MAX_CLOSING_CHARACTERS = 64  # letters and digits that may close an answer before its end token
MAX_GAPS_REMEMBERED = 4096  # cached texts between a question and its answer
EMPTY_THOUGHT = re.compile(r"\s*(?:<[^<>/]*think[^<>]*>)?\s*</[^<>]*think[^<>]*>\s*")
THINK_TAG = re.compile("think>|</[^<>]*think")
# Marks that a template writes as a unit, whether or not they are single tokens.
TAG_PATTERN = r"</?[\w|｜:▁.-]+>|\[/?[A-Z_]+\]"


class Answers(NamedTuple):
    """The answers of one conversation in characters, one for each message of the assistant, in order; whether the last
    one ends with a token at which generation stops; and what the template left out."""

    spans: list[Span]
    is_ended: bool = True
    lost: tuple[str, ...] = ()


class AnswerSpans:
    """Finds the answers in the output of one template. `generation_stops`: the tokens at which generation stops
    according to the model's configuration.

    Raises Refusal if the template cannot render a question and an answer, or if nothing would end an answer.
    """

    def __init__(self, template: ChatTemplate, generation_stops: Sequence[str], settings: MaskSettings):
        self.template, self.settings = template, settings
        self.atoms = re.compile(f"{template.any_control.pattern}|{TAG_PATTERN}")
        self.starts: dict[tuple[Any, ...], int | None] = {}
        try:
            probes = EndingProbes(template, generation_stops, settings)
            self.opening, self.openers, self.endings = probes.opening, probes.openers, probes.endings()
        except Exception as error:  # a template is a program and may raise anything
            raise Refusal(problem("template-fails", "model.chat_template", reason=str(error))) from error
        if not self.endings.all():
            raise Refusal(problem("template-without-end", "model.chat_template"))
        self.stop = any_of({*self.endings.stops, *generation_stops})
        self.generation_stops = tuple(generation_stops)

    def find(self, row: Row, text: str, traced: Provenance | None) -> tuple[str, Answers]:
        """The answers in `text`, the rendering of `row`, and the text with the end of the last one added if it lacks
        one. `traced`: where the text comes from, if known.

        Raises Refusal if it cannot be proved that the answers are where they seem to be.
        """
        answers = self._from_provenance(row, text, traced) if traced else self._from_proposals(row, text)
        return self._with_end_token(row, text, answers)

    def are_independent_of(self, answer: str) -> bool:
        """Whether the spans found for any other answer of this kind also hold for this one (`template_cache` reuses
        them).

        It has to contain text, without reasoning in it, and must not begin with the end of the generation prompt,
        because its beginning would then be a part of that.
        """
        words = answer.lstrip()
        thinks = "think" in answer and THINK_TAG.search(answer)
        return bool(words) and not thinks and not words.startswith(self._opening_atoms)

    @cached_property
    def _opening_atoms(self) -> tuple[str, ...]:
        return tuple(self.atoms.findall(self.opening)) or ("\0",)

    def _from_proposals(self, row: Row, text: str) -> Answers:
        """The answers if it is unknown where everything comes from. Raises Refusal if no other way can be proved."""
        for proposal in proposed_spans(self.template, row, text):
            words = verified_answers(row, text, proposal, self.template.any_control)
            if words is None:
                continue
            stops = [self.stop.search(text, begin, limit) for begin, _, limit in words]
            # Only an answer that nothing follows may continue to the end of the text.
            if all(stops[:-1]) and (not stops or stops[-1] or words[-1][2] == len(text)):
                ends = [stop.end() if stop else len(text) for stop in stops]
                whole = [(begin, end) for (begin, _, _), end in zip(words, ends, strict=True)]
                starts = [stop.start() if stop else len(text) for stop in stops]
                if all(last <= start for (_, last, _), start in zip(words, starts, strict=True)):
                    lost = (*self._reasoning_losses(row, text, whole), *self._header_losses(whole))
                    return Answers(self._behind_empty_thoughts(text, whole), bool(stops and stops[-1]), lost)
        raise Refusal(problem("mask-unproven"))

    def _with_end_token(self, row: Row, text: str, answers: Answers) -> tuple[str, Answers]:
        """The same with the end of turn added after a last answer that has none."""
        end = self.endings.added_call if row["messages"][-1].get("tool_calls") else self.endings.added
        if not end and self.settings.end_last_answer:  # written after other answers, but not after this one
            end = next(iter((*self.endings.stops, *self.generation_stops)), None)
        if answers.is_ended or not end or not answers.spans or answers.spans[-1][1] != len(text):
            return text, answers
        start, stop = answers.spans[-1]
        spans = [*answers.spans[:-1], (start, stop + len(end))]
        return text + end, answers._replace(spans=spans, is_ended=True)

    def _from_provenance(self, row: Row, text: str, traced: Provenance) -> Answers:
        """The answers in a text of which it is known where everything comes from."""
        marks = self.template.generation_marks(row["messages"], row.get("tools"))
        rendering = Rendering(row, text, traced, marks, self.template.separators)
        spans: list[Span] = []
        is_ended = True
        for number, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                span, is_ended = self._span(rendering, number, after=spans[-1][1] if spans else 0)
                spans.append(span)
        lost = (
            *losses_in(row, text, traced),
            *self._reasoning_losses(row, text, spans),
            *self._header_losses(spans),
        )
        return Answers(self._behind_empty_thoughts(text, spans), is_ended, lost)

    def _reasoning_losses(self, row: Row, text: str, spans: list[Span]) -> list[str]:
        """What happens to a last answer without reasoning if the template is a thinking model's."""
        if not spans or row["messages"][-1]["role"] != "assistant":
            return []
        answer = text[slice(*spans[-1])]
        if EMPTY_THOUGHT.match(answer):
            return ["empty_reasoning"]
        return ["without_reasoning"] if "think" in self.opening and "think>" not in answer else []

    def _header_losses(self, spans: list[Span]) -> list[str]:
        """Whether the header of an answer is trained with it."""
        return ["header"] if spans and self.trained_header else []

    @cached_property
    def trained_header(self) -> str:
        """The header of each answer that no generation prompt writes, so that the model has to."""
        row = {"messages": [user_message(QUESTION), assistant_message(PROBE)]}
        if self.opening.strip():
            return ""
        try:
            text = self.template.render(row["messages"])
            if not (traced := trace_provenance(self.template, row, text)):
                return ""
            marks = self.template.generation_marks(row["messages"])
            start = self._span(Rendering(row, text, traced, marks, self.template.separators), 1, 0)[0][0]
        except Exception:  # a template may reject even this, and then renders no answer
            return ""
        return EMPTY_THOUGHT.sub("", text[start:].partition(PROBE)[0]).strip()

    def _behind_empty_thoughts(self, text: str, spans: list[Span]) -> list[Span]:
        """The spans without the empty thinking that the template writes before answers without reasoning, if it is not
        to be trained."""
        if self.settings.train_empty_thoughts:
            return spans
        return [(match.end() if (match := EMPTY_THOUGHT.match(text, *span)) else span[0], span[1]) for span in spans]

    def _span(self, rendering: Rendering, number: int, after: int) -> tuple[Span, bool]:
        """The span of the answer in message `number`, after the answer that ends at `after`; and whether a stop ends
        it."""
        text, own = rendering.text, rendering.own(number)
        rendering.check_written(number, own)
        blank = not any(piece.start < piece.end for piece in own)
        if blank and not self._writes_blank(rendering, number):
            raise Refusal(problem("answer-left-out", message=number + 1))
        others = [piece for piece in rendering.traced.pieces if piece.message != number]
        low, high = _bounds_of_answer(number, own, others, len(text))
        first = own[0].start if own else high
        if number and not rendering.copies(number - 1):
            offset = self._start_behind(rendering, number, low, first)
        else:
            offset = self._start(rendering, number, text[low:first], blank)
        marked = None if self.opening else rendering.marked_start(max(low, after), first)
        if offset is None and marked is None:
            raise Refusal(problem("answer-start-hidden", message=number + 1))
        start = max(after, low + (offset or 0), marked or 0)
        last = max([piece.end for piece in own], default=start)
        stop = self.stop.search(text, last, high)
        if not stop and high < len(text) and not self.template.any_control.search(text, last, high):
            raise Refusal(problem("answer-without-end", message=number + 1))
        end = stop.end() if stop else last + self._closed(rendering.row, number, text[last:high])
        closing = self.template.any_control.sub("", text[last:end]) if own and own[-1].field == "content" else ""
        if sum(map(str.isalnum, closing)) > MAX_CLOSING_CHARACTERS:
            raise Refusal(problem("answer-end-hidden", message=number + 1))
        if any(start < piece.end and piece.start < end for piece in others):
            raise Refusal(problem("mask-mixed", message=number + 1))
        rendering.check_span(number, (start, end))
        return (start, end), stop is not None

    def _writes_blank(self, rendering: Rendering, number: int) -> bool:
        """Whether the template writes anything for an empty message."""
        row = rendering.row
        without = [*row["messages"][:number], *row["messages"][number + 1 :]]
        try:
            return self.template.render(without, row.get("tools")) != rendering.text
        except Exception:  # the other messages alone are not a conversation that it accepts
            return True

    def _closed(self, row: Row, number: int, rest: str) -> int:
        """How much of `rest`, the text after an answer without a stop, closes it: what is also there without the next
        message."""
        following = row["messages"][number + 1 :]
        alone = self._tail({**row, "messages": row["messages"][: number + 1]}) if following else rest
        shared = rest[: common_prefix_length(rest, alone or "", self.atoms)]
        opened = any_of(self.openers).search(shared)
        if opened or following:
            shared = shared[: opened.start() if opened else None].rstrip()
        return len(shared)

    def _start(self, rendering: Rendering, number: int, gap: str, blank: bool) -> int | None:
        """The start of the answer in `gap`, the text between what precedes the answer and its first word. For a `blank`
        answer, which has no first word, only the generation prompt shows it."""
        row = rendering.row
        role = row["messages"][number - 1]["role"] if number else ""
        key = gap, role, bool(row.get("tools")), rendering.contexts[number], blank
        if key not in self.starts:
            if len(self.starts) >= MAX_GAPS_REMEMBERED:
                self.starts.clear()
            self.starts[key] = self._learn_start(row, number, gap, blank)
        return self.starts[key]

    def _start_behind(self, rendering: Rendering, number: int, low: int, first: int) -> int | None:
        """The same if nothing shows where the message before the answer is, because it is blank: `low` is then earlier,
        and the prompt is compared from there."""
        row, gap = rendering.row, rendering.text[low:first]
        before = row["messages"][:number]
        if before[-1]["role"] == "assistant":
            return None
        try:
            prompt = self.template.render(before, row.get("tools"), add_generation_prompt=True)
            answered = self.template.render([*before, assistant_message(PROBE)], row.get("tools"))
        except Exception:  # a template may reject half a conversation
            return None
        header = answered.partition(PROBE)[0]
        if not all(written.startswith(rendering.text[:low]) for written in (prompt, header)):
            return None
        (offset, whole), (header_offset, header_whole) = (
            self._parting(gap, written[low:]) for written in (prompt, header)
        )
        if not header_whole:
            return None
        return offset if whole else header_offset

    def _learn_start(self, row: Row, number: int, gap: str, blank: bool) -> int | None:
        before = {**row, "messages": row["messages"][:number]}
        if not number or before["messages"][-1]["role"] == "assistant":
            return self._behind_opening(gap)  # nothing is generated here, so there is no generation prompt
        prompt = self._tail(before, add_generation_prompt=True)
        if prompt is None:
            return self._behind_opening(gap)
        offset, whole = self._parting(gap, prompt)
        if whole:
            return offset
        if blank:
            return None
        if "think" in (self.atoms.match(gap, offset) or [""])[0]:
            return offset  # the model writes its reasoning itself
        # History and generation prompt name the speaker differently: an answer of plain text shows where it begins.
        author = {key: value for key, value in row["messages"][number].items() if key == "name"}
        plain = assistant_message(PROBE, **author)
        header = self._tail({**row, "messages": [*before["messages"], plain]}, until=PROBE)
        header_offset, header_whole = self._parting(gap, header or "")
        # Questions are also named differently once they are answered: the header of any answer shows where it begins.
        behind = 0 if header_whole else self._behind_opening(gap) or 0
        return max(offset, header_offset, behind)

    def _behind_opening(self, gap: str) -> int | None:
        """Where the header of an answer to a question ends in `gap`; all of it if there is none."""
        opening = self.opening.strip()
        if not opening:
            return len(gap)
        first = self.atoms.match(opening) or re.match(r"\S+", opening)
        assert first is not None  # a text that does not begin with a space
        head = re.escape(first[0])
        lengths = {
            match.start(): self._parting(gap[match.start() :], self.opening)[0] for match in re.finditer(head, gap)
        }
        return max((length, at + length) for at, length in lengths.items())[1] if lengths else None

    def _tail(self, row: Row, *, add_generation_prompt: bool = False, until: str = "") -> str | None:
        """What the template writes after the last text of the conversation or, before `until`, after the one before."""
        try:
            text = self.template.render(row["messages"], row.get("tools"), add_generation_prompt)
        except Exception:  # a template may reject half a conversation
            return None
        traced = trace_provenance(self.template, row, text, add_generation_prompt)
        if traced is None:
            return None
        limit = text.rindex(until) if until and until in text else len(text)
        before = len(row["messages"]) - bool(until)
        ends = [piece.end for piece in traced.pieces if piece.end <= limit and piece.message < before]
        return text[max(ends, default=0) : limit]

    def _parting(self, history: str, prompt: str) -> tuple[int, bool]:
        """How much of `history` equals `prompt`, ignoring blanks, and whether one of them ends there."""
        at, other = 0, 0
        while True:
            ahead, other_ahead = _skip_blanks(history, at), _skip_blanks(prompt, other)
            if ahead == len(history) or other_ahead == len(prompt) or history[ahead] != prompt[other_ahead]:
                break
            at, other = ahead + 1, other_ahead + 1
        whole = ahead == len(history) or other_ahead == len(prompt)
        while at < len(history) and other < len(prompt) and history[at] == prompt[other]:  # blanks
            at, other = at + 1, other + 1
        for text, place in ((history, at), (prompt, other)):
            for atom in self.atoms.finditer(text):
                if atom.start() < place < atom.end():
                    back = len("".join(text[atom.start() : place].split()))
                    while back:
                        at -= 1
                        back -= not history[at].isspace()
                    return at, False
        return at, whole


def _bounds_of_answer(number: int, own: list[Piece], others: list[Piece], length: int) -> Span:
    """The pieces of other messages between which the answer in message `number` is."""
    if own:
        first, last = own[0].start, max(piece.end for piece in own)
        low = max([piece.end for piece in others if piece.end <= first], default=0)
        return low, min([piece.start for piece in others if piece.start >= last], default=length)
    low = max([piece.end for piece in others if piece.message < number], default=0)
    return low, min([p.start for p in others if p.message > number and p.start >= low], default=length)


def _skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
