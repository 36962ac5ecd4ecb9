"""What the spec in the form would do, and what prevents it, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from engine.core import hardware
from engine.core.problems import Problem, say
from engine.core.stages import STAGES
from engine.launch.command import on_cpu
from engine.runs.plan import Summary
from engine.spec.run_spec import RunSpec
from engine.spec.steps import examples_per_step
from webui import notices
from webui.numbers import human, size
from webui.words import Words


class Statistic(NamedTuple):
    label: str  # its code in the page's texts
    value: str | None  # as it is written; None: unknown
    note: str = ""


def plan(spec: RunSpec, summary: Summary, problems: Sequence[Problem], words: Words, known: bool) -> str:
    """The figures of the plan, and what prevents a start; without figures unless the spec is `known` to equal the
    form."""
    cells = "".join(_cell(statistic, words, known) for statistic in _statistics(spec, summary, words))
    if problems:
        state = (
            f'<p class="state wrong">{escape(notices.counted(problems, words))}</p>{notices.listed(problems, words)}'
        )
    else:
        state = (
            f'<p class="state right">{escape(words("ready"))}</p>'
            f"{_strategy(summary, words)}{_doubts(summary, words)}{memory(summary, spec, words)}"
        )
    numbers = f'<h2>{escape(words("summary"))}</h2><dl class="stats">{cells}</dl>'
    return f"{numbers}{_adapted(summary, words)}{state}{_remarks(summary, words)}"


def _statistics(spec: RunSpec, summary: Summary, words: Words) -> list[Statistic]:
    share = ""
    if summary.trainable and summary.parameters:
        share = words("stat-share", percent=f"{summary.trainable / summary.parameters:.2%}")
    batch = "stat-answers" if STAGES[spec.stage.kind].answers else "stat-batch"
    trainable = None if summary.trainable is None else human(summary.trainable)
    statistics = [
        Statistic("stat-rows", _count(summary.rows, summary.exact)),
        Statistic(batch, _count(examples_per_step(spec), exact=True)),
        Statistic("stat-steps", _count(summary.steps, summary.exact or bool(spec.training.max_steps))),
        Statistic("stat-trainable", trainable, share),
    ]
    if summary.needed:
        main_memory = on_cpu(spec, len(hardware.planned_gpus()))
        label = "stat-memory" if main_memory else "stat-device-memory"
        of = words("stat-memory-of", there=size(summary.room.bytes)) if summary.room else ""
        statistics.append(Statistic(label, f"≈ {size(summary.needed.total)}", of))
    return statistics


def _count(count: int | None, exact: bool) -> str | None:
    return None if count is None else f"{'' if exact else '≈ '}{count:,}"


def _cell(statistic: Statistic, words: Words, known: bool) -> str:
    value = statistic.value if known and statistic.value is not None else "—"
    note = statistic.note if known else ""
    label = escape(words(statistic.label))
    return f"<div><dt>{label}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"


def _adapted(summary: Summary, words: Words) -> str:
    """The modules that get an adapter, by the names that training passes to peft."""
    if not summary.adapted:
        return ""
    names = ", ".join(f"{name} × {count}" for name, count in summary.adapted.items())
    return f'<p class="adapted">{escape(words("adapted", names=names))}</p>'


def _strategy(summary: Summary, words: Words) -> str:
    """How several processes divide the training, and why in this way."""
    if not summary.strategy:
        return ""
    return f'<p class="quiet">{escape(notices.sentence(summary.strategy, words))}</p>'


def _remarks(summary: Summary, words: Words) -> str:
    """What should be known about the data before the start, although it does not prevent it."""
    if not summary.remarks:
        return ""
    items = "".join(f"<li>{escape(notices.sentence(remark, words))}</li>" for remark in summary.remarks)
    heading = escape(words("remarks", count=len(summary.remarks)))
    return f'<details class="remarks" open><summary>{heading}</summary><ul>{items}</ul></details>'


def _doubts(summary: Summary, words: Words) -> str:
    """Settings that work, but may not have the expected effect."""
    return "".join(f'<p class="doubtful">{escape(notices.sentence(doubt, words))}</p>' for doubt in summary.doubts)


def memory(summary: Summary, spec: RunSpec, words: Words) -> str:
    """What to change if the run may need more memory than is available. It is an estimate, so it does not prevent a
    start."""
    if not summary.needed or not summary.room or summary.needed.total <= summary.room.bytes:
        return ""
    machine = "memory-there" if hardware.plans_elsewhere() else "memory-here"
    values = {"there": size(summary.room.bytes), "card": summary.room.card or words(machine)}
    if summary.fits is None:
        sentence = words("memory-too-large", **values)
    else:
        sentence = words("memory-short", changes=notices.changes(spec, summary.fits, words), **values)
    return f'<p class="doubtful">{escape(sentence)}</p>'


def hours_left(left: float, limit: float, stops: bool, words: Words) -> str:
    """How many GPU hours are left of how many, and whether a training stops at their end."""
    code = "quota-hours-left-stop" if stops else "quota-hours-left"
    text = say(code, words.language, left=f"{left:,.1f}", limit=f"{limit:g}")
    return f'<p class="{"quiet" if left else "doubtful"}">{escape(text)}</p>'
