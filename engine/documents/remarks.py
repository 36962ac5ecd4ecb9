"""What there is to know of a draft besides its rows: what could not be read of the documents and of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.core.problems import NOTHING, Problem, problem
from engine.documents.answers import MAX_TEXT, Dropped
from engine.documents.drafts import Draft
from engine.documents.review import Counts

MAX_PAGES_NAMED = 12
EXAMPLE_CHARACTERS = 300
DROPPED: Mapping[Dropped, str] = {
    "blank": "draft-dropped-blank",
    "long": "draft-dropped-long",
    "same": "draft-dropped-same",
    "surplus": "draft-dropped-surplus",
}


def remarks(draft: Draft, counts: Counts) -> list[Problem]:
    """Sentences about the documents, then about the answers, then why the process has failed."""
    return [
        *(remark for facts in draft.reading for remark in _of_document(facts)),
        *_of_answers(counts),
        *(draft.problems if draft.state == "failed" else []),
    ]


def _of_document(facts: Mapping[str, Any]) -> Iterator[Problem]:
    file = facts["file"]
    for record in facts.get("problems", ()):
        yield Problem(record["code"], record["field"], record["values"])
    pages = facts.get("pages", 0)
    if empty := facts.get("empty_pages"):
        yield problem("draft-pages-empty", file=file, count=len(empty), pages=pages, numbers=_numbers(empty))
    if unreadable := facts.get("unreadable_pages"):
        numbers = _numbers(unreadable)
        yield problem("draft-pages-unreadable", file=file, count=len(unreadable), pages=pages, numbers=numbers)
    if repeated := facts.get("repeated_lines"):
        yield problem("draft-lines-repeated", file=file, count=repeated)
    if encoding := facts.get("encoding"):
        yield problem("draft-encoding", file=file, encoding=encoding)


def _numbers(pages: Sequence[int]) -> str:
    named = ", ".join(map(str, pages[:MAX_PAGES_NAMED]))
    return f"{named}, …" if len(pages) > MAX_PAGES_NAMED else named


def _of_answers(counts: Counts) -> Iterator[Problem]:
    if counts.unread:
        example = " ".join(counts.example.split())
        if len(example) > EXAMPLE_CHARACTERS:
            example = f"{example[:EXAMPLE_CHARACTERS]} …"
        yield problem("draft-unread", count=counts.unread, asked=counts.asked, example=example or NOTHING)
    if counts.problem is not None:
        values = {language: counts.problem.text(language) for language in ("en", "zh")}
        yield problem("draft-refused", count=counts.refused, why=values)
    if counts.cut_off:
        yield problem("draft-cut-off", count=counts.cut_off, asked=counts.asked)
    for reason, code in DROPPED.items():
        if count := counts.dropped.get(reason, 0):
            yield problem(code, count=count, limit=f"{MAX_TEXT:,}")
    if counts.unjudged:
        yield problem("draft-unjudged", count=counts.unjudged, rows=counts.rows)
    if repeated := counts.by_filter["repeated"]:
        yield problem("draft-repeated", count=repeated)
