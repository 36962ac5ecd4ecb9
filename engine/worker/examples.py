"""Canonical rows → token ids and labels, ready to be trained on; needs a fast tokenizer and no GPU.

A chat row becomes exactly the ids `tokenizer.apply_chat_template` gives, and its labels are the answers: all that
follows the generation prompt of an assistant turn, up to and including the token that ends the turn. The template
itself is asked where that is (`Frame`), so no list of model families is kept here. A conversation is rendered once
and tokenized once, in batches.

There is one exception to "exactly": where a *value* of the data contains the text of a control token, that text
stays text, so that data cannot forge a turn. Reading the data is left to `engine.datasets`, storing and counting
to `engine.worker.prepare`.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from engine.problems import Problem, Refusal, problem

IGNORED = -100  # the label the loss skips, by torch's convention
Span = tuple[int, int]
TrainOn = Literal["answers", "last_answer", "everything"]
TooLong = Literal["cut_end", "drop"]
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template's own marks around what is to be trained
Fate = Literal["kept", "cut", "too_long", "untrained", "refused"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example. Of a row that cannot be trained on, `fate` says why and both lists are empty.

    "cut": shortened to max_length. "too_long": longer than max_length, and the policy or the lack of a surviving
    answer forbids cutting. "untrained": no label at all. "refused": the template does not take the row (`reason`).
    `ended`: every trained answer includes the token that ends it; a model never shown one never stops.
    """

    input_ids: list[int]
    labels: list[int]
    fate: Fate = "kept"
    reason: Problem | None = None
    ended: bool = True

    @property
    def usable(self) -> bool:
        return self.fate in ("kept", "cut")


def encode_chat(
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[dict[str, Any]],
    *,
    max_length: int,
    train_on: TrainOn = "answers",
    too_long: TooLong = "cut_end",
    chat_template: str | None = None,
) -> list[Encoded]:
    """Rows `{"messages": [...], "tools": [...] | None}` → one `Encoded` per row, in the same order.

    `too_long` says what becomes of a row of more than `max_length` tokens. "cut_end" keeps the turns up to the last
    answer that fits, and where not even the first does, the tokens that fit, if some of an answer are among them.
    "drop" leaves the row out.
    Raises Refusal if the template writes nothing at the end of an answer that a model could learn to stop with.
    """
    template = tokenizer.get_chat_template(chat_template)
    frame = Frame.of(tokenizer, template)
    shield = Shield(tokenizer, template, frame)

    shielded = [shield.row(row) for row in rows]
    renderings = _render_all(tokenizer, template, [row for row, _ in shielded])
    results: list[Encoded | None] = [None] * len(rows)
    drafts: list[tuple[int, str, list[Span], dict[str, str]]] = []
    for index, ((row, hidden), rendering) in enumerate(zip(shielded, renderings, strict=True)):
        try:
            text, marked = rendering or _render(
                tokenizer, template, row["messages"], row.get("tools") or None
            )
            spans = (
                _marked_spans(text, marked, frame)
                if marked
                else _spans(tokenizer, template, text, row, frame)
            )
        except Refusal as refusal:
            results[index] = Encoded([], [], "refused", refusal.problems[0])
        except Exception as error:  # a template is a program of its own; whatever it raises is about this row
            reason = problem("template-refuses-row", reason=str(error))
            results[index] = Encoded([], [], "refused", reason)
        else:
            drafts.append((index, text, spans, hidden))

    texts = [text for _, text, _, _ in drafts]
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    for (index, text, spans, hidden), encoding in zip(drafts, encodings, strict=True):
        ids, answers = encoding.ids, [_tokens_of(encoding, span, shield.control) for span in spans]
        ended = all(frame.stop.search(text, *span) for span in spans)
        try:
            if hidden:
                ids, answers = shield.restore(text, encoding, answers, hidden)
        except Refusal as refusal:
            results[index] = Encoded([], [], "refused", refusal.problems[0])
        else:
            results[index] = _label(ids, answers, train_on, max_length, too_long, ended)
    return results


