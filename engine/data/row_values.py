"""Access to the values of one row of a data file, and the problems and oddities that it can have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.data import row_files
from engine.data.dataset_info import Dataset
from engine.data.row_files import type_of
from engine.data.text_lines import Located


@dataclass(slots=True)
class Row:
    """The values of a row by LLaMA-Factory's column names.

    `notes` are reported for a usable row: what is unknown, or not used as specified. `marked`: one of its messages has
    a `weight`; `pictured`: one of its messages has a part that is an image.
    """

    dataset: Dataset
    place: Located
    values: Mapping[str, Any]
    notes: list[Problem] | None = None
    marked: bool = False
    pictured: bool = False

    def bad(self, code: str, **values: Any) -> Refusal:
        return Refusal(problem(code, place=str(self.place), **values))

    def wrong_type(self, column: str, expected: str, value: Any, *, named: bool = False) -> Refusal:
        """`named`: show the value after its type, if other values of that type are understood."""
        actual = type_of(value)
        if named and isinstance(value, (str, int, float)):
            actual += f" {json.dumps(value, ensure_ascii=False)[:40]}"
        return self.bad("row-value-type", column=column, expected=expected, found=actual)

    def note(self, code: str, **values: Any) -> None:
        """Add a note about the row, once for each code."""
        self.notes = self.notes or []
        if all(note.code != code for note in self.notes):
            self.notes.append(problem(code, place=str(self.place), **values))

    def get(self, role: str) -> Any:
        """The value of an optional column; None if there is none."""
        return self.values.get(self.dataset.columns.get(role, ""))

    def need(self, role: str) -> Any:
        column = self.dataset.columns.get(role, role)
        if column not in self.values:
            raise self.bad("row-without-column", column=column, columns=comma_separated(self.values))
        return self.values[column]

    def column(self, role: str) -> str:
        return self.dataset.columns.get(role, role)

    def parsed(self, value: Any) -> Any:
        """The content of a string that is the JSON of a list or an object, otherwise the value itself. Raises Refusal
        for half a character, which JSON in a string can hide."""
        result = parsed(value)
        if result is not value and (half := row_files.half_character(result, value)):
            raise self.bad("row-half-character", found=half)
        return result

    def items(self, value: Any, column: str) -> list[Any]:
        """A list, or the JSON of one, since tables cannot contain lists."""
        value = self.parsed(value)
        if not isinstance(value, list):
            raise self.wrong_type(column, "list", value)
        return value

    def structs(self, value: Any) -> Any:
        """A value without the nulls in its objects, if it comes from Parquet: there all objects of a column have the
        same keys, so a missing key cannot be distinguished from null. Nulls in JSON are kept."""
        return without_nulls(value) if self.place.file.suffix.lower() == ".parquet" else value


def without_nulls(value: Any) -> Any:
    """A value whose objects, at any depth, have no null values."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def parsed(value: Any) -> Any:
    """The content of a string that is the JSON of a list or an object, otherwise the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def nth_element(column: str, number: int) -> str:
    """The name of element `number` (from 0) of a list in a column, counted from 1 like lines and messages."""
    return f"{column} #{number + 1}"


def comma_separated(names: Any) -> str:
    return ", ".join(map(str, names)) or "—"
