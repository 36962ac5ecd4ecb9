"""The judge of a report as HTML: what to know about its scores, its agreement with a person, what it was asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from engine.core.problems import Problem
from engine.evaluation.judge_notes import CAUTIONS
from webui import notices
from webui.numbers import short
from webui.words import Words


def judge_section(report: Mapping[str, Any], notes: Sequence[Problem], words: Words) -> str:
    """The judge of a report; "" without one. `notes`: what has to be known about its scores."""
    judge = report.get("judge")
    if not judge:
        return ""
    notes_html = "".join(_note(note, words) for note in notes)
    return (
        f'<section class="judge"><h3>{escape(words("evaluate-judge"))}</h3>{notes_html}'
        f"{_agreement(judge['agreement'], words)}{_asked(judge, words)}</section>"
    )


def _note(note: Problem, words: Words) -> str:
    kind = "verdict caution" if note.code in CAUTIONS else "verdict"
    return f'<p class="{kind}">{escape(notices.sentence(note, words))}</p>'


def _agreement(known: Mapping[str, Any] | None, words: Words) -> str:
    """Each measure of agreement with its interval; "" if this evaluation compared the judge with nothing."""
    if not known:
        return ""
    body = "".join(
        f'<tr><th title="{escape(words(f"{code}-help"))}">{escape(words(code))}</th><td><b>{value}</b>{between}</td>'
        f"<td>{count:,}</td></tr>"
        for code, value, between, count in _agreement_rows(known)
    )
    if not body:
        return ""
    heads = "".join(
        f"<th>{escape(text)}</th>" for text in (words("report-measure"), ", ".join(known["sets"]), words("agreement-n"))
    )
    return f'<div class="wide"><table class="report"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _agreement_rows(known: Mapping[str, Any]) -> Iterator[tuple[str, str, str, int]]:
    """Code of the label, value, interval and number of ratings."""
    thumbs, pairs = known["thumbs"], known["preferences"]
    measured = [("agreement-auc", thumbs.get("auc"), "", thumbs["ratings"])]
    for name in ("best", "median"):
        own = thumbs.get(name, {})
        measured.append((f"agreement-{name}", own.get("agreement"), " %", thumbs["ratings"]))
        measured.append((f"agreement-kappa-{name}", own.get("kappa"), "", thumbs["ratings"]))
    measured.append(("agreement-preferences", pairs.get("agreement"), " %", pairs["ratings"]))
    for code, value, unit, count in measured:
        if value:
            between = "" if value["low"] is None else f"<small>{short(value['low'])} – {short(value['high'])}</small>"
            yield code, f"{short(value['value'])}{unit}", between, count


def _asked(judge: Mapping[str, Any], words: Words) -> str:
    """The prompts, folded away."""
    prompts = "".join(f"<pre>{escape(prompt)}</pre>" for prompt in judge["prompts"].values())
    return f'<details class="asked"><summary>{escape(words("report-judge-asked"))}</summary>{prompts}</details>'


def judgement(answer: Mapping[str, Any], words: Words) -> str:
    """The judge's reason for the score of an answer, its verdict on the comparison, or why there is no score."""
    own = answer.get("judgement")
    if not own:
        return ""
    parts = [own.get("reason", "")]
    if verdict := own.get("verdict"):
        parts.append(words(f"judged-{verdict}"))
    if own.get("problem"):
        parts.append(notices.sentence(Problem(own["problem"]["code"], "", own["problem"]["values"]), words))
    elif own.get("score") is None:
        parts.append(words("judged-unscored"))
    if own.get("cut"):
        parts.append(words("judged-cut", count=f"{own['cut']:,}"))
    text = " · ".join(filter(None, parts))
    return f'<p class="judged"><b>{escape(words("evaluate-judge"))}</b> {escape(text)}</p>' if text else ""
