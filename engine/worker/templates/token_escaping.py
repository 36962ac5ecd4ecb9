"""Keep data from faking turns: control tokens that appear in a value of the data stay text."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer

from engine.core.problems import Refusal, problem
from engine.worker.templates.answer_spans import AnswerSpans
from engine.worker.templates.chat_template import ChatTemplate, Row, Span, any_of, ids_of_tokens, texts_in


class TokenEscaping:
    """Keeps control tokens in the data from becoming control tokens.

    Their text is replaced by spare private-use characters before the template is rendered and the text tokenized; then
    the tokens of each such character are replaced by those of the original text, spelled out.

    Only the assistant may write control tokens. In an answer only those that frame turns are escaped, while `<think>`
    and `<tool_call>` keep their meaning, because the model writes these itself.
    """

    def __init__(self, template: ChatTemplate, spans: AnswerSpans | None = None):
        tokenizer, control = template.tokenizer, template.control
        framing = {*spans.openers, *spans.endings.all()} if spans else set()
        # Marks of reasoning keep their meaning in an answer, whether or not the template looks for them.
        ends = set(spans.endings.all()) if spans else set()
        meant = {token for token in control if "think" in token.lower()} - ends
        own = [token for token in control if (control[token] or token in framing) and token not in meant]
        self.in_answers = any_of(own)
        self.elsewhere = any_of(control)
        self.control = set(ids_of_tokens(tokenizer, control))
        backend = tokenizer.backend_tokenizer
        self.speller = Tokenizer(backend.model)  # the same vocabulary and merges, and no added tokens
        if backend.normalizer:
            self.speller.normalizer = backend.normalizer
        if backend.pre_tokenizer:
            self.speller.pre_tokenizer = backend.pre_tokenizer

    def row(self, row: Row) -> tuple[Row, dict[str, str]]:
        """A chat row without control tokens, and what stands for what. The same row if it contains none."""
        written = texts_in(row)
        if not self.elsewhere.search(written):
            return row, {}
        stand_ins = _Placeholders(written)
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
        stand_ins = _Placeholders(text)
        return stand_ins.hide(text, self.elsewhere), stand_ins.hidden()

    def restore(
        self, text: str, encoding: Any, spans: list[Span], hidden: dict[str, str]
    ) -> tuple[list[int], list[Span]]:
        """Ids and token spans with the spelled-out text in place of each stand-in. Raises Refusal if that is
        impossible."""
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
        escaped = any(form in text for char in hidden for form in _escaped(char))
        if escaped or len(spelled) != sum(char in hidden for char in text):
            raise Refusal(problem("control-token-in-data", token=", ".join(hidden.values())))
        return ids, [(moved[begin], moved[end]) for begin, end in spans]

    def spell(self, token: str) -> list[int]:
        """The text of a control token as ordinary tokens. Raises Refusal if the vocabulary cannot express it."""
        # After a newline, because some tokenizers put a space before the very first text.
        newline = self.speller.encode("\n", add_special_tokens=False).ids
        ids = self.speller.encode("\n" + token, add_special_tokens=False).ids
        if ids[: len(newline)] == newline:
            ids = ids[len(newline) :]
        else:
            ids = self.speller.encode(token, add_special_tokens=False).ids
        if self.control.intersection(ids):
            raise Refusal(problem("control-token-in-data", token=token))
        return ids


def _escaped(char: str) -> tuple[str, str]:
    """A stand-in as written by Python and JSON, for templates that write a whole object."""
    return ascii(char)[1:-1], json.dumps(char)[1:-1]


class _Placeholders:
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

    def _stand_in(self, match: re.Match[str]) -> str:
        if match[0] not in self.by_token:
            self.by_token[match[0]] = next(self.spare)
        return self.by_token[match[0]]
