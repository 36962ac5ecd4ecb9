"""How a data file is read, in plain words: its format, its encoding and the confidence in it, and the available
choices."""

from __future__ import annotations

from html import escape

from engine.core.problems import Problem, Refusal, say
from engine.data.datasets import Dataset
from engine.data.encodings import ENCODINGS
from engine.data.row_files import FileSource, source_of
from webui import notices
from webui.words import Words

MAX_FILES_LOOKED_AT = 3  # of a set, checked for uncertainties
COLUMN_LAYOUTS = ("columns", "indexed columns", "split")  # of JSON


def described(dataset: Dataset, words: Words) -> str:
    """How the files of a set are read, and what is uncertain about it."""
    facts = ""
    doubts: list[Problem] = []
    for number, file in enumerate(dataset.files[:MAX_FILES_LOOKED_AT]):
        try:
            source = source_of(file, dataset.encoding)
        except Refusal:
            continue  # the reason is shown in place of the rows
        doubts += source.doubts
        if not number:
            facts = words("read-as", how=" · ".join((_format(source, words), *_encoding(source, dataset, words))))
    facts_html = f'<p class="quiet" id="read-as">{escape(facts)}</p>' if facts else ""
    return facts_html + (notices.listed(doubts, words) if doubts else "")


def _format(source: FileSource, words: Words) -> str:
    if source.separator:
        return say("table-separated", words.language, separator=source.separator)
    if source.layout:
        shape = "columns" if source.layout in COLUMN_LAYOUTS else source.layout.replace(" ", "-")
        return words(f"layout-{shape}")
    return words("layout-text" if source.encoding else "layout-parquet")


def _encoding(source: FileSource, dataset: Dataset, words: Words) -> tuple[str, ...]:
    if source.encoding is None:
        return ()
    label = source.encoding.label
    if dataset.encoding:
        return (words("encoding-chosen", encoding=label),)
    if source.encoding.detected:
        return (words("encoding-detected", encoding=label, sure=f"{source.encoding.confidence:.0%}"),)
    return (label,)


def encodings(dataset: Dataset, words: Words) -> tuple[list[tuple[str, str]], bool]:
    """The encodings to choose from for a set's files, and whether there is a choice."""
    detected, nearest, open_question = words("encoding-as-found"), [], bool(dataset.encoding)
    try:
        source = source_of(dataset.files[0])
        if source.encoding and source.encoding.detected:
            detected = words("encoding-found", encoding=source.encoding.label)
            nearest, open_question = [source.encoding.name, *source.encoding.others], True
    except Refusal as refusal:
        open_question |= any(_of_encoding(problem) for problem in refusal.problems)
    names = dict.fromkeys([*nearest, *ENCODINGS])
    return [(detected, ""), *((ENCODINGS[name][0], name) for name in names)], open_question


def _of_encoding(problem: Problem) -> bool:
    return problem.code.startswith("file-encoding")
