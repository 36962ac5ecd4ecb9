"""Rows whose text is nearly that of an earlier row: found by MinHash, then compared exactly.

The similarity of two texts is the share of the pieces of five characters that both have among all pieces of either
(Jaccard). It needs no words, so it is the same for Chinese. MinHash with bands (Broder 1997; Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3) proposes pairs without comparing all with all; each pair is then compared
exactly, so no row counts as similar that is not. Of the pairs that are just as similar as the threshold, 99 % are
proposed, and more of those that are more similar.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.core.problems import Problem, Refusal
from engine.data.datasets import Dataset, entries, example
from engine.data.row_files import Place
from engine.data.row_images import images_of
from engine.data.validation import example_text

if TYPE_CHECKING:
    import numpy as np

PIECE_LENGTH = 5  # characters
PERMUTATIONS = 128
PROPOSED_SHARE = 0.99  # of the pairs at the threshold
MAX_ERROR = 0.16  # of the similarity by signatures: four standard errors
MAX_CANDIDATES = 64  # earlier rows with which one is compared
PROGRESS_INTERVAL_ROWS = 1_000
SEED = 1
OnRows = Callable[[int], None]


@dataclass(frozen=True)
class NearDuplicate:
    """A row, the earlier row that it is similar to, and how similar they are (0 to 1)."""

    place: Place
    earlier: Place
    similarity: float


def near_duplicates(dataset: Dataset, threshold: float, on_rows: OnRows | None = None) -> dict[int, NearDuplicate]:
    """The rows, by their number from 0, that are at least as similar as `threshold` to an earlier one that is not left
    out itself. Rows with different images or labels are never similar, nor are rows with problems. Holds about half a
    byte of memory per character of the rows that stay."""
    kept: dict[int, tuple[Place, bytes]] = {}  # with their texts, compressed
    index = _Index(bands(threshold))
    near: dict[int, NearDuplicate] = {}
    for number, (place, row) in enumerate(entries(dataset)):
        if on_rows and number % PROGRESS_INTERVAL_ROWS == 0:
            on_rows(number)
        try:
            if isinstance(row, Problem):
                continue
            canonical_row = example(dataset, place, row)
        except Refusal:
            continue
        text = example_text(canonical_row)
        pieces = pieces_of(text)
        kind = hash((tuple(image.identity for image in images_of(canonical_row)), canonical_row.get("label")))
        signature = index.signature(pieces)
        for earlier in index.candidates(signature, kind, threshold):
            earlier_place, packed = kept[earlier]
            similarity = jaccard(pieces, pieces_of(zlib.decompress(packed).decode("utf-8", "surrogatepass")))
            if similarity >= threshold:
                near[number] = NearDuplicate(place, earlier_place, similarity)
                break
        else:
            kept[number] = place, zlib.compress(text.encode("utf-8", "surrogatepass"), 1)
            index.add(number, signature, kind)
    return near


def pieces_of(text: str) -> np.ndarray:
    """Hashes of all pieces of the text, uint64, sorted and each once. Texts are compared without differences of case
    and of white space. The probability that two pieces have one hash is 5·10⁻²⁰."""
    import numpy as np

    plain = " ".join(text.casefold().split()).ljust(PIECE_LENGTH)
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    hashes = np.zeros(len(codes) - PIECE_LENGTH + 1, np.uint64)
    for offset in range(PIECE_LENGTH):
        hashes = _mixed(hashes + codes[offset : offset + len(hashes)])
    return np.unique(hashes)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of the input changes half of the output."""
    import numpy as np

    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return (numbers ^ (numbers >> np.uint64(31))) + np.uint64(0x9E3779B97F4A7C15)


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """The share of the pieces that both have among those of either."""
    import numpy as np

    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


def bands(threshold: float) -> int:
    """The smallest number of bands for which PROPOSED_SHARE of the pairs at the threshold agree in at least one."""
    divisors = (count for count in range(1, PERMUTATIONS + 1) if PERMUTATIONS % count == 0)
    # Mining of Massive Datasets, section 3.4.2
    shares = ((count, 1 - (1 - threshold ** (PERMUTATIONS // count)) ** count) for count in divisors)
    return next((count for count, proposed in shares if proposed >= PROPOSED_SHARE), PERMUTATIONS)


class _Index:
    """Rows by the bands of their MinHash signatures: two rows that agree in a band may be similar. Rows of different
    kinds are not compared."""

    def __init__(self, band_count: int):
        import numpy as np

        random = np.random.default_rng(SEED)
        numbers = random.integers(1, 2**63, (2, PERMUTATIONS, 1), np.uint64)
        self.factors, self.terms = numbers * np.uint64(2) + np.uint64(1)
        self.band_count = band_count
        self.rows: dict[tuple[int, bytes, int], list[int]] = defaultdict(list)
        self.signatures: dict[int, np.ndarray] = {}

    def signature(self, pieces: np.ndarray) -> np.ndarray:
        """The smallest hash of the pieces under each permutation, uint32, shape (PERMUTATIONS,)."""
        import numpy as np

        # Multiply-shift hashing: the high bits of a·x + b (Dietzfelbinger et al. 1997).
        hashes = (self.factors * pieces + self.terms) >> np.uint64(32)
        return hashes.min(axis=1).astype(np.uint32)

    def _keys(self, signature: np.ndarray, kind: int) -> Iterator[tuple[int, bytes, int]]:
        for band, part in enumerate(signature.reshape(self.band_count, -1)):
            yield band, part.tobytes(), kind

    def add(self, number: int, signature: np.ndarray, kind: int) -> None:
        self.signatures[number] = signature
        for key in self._keys(signature, kind):
            self.rows[key].append(number)

    def candidates(self, signature: np.ndarray, kind: int, threshold: float) -> list[int]:
        """The earlier rows that may be at least so similar, the most similar first: by their signatures, whose estimate
        is at most MAX_ERROR too low."""
        agreeing = {other for key in self._keys(signature, kind) for other in self.rows.get(key, ())}
        shares = {other: float((self.signatures[other] == signature).mean()) for other in agreeing}
        likely = [other for other, share in shares.items() if share >= threshold - MAX_ERROR]
        return sorted(likely, key=lambda other: -shares[other])[:MAX_CANDIDATES]
