"""The results of the probe at the end of a training, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import takewhile
from typing import Any

from engine.evaluation.probe import MAX_ANSWER_TOKENS
from webui.text_html import lines
from webui.words import Words

ANSWER_WORDS = {
    "right": "probe-right-word",
    "not-right": "probe-not-right",
    "same": "probe-same",
    "not-same": "probe-not-same",
    "unknown": "probe-unknown",
}
# The label of an unchanged loss is the same as that of an unchanged answer.
LOSS_WORDS = {name: f"probe-{name}" for name in ("lower", "same", "higher", "forgot")}


def probe_html(probe: Mapping[str, Any], words: Words) -> str:
    """The results of the probe at the end of a training: a sentence about each measurement, and each prompt before and
    after."""
    verdict, training, general = probe["verdict"], probe["training"], probe["general"]
    details = []
    if training["answered"] and verdict in ("forgot", "changed"):
        details.append(words("probe-right", **training))
    if training["loss_before"] is not None and training["loss_after"] is not None:
        losses = {name: f"{training[name]:.2f}" for name in ("loss_before", "loss_after")}
        details.append(words("probe-losses", **losses))
    shared = _shared_affixes([row["prompt"] for row in probe["prompts"] if row["kind"] == "training"])
    body = "".join(_prompt_row(row, shared, words) for row in probe["prompts"])
    names = ("prompt", "before", "after", "answer", "loss")
    heads = "".join(f"<th>{escape(words(f'probe-{name}'))}</th>" for name in names)
    help_ = words(
        "probe-help", tokens=MAX_ANSWER_TOKENS, learned=f"{probe['learned']:g}", forgot=f"{probe['forgot']:g}"
    )
    first = f"<b>{escape(words('probe'))}</b> <span>{escape(words(f'probe-run-{verdict}', **training))}</span>"
    lines = f'<span class="verdict {escape(verdict)}">{first} <small>{escape(" ".join(details))}</small></span>'
    if beside := probe["general_verdict"]:
        sentence = words(f"probe-general-{beside}", **general)
        lines += f'<span class="verdict {escape(beside)}">{escape(sentence)}</span>'
    return (
        f'<details class="probe"><summary>{lines}</summary>'
        f'<div class="wide"><table class="samples"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="quiet">{escape(help_)}</p></details>'
    )


def _shared_affixes(prompts: Sequence[str]) -> tuple[int, int]:
    """The number of characters common to the beginnings, and to the ends, of all prompts, in whole words: for example
    the system message, and the header of the answer. For a single prompt none."""
    if len(prompts) < 2:
        return 0, 0
    begins = _common_prefix(prompts)
    begin = max(begins.rfind(" "), begins.rfind("\n")) + 1
    ends = _common_prefix([prompt[begin:][::-1] for prompt in prompts])
    return begin, max(ends.rfind(" "), ends.rfind("\n"), 0)


def _common_prefix(texts: Sequence[str]) -> str:
    """The common beginning of all texts."""
    alike = takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return "".join(characters[0] for characters in alike)


def _prompt_row(row: Mapping[str, Any], shared: tuple[int, int], words: Words) -> str:
    kind = words(f"probe-{row['kind']}")
    reference = (
        f"<small>{escape(words('report-reference'))}: {escape(row['reference'])}</small>" if row["reference"] else ""
    )
    cells = "".join(
        f"<td>{'—' if row[when] is None else escape(row[when]) or escape(words('samples-empty'))}</td>"
        for when in ("before", "after")
    )
    begin, end = shared if row["kind"] == "training" else (0, 0)
    text = row["prompt"][begin : len(row["prompt"]) - end].strip()
    prompt = lines(f"… {text}" if begin else text)
    name, value = ("right", row["right"]) if row["kind"] == "training" else ("same", row["same"])
    answer = "unknown" if value is None else name if value else f"not-{name}"
    return (
        f'<tr><td title="{escape(row["prompt"])}"><small>{escape(kind)}</small>{prompt}{reference}</td>{cells}'
        f'<td class="{answer}">{escape(words(ANSWER_WORDS[answer]))}</td>{_loss_cell(row, words)}</tr>'
    )


def _loss_cell(row: Mapping[str, Any], words: Words) -> str:
    if row["loss"] is None:
        return "<td>—</td>"
    losses = " → ".join(
        "—" if row[f"loss_{when}"] is None else f"{row[f'loss_{when}']:.2f}" for when in ("before", "after")
    )
    verdict = row["loss"]
    return f'<td class="{escape(verdict)}">{losses}<small>{escape(words(LOSS_WORDS[verdict]))}</small></td>'
