"""Tables for spreadsheets: what a model or a stranger wrote is text there, and numbers stay numbers."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from engine.core.csvtext import as_csv
from engine.worker.evaluation.findings import csv_rows


def cell(value: Any) -> str:
    ((read,),) = csv.reader(io.StringIO(as_csv([[value]]).removeprefix("\ufeff"), newline=""))
    return read


@pytest.mark.parametrize(
    "text", ['=HYPERLINK("http://evil")', "+1+1", "-2+3|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", "- a list"]
)
def test_no_text_is_a_formula(text: str) -> None:
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (-1.5, "-1.5"),
        (-3, "-3"),
        ("-3", "-3"),
        ("+1e-5", "+1e-5"),
        ("a=b", "a=b"),
        (float("nan"), ""),
        (None, ""),
        ("'=1", "'=1"),
    ],
)
def test_what_is_no_formula_stays_as_it_is(value: Any, read: str) -> None:
    assert cell(value) == read


def test_the_rows_of_an_evaluation_are_such_a_table() -> None:
    answers = {"one": {"text": "=1+1", "scores": {"loss": -0.5}}}
    row = {
        "row": 1,
        "set": "@set",
        "place": "a:1",
        "messages": [{"role": "user", "content": "-x"}],
        "reference": "+x",
        "answers": answers,
    }
    text = as_csv(csv_rows([row], [{"id": "one", "title": "=cmd"}]))
    assert text.startswith("\ufeff")
    assert list(csv.reader(io.StringIO(text[1:], newline=""))) == [
        ["row", "set", "place", "prompt", "reference", "'=cmd: answer", "'=cmd: loss"],
        ["1", "'@set", "a:1", "'-x", "'+x", "'=1+1", "-0.5"],
    ]
