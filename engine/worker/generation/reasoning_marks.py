"""The marks around the reasoning of a model, as its tokenizer has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from engine.core.reasoning import opens_reasoning, reasoning_marks

MAX_MARK_TOKENS = 16  # in the mark that opens reasoning, with the line break after it


class AnswerTexts:
    """The texts of answers, with the marks of their reasoning even if these are special tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.backend = with_visible_marks(tokenizer.backend_tokenizer)

    def texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """The text of each answer, given as tokens."""
        return self.backend.decode_batch([list(ids) for ids in answers])

    def opens(self, prompt: Sequence[int]) -> bool:
        """Whether an answer to this prompt begins within its reasoning."""
        return prompt_opens_reasoning(self.tokenizer, list(prompt))


def prompt_opens_reasoning(tokenizer: Any, prompt: list[int]) -> bool:
    """Whether these tokens end with the mark that opens reasoning, so that an answer begins within it."""
    return opens_reasoning(str(tokenizer.decode(prompt[-MAX_MARK_TOKENS:])))


def with_visible_marks(backend: Tokenizer) -> Tokenizer:
    """A tokenizer for the text of answers. Where the marks are special tokens, which are left out of texts, a copy in
    which they are ordinary ones: without them, reasoning could not be told from the answer."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    marks = reasoning_marks(special)
    if not marks:
        return backend
    plain = json.loads(backend.to_str())
    for token in plain["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in marks
    return Tokenizer.from_str(json.dumps(plain))
