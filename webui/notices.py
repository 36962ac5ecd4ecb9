"""How the page shows problems and confirmations.

A problem belongs to a field. The summary lists all of them; the marks at the fields are one small style sheet, so that
showing them moves nothing on the page and needs one output instead of one per field.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from html import escape

from engine.core.problems import Problem
from engine.runs.compare import ABSENT, differences
from engine.spec.run_spec import RunSpec
from webui.form.settings import element_id, essential, part_id, setting_of
from webui.words import Words

_parity = itertools.count()
MAX_REASONS_IN_TOAST = 3  # more would cover the page


def sentence(problem: Problem, words: Words) -> str:
    """The problem in the reader's language, its field under its label."""
    path = setting_of(problem.field)
    values = {name: words("empty") if value == "" else value for name, value in problem.values.items()}
    field = words.label(path) if path else problem.field
    return dataclasses.replace(problem, field=field, values=values).text(words.language)


def listed(problems: Sequence[Problem], words: Words) -> str:
    """All problems as a list; each links to its field."""
    rows = []
    for problem in problems:
        path, text = setting_of(problem.field), escape(sentence(problem, words))
        if path:
            text = f'<a href="#{element_id(path)}" data-part="{part_id(path)}">{text}</a>'
        rows.append(f"<li>{text}</li>")
    return f'<ul class="problems" role="alert">{"".join(rows)}</ul>'


def noted(notes: Sequence[Problem], words: Words) -> str:
    """Warnings that do not prevent a start."""
    rows = "".join(f"<li>{escape(sentence(note, words))}</li>" for note in notes)
    return f'<ul class="problems notes">{rows}</ul>' if rows else ""


def counted(problems: Sequence[Problem], words: Words) -> str:
    """The number of problems to fix; a heading above rows listed below it does not count."""
    return words("to-fix", count=sum(problem.code != "bad-rows" for problem in problems))


def marks(problems: Iterable[Problem], words: Words) -> str:
    """A style sheet that shows each problem under its field, and a dot on the part with the field."""
    by_field: dict[str, list[str]] = {}
    for problem in problems:
        if path := setting_of(problem.field):
            by_field.setdefault(path, []).append(sentence(problem, words))
    rules = []
    for path, texts in by_field.items():
        rules.append(f"#{element_id(path)}{{--wrong:1px;--field-edge:var(--bad)}}")
        rules.append(f'#{element_id(path)}::after{{content:"{css_text(" ".join(texts))}"}}')
        if not essential(path):
            rules.append(f'#{part_id(path)} .label-wrap>span:first-child::after{{content:"";display:inline-block}}')
    return f"<style>{''.join(rules)}</style>"


def css_text(text: str) -> str:
    """`text` inside a CSS string: everything except plain letters and digits is written as its code point."""
    return "".join(
        character if character.isascii() and (character.isalnum() or character == " ") else f"\\{ord(character):x} "
        for character in text
    )


def toast(text: str, kind: str = "good") -> str:
    """A short message in the corner that disappears by itself; an error stays longer."""
    # Two names for one animation: a second message restarts it.
    return f'<div class="toast {kind} turn-{next(_parity) % 2}" role="status">{escape(text)}</div>'


def refused(problems: Sequence[Problem], words: Words) -> str:
    """Why an action was refused: the first of several reasons, and how many more there are."""
    sentences = [sentence(problem, words) for problem in problems[:MAX_REASONS_IN_TOAST]]
    if (left := len(problems) - len(sentences)) > 0:
        sentences.append(words("refused-more", count=left))
    return toast(" ".join(sentences), "bad")


def denied(problem: Problem | None, selector: str, words: Words) -> str:
    """Why this person may not use the controls that match the CSS selector; the page's script disables them as long as
    this is shown. "" if there is no problem, or if it is that of all viewers, which the head of the page says."""
    if problem is None or problem.code == "rights-viewer":
        return ""
    return f'<p class="denied" data-denies="{escape(selector)}">{escape(sentence(problem, words))}</p>'


def code(id: str, text: str, words: Words, save: bool = False) -> str:
    """Text to copy, and to save as a file."""
    done = escape(words("copied"))
    buttons = f'<button type="button" data-copy="#{id}" data-done="{done}">{escape(words("copy"))}</button>'
    if save:
        buttons += f'<button type="button" data-save="#{id}">{escape(words("download"))}</button>'
    return f'<div class="code"><div class="tools">{buttons}</div><pre id="{id}" tabindex="0">{escape(text)}</pre></div>'


def changes(before: RunSpec, after: RunSpec, words: Words) -> str:
    """The settings in which the second spec differs, each with its new value, as a part of a sentence."""
    named = [
        words(
            "memory-change", name=words.label(difference.path), value=words.value(difference.path, difference.values[1])
        )
        for difference in differences([before, after])
        if ABSENT not in difference.values
    ]
    return words("memory-and").join(named)
