"""Conversations → token ids, and the spans of the answers in them.

The ids are exactly those of `tokenizer.apply_chat_template`, with two exceptions: if a *value* of the data contains the
text of a control token, it stays text; and if the template writes nothing after the last answer, the token at which
generation stops can be added there. A conversation is rendered and tokenized as a whole. Most come from the cache
(`engine.worker.templates.template_cache`), which produces what the template would write without running it; whatever
the cache is not certain about is rendered by the template itself, once plainly and once to find out where everything
comes from.

The spans of the answers become labels in `engine.worker.data.examples.labels_from_spans`. Whoever changes ids or spans
here has to raise `engine.worker.data.cache.PREPARATION_VERSION`.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from engine.core.problems import NOTHING, Problem, Refusal, problem
from engine.data.row_images import images_of
from engine.worker.templates.answer_endings import DEFAULT_MASK, MaskSettings
from engine.worker.templates.answer_spans import Answers, AnswerSpans
from engine.worker.templates.chat_template import ChatTemplate, Row, Span, ids_of_tokens, with_short_ids
from engine.worker.templates.image_tokens import ImageTokens
from engine.worker.templates.provenance import losses_in, trace_provenance
from engine.worker.templates.template_cache import TemplateCache
from engine.worker.templates.template_shapes import TokenizedGroup
from engine.worker.templates.token_escaping import TokenEscaping

CONVERSATIONS_COMPARED = 8  # conversations of each shape that are compared with the output of the template
WRITES_NO_CALLS = "template-without-tool-calls"
NO_IMAGES = problem("model-without-images", "model.model_name_or_path")
TOOL_TEMPLATE_NAME = "tool_use"  # the name of a tokenizer's second template, which is for conversations with tools


class TokenizedConversation(NamedTuple):
    """A conversation: its ids (int32); the token spans of its answers, one for each message of the assistant, including
    the token that ends the turn; whether the last one has such a token, since a model never shown one never stops; what
    the template left out of the row (see `engine.data.template_losses`); and the token spans of its images, including
    everything that the model's processor writes around them."""

    ids: np.ndarray
    answers: Sequence[Span]
    ended: bool
    lost: tuple[str, ...] = ()
    images: Sequence[Span] = ()


class ConversationEncoder:
    """A tokenizer with its chat templates: there may be a separate one for conversations with tools.

    Raises Refusal if nothing at the end of an answer can teach a model to stop.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
        settings: MaskSettings = DEFAULT_MASK,
        images: ImageTokens | Problem = NO_IMAGES,
    ):
        """`images`: the model's image tokens, or the reason why it has none."""
        self.tokenizer = tokenizer
        sources = _chat_templates(tokenizer, chat_template)
        self.plain = TemplateEncoder(tokenizer, sources[0], settings, images)
        self.with_tools = self.plain
        if sources[1] != sources[0]:
            self.with_tools = TemplateEncoder(tokenizer, sources[1], settings, images)

    @property
    def end_tokens(self) -> list[str]:
        """The tokens that end an answer according to the templates, at which generation has to stop. Never empty."""
        both = (self.plain, self.with_tools)
        return list(dict.fromkeys(token for rendered in both for token in rendered.end_tokens))

    def encode(
        self, rows: Sequence[Row], *, add_generation_prompt: bool = False
    ) -> list[TokenizedConversation | Problem]:
        """One result per row, in the same order; a Problem for a row that the template or the tokenizer cannot render.

        `generate`: the conversation ends with the opening of an answer that is yet to be generated.
        """
        if self.plain is self.with_tools:
            return self.plain.encode(rows, add_generation_prompt)
        results: list[TokenizedConversation | Problem | None] = [None] * len(rows)
        for rendered, tools in ((self.plain, False), (self.with_tools, True)):
            numbers = [number for number, row in enumerate(rows) if bool(row.get("tools")) == tools]
            encoded = rendered.encode([rows[number] for number in numbers], add_generation_prompt)
            for number, result in zip(numbers, encoded, strict=True):
                results[number] = result
        return self._with_calls(rows, results, add_generation_prompt)

    def _with_calls(
        self, rows: Sequence[Row], results: list[Any], add_generation_prompt: bool
    ) -> list[TokenizedConversation | Problem]:
        """Rows that call tools without a list of them, if only the template for tools renders calls."""
        numbers = [n for n, result in enumerate(results) if getattr(result, "code", "") == WRITES_NO_CALLS]
        encoded = self.with_tools.encode([rows[number] for number in numbers], add_generation_prompt)
        for number, result in zip(numbers, encoded, strict=True):
            results[number] = result
        return cast("list[TokenizedConversation | Problem]", results)  # each has one by now


