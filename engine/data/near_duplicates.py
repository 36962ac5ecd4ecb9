"""Rows whose text is nearly that of an earlier row: found by MinHash, then compared exactly.

The similarity of two texts is the share of the pieces of five characters that both have among all pieces of either
(Jaccard). It needs no words, so it is the same for Chinese. MinHash with bands (Broder 1997; Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3) proposes pairs without comparing all with all; each pair is then compared
exactly, so no row counts as similar that is not. Of the pairs that are just as similar as the threshold, 99 % are
proposed, and more of those that are more similar.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from engine.core.problems import Problem, Refusal
from engine.data.datasets import Dataset, Example, entries, example
from engine.data.row_files import Place
from engine.data.row_images import images_of
from engine.data.validation import example_text

PIECE_LENGTH = 5  # characters
PERMUTATIONS = 128
PROPOSED_SHARE = 0.99  # of the pairs at the threshold
MAX_PROPOSALS = 32  # earlier rows with which one is compared
PROGRESS_INTERVAL_ROWS = 1_000
OnRows = Callable[[int], None]


@dataclass(frozen=True)
class NearDuplicate:
    """A row, the earlier row that it is similar to, and how similar they are (0 to 1)."""

    place: Place
    earlier: Place
    similarity: float


def near_duplicates(dataset: Dataset, threshold: float, on_rows: OnRows | None = None) -> dict[int, NearDuplicate]:
    """The rows, by their number from 0, that are at least as similar as `threshold` to an earlier one that is not left
    out itself. Rows with different images or labels are never similar, nor are rows with problems. Reads the set
    twice."""
    proposals = _proposals(dataset, threshold, on_rows)
    uses = Counter(earlier for several in proposals.values() for earlier in several)
    pieces: dict[int, tuple[Place, frozenset[str]]] = {}  # of earlier rows, until nothing is compared with them
    near: dict[int, NearDuplicate] = {}
    for number, place, row in _good_rows(dataset, on_rows):
        if number not in uses and number not in proposals:
            continue
        own = pieces_of(example_text(row))
        for earlier in proposals.get(number, ()):
            if number not in near and earlier not in near:
                earlier_place, others = pieces[earlier]
                if (similarity := jaccard(own, others)) >= threshold:
                    near[number] = NearDuplicate(place, earlier_place, similarity)
            uses[earlier] -= 1
            if not uses[earlier]:
                del pieces[earlier]
        if uses[number]:
            pieces[number] = place, own
    return near


def pieces_of(text: str) -> frozenset[str]:
    """All pieces of the text, which is compared without differences of case and of white space."""
    plain = " ".join(text.casefold().split())
    return frozenset(plain[start : start + PIECE_LENGTH] for start in range(max(len(plain) - PIECE_LENGTH + 1, 1)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """The share of the pieces that both have among those of either."""
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def bands(threshold: float) -> int:
    """The smallest number of bands for which PROPOSED_SHARE of the pairs at the threshold agree in at least one."""
    divisors = (count for count in range(1, PERMUTATIONS + 1) if PERMUTATIONS % count == 0)
    # Mining of Massive Datasets, section 3.4.2
    shares = ((count, 1 - (1 - threshold ** (PERMUTATIONS // count)) ** count) for count in divisors)
    return next((count for count, proposed in shares if proposed >= PROPOSED_SHARE), PERMUTATIONS)


def _proposals(dataset: Dataset, threshold: float, on_rows: OnRows | None) -> dict[int, list[int]]:
    """Row → earlier rows that may be similar to it, the earliest first."""
    from rensa import RMinHash, RMinHashLSH  # only jobs need it

    index = RMinHashLSH(threshold, PERMUTATIONS, bands(threshold))
    hashes: dict[int, Any] = {}
    kinds = array("q")  # of each row, a hash of its images and label
    proposals: dict[int, list[int]] = {}
    for number, _, row in _good_rows(dataset, on_rows):
        while len(kinds) < number:
            kinds.append(0)  # rows with problems, which are never proposed
        kinds.append(hash((tuple(image.identity for image in images_of(row)), row.get("label"))))
        hashed = RMinHash(PERMUTATIONS, 1)
        hashed.update(list(pieces_of(example_text(row))))
        earlier = sorted(other for other in index.query(hashed) if kinds[other] == kinds[number])[:MAX_PROPOSALS]
        if earlier:
            proposals[number] = earlier
        # A row that is nearly certain to be left out stands for no others, so many copies are not compared with each
        # other. The estimate has a standard error of at most 0.04.
        certain = min(threshold + 0.12, 0.97)
        if all(hashed.jaccard(hashes[other]) < certain for other in earlier):
            index.insert(number, hashed)
            hashes[number] = hashed
    return proposals


def _good_rows(dataset: Dataset, on_rows: OnRows | None) -> Iterator[tuple[int, Place, Example]]:
    for number, (place, row) in enumerate(entries(dataset)):
        if on_rows and number % PROGRESS_INTERVAL_ROWS == 0:
            on_rows(number)
        if not isinstance(row, Problem):
            try:
                yield number, place, example(dataset, place, row)
            except Refusal:
                continue
