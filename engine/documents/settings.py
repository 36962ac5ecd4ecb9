"""What a draft is made with: the model, the language, how many rows, and what else is wished for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.documents.passages import PASSAGE_CHARACTERS
from engine.documents.prompts import FORMS, LANGUAGES, Form, Language

MAX_ROWS = 10  # of a passage
MAX_INSTRUCTION = 2_000  # characters
MIN_SIMILARITY = 0.5
PASSAGE_LIMITS = (300, 8_000)  # characters


@dataclass(frozen=True)
class DraftSettings:
    """`base`: folder of the model, "" for that of `run`; `run`: id of a finished run, "" for the base itself. `rows`:
    questions asked for on each passage, of about `length` characters. `similarity`: from which on a row counts as a
    repetition of an earlier one. `form`: in which the model is to write."""

    base: str = ""
    run: str = ""
    language: Language = "passage"
    rows: int = 3
    instruction: str = ""
    similarity: float = 0.8
    length: int = PASSAGE_CHARACTERS
    form: Form = FORMS[0]

    def problems(self) -> list[Problem]:
        """All that is wrong with them, apart from the model."""
        wrong = []
        if self.language not in LANGUAGES:
            choices = ", ".join(LANGUAGES)
            wrong.append(problem("spec-choice", "language", given=str(self.language)[:40], choices=choices))
        if self.form not in FORMS:
            wrong.append(problem("spec-choice", "form", given=str(self.form)[:40], choices=", ".join(FORMS)))
        if not 1 <= self.rows <= MAX_ROWS:
            wrong.append(problem("draft-rows", rows=self.rows, limit=MAX_ROWS))
        if len(self.instruction) > MAX_INSTRUCTION:
            wrong.append(problem("draft-instruction", characters=len(self.instruction), limit=MAX_INSTRUCTION))
        if not MIN_SIMILARITY <= self.similarity <= 1:
            wrong.append(problem("similarity-range", given=self.similarity))
        low, high = PASSAGE_LIMITS
        if not low <= self.length <= high:
            wrong.append(problem("draft-length", characters=self.length, low=low, high=high))
        return wrong

    def as_record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> DraftSettings:
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})


def whole_number(text: str, limit: int) -> int:
    """A typed number of rows for each passage. Raises Refusal if it is none."""
    if not re.fullmatch(r"\d{1,9}", str(text).strip(), re.ASCII):
        raise Refusal(problem("draft-rows", rows=str(text)[:40] or "—", limit=limit))
    return int(text)
