"""What a chat template leaves out of rows, or renders differently than their author may expect, with the number of
rows.

A template may omit a system message or earlier reasoning; the ids are then a valid rendering, but not what the user
meant. `engine.worker.templates.provenance` finds which rows lose what, and they are counted here.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.core.problems import Problem, problem

# Each kind of loss and its sentence, in the order in which they are shown; a row's losses are stored as bits in this
# order.
SENTENCES = {
    "system": "rows-lose-system",
    "reasoning": "rows-lose-reasoning",
    "earlier_reasoning": "rows-lose-earlier-reasoning",
    "text_beside_calls": "rows-lose-text-beside-calls",
    "content": "rows-lose-content",
    "changed": "rows-changed",
    "tool_names": "rows-lose-tool-names",
    "tool_ids": "rows-lose-tool-ids",
    "without_reasoning": "rows-without-reasoning",
    "empty_reasoning": "rows-with-empty-thoughts",
    "header": "rows-with-header",
}
LOSSES = tuple(SENTENCES)


def notes(lost: Mapping[str, int], rows: int) -> list[Problem]:
    """A sentence for each kind of loss, with what to do. `lost`: rows by kind; `rows`: the number of rows checked."""
    return [problem(code, lost=lost[loss], rows=rows) for loss, code in SENTENCES.items() if lost.get(loss)]