def encode_text(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, max_length: int
) -> list[Encoded]:
    """Documents → consecutive windows of at most `max_length` tokens, every token trained, nothing thrown away.

    Each document ends with the tokenizer's eos, once, and begins with what the tokenizer itself puts first (a BOS or
    nothing). So there may be more results than texts. Raises Refusal if the tokenizer has no eos token.
    """
    if tokenizer.eos_token_id is None:
        raise Refusal(problem("tokenizer-without-eos"))
    shield = Shield(tokenizer)
    shielded = [shield.text(text) for text in texts]
    encodings = tokenizer.backend_tokenizer.encode_batch(
        [text for text, _ in shielded], add_special_tokens=True
    )
    windows: list[Encoded] = []
    for (text, hidden), encoding in zip(shielded, encodings, strict=True):
        try:
            ids = shield.restore(text, encoding, [], hidden)[0] if hidden else encoding.ids
        except Refusal as refusal:
            windows.append(Encoded([], [], "refused", refusal.problems[0]))
            continue
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        fate: Fate = "kept" if len(ids) <= max_length else "cut"
        for start in range(0, len(ids), max_length):
            window = ids[start : start + max_length]
            windows.append(Encoded(window, list(window), fate))
    return windows


def encode_prompts(tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Rows `{"messages": [...], "tools": [...] | None}` → the ids of each with the generation prompt behind it."""
    template = tokenizer.get_chat_template()
    shield = Shield(tokenizer, template, Frame.of(tokenizer, template))
    encoded = []
    for row, hidden in map(shield.row, rows):
        text, _ = _render(tokenizer, template, row["messages"], row.get("tools") or None, generate=True)
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        encoded.append(shield.restore(text, encoding, [], hidden)[0] if hidden else encoding.ids)
    return encoded


def end_of_turn_ids(tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None) -> list[int]:
    """The tokens that end an answer according to the template: what generation has to stop at. Never empty."""
    frame = Frame.of(tokenizer, tokenizer.get_chat_template(chat_template))
    return [tokenizer.convert_tokens_to_ids(token) for token in frame.ends]


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing: the row numbers that go together into each pack of at most `max_length` tokens.

    Deterministic. Raises ValueError on a row longer than a pack. Rows are taken longest first, each into the fullest
    pack it fits; open packs are looked up by the room they have left, of which there are at most `max_length` values.
    """
    packs: list[list[int]] = []
    packs_with: dict[int, list[int]] = {}  # room left → packs with just that room
    rooms: list[int] = []  # the keys of packs_with, sorted
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[row]
        if length > max_length:
            raise ValueError(f"row {row} has {length} tokens, a pack holds {max_length}")
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, chosen = max_length, len(packs)
            packs.append([])
        else:
            room = rooms[at]
            chosen = packs_with[room].pop()
            if not packs_with[room]:
                del packs_with[room], rooms[at]
        packs[chosen].append(row)
        left = room - length
        if left:
            if left not in packs_with:
                packs_with[left] = []
                insort(rooms, left)
            packs_with[left].append(chosen)
    return packs


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
        any_control, special = _any_of(control), _any_of([token for token in control if control[token]])
        # Private-use characters: no template writes them, so whatever differs around them is the template's.
        question, answer, question_2, answer_2, argument = map(chr, range(0xE000, 0xE005))
        ask, ask_again = ({"role": "user", "content": text} for text in (question, question_2))
        reply, reply_again = ({"role": "assistant", "content": text} for text in (answer, answer_2))

        def after(mark: str, messages: list[dict[str, Any]], generate: bool = False) -> str:
            return _render(tokenizer, template, messages, generate=generate)[0].partition(mark)[2]

        bare, prompt = after(question, [ask]), after(question, [ask], generate=True)
        full = after(question, [ask, reply, ask_again, reply_again])
        opens, shared = _agree(prompt, bare, any_control), _agree(prompt, full, any_control)
        anchor = prompt[opens:shared]

        # What follows an answer in the middle may already be the next turn; what it has in common with the end is not.
        run = re.compile(f"(?:{any_control.pattern})+")
        tails = (full.partition(answer_2)[2], full.partition(answer)[2].partition(question_2)[0])
        runs = [found[0] for found in map(run.search, tails) if found]
        common = _agree(*runs, any_control) if len(runs) == 2 else 0
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
            stop=_any_of(stops + calls),
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


class Shield:
    """Keeps control tokens that are written in the data from becoming control tokens.

    Their text is replaced by spare private-use characters before the template is rendered and the text tokenized; then
    the tokens of each such character are replaced by those of the text it stands for, spelled out.

    Nobody but the assistant may write any control token. In an answer only those that frame turns are shielded, and
    `<think>` or `<tool_call>` is what it looks like: the model writes these itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str = "", frame: Frame | None = None):
        control = control_tokens(tokenizer, template)
        framing = frame.anchor + "".join(frame.stops) if frame else ""
        self.in_answers = _any_of([token for token in control if control[token] or token in framing])
        self.elsewhere = _any_of(control)
        self.control = set(tokenizer.convert_tokens_to_ids(list(control)))
        backend = tokenizer.backend_tokenizer
        self.speller = Tokenizer(backend.model)  # the same vocabulary and merges, and no added tokens
        if backend.normalizer:
            self.speller.normalizer = backend.normalizer
        if backend.pre_tokenizer:
            self.speller.pre_tokenizer = backend.pre_tokenizer

    def row(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """A chat row without control tokens, and what stands for what. The same row if it holds none."""
        written = repr(row)
        if not self.elsewhere.search(written):
            return row, {}
        stand_ins = _StandIns(written)
        messages = [
            stand_ins.hide(message, self.in_answers if message["role"] == "assistant" else self.elsewhere)
            for message in row["messages"]
        ]
        tools = stand_ins.hide(row.get("tools"), self.elsewhere)
        return {**row, "messages": messages, "tools": tools}, stand_ins.hidden()

    def text(self, text: str) -> tuple[str, dict[str, str]]:
        """The same for a document."""
        if not self.elsewhere.search(text):
            return text, {}
        stand_ins = _StandIns(text)
        return stand_ins.hide(text, self.elsewhere), stand_ins.hidden()

    def restore(
        self, text: str, encoding: Any, spans: list[Span], hidden: dict[str, str]
    ) -> tuple[list[int], list[Span]]:
        """Ids and token spans with the spelled-out text where a stand-in was. Raises Refusal if it cannot be."""
        ids: list[int] = []
        moved = [0]  # where each old token now begins
        spelled: list[Span] = []  # one stand-in may be several tokens (bytes), with the same offsets
        for token, offset in zip(encoding.ids, encoding.offsets, strict=True):
            stands_for = hidden.get(text[slice(*offset)])
            if stands_for is None:
                ids.append(token)
            elif not spelled or spelled[-1] != offset:
                ids += self.spell(stands_for)
                spelled.append(offset)
            moved.append(len(ids))
        if len(spelled) != sum(char in hidden for char in text):
            raise Refusal(problem("control-token-in-data", token=", ".join(hidden.values())))
        return ids, [(moved[begin], moved[end]) for begin, end in spans]

    def spell(self, token: str) -> list[int]:
        """The text of a control token as ordinary tokens. Raises Refusal if the vocabulary cannot."""
        # Behind a newline, since some tokenizers put a space before whatever stands at the very beginning.
        newline = self.speller.encode("\n", add_special_tokens=False).ids
        ids = self.speller.encode("\n" + token, add_special_tokens=False).ids
        if ids[: len(newline)] == newline:
            ids = ids[len(newline) :]
        else:
            ids = self.speller.encode(token, add_special_tokens=False).ids
        if self.control.intersection(ids):
            raise Refusal(problem("control-token-in-data", token=token))
        return ids


class _StandIns:
    """Which spare character stands for which control token, for one row."""

    def __init__(self, written: str):
        self.spare = (char for char in map(chr, range(0x100000, 0x10FFFE)) if char not in written)
        self.by_token: dict[str, str] = {}

    def hide(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(self._stand_in, value)
        if isinstance(value, dict):
            return {self.hide(key, pattern): self.hide(item, pattern) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item, pattern) for item in value]
        return value

    def hidden(self) -> dict[str, str]:
        return {char: token for token, char in self.by_token.items()}

    def _stand_in(self, found: re.Match[str]) -> str:
        if found[0] not in self.by_token:
            self.by_token[found[0]] = next(self.spare)
        return self.by_token[found[0]]


def control_tokens(tokenizer: PreTrainedTokenizerFast, template: str) -> dict[str, bool]:
    """Text of each control token → whether it is special: all special tokens and the added ones the template writes.

    Other added tokens are ordinary vocabulary, such as Gemma's runs of spaces and HTML tags.
    """
    return {
        token.content: token.special
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in template and not token.content.isspace())
    }


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


def _agree(a: str, b: str, control: re.Pattern[str]) -> int:
    """Length of the common beginning of `a` and `b`, no control token cut in two ("<|end|>" against "<|user|>")."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    cut = [m.start() for text in (a, b) for m in control.finditer(text) if m.start() < length < m.end()]
    return min([length, *cut])


def _render(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    generate: bool = False,
) -> tuple[str, list[Span]]:
    """The text of one conversation and the character spans its template itself marks with {% generation %}."""
    return _render_batch(tokenizer, template, [messages], tools, generate)[0]


def _render_batch(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    conversations: list[list[dict[str, Any]]],
    tools: list[dict[str, Any]] | None = None,
    generate: bool = False,
) -> list[tuple[str, list[Span]]]:
    texts, marked = render_jinja_template(
        conversations=conversations,
        tools=tools,
        chat_template=template,
        add_generation_prompt=generate,
        return_assistant_tokens_mask=MARKS.search(template) is not None,
        **tokenizer.special_tokens_map,
    )
    return list(zip(texts, marked or [[] for _ in texts], strict=True))


def _render_all(
    tokenizer: PreTrainedTokenizerFast, template: str, rows: Sequence[dict[str, Any]]
) -> list[tuple[str, list[Span]] | None]:
    """The rows without tools, in one go, which is faster. None: a row to be rendered on its own."""
    renderings: list[tuple[str, list[Span]] | None] = [None] * len(rows)
    together = [index for index, row in enumerate(rows) if not row.get("tools")]
    try:
        batch = _render_batch(tokenizer, template, [rows[index]["messages"] for index in together])
    except Exception:  # which row it was about will show when each is rendered on its own
        return renderings
    for index, rendering in zip(together, batch, strict=True):
        renderings[index] = rendering
    return renderings


def _spans(
    tokenizer: PreTrainedTokenizerFast, template: str, text: str, row: dict[str, Any], frame: Frame
) -> list[Span]:
    """Character spans of the answers in a rendered conversation. Raises Refusal where they cannot be told.

    Data cannot write the anchor if that holds a control token; so where there are as many anchors as answers, those
    are the answers. Otherwise (no such token, several anchors to one answer, none after a tool's result) an answer
    begins where the conversation before it, rendered with the generation prompt, ends.
    """
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
                before, _ = _render(
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


def _marked_spans(text: str, marked: list[Span], frame: Frame) -> list[Span]:
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


def _label(
    ids: list[int], spans: list[Span], train_on: TrainOn, max_length: int, too_long: TooLong, ended: bool
) -> Encoded:
    kept = len(ids)
    if kept > max_length:
        whole = [end for _, end in spans if end <= max_length]
        kept = 0 if too_long == "drop" else whole[-1] if whole else max_length
    fate: Fate = "kept" if kept == len(ids) else "cut"
    answers = [(begin, min(end, kept)) for begin, end in spans if begin < kept]
    if not kept or (fate == "cut" and not answers):
        return Encoded([], [], "too_long")
    if train_on == "everything":
        return Encoded(ids[:kept], ids[:kept], fate, ended=ended)
    chosen = answers[-1:] if train_on == "last_answer" else answers
    if not any(begin < end for begin, end in chosen):
        return Encoded([], [], "untrained")
    labels = [IGNORED] * kept
    for begin, end in chosen:
        labels[begin:end] = ids[begin:end]
    return Encoded(ids[:kept], labels, fate, ended=ended and answers[-1][1] == spans[len(answers) - 1][1])
