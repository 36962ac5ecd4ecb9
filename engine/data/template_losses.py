"""What a chat template leaves out of rows, or writes otherwise than their author may think, told with how many rows.

A template is free to write nothing of a system message or of earlier reasoning; the ids are then its own rendering, and
still not what the user meant. Which rows lose what is found by `engine.worker.templates.provenance` and counted by row.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.core.problems import Problem, problem

# Each loss and the sentence that tells it, in the order in which they are told;
# a row's losses are stored as bits by it.
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
    """A sentence for each kind of loss, with what to do. `lost`: rows by kind; `rows`: how many were looked at."""
    return [problem(code, lost=lost[loss], rows=rows) for loss, code in SENTENCES.items() if lost.get(loss)]
