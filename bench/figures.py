"""A measured number with its target and the peer's figure, and a table of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Figure:
    """One line of the table. `target` is the upper limit; None without one."""

    what: str
    value: float | str
    unit: str = ""
    target: float | str | None = None
    peer: float | str | None = None

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value == self.target if isinstance(self.target, str) else self.value <= self.target

    def cells(self) -> list[str]:
        limit = (
            ""
            if self.target is None
            else self.target
            if isinstance(self.target, str)
            else f"≤ {self._say(self.target)}"
        )
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        return [
            self.what,
            self._say(self.value),
            limit,
            verdict,
            "" if self.peer is None else self._say(self.peer),
        ]

    def _say(self, value: float | str) -> str:
        return value if isinstance(value, str) else f"{value:,.{_digits(value)}f} {self.unit}".rstrip()


def _digits(value: float) -> int:
    return 0 if value == int(value) or abs(value) >= 100 else 1 if abs(value) >= 10 else 2


def table(figures: list[Figure], peer: str) -> str:
    """The figures as a Markdown table, which is also readable in a terminal."""
    rows = [["what", "measured", "target", "", peer], *(figure.cells() for figure in figures)]
    wide = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in wide) + "|")
    return "\n".join(lines)
