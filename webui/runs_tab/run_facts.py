"""Descriptions of a run, for the table, its search and the head of the open run."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from engine.runs.runs import Run
from webui.words import Words


def run_facts(run: Run) -> dict[str, str]:
    """Title, model, stage, method and data; empty if the spec cannot be read."""
    facts = run.facts
    model = Path(facts.base).name or run.id.split("/")[0]
    return {
        "title": run.title,
        "model": model,
        "stage": facts.stage,
        "method": facts.method,
        "data": ", ".join(facts.data),
    }


def kind_of(run: Run, facts: Mapping[str, str], words: Words) -> str:
    """Stage and method of a training; the kind of any other run."""
    if run.kind != "training":
        return words(f"kind-{run.kind}")
    return " · ".join(words.choice(path, facts[path]) for path in ("stage", "method") if facts[path])


def matches(run: Run, text: str) -> bool:
    """Whether every word of `text` occurs in the run's id, name, model, data or owner."""
    if not text.strip():
        return True
    hay = " ".join([run.id, run.by, run.state, *run_facts(run).values()]).casefold()
    return all(word in hay for word in text.casefold().split())


def state_html(run: Run, words: Words) -> str:
    return f'<span class="dot {escape(run.state)}"></span><span>{escape(words(f"state-{run.state}"))}</span>'
