"""What a notification says about an occurrence of a run, in the language of its reader: title, last figures, duration,
reason and link; and the same as fields. See docs/notifications.md."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from engine.core.problems import NOTHING, say
from engine.core.rundir import read_object
from engine.notifications.notice import Level, Notice, iso
from engine.notifications.policy import Policy
from engine.runs import attempts, engines, facts
from engine.runs.failures import explain
from engine.runs.occurrences import ENDS, Occurrence, newest_stall, waits_since
from engine.runs.run import Run, sweep_of
from engine.runs.sweep_standing import best_of

LEVELS: dict[str, Level] = {
    "finished": "success",
    "failed": "failure",
    "stopped": "info",
    "stalled": "warning",
    "space": "warning",
    "turn": "info",
}
# The sentence of the title, by the event or, of an interrupted run, its state; and those of the lines.
TITLES = {
    "finished": "notice-finished",
    "failed": "notice-failed",
    "interrupted": "notice-interrupted",
    "stopped": "notice-stopped",
    "stalled": "notice-stalled",
    "space": "notice-space",
    "turn": "notice-turn",
}
LINES = ("notice-figures", "notice-time", "notice-reason", "notice-link")
LINES_OF_SWEEP = ("notice-best", "notice-time", "notice-link")
MAX_NAME_CHARACTERS, MAX_REASON_CHARACTERS = 120, 600
FIGURES = ("eval_loss",)  # shown besides the main curve, if there are any


def notice_of(occurrence: Occurrence, policy: Policy, language: str) -> Notice:
    """The notification."""
    if occurrence.sweep:
        return _notice_of_sweep(occurrence, policy, language)
    run = occurrence.run
    name, figures = _shortened(run.title, MAX_NAME_CHARACTERS), last_figures(run)
    reason = reason_of(occurrence, language)
    progress = _progress(run)
    duration, link = duration_of(run), policy.link(run.id)
    values = {
        "figures": ", ".join(f"{curve} {value:.4g}" for curve, value in figures.items()) or NOTHING,
        "done": f"{progress['done']:,}/{progress['total']:,}" if progress else NOTHING,
        "time": duration_text(duration, language) if duration is not None else NOTHING,
        "reason": reason or NOTHING,
        "link": link or NOTHING,
    }
    state = "interrupted" if run.state == "interrupted" else occurrence.event
    return Notice(
        id=f"{run.id}#{occurrence.key}",
        event=occurrence.event,
        title=say(TITLES[state], language, name=name),
        text=_text(LINES, language, name, values),
        language=language,
        at=iso(occurrence.at),
        level=LEVELS[occurrence.event],
        run=_fields_of(run),
        metrics=figures,
        progress=progress,
        duration_seconds=None if duration is None else round(duration, 1),
        reason=reason,
        link=link,
    )


def _text(codes: Sequence[str], language: str, name: str, values: Mapping[str, Any]) -> str:
    """The lines that say something."""
    lines = (say(code, language, **values).strip() for code in codes)
    return "\n".join(filter(None, lines)) or say("notice-bare", language, name=name)


def _fields_of(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        "name": run.title,
        "kind": run.kind,
        "stage": run.facts.stage or None,
        "base": run.facts.base or None,
        "owner": run.by or None,
        "state": run.state,
    }


def _notice_of_sweep(occurrence: Occurrence, policy: Policy, language: str) -> Notice:
    """The notification of the end of a whole sweep: how many of its runs have ended in which way, and the best."""
    sweep = occurrence.sweep
    counts = Counter(ENDS[run.state] for run in sweep)
    best = best_of(sweep)
    shown = best or occurrence.run
    figures, link = last_figures(shown), policy.link(shown.id)
    begun = [run.started for run in sweep if isinstance(run.started, (int, float))]
    duration = max(occurrence.at - min(begun), 0.0) if begun else None
    name = _shortened(_common_name(sweep), MAX_NAME_CHARACTERS)
    values = {
        "figures": ", ".join(f"{curve} {value:.4g}" for curve, value in figures.items()) or NOTHING,
        "best": _shortened(best.title, MAX_NAME_CHARACTERS) if best else NOTHING,
        "time": duration_text(duration, language) if duration is not None else NOTHING,
        "link": link or NOTHING,
    }
    totals = {event: counts[event] for event in ("finished", "failed", "stopped")}
    return Notice(
        id=f"{occurrence.run.id}#{occurrence.key}",
        event=occurrence.event,
        title=say("notice-sweep", language, name=name, count=len(sweep), **totals),
        text=_text(LINES_OF_SWEEP, language, name, values),
        language=language,
        at=iso(occurrence.at),
        level=LEVELS[occurrence.event],
        run=_fields_of(shown),
        metrics=figures,
        duration_seconds=None if duration is None else round(duration, 1),
        link=link,
        sweep={"id": sweep_of(shown)["id"], "runs": len(sweep), **totals, "best": best.id if best else None},
    )


def _common_name(sweep: Sequence[Run]) -> str:
    """The name with which the sweep was submitted: its runs add the values that they try."""
    words = zip(*(run.title.split() for run in sweep), strict=False)
    common = (same[0] for same in takewhile(lambda same: len(set(same)) == 1, words))
    return " ".join(common) or str(sweep_of(sweep[0])["id"])


def last_figures(run: Run) -> dict[str, float]:
    """The newest values of the main curve and of the loss on held-out rows, by the names of the curves."""
    names = dict.fromkeys((facts.headline_curve(run.kind, run.facts.stage), *FIGURES))
    values = {name: facts.newest_value(run.dir.metrics, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _progress(run: Run) -> dict[str, Any] | None:
    """How far the run has come; None if it has not begun, or counts bytes."""
    reported = read_object(run.dir.progress)
    done, total, unit = reported.get("done"), reported.get("total"), reported.get("unit")
    if not isinstance(done, int) or not isinstance(total, int) or not total or unit in ("", "B"):
        return None
    return {"done": done, "total": total, "unit": unit}


def duration_of(run: Run) -> float | None:
    """Seconds that all attempts have taken so far; of a waiting run, those of its wait."""
    if run.state == "queued":
        since = waits_since(run)
        return max(time.time() - since, 0.0) if since else None
    started = run.started
    if not isinstance(started, (int, float)):
        return None
    end = run.ended or read_object(run.dir.progress).get("at")
    end = end if run.final and isinstance(end, (int, float)) else time.time()
    return attempts.seconds_before(run) + max(end - started, 0.0)


def duration_text(seconds: float, language: str) -> str:
    """A duration in words, to the minute; below that, in seconds."""
    if not math.isfinite(seconds):
        return NOTHING
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return say("duration-hours", language, hours=hours, minutes=minutes)
    if seconds >= 60:
        return say("duration-minutes", language, minutes=minutes)
    return say("duration-seconds", language, seconds=round(seconds))


def reason_of(occurrence: Occurrence, language: str) -> str | None:
    """Why it has happened, and what helps; None if that is clear."""
    run, event = occurrence.run, occurrence.event
    if event == "failed" and (explanation := explain(run)):
        return _shortened(f"{explanation.what(language)} {explanation.advice(language)}", MAX_REASON_CHARACTERS)
    if event == "stopped":
        by = (run.request.get("stop") or {}).get("by")
        return say("notice-stopped-by", language, user=by) if by and by != run.by else None
    if event == "stalled" and (stall := newest_stall(run)):
        return _shortened(stall.problem.text(language), MAX_REASON_CHARACTERS)
    if event == "turn" and (place := engines.place(run)):
        return _shortened(place.decision.text(language), MAX_REASON_CHARACTERS) or None
    if event == "space":
        return _space(run, language)
    return None


def _space(run: Run, language: str) -> str:
    reported = read_object(run.dir.progress)
    needed, free = (reported.get(name) for name in ("needed", "free"))
    sizes = [f"{size / 1e9:.2f} GB" if isinstance(size, int) else NOTHING for size in (needed, free)]
    return say("notice-space-needed", language, needed=sizes[0], free=sizes[1])


def _shortened(text: str, most: int) -> str:
    """The text in one line, of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"
