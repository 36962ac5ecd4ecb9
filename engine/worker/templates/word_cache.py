"""Token ids of text word by word: a byte-level BPE tokenizer always does the same with a word, so each is tokenized
once.

Such a tokenizer splits a text into words by one regular expression and merges within words only. The same expression
splits them here. Since another library evaluates it, each character is tested in many contexts before texts with it are
accepted; a text with a character that the two treat differently, with an added token, or not in the tokenizer's normal
form, is left to the tokenizer.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from itertools import chain

import numpy as np
import regex
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.worker.templates.chat_template import any_of

# ByteLevel's default pattern.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PROBE_TEXT = (
    "{0}a{0}{0}A{0}1{0} {0}  {0}\n{0}\n\n{0}\r{0}\t{0}.{0}!{0}'{0}s{0}'s{0}'{0}t{0}'l{0}l{0}'re{0}中{0}é{0}_{0}"
)
MAX_WORDS_REMEMBERED = 400_000


class WordCache:
    """The words of a tokenizer and their ids. See `of`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pattern: str):
        self.backend = tokenizer.backend_tokenizer
        self.cut = regex.compile(pattern, regex.V0).findall
        self.normal = self.backend.normalizer is not None
        self.added = any_of(token.content for token in tokenizer.added_tokens_decoder.values())
        self.speller = Tokenizer(self.backend.model)  # a word that must not be split further
        self.speller.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tried: set[str] = set()
        self.odd: set[str] = set()
        self.known: dict[str, tuple[int, ...]] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> WordCache | None:
        """None if the tokenizer does not work word by word."""
        backend = tokenizer.backend_tokenizer
        steps = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {"type": None}
        steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
        normalizer = json.loads(backend.normalizer.__getstate__())["type"] if backend.normalizer else None
        if normalizer not in (None, "NFC") or type(backend.model).__name__ != "BPE" or backend.model.dropout:
            return None
        match steps:
            case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
                return cls(tokenizer, GPT2_PATTERN)
            case [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ]:
                return cls(tokenizer, pattern)
        return None

    def ids(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """The ids of all texts (int32), one after another, and the number for each; None if they cannot all be
        determined in this way."""
        whole = "".join(texts)
        characters = set(whole)
        if new := characters - self.tried:
            self._try(new)
        if self.odd & characters or self.added.search(whole):
            return None
        if self.normal and not unicodedata.is_normalized("NFC", whole):
            return None
        words = [self.cut(text) for text in texts]
        all_words = list(chain.from_iterable(words))
        if sum(map(len, all_words)) != len(whole):
            return None
        if len(self.known) > MAX_WORDS_REMEMBERED:
            self.known.clear()
        if unknown := list(set(all_words) - self.known.keys()):
            encodings = self.speller.encode_batch_fast(unknown, add_special_tokens=False)
            self.known.update((word, tuple(encoding.ids)) for word, encoding in zip(unknown, encodings, strict=True))
        known = list(map(self.known.__getitem__, all_words))
        each = np.fromiter(map(len, known), np.int64, len(known))
        ends = np.concatenate([[0], each.cumsum()])[np.cumsum([len(some) for some in words])]
        return np.fromiter(chain.from_iterable(known), np.int32, int(each.sum())), np.diff(ends, prepend=0)

    def _try(self, characters: set[str]) -> None:
        """Whether both split a text in the same way, for each of these characters."""
        self.tried |= characters
        for character in characters:
            text = PROBE_TEXT.format(character)
            try:
                theirs = [text[slice(*offsets)] for _, offsets in self.backend.pre_tokenizer.pre_tokenize_str(text)]
            except UnicodeError:  # half a surrogate
                theirs = []
            # Normal forms never change, but only for characters that this version of Unicode has.
            if unicodedata.category(character) == "Cn" or theirs != self.cut(text):
                self.odd.add(character)
