"""From values to pixels: the frame of a chart, linear and logarithmic scales, and round tick values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 52, 14, 12, 34


@dataclass(frozen=True)
class Frame:
    """A picture's size in pixels, and the area in it where curves are drawn."""

    width: int
    height: int

    @property
    def right(self) -> int:
        return self.width - MARGIN_RIGHT

    @property
    def bottom(self) -> int:
        return self.height - MARGIN_BOTTOM


SMALL, WIDE = Frame(600, 250), Frame(1200, 420)


@dataclass(frozen=True)
class Scale:
    """From values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, log: bool = False, room: float = 0.0) -> Scale:
        """A scale that includes every value, with `room` left at both ends as a share of the range."""
        values = list(values)
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= abs(high) * 1e-9:
            middle, half = low, (abs(low) * 0.1 or 0.5)
            low, high = middle - half, middle + half
        extra = (high - low) * room
        return cls(low - extra, high + extra, start, end, log)

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, count)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for steps in ((1,), (1, 2, 5)):
            candidates = [m * 10.0**power for power in powers for m in steps]
            candidates = [tick for tick in candidates if self.low <= math.log10(tick) <= self.high]
            if len(candidates) >= 3:
                return candidates[:: math.ceil(len(candidates) / (count + 2))]
        return [tick for tick in ticks(10**self.low, 10**self.high, count) if tick > 0]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 × a power of ten) between `low` and `high`, about `count` of them."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((power * m for m in (1, 2, 5) if power * m >= raw), power * 10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]
