"""The head of the open run as HTML: what it is, its progress, why it failed and its warnings."""

from __future__ import annotations

from html import escape
from pathlib import Path

from engine.core.problems import say
from engine.core.run_warnings import read_warnings
from engine.core.rundir import WAITING_FOR_SPACE, read_object
from engine.evaluation import probe, report
from engine.importer import run_import
from engine.notifications.services import SERVICES
from engine.runs import attempts, engines, evaluations, notification_log, progress
from engine.runs.failures import explain
from engine.runs.outcome import disk_is_full
from engine.runs.progress import Progress
from engine.runs.runs import Run
from webui import notices, probes, queue_html, reports
from webui.numbers import duration, human, moment, short, size
from webui.runs_tab import sweep_html
from webui.runs_tab.run_facts import kind_of, run_facts, state_html
from webui.text_html import lines
from webui.words import Words


def status(run: Run, words: Words) -> tuple[str, str, str]:
    """The run's progress, its state, and why it failed, for a page of another tab."""
    return progress_bar(run, progress.progress(run), words), state_html(run, words), failure(run, words)


def head(run: Run, saves: Path, words: Words) -> str:
    facts, now = run_facts(run), progress.progress(run)
    fields = {
        "fact-model": facts["model"],
        "fact-method": kind_of(run, facts, words),
        "fact-data": facts["data"],
        "fact-owner": run.by,
        "fact-submitted": moment(run.submitted),
        "fact-origin": origin(run),
    }
    rows = "".join(
        f"<div><dt>{escape(words(code))}</dt><dd>{escape(value)}</dd></div>" for code, value in fields.items() if value
    )
    return (
        f'<a class="back" href="?tab=runs" data-run="">← {escape(words("all-runs"))}</a>'
        f'<div class="run-title"><h1>{escape(facts["title"])}</h1>'
        f'<span class="badge">{state_html(run, words)}</span></div>'
        f"{progress_bar(run, now, words)}"
        f"{sweep_html.line(run, saves, words)}"
        f'<dl class="facts-row">{rows}</dl>'
    )


def origin(run: Run) -> str:
    """The program that has trained an imported run, and the folder; "" for any other run."""
    imported = run.request.get("imported")
    return f"{imported['tool']}, {imported['folder']}" if imported else ""


def gone(run_id: str, words: Words) -> str:
    """The head of a run that was deleted while it was open."""
    badge = f'<span class="dot interrupted"></span><span>{escape(words("state-deleted"))}</span>'
    return (
        f'<a class="back" href="?tab=runs" data-run="">← {escape(words("all-runs"))}</a>'
        f'<div class="run-title"><h1>{escape(run_id.rpartition("/")[2])}</h1><span class="badge">{badge}</span></div>'
        f'<div class="failure caution" role="status"><p>{escape(words("run-deleted"))}</p></div>'
    )


def progress_bar(run: Run, now: Progress, words: Words) -> str:
    """Phase, progress bar and speed while it is running; its duration when it has ended."""
    wide = 100 * min(max(now.fraction or 0.0, 0.0), 1.0)
    unknown = " unknown" if now.fraction is None and not run.final and run.state != "queued" else ""
    bar = f'<div class="bar {escape(run.state)}{unknown}"><i style="width:{wide:.1f}%"></i></div>'
    parts = " · ".join(f"<span>{escape(part)}</span>" for part in _progress_parts(run, now, words))
    return f'{bar}<p class="told">{parts}</p>'


def _progress_parts(run: Run, now: Progress, words: Words) -> list[str]:
    parts = []
    if place := engines.place(run):
        parts.append(queue_html.position(place, words))
    elif not run.final:
        parts.append(words(f"phase-{now.phase}"))
    if now.total:
        unit = f"unit-{now.unit}" if words.knows(f"unit-{now.unit}") else "unit-other"
        write = size if now.unit == "B" else "{:,}".format
        parts.append(words(unit, done=write(now.done), total=write(now.total)))
    if now.fraction is not None and not run.final:
        parts.append(f"{now.fraction:.0%}")
    if (value := run.facts.headline) is not None:
        parts.append(f"{words(f'brief-{progress.headline_curve(run)}')} {short(value)}")
    if now.tokens_per_s and not run.final:
        parts.append(words("speed", count=human(now.tokens_per_s)))
    if now.eta_s is not None and now.eta_s > 0 and run.state != "stopping":
        parts.append(words("eta", time=duration(now.eta_s, words)))
    if run.started and run.ended:
        parts.append(_time_taken(run.ended - run.started, attempts.seconds_before(run), words))
    if run.started and (step := attempts.resumed_from(run)) is not None:
        parts.append(words("continued-from", step=f"{step:,}") if step else words("continued-from-start"))
    return parts


