"""Canonical rows → training examples of a stage: token ids, labels (the loss mask), and what was truncated.

    text     → input_ids, labels                              every token trained; each document ends with eos
    chat     → input_ids, labels                              the answers trained, including their end tokens,
                                                              weighted by the row (engine.worker.data.turn_weights)
    pairs    → prompt_ids, chosen_ids, rejected_ids           prompt + answer are the template's ids of the two together
    thumbs   → prompt_ids, completion_ids, label
    prompts  → prompt_ids, prompt (JSON of the messages), answer        ends where an answer has to begin

If any row has images, each also has image_sources: where its images are. No example is longer than `max_length`.
Reading the data is left to `engine.data.datasets`, storing to `engine.worker.prepare`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from engine.core.problems import Problem, Refusal, problem
from engine.core.stages import STAGES, Form
from engine.data.images import ImageSource
from engine.data.row_images import broken_image, images_of, readable
from engine.data.template_losses import LOSSES
from engine.spec.run_spec import RunSpec
from engine.worker.data.images_column import IMAGES_COLUMN, images_column
from engine.worker.data.turn_weights import spans_without, weighted_spans, weights_column, without_oldest
from engine.worker.templates.answer_endings import DEFAULT_MASK, MaskSettings
from engine.worker.templates.chat_template import ChatTemplate, Span
from engine.worker.templates.conversations import NO_IMAGES, ConversationEncoder, Row, TokenizedConversation
from engine.worker.templates.image_tokens import ImageTokens
from engine.worker.templates.token_escaping import TokenEscaping

IGNORE_INDEX = -100  # the label that the loss ignores, as in torch's cross_entropy by default
TrainOn = Literal["answers", "last_answer", "everything"]
TooLong = Literal["cut_end", "cut_start", "drop"]

# The status of a row. "cut": truncated to max_length. "too_long": longer than that, and truncation would remove all
# trained tokens, or the policy forbids it. "untrained": no labels at all. "equal": a pair without a difference.
# "refused": the template or the tokenizer cannot render it.
ROW_STATUSES = ("kept", "cut", "too_long", "untrained", "equal", "refused")
USABLE_STATUSES = 2  # the first two of them

IDS_TYPE = pa.list_(pa.int32())
COLUMNS: dict[Form, dict[str, pa.DataType]] = {
    "text": {"input_ids": IDS_TYPE, "labels": IDS_TYPE},
    "chat": {"input_ids": IDS_TYPE, "labels": IDS_TYPE},
    "pairs": {"prompt_ids": IDS_TYPE, "chosen_ids": IDS_TYPE, "rejected_ids": IDS_TYPE},
    "thumbs": {"prompt_ids": IDS_TYPE, "completion_ids": IDS_TYPE, "label": pa.bool_()},
    "prompts": {"prompt_ids": IDS_TYPE, "prompt": pa.string(), "answer": pa.string()},
}


class Example(NamedTuple):
    """One row. If it cannot be used, the values are empty.

    `trained`: spans of the first value that are trained (text, chat). `lost`: what the chat template left out of the
    row, as words of `engine.data.template_losses.LOSSES`. `ended`: every trained answer includes its end token; a model
    that never sees one never stops. `weights`: of each span, if not all are 1. `image_spans`: the tokens of each image.
    """

    values: tuple[Any, ...]
    status: str = "kept"
    ended: bool = True
    trained: Sequence[Span] = ()
    reason: Problem | None = None
    weights: Sequence[float] | None = None
    lost: tuple[str, ...] = ()
    images: tuple[ImageSource, ...] = ()
    image_spans: Sequence[Span] = ()


@dataclass
class Encoder:
    """Makes examples of one form. `too_long` says what happens to a row of more than `max_length` tokens:

    "cut_end" keeps the turns up to the last answer that fits, and if not even the first does, the tokens that fit; of a
    pair it shortens the answers, never the prompt. "cut_start" leaves out the oldest turns after the system message, as
    few as necessary, and if the last ones alone are too long, truncates their end. "drop" leaves the row out. Text is
    never truncated: what does not fit into one example goes into the next.

    Raises Refusal if the template does not show where an answer ends, or the tokenizer has no eos for texts.
    """

    tokenizer: PreTrainedTokenizerFast
    form: Form
    max_length: int
    train_on: TrainOn = "answers"
    too_long: TooLong = "cut_end"
    chat_template: str | None = None
    mask: MaskSettings = DEFAULT_MASK
    images: ImageTokens | Problem = NO_IMAGES  # the model's image tokens, or the reason why it has none
    decode_images: bool = True  # decode each image in full, to find damage after its header
    conversations: ConversationEncoder = field(init=False, repr=False, compare=False)  # for all forms except texts
    escaping: TokenEscaping = field(init=False, repr=False, compare=False)  # for texts

    @classmethod
    def of(
        cls,
        spec: RunSpec,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int | None = None,
        images: ImageTokens | Problem = NO_IMAGES,
    ) -> Encoder:
        """The encoder of a run of `spec`; with `max_length` instead of the spec's."""
        train_on: TrainOn = getattr(spec.stage, "train_on", "answers")
        data, length = spec.data, max_length or spec.data.max_length
        stage = STAGES[spec.stage.kind]
        mask = MaskSettings(data.end_last_answer, data.train_empty_thoughts)
        images = images if stage.images else problem("row-images-stage")
        return cls(tokenizer, stage.form, length, train_on, data.too_long, mask=mask, images=images)

    def __post_init__(self) -> None:
        if self.form == "text":
            if self.tokenizer.eos_token_id is None:
                raise Refusal(problem("tokenizer-without-eos", "model.model_name_or_path"))
            self.escaping = TokenEscaping(ChatTemplate(self.tokenizer, ""))
        else:
            self.conversations = ConversationEncoder(self.tokenizer, self.chat_template, self.mask, self.images)

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """One example per row, in the same order. A text is one example, however long: see `windows`."""
        examples = EXAMPLES_OF_FORM[self.form](self, rows)
        if self.too_long == "cut_start" and self.form != "text":
            self._cut_start(rows, examples)
        return examples

    def _cut_start(self, rows: Sequence[Row], examples: list[Example]) -> None:
        """Replaces each example that was too long by that of the row with as few turns removed as necessary."""
        least = {n: 1 for n, example in enumerate(examples) if _too_long(example)}
        most = {n: len(_turn_starts(rows[n])) - 1 for n in least}
        while open_ := [n for n in least if least[n] <= most[n]]:
            tried = {n: (least[n] + most[n]) // 2 for n in open_}
            made = EXAMPLES_OF_FORM[self.form](self, [_without_oldest(rows[n], tried[n]) for n in open_])
            for n, example in zip(open_, made, strict=True):
                if _too_long(example):
                    least[n] = tried[n] + 1
                    if least[n] > most[n] and _too_long(examples[n]):
                        examples[n] = example
                else:
                    most[n] = tried[n] - 1
                    examples[n] = example._replace(status="cut" if example.status == "kept" else example.status)


def _too_long(example: Example) -> bool:
    return example.status in ("cut", "too_long")


def _turn_starts(row: Row) -> list[int]:
    """The position of each question together with everything that belongs to its answer. What comes before the first,
    such as a greeting, is a turn of its own; a last question without an answer belongs to the turn before."""
    roles = [message["role"] for message in row["messages"]]
    if "chosen" not in row and "answer" not in row:  # its answers are among them
        roles = roles[: len(roles) - roles[::-1].index("assistant")]
    first = next((number for number, role in enumerate(roles) if role != "system"), 0)
    return [number for number, role in enumerate(roles) if role == "user" or number == first]


def _without_oldest(row: Row, count: int) -> Row:
    turns = _turn_starts(row)
    return without_oldest(row, turns[0], turns[count])


# ---------------------------------------------------------------------------------------------- forms


def _text_examples(encoder: Encoder, rows: Sequence[Row]) -> list[Example]:
    """Each document ends with the tokenizer's eos, once, and begins with what the tokenizer itself puts first (a BOS or
    nothing)."""
    backend, escaping, eos = (
        encoder.tokenizer.backend_tokenizer,
        encoder.escaping,
        encoder.tokenizer.eos_token_id,
    )
    escaped = [escaping.text(row["text"]) for row in rows]
    # Offsets are needed only for texts in which control tokens were escaped.
    plain = iter(backend.encode_batch_fast([text for text, hidden in escaped if not hidden]))
    marked = iter(backend.encode_batch([text for text, hidden in escaped if hidden]))
    examples = []
    for row, (text, hidden) in zip(rows, escaped, strict=True):
        try:
            ids = escaping.restore(text, next(marked), [], hidden)[0] if hidden else next(plain).ids
        except Refusal as refusal:
            examples.append(_refused("text", refusal.problems[0]))
            continue
        whole = np.array(ids if ids and ids[-1] == eos else [*ids, eos], dtype=np.int32)
        status = "kept" if len(whole) <= encoder.max_length else "cut"
        trained, weights = weighted_spans([(0, len(whole))], row.get("weights"), len(whole), "answers")
        usable = Example((whole,), status, trained=trained, weights=weights)
        examples.append(usable if trained else _unusable("text", "untrained"))
    return examples


def _chat_examples(encoder: Encoder, rows: Sequence[Row]) -> list[Example]:
    max_length = encoder.max_length
    examples = []
    for row, tokens in zip(rows, encoder.conversations.encode(rows), strict=True):
        if not isinstance(tokens, TokenizedConversation):
            examples.append(_refused("chat", tokens))
            continue
        ids, answers, ended, lost, image_spans = tokens
        images = tuple(images_of(row))
        status, weights = "kept", row.get("weights")
        if broken := encoder.decode_images and broken_image(row):
            examples.append(_refused("chat", broken))
            continue
        if weights is not None and len(weights) != len(answers):
            reason = problem("weights-beside-answers", weights=len(weights), answers=len(answers))
            examples.append(_refused("chat", reason))
            continue
        if len(ids) > max_length:
            ids, answers, status, ended = _truncated(tokens, max_length, encoder.too_long)
            # A cut is after an answer, or in the first one: never in an image.
            images = images[: sum(end <= len(ids) for _, end in image_spans)]
        chosen, weights = weighted_spans(answers, weights, len(ids), encoder.train_on)
        if images:
            chosen, weights = spans_without(chosen, weights, image_spans)
        if status == "too_long":
            examples.append(_unusable("chat", status))
        elif not any([begin < end for begin, end in chosen]):
            examples.append(_unusable("chat", "untrained"))
        else:
            spans = image_spans[: len(images)]
            examples.append(Example((ids,), status, ended, chosen, None, weights, lost, images, spans))
    return examples


def _truncated(
    tokens: TokenizedConversation, max_length: int, too_long: TooLong
) -> tuple[np.ndarray, list[Span], str, bool]:
    """Ids and answers up to the last answer that fits; of the first one, as much as fits."""
    whole = [end for _, end in tokens.answers if end <= max_length]
    kept = 0 if too_long == "drop" else whole[-1] if whole else max_length
    answers = [(begin, min(end, kept)) for begin, end in tokens.answers if begin < kept]
    ended = tokens.ended and bool(whole)
    return tokens.ids[:kept], answers, "cut" if answers else "too_long", ended


def _pair_examples(encoder: Encoder, rows: Sequence[Row]) -> list[Example]:
    sides = encoder.conversations.encode(
        [{**row, "messages": row["messages"] + row[side]} for side in ("chosen", "rejected") for row in rows]
    )
    examples = []
    for row, chosen, rejected in zip(rows, sides[: len(rows)], sides[len(rows) :], strict=True):
        if isinstance(chosen, Problem):
            examples.append(_refused("pairs", chosen))
            continue
        if isinstance(rejected, Problem):
            examples.append(_refused("pairs", rejected))
            continue
        at = _common_prompt_length(chosen, rejected)
        example = _prompt_and_answers(encoder, "pairs", row, at, chosen, rejected)
        _, *answers = example.values
        if example.status in ROW_STATUSES[:USABLE_STATUSES] and np.array_equal(*answers):
            example = _unusable("pairs", "equal")
        examples.append(example)
    return examples


def _common_prompt_length(chosen: TokenizedConversation, rejected: TokenizedConversation) -> int:
    """The start of the last answers of two conversations; if a token contains the end of the question and the beginning
    of only one of the answers, the position before that."""
    at = min(chosen.answers[-1][0], rejected.answers[-1][0])
    differs = chosen.ids[:at] != rejected.ids[:at]
    return int(differs.argmax()) if differs.any() else at


def _kto_examples(encoder: Encoder, rows: Sequence[Row]) -> list[Example]:
    examples = []
    for row, tokens in zip(rows, encoder.conversations.encode(rows), strict=True):
        if not isinstance(tokens, TokenizedConversation):
            examples.append(_refused("thumbs", tokens))
            continue
        example = _prompt_and_answers(encoder, "thumbs", row, tokens.answers[-1][0], tokens)
        if example.status in ROW_STATUSES[:USABLE_STATUSES]:
            example = example._replace(values=(*example.values, row["label"]))
        examples.append(example)
    return examples


def _prompt_and_answers(encoder: Encoder, form: Form, row: Row, at: int, *sides: TokenizedConversation) -> Example:
    """A prompt that ends at `at`, and the last answer of each side. The prompt is never truncated, and has all images
    of the row."""
    if broken := encoder.decode_images and broken_image(row):
        return _refused(form, broken)
    spans = sides[0].images
    if any(end > at for _, end in spans):
        return _refused(form, problem("row-image-answer"))
    prompt, images = sides[0].ids[:at], tuple(images_of(row))
    answers = [side.ids[at : side.answers[-1][1]] for side in sides]
    room, lost = encoder.max_length - at, tuple(dict.fromkeys(word for side in sides for word in side.lost))
    seen: dict[str, Any] = {"lost": lost, "images": images, "image_spans": spans}
    if max(map(len, answers)) <= room:
        return Example((prompt, *answers), ended=all(side.ended for side in sides), **seen)
    if room <= 0 or encoder.too_long == "drop":
        return _unusable(form, "too_long")
    return Example((prompt, *(answer[:room] for answer in answers)), "cut", ended=False, **seen)


def _prompt_examples(encoder: Encoder, rows: Sequence[Row]) -> list[Example]:
    examples = []
    for row, tokens in zip(rows, encoder.conversations.encode(rows, add_generation_prompt=True), strict=True):
        if not isinstance(tokens, TokenizedConversation):
            examples.append(_refused("prompts", tokens))
        elif broken := encoder.decode_images and broken_image(row):
            examples.append(_refused("prompts", broken))
        elif len(tokens.ids) > encoder.max_length:
            examples.append(_unusable("prompts", "too_long"))
        else:
            messages = json.dumps(readable(row["messages"]), ensure_ascii=False)
            seen: dict[str, Any] = {"images": tuple(images_of(row)), "image_spans": tokens.images}
            examples.append(Example((tokens.ids, messages, row.get("answer")), lost=tokens.lost, **seen))
    return examples


EXAMPLES_OF_FORM: dict[Form, Callable[[Encoder, Sequence[Row]], list[Example]]] = {
    "text": _text_examples,
    "chat": _chat_examples,
    "pairs": _pair_examples,
    "thumbs": _kto_examples,
    "prompts": _prompt_examples,
}

NO_IDS = np.zeros(0, dtype=np.int32)
EMPTY_VALUES: dict[Form, tuple[Any, ...]] = {
    form: tuple(NO_IDS if kind == IDS_TYPE else None for kind in columns.values()) for form, columns in COLUMNS.items()
}


def _unusable(form: Form, status: str) -> Example:
    return Example(EMPTY_VALUES[form], status)


def _refused(form: Form, reason: Problem) -> Example:
    return Example(EMPTY_VALUES[form], "refused", reason=reason)


# --------------------------------------------------------------------------------------------- tables


def examples_table(form: Form, examples: Sequence[Example]) -> pa.RecordBatch:
    """The examples as columns, one row each, unusable ones empty; then `weights` of the tokens and images, if any
    example has some, `status` (its number), `ended` and `lost` (a bit for each word of `LOSSES`)."""
    columns: list[pa.Array] = []
    for at, (name, kind) in enumerate(COLUMNS[form].items()):
        if name == "labels":
            columns.append(labels_from_spans(columns[0], examples))
        elif kind == IDS_TYPE:
            columns.append(list_array([example.values[at] for example in examples]))
        else:
            columns.append(pa.array([example.values[at] for example in examples], kind))
    names = list(COLUMNS[form])
    if any([example.weights is not None for example in examples]):
        columns.append(weights_column(columns[names.index("labels")], IGNORE_INDEX, examples))
        names.append("weights")
    if any([example.images for example in examples]):
        columns.append(images_column(example.images for example in examples))
        names.append(IMAGES_COLUMN)
    number = {status: at for at, status in enumerate(ROW_STATUSES)}
    columns.append(pa.array([number[example.status] for example in examples], pa.uint8()))
    columns.append(pa.array([example.ended for example in examples], pa.bool_()))
    bit = {word: 1 << at for at, word in enumerate(LOSSES)}
    columns.append(pa.array([sum(map(bit.__getitem__, example.lost)) for example in examples], pa.uint16()))
    return pa.RecordBatch.from_arrays(columns, names=[*names, "status", "ended", "lost"])


def list_array(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """Arrays of int32 as one column."""
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    flat = np.concatenate(arrays) if arrays else NO_IDS
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def labels_from_spans(input_ids: pa.ListArray, examples: Sequence[Example]) -> pa.ListArray:
    """The labels of the loss: each id in a trained span, IGNORE_INDEX elsewhere (the loss mask, or assistant mask).

    The result for the same rows may change only together with `engine.worker.data.cache.PREPARATION_VERSION`.
    """
    offsets = input_ids.offsets.to_numpy()
    starts = [
        (start + begin, start + end)
        for start, example in zip(offsets.tolist(), examples, strict=False)
        for begin, end in example.trained
    ]
    edges = np.zeros(offsets[-1] + 1, dtype=np.int8)
    if starts:
        begins, ends = np.array(starts).T
        np.add.at(edges, begins, 1)
        np.add.at(edges, ends, -1)
    ids = input_ids.values.to_numpy()
    return pa.ListArray.from_arrays(
        input_ids.offsets,
        pa.array(np.where(edges[:-1].cumsum(dtype=np.int8) > 0, ids, np.int32(IGNORE_INDEX))),
    )