class Draft(NamedTuple):
    """A conversation as text. `hidden`: placeholders of control tokens in it; `images`: the character span of each
    image; `rendered`: the text as the template wrote it, if images are expanded in `text`."""

    text: str
    answers: Answers
    hidden: dict[str, str]
    images: Sequence[Span] = ()
    rendered: str = ""


def _has_images(row: Row) -> bool:
    return any("images" in message for message in row["messages"])


class TemplateEncoder:
    """One template, and what is known about its output."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, source: str, settings: MaskSettings, images: ImageTokens | Problem
    ):
        self.tokenizer, self.images = tokenizer, images
        self.template = ChatTemplate(tokenizer, source)
        self.spans = AnswerSpans(self.template, generation_stops(tokenizer), settings)
        self.escaping = TokenEscaping(self.template, self.spans)
        self.cache = TemplateCache(self.template, self.spans)

    @property
    def end_tokens(self) -> list[str]:
        return self.spans.endings.all()

    def encode(
        self, rows: Sequence[Row], add_generation_prompt: bool = False, *, use_cache: bool = True
    ) -> list[TokenizedConversation | Problem]:
        """See `ConversationEncoder.encode`. Without `use_cache` each row is rendered by the template itself."""
        rows = [self.template.adapt(row) for row in rows]
        if not use_cache:
            return self._by_template(rows, add_generation_prompt, template_only=True)
        results: list[TokenizedConversation | Problem | None] = [None] * len(rows)
        plain = [number for number, row in enumerate(rows) if not _has_images(row)]
        plain_rows = rows if len(plain) == len(rows) else [rows[number] for number in plain]
        for group in self.cache.encode(plain_rows, add_generation_prompt):
            if not self._proven(group, plain_rows, add_generation_prompt):
                continue
            shape, numbers, ids, bounds, answers = group
            for at, number in enumerate(numbers):
                results[plain[number]] = TokenizedConversation(
                    ids[bounds[at] : bounds[at + 1]], answers[at], shape.is_ended, shape.lost
                )
        left = [number for number, result in enumerate(results) if result is None]
        by_template = self._by_template([rows[number] for number in left], add_generation_prompt)
        for number, result in zip(left, by_template, strict=True):
            results[number] = result
        return cast("list[TokenizedConversation | Problem]", results)  # each has one by now

    def _proven(self, group: TokenizedGroup, rows: Sequence[Row], add_generation_prompt: bool) -> bool:
        """Whether the cache gives the same as the template, compared once for the first conversations of each shape."""
        shape = group.shape
        if not shape.proven and shape.plan:
            compared = range(min(len(group.rows), CONVERSATIONS_COMPARED))
            by_template = self._by_template(
                [rows[group.rows[at]] for at in compared], add_generation_prompt, template_only=True
            )
            shape.proven = all(
                isinstance(tokens, TokenizedConversation)
                and tokens.ids.tolist() == group.ids[group.bounds[at] : group.bounds[at + 1]].tolist()
                and tuple(tokens.answers) == group.answers[at]
                and (tokens.ended, tokens.lost) == (shape.is_ended, shape.lost)
                for at, tokens in zip(compared, by_template, strict=True)
            )
            if not shape.proven:
                shape.plan = None
        return shape.proven

    def _by_template(
        self, rows: Sequence[Row], add_generation_prompt: bool, *, template_only: bool = False
    ) -> list[TokenizedConversation | Problem]:
        """Rendered as a whole and tokenized as a whole."""
        results: list[TokenizedConversation | Problem | None] = [None] * len(rows)
        drafts: list[tuple[int, Draft]] = []
        for number, row in enumerate(rows):
            escaped, hidden = self.escaping.row(row)
            try:
                self._check_images(row)
                known = None if template_only or _has_images(row) else self.cache.text(escaped, add_generation_prompt)
                text, answers = known or self._rendered(escaped, add_generation_prompt)
                draft = self._with_images(row, Draft(text, answers, hidden))
            except Refusal as refusal:
                results[number] = refusal.problems[0]
            except Exception as error:  # a template is a program: whatever it raises is about this row
                results[number] = problem("template-refuses-row", reason=str(error))
            else:
                drafts.append((number, draft))
        encodings = self.tokenizer.backend_tokenizer.encode_batch(
            [draft.text for _, draft in drafts], add_special_tokens=False
        )
        for (number, draft), encoding in zip(drafts, encodings, strict=True):
            try:
                results[number] = self._tokens(draft, encoding)
                if draft.images:
                    self._prove_images(rows[number], draft, encoding)
            except Refusal as refusal:
                results[number] = refusal.problems[0]
        return cast("list[TokenizedConversation | Problem]", results)  # each has one by now

    def _check_images(self, row: Row) -> None:
        """Raises Refusal if the row has images, but the model or its template does not support them."""
        if images := list(images_of(row)):
            if isinstance(self.images, Problem):
                raise Refusal(self.images)
            if not self.template.writes_image(self.images.token):
                raise Refusal(problem("images-left-out", places=0, images=len(images)))

    def _with_images(self, row: Row, draft: Draft) -> Draft:
        """The draft with the images of the row expanded."""
        images = list(images_of(row))
        if not images:
            return draft
        assert not isinstance(self.images, Problem)  # checked before
        text, spans, written = self.images.expand(draft.text, draft.answers.spans, images)
        return Draft(text, draft.answers._replace(spans=spans), draft.hidden, written, draft.text)

    def _prove_images(self, row: Row, draft: Draft, encoding: Any) -> None:
        assert not isinstance(self.images, Problem)  # it has expanded them
        self.images.prove(draft.rendered, list(images_of(row)), encoding.ids)

    def _tokens(self, draft: Draft, encoding: Any) -> TokenizedConversation:
        text, answers, hidden = draft.text, draft.answers, draft.hidden
        ids = encoding.ids
        spans = [_token_span(encoding, span, self.escaping.control) for span in answers.spans]
        # A token that is partly an image's counts as the image's: it is not trained.
        images = [_token_span(encoding, span, ()) for span in draft.images]
        if hidden:
            ids, moved = self.escaping.restore(text, encoding, [*spans, *images], hidden)
            spans, images = moved[: len(spans)], moved[len(spans) :]
        if empty := [number for number, (begin, end) in enumerate(spans) if begin >= end]:
            raise Refusal(problem("mask-empty", answer=empty[0] + 1))
        ids = np.array(ids, dtype=np.int32)
        return TokenizedConversation(ids, spans, answers.is_ended, answers.lost, images)

    def _rendered(self, row: Row, add_generation_prompt: bool) -> tuple[str, Answers]:
        try:
            text = self.template.render(row["messages"], row.get("tools"), add_generation_prompt)
        except Exception:
            # Some templates accept only their own kind of call IDs; any other error is raised again.
            row = {**row, "messages": with_short_ids(row["messages"])}
            text = self.template.render(row["messages"], row.get("tools"), add_generation_prompt)
        traced = trace_provenance(self.template, row, text, add_generation_prompt)
        if not add_generation_prompt:
            return self.spans.find(row, text, traced)
        return text, Answers([], lost=losses_in(row, text, traced) if traced else ())


def generation_stops(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The tokens at which generation stops: those of the generation_config.json next to the tokenizer, otherwise its
    eos.

    Only added tokens: others may be a part of a word when they occur in a text.
    """
    try:
        config = json.loads(Path(tokenizer.name_or_path, "generation_config.json").read_text(encoding="utf-8"))
        ends = config.get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        ends = None
    ids = ends if isinstance(ends, list) else [ends]
    added = tokenizer.added_tokens_decoder
    tokens = [added[number].content for number in ids if type(number) is int and number in added]
    return [token for token in dict.fromkeys(tokens or [tokenizer.eos_token]) if token]


