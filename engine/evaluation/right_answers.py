"""A data set of the right answers that a model has written in an evaluation, with its own reasoning.

Training a thinking model on plain answers teaches it not to think. Its own reasoning, where it reaches the answer in
the data, can be trained on instead (rejection sampling as in STaR: Zelikman et al. 2022, arXiv:2203.14465, section 3).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from engine.core.problems import Refusal, problem
from engine.core.rundir import RunDir, append_lines, read_lines
from engine.data import dataset_info_edits, uploads
from engine.evaluation import report
from engine.evaluation.numeric_answers import last_number

Comparison = Literal["exact", "number"]
COMPARISONS: tuple[str, ...] = get_args(Comparison)


class SavedAnswers(NamedTuple):
    """The name of the data set, its number of rows, how many of them have reasoning, and the number of rows that were
    answered."""

    dataset: str
    rows: int
    with_reasoning: int
    answers: int


def save_right_answers(run: RunDir, model: str, data_dir: Path, comparison: str = "exact") -> SavedAnswers:
    """Write the right answers of a model in a finished evaluation as conversations into a new data set.

    By "exact", an answer is right if it equals the reference as the metric compares them, and is written as in the
    data; by "number", if it was completed and both come to the same number, and is written as the model did. Of several
    answers to a row, the first right one is taken. Rows with images are left out.
    Raises Refusal if no answer is right, or the data folder cannot be written to.
    """
    summary = report.summary(run) or {}
    titles = {known["id"]: known["title"] for known in summary.get("voices", ())}
    if model not in titles or comparison not in COMPARISONS:
        raise Refusal(problem("right-answers-gone"))
    questions = {line["row"] + 1: line for line in read_lines(run.report / report.QUESTIONS_FILE)}
    answers = [
        row
        for row in report.rows(run)
        if model in row["answers"] and row.get("reference") is not None and row["row"] in questions
        if not _has_images(questions[row["row"]])
    ]
    conversations = list(_conversations(questions, answers, model, comparison))
    if not conversations:
        raise Refusal(problem("right-answers-none", name=titles[model], answers=len(answers)))
    name = uploads.safe_name(f"{titles[model]}-right-answers")
    columns = {key: key for key in ("messages", "tools")}
    try:
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=uploads.ARRIVING) as folder:
            file = Path(folder) / f"{name}.jsonl"
            append_lines(file, conversations)
            placed = uploads.place(file, data_dir).name
        entry = {"file_name": placed, "formatting": "openai", "columns": columns}
        name = dataset_info_edits.add(data_dir, name, entry)
    except OSError as error:
        raise Refusal(problem("data-not-writable", folder=data_dir, why=error.strerror or error)) from error
    thinking = sum("reasoning_content" in conversation["messages"][-1] for conversation in conversations)
    return SavedAnswers(name, len(conversations), thinking, len(answers))


def _has_images(question: Mapping[str, Any]) -> bool:
    return any("images" in message for message in question["messages"])


def _conversations(
    questions: Mapping[int, Mapping[str, Any]], rows: list[Mapping[str, Any]], model: str, comparison: str
) -> Iterator[dict[str, Any]]:
    for row in rows:
        first, question = row["answers"][model], questions[row["row"]]
        right = (answer for answer in (first, *first.get("samples", ())) if is_right(answer, row, comparison))
        if (answer := next(right, None)) is None:
            continue
        message = {"role": "assistant", "content": row["reference"] if comparison == "exact" else answer["text"]}
        if answer.get("reasoning"):
            message["reasoning_content"] = answer["reasoning"]
        tools = {"tools": question["tools"]} if question.get("tools") else {}
        yield {"messages": [*question["messages"], message], **tools}


def is_right(answer: Mapping[str, Any], row: Mapping[str, Any], comparison: str) -> bool:
    """Whether an answer of a report's row is right."""
    if comparison == "exact":
        return any(answer["scores"].get(name) == 100 for name in ("exact", "accuracy"))
    # Of an answer that was cut off, training would learn to stop there.
    number = last_number(row["reference"]) if answer["scores"].get("ended") else None
    return number is not None and last_number(answer["text"]) == number
