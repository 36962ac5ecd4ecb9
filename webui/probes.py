"""What the probe at a training's end says, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import takewhile
from typing import Any

from engine.evaluation.probe import MAX_ANSWER_TOKENS
from webui.words import Words

ANSWERS = {
    "right": "probe-right-word", "not-right": "probe-not-right", "same": "probe-same", "not-same": "probe-not-same",
    "unknown": "probe-unknown",
}  # fmt: skip
# What a loss that is about as it was is called: the same as an answer that is.
LOSSES = {name: f"probe-{name}" for name in ("lower", "same", "higher", "forgot")}


def report(found: Mapping[str, Any], words: Words) -> str:
    """What the small probe at the end of a training says: a sentence about each thing that was measured, and each prompt
    before and after."""
    verdict, training, general = found["verdict"], found["training"], found["general"]
    details = []
    if training["answered"] and verdict in ("forgot", "changed"):
        details.append(words("probe-right", **training))
    if training["loss_before"] is not None and training["loss_after"] is not None:
        losses = {name: f"{training[name]:.2f}" for name in ("loss_before", "loss_after")}
        details.append(words("probe-losses", **losses))
    shared = _shared([one["prompt"] for one in found["prompts"] if one["kind"] == "training"])
    body = "".join(_probed(one, shared, words) for one in found["prompts"])
    names = ("prompt", "before", "after", "answer", "loss")
    heads = "".join(f"<th>{escape(words(f'probe-{name}'))}</th>" for name in names)
    help_ = words(
        "probe-help", tokens=MAX_ANSWER_TOKENS, learned=f"{found['learned']:g}", forgot=f"{found['forgot']:g}"
    )
    first = (
        f"<b>{escape(words('probe'))}</b> <span>{escape(words(f'probe-run-{verdict}', **training))}</span>"
    )
    lines = (
        f'<span class="verdict {escape(verdict)}">{first} <small>{escape(" ".join(details))}</small></span>'
    )
    if beside := found["general_verdict"]:
        sentence = words(f"probe-general-{beside}", **general)
        lines += f'<span class="verdict {escape(beside)}">{escape(sentence)}</span>'
    return (
        f'<details class="probe"><summary>{lines}</summary>'
        f'<div class="wide"><table class="samples"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="quiet">{escape(help_)}</p></details>'
    )


def _shared(prompts: Sequence[str]) -> tuple[int, int]:
    """How many characters all prompts begin with, and end with, in whole words: the system message, say, and the mark of
    the answer. Of one prompt alone none."""
    if len(prompts) < 2:
        return 0, 0
    begins = _beginning(prompts)
    begin = max(begins.rfind(" "), begins.rfind("\n")) + 1
    ends = _beginning([prompt[begin:][::-1] for prompt in prompts])
    return begin, max(ends.rfind(" "), ends.rfind("\n"), 0)


def _beginning(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    alike = takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return "".join(characters[0] for characters in alike)


def _probed(one: Mapping[str, Any], shared: tuple[int, int], words: Words) -> str:
    kind = words(f"probe-{one['kind']}")
    reference = (
        f"<small>{escape(words('report-reference'))}: {escape(one['reference'])}</small>"
        if one["reference"]
        else ""
    )
    cells = "".join(
        f"<td>{'—' if one[when] is None else escape(one[when]) or escape(words('samples-empty'))}</td>"
        for when in ("before", "after")
    )
    begin, end = shared if one["kind"] == "training" else (0, 0)
    text = one["prompt"][begin : len(one["prompt"]) - end].strip()
    prompt = escape(f"… {text}" if begin else text).replace("\n", "<br>")
    name, value = ("right", one["right"]) if one["kind"] == "training" else ("same", one["same"])
    answer = "unknown" if value is None else name if value else f"not-{name}"
    return (
        f'<tr><td title="{escape(one["prompt"])}"><small>{escape(kind)}</small>{prompt}{reference}</td>{cells}'
        f'<td class="{answer}">{escape(words(ANSWERS[answer]))}</td>{_loss_cell(one, words)}</tr>'
    )


def _loss_cell(one: Mapping[str, Any], words: Words) -> str:
    if one["loss"] is None:
        return "<td>—</td>"
    losses = " → ".join(
        "—" if one[f"loss_{when}"] is None else f"{one[f'loss_{when}']:.2f}" for when in ("before", "after")
    )
    verdict = one["loss"]
    return f'<td class="{escape(verdict)}">{losses}<small>{escape(words(LOSSES[verdict]))}</small></td>'