def end_of_turn_ids(tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None) -> list[int]:
    """The tokens that end an answer according to the template, at which generation has to stop. Never empty."""
    return ids_of_tokens(tokenizer, ConversationEncoder(tokenizer, chat_template).end_tokens)


def _chat_templates(tokenizer: PreTrainedTokenizerFast, chat_template: str | None) -> tuple[str, str]:
    """The template for conversations without tools and the one for those with tools, which may be the same."""
    several: Any = tokenizer.chat_template
    if chat_template or not isinstance(several, dict):
        source = tokenizer.get_chat_template(chat_template)
        return source, source
    plain: str = several.get("default") or (next(iter(several.values())) if len(several) == 1 else "")
    if not plain:
        raise Refusal(problem("templates-without-default", "model.chat_template", names=", ".join(several) or NOTHING))
    return plain, several.get(TOOL_TEMPLATE_NAME, plain)


def _token_span(encoding: Any, span: Span, control: Collection[int]) -> Span:
    """The tokens that contain any of the characters of an answer.

    So an ordinary token shared by answer and prompt (" yes" after "A: ") belongs to the answer, which would otherwise
    lose its beginning. A control token belongs to the prompt even if it swallows the answer's leading spaces (Phi).
    """
    start, end = span
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:  # slower, but also correct if a tokenizer leaves characters out
        offsets = encoding.offsets
        first = next((token for token, (_, ends) in enumerate(offsets) if ends > start), len(offsets))
        last = bisect_left(offsets, (end,)) - 1
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1)[0] < end:
        last += 1  # several tokens may share one character
    if first <= last and encoding.ids[first] in control and encoding.token_to_chars(first)[0] < start:
        first += 1
    return first, max(first, last + 1)
