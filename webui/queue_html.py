"""The place of a run in the queue, and why it waits, as text and HTML."""

from __future__ import annotations

from html import escape

from engine.runs import engines
from engine.runs.queue import Place
from engine.runs.runs import Run
from webui.words import Words


def position(place: Place, words: Words) -> str:
    """Its place in one phrase."""
    return words("queue-position", position=place.number) if place.number else words("queue-elsewhere")


def reason(run: Run, words: Words) -> str:
    """The reason in a sentence, and below it what keeps the run from single GPUs."""
    place = engines.place(run)
    if place is None or place.decision.reason is None:
        return ""
    sentence = escape(place.decision.reason.text(words.language))
    details = "".join(f"<li>{escape(detail.text(words.language))}</li>" for detail in place.decision.details)
    return f"<p>{sentence}</p>" + (f"<ul>{details}</ul>" if details else "")
