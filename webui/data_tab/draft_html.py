"""Drafts as HTML: the list of them, and the review of one."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from engine.documents.drafts import Draft
from engine.documents.passages import Passage
from engine.documents.remarks import remarks
from engine.documents.review import FILTERS, LOW_SCORE, LOW_SUPPORT, Counts, DraftRow
from engine.documents.save import FORMATS
from webui import notices
from webui.words import Words

ROWS_PER_PAGE = 10
SUPPORT_OFFERED = "0.8"


def listed(drafts: Sequence[Draft], chosen: str, words: Words) -> str:
    """The drafts with their states; nothing if there are none."""
    entries = "".join(
        f'<li><a href="#" data-draft="{escape(draft.id)}" class="{"on" if draft.id == chosen else ""}">'
        f"<b>{escape(draft.name)}</b><small>{escape(words(f'draft-{draft.state}'))}</small></a></li>"
        for draft in drafts
    )
    return f'<h3>{escape(words("drafts"))}</h3><ul class="sets">{entries}</ul>' if entries else ""


def review(
    draft: Draft, counts: Counts, rows: Sequence[DraftRow], filter: str, page: int, last: int, words: Words
) -> str:
    """A draft with one page of the `rows` that fit the filter; `last` is the number of the last page."""
    start = (page - 1) * ROWS_PER_PAGE
    shown = "".join(_row(row, words) for row in rows[start : start + ROWS_PER_PAGE])
    if not shown:
        nothing = words("draft-none-here" if counts.rows else "draft-none-yet")
        shown = f'<p class="empty">{escape(nothing)}</p>'
    return (
        f"{_head(draft, counts, words)}{_filters(counts, filter, words)}{_tools(counts, words)}"
        f'<p class="quiet keys">{escape(words("draft-keys"))}</p>'
        f'<div class="rows draft-rows">{shown}</div>{_pages(filter, page, last, words)}'
    )


def _button(act: str, label: str, kind: str = "", **data: str) -> str:
    values = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
    return f'<button type="button" class="plain {kind}" data-act="{act}"{values}>{escape(label)}</button>'


def _head(draft: Draft, counts: Counts, words: Words) -> str:
    """The name, how far it is, what there is to know, and what can be done with all of it."""
    state = draft.state
    buttons = ""
    if state == "working":
        buttons += _button("stop", words("draft-stop"))
    elif state != "done":
        buttons += _button("continue", words("draft-continue"))
    if accepted := counts.by_filter["accepted"]:
        for form in FORMATS:
            label = words(f"draft-save-{form}", count=accepted)
            buttons += _button("save", label, "primary" if form == next(iter(FORMATS)) else "", format=form)
    buttons += _button("ask-remove", words("draft-remove"), "hurts")
    sure = (
        f'<div class="sure" hidden><p>{escape(words("draft-remove-sure", name=draft.name))}</p>'
        f"{_button('remove', words('draft-remove-yes'), 'hurts')}{_button('keep-draft', words('cancel'))}</div>"
    )
    facts = words(
        "draft-facts", asked=f"{counts.asked:,}", passages=f"{counts.passages:,}", rows=f"{counts.rows:,}",
        files=len(draft.files),
    )  # fmt: skip
    progress = _progress(draft, words) if state == "working" else ""
    notes = notices.noted(remarks(draft, counts), words)
    return (
        f'<div class="run-title"><h1>{escape(draft.name)}</h1></div>'
        f'<p class="quiet"><b>{escape(words(f"draft-{state}"))}</b> · {escape(facts)}</p>'
        f'{progress}{notes}<div class="buttons-row">{buttons}</div>{sure}'
    )


def _progress(draft: Draft, words: Words) -> str:
    now = draft.progress
    done, total, unit = now.get("done", 0), now.get("total"), now.get("unit", "pages")
    if draft.stopping:
        unit = "stopping"
    amount = f"{done:,} / {total:,}" if total else ""
    wide = f"width:{100 * done / total:.1f}%" if total else ""
    return (
        f'<div class="bar running {"" if total else "unknown"}"><i style="{wide}"></i></div>'
        f'<p class="told"><span>{escape(words(f"draft-unit-{unit}"))}</span><span>{escape(amount)}</span></p>'
    )


def _filters(counts: Counts, chosen: str, words: Words) -> str:
    tabs = "".join(
        f'<button type="button" data-act="show" data-filter="{name}" aria-pressed="{str(name == chosen).lower()}">'
        f"{escape(words(f'draft-filter-{name}'))} <span>{counts.by_filter[name]:,}</span></button>"
        for name in FILTERS
    )
    return f'<div class="draft-filters" role="group">{tabs}</div>'


def _tools(counts: Counts, words: Words) -> str:
    """Accepting all rows that have enough support."""
    if not counts.by_filter["open"]:
        return ""
    label, help = escape(words("draft-accept-supported")), escape(words("draft-accept-supported-help"))
    return (
        f'<p class="draft-tools" title="{help}"><label>{label} <input name="least" value="{SUPPORT_OFFERED}" size="4"'
        f' inputmode="decimal"></label> {_button("accept-supported", words("draft-accept"))}</p>'
    )


def _pages(filter: str, page: int, last: int, words: Words) -> str:
    if last == 1:
        return ""
    buttons = [
        _button("show", label, "", filter=filter, page=str(number)) if 1 <= number <= last else ""
        for label, number in (("‹", page - 1), ("›", page + 1))
    ]
    return f'<p class="draft-pages">{buttons[0]}<span>{page:,} / {last:,}</span>{buttons[1]}</p>'


def place(passage: Passage, words: Words) -> str:
    """Where a passage is: file, pages and headings."""
    parts = [passage.file]
    if passage.pages:
        first, last = passage.pages
        parts.append(words("draft-page", page=first if first == last else f"{first}–{last}"))
    return " · ".join([*parts, *([" › ".join(passage.headings)] if passage.headings else [])])


def _row(row: DraftRow, words: Words) -> str:
    state = row.decision or ("repeated" if row.repetition else "")
    reason = f'<p class="quiet">{escape(words("draft-reason", reason=row.reason))}</p>' if row.reason else ""
    turns = "".join(
        f'<div class="speech {role}"><span>{escape(words(f"draft-{name}"))}</span>'
        f'<div class="said">{escape(text)}</div></div>'
        for role, name, text in (("user", "question", row.question), ("assistant", "answer", row.answer))
    )
    boxes = "".join(
        f"<label>{escape(words(f'draft-{name}'))}"
        f'<textarea name="{name}" rows="{lines}">{escape(text)}</textarea></label>'
        for name, text, lines in (("question", row.question, 2), ("answer", row.answer, 5))
    )
    buttons = _button("accept", words("draft-accept")) + _button("reject", words("draft-reject"))
    buttons += _button("edit", words("draft-edit"))
    if row.decision:
        buttons += _button("undo", words("draft-undo"))
    return (
        f'<article data-row="{escape(row.id)}" class="{state}" tabindex="-1">'
        f"<header><b>{escape(row.id)}</b><span>{escape(place(row.passage, words))}</span>{_marks(row, words)}</header>"
        f'<div class="reading">{turns}{reason}'
        f"<details><summary>{escape(words('draft-passage'))}</summary><pre>{escape(row.passage.text)}</pre></details>"
        f'<div class="buttons-row">{buttons}</div></div>'
        f'<div class="edits">{boxes}<div class="buttons-row">{_button("keep", words("draft-keep"), "primary")}'
        f"{_button('cancel', words('cancel'))}</div></div></article>"
    )


def _marks(row: DraftRow, words: Words) -> str:
    """The measures, those that speak against the row in the colour of a warning, and its state."""
    low = "low" if row.support < LOW_SUPPORT else ""
    marks = [(low, words("draft-support", share=f"{row.support:.0%}"))]
    if row.missing:
        marks.append(("low", words("draft-missing", numbers=", ".join(row.missing))))
    if row.score is not None:
        marks.append(("low" if row.score < LOW_SCORE else "", words("draft-score", score=row.score)))
    elif not row.edited:
        marks.append(("", words("draft-no-score")))
    if row.repetition:
        earlier, similarity = row.repetition
        marks.append(("low", words("draft-repeats", row=earlier, share=f"{similarity:.0%}")))
    if row.edited:
        marks.append(("", words("draft-edited")))
    if row.decision:
        marks.append((row.decision, words(f"draft-is-{row.decision}")))
    return "".join(f'<span class="mark {kind}">{escape(text)}</span>' for kind, text in marks)
