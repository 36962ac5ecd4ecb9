"""A part of RESULTS.md that a benchmark writes itself, line by line: a run that is cut off has written what it knew."""

from __future__ import annotations

import re
from pathlib import Path

BEGIN, END = "<!-- written by bench.gpu: begin -->", "<!-- written by bench.gpu: end -->"


class Report:
    """What is known so far: printed, and written to a file between two marks."""

    def __init__(self, file: Path, title: str):
        self.file, self.sections = file, {"": [title]}

    def add(self, section: str, line: str, head: str = "") -> None:
        """A line of a section; `head` is that of its table."""
        begun = [] if section in self.sections else [f"**{section}**", "", *filter(None, [head])]
        self.sections.setdefault(section, begun).append(line)
        print("\n".join([*begun[:-1], line] if begun else [line]), flush=True)
        self.write()

    def write(self) -> None:
        """Replace what is between the marks; without marks, at the end."""
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        body = "\n\n".join("\n".join(lines) for lines in self.sections.values())
        block = f"{BEGIN}\n{body}\n{END}"
        marks = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
        text = marks.sub(lambda _: block, text) if marks.search(text) else f"{text}\n{block}\n"
        self.file.write_text(text, encoding="utf-8")
