"""How much of an answer stands in its passage: an exact measure beside a model's judgement, which may be wrong.

It knows no meaning: an answer in other words has a low share, and "not" changes it little. So it is for sorting, and
for seeing at once which numbers are not from the passage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.documents.blocks import WIDE

NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
WORD = re.compile(r"[^\W\d_]+")
MIN_WORD_LETTERS = 4  # shorter words, such as articles, are in every passage
Terms = set[str]


@dataclass(frozen=True)
class Support:
    """`share`: from 0 to 1, of the answer's terms that occur in the passage; `missing_numbers`: those that do not."""

    share: float
    missing_numbers: tuple[str, ...]


def support(answer: str, passage: str) -> Support:
    """Terms are numbers, words of at least MIN_WORD_LETTERS letters, and pairs of neighbouring Chinese characters; if
    there are none, all words and characters. The share is 1 for an answer without any."""
    numbers, there = dict.fromkeys(NUMBER.findall(answer)), set(NUMBER.findall(passage))
    terms = _terms(answer, MIN_WORD_LETTERS) or (set() if numbers else _terms(answer, 1))
    known = _terms(passage, 1)
    missing = tuple(number for number in numbers if number not in there)
    total = len(terms) + len(numbers)
    return Support((len(terms & known) + len(numbers) - len(missing)) / total if total else 1.0, missing)


def _terms(text: str, least: int) -> Terms:
    """Words with at least `least` letters, and pairs of Chinese characters; single ones, too, if `least` is 1."""
    terms: Terms = set()
    for word in WORD.findall(text.casefold()):
        characters = WIDE.findall(word)
        if not characters:
            terms |= {word} if len(word) >= least else set()
            continue
        terms |= {word[at : at + 2] for at in range(len(word) - 1)}
        terms |= set(characters) if least == 1 else set()
    return terms