def _time_taken(seconds: float, before: float, words: Words) -> str:
    """How long the run took; if it was resumed, in all and since then."""
    if not before:
        return words("took", time=duration(seconds, words))
    return words("took-in-all", total=duration(before + seconds, words), time=duration(seconds, words))


def failure(run: Run, words: Words) -> str:
    """What happened, what to do, and the first traceback."""
    why = explain(run)
    if not why:
        return ""
    advice, traceback = why.advice(words.language), ""
    if advice:
        advice = f"<p><b>{escape(words('what-to-do'))}</b> {lines(advice)}</p>"
    if why.traceback:
        traceback = (
            f"<details><summary>{escape(words('traceback'))}</summary><pre>{escape(why.traceback)}</pre></details>"
        )
    return (
        '<div class="failure" role="alert"><p class="what">'
        f"{lines(why.what(words.language))}</p>{advice}{traceback}</div>"
    )


def waiting_for_space(run: Run, words: Words) -> str:
    """That the training waits for disk space, how much it needs, and what to do; or that a run cannot start."""
    reported = read_object(run.dir.progress)
    if run.state == "queued" and disk_is_full(run.dir):
        text = words("space-to-start")
    elif not run.final and reported.get("phase") == WAITING_FOR_SPACE:
        text = words("space-needed", needed=size(reported["needed"]), free=size(reported["free"]))
    else:
        return ""
    return f'<div class="failure caution" role="status"><p>{escape(text)}</p></div>'


def engine_doubt(run: Run, words: Words) -> str:
    """That the engine does not answer, so that the state may be out of date."""
    doubt = engines.doubt(run)
    return (
        f'<div class="failure caution" role="status"><p>{lines(doubt.text(words.language))}</p></div>' if doubt else ""
    )


def unsent(run: Run, words: Words) -> str:
    """That notifications about the run have not reached an address, and why."""
    sentences = {
        say(
            "notify-failed" if delivery.state == "failed" else "notify-retrying",
            words.language,
            service=SERVICES[delivery.service].name if delivery.service in SERVICES else delivery.service,
            tries=delivery.tries,
            why=delivery.reason.text(words.language),
        ): None
        for delivery in notification_log.failures(run.dir)
        if delivery.reason
    }
    return "".join(
        f'<div class="failure caution" role="status"><p>{escape(sentence)}</p></div>' for sentence in sentences
    )


def cautions(run: Run, words: Words) -> str:
    """What went wrong during the run, and what to do about it, except for the cause of its failure."""
    ended_by = {entry["code"] for entry in read_object(run.dir.error).get("problems", ())}
    return (
        engine_doubt(run, words)
        + waiting_for_space(run, words)
        + unsent(run, words)
        + "".join(
            (
                f'<div class="failure caution" role="status"><p><b>{moment(warning.at)}</b> '
                f"{lines(notices.sentence(warning.problem, words))}</p></div>"
            )
            for warning in read_warnings(run.dir)
            if warning.problem.code not in ended_by
        )
    )


def findings(run: Run, words: Words) -> str:
    """The findings of an evaluation, with a link to all of them; for a training, the result of its probe, or what could
    not be imported; for an export, a link to its result."""
    if run.request.get("imported"):
        return import_remarks(run, words)
    if probe_result := probe.read(run.dir):
        return probes.probe_html(probe_result, words)
    if run.kind == "export" and run.final and run.dir.left():
        return f'<p><a class="load" href="?tab=export">{escape(words("export-result-link"))}</a></p>'
    summary = report.summary(run.dir) if run.kind == "evaluation" else None
    if not summary:
        return ""
    link = f'<p><a class="load" href="{escape(reports.link(run.id))}">{escape(words("report-whole"))}</a></p>'
    return reports.summary(summary, words, evaluations.notes_of(run, summary)) + link


def import_remarks(run: Run, words: Words) -> str:
    """What could not be imported, folded; "" if everything was."""
    remarks = run_import.remarks(run.dir)
    if not remarks:
        return ""
    title = escape(words("import-remarks", count=len(remarks)))
    return f'<details class="import-remarks"><summary>{title}</summary>{notices.noted(remarks, words)}</details>'
