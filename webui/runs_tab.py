"""The Runs tab: what has been started, and one run in full.

Nothing about a run is kept here: each look reads its folder, so a reload, another browser and another user see
the same. A short poll asks every two seconds and answers nothing where nothing has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from engine.core import rundir
from engine.core.problems import Problem, Refusal
from engine.core.smoothing import SMOOTHING
from engine.core.stages import STAGES
from engine.evaluation import probe, report
from engine.launch.workspace import Workplace
from engine.runs import progress, queue, runs, samples
from engine.runs.failures import explain
from engine.runs.results import possible_next_stages, result_of
from engine.runs.runs import Run
from webui import charts, clicks, notices, probes, reports
from webui.events import QUIET
from webui.numbers import ago, duration, human, moment, size
from webui.words import Words

TABLE_ROWS = 100  # runs in the table before "show more"
MAX_FILES_LISTED = 200  # of a run, listed
RUN_POLL_SECONDS = 2  # between two looks at the open run
TABLE_POLL_SECONDS = 4  # between two looks at the table


@dataclass(frozen=True)
class RunsTab:
    """The parts of the tab that the rest of the page is wired to."""

    open: Callable[..., list[Any]]
    view: list[Any]  # what `open` asks besides the id
    outputs: list[Any]  # what `open` answers into
    timers: list[gr.Timer]
    clone: gr.Button
    compare: gr.Button
    chat: gr.Button
    export: gr.Button
    evaluate: gr.Button
    follow: gr.Dropdown  # the stage that is to go on from the open run


def build(
    words: Words,
    workplace: Workplace,
    root: str,
    selected: gr.Textbox,
    message_html: gr.HTML,
    user: Callable[[gr.Request], str],
) -> RunsTab:
    """The tab in the current context. `selected` holds the id of the open run ("" = the table)."""
    saves = workplace.saves
    with gr.Column(elem_classes="list") as table_view:
        with gr.Row(elem_classes="bar-row"):
            search = gr.Textbox(
                placeholder=words("runs-search"),
                show_label=False,
                container=False,
                elem_id="search",
                max_lines=1,
                scale=1,
            )
        table = gr.HTML(js_on_load=clicks.row_click_js("run"), elem_id="runs")
        limit = gr.Textbox(str(TABLE_ROWS), elem_classes="unseen", container=False)
        more = gr.Button(words("runs-more", count=0), size="sm", visible=False, elem_id="runs-more")
    with gr.Column(visible=False, elem_classes="one-run") as run_view:
        head = gr.HTML(js_on_load=clicks.row_click_js("run"), elem_id="run-head")
        with gr.Row(elem_classes="buttons actions"):
            stop = gr.Button(words("stop-save"), size="sm", elem_id="stop")
            kill = gr.Button(words("kill"), size="sm", elem_id="kill", elem_classes="hurts")
            resume = gr.Button(words("resume"), size="sm", variant="primary", elem_id="resume")
            chat = gr.Button(
                words("chat-with"), size="sm", variant="primary", visible=False, elem_id="chat-with"
            )
            export = gr.Button(words("export-it"), size="sm", visible=False, elem_id="export-it")
            evaluate = gr.Button(words("evaluate-it"), size="sm", visible=False, elem_id="evaluate-it")
            follow = gr.Dropdown(
                [], value=None, show_label=False, container=False, visible=False, elem_id="follow", scale=0,
                min_width=190, interactive=True, label=words("follow"),
            )  # fmt: skip
            clone = gr.Button(words("clone"), size="sm", elem_id="clone")
            compare = gr.Button(words("compare"), size="sm", elem_id="compare")
            delete = gr.Button(words("delete"), size="sm", elem_id="delete", elem_classes="hurts")
        with gr.Row(visible=False, elem_classes="sure") as sure_kill:
            gr.HTML(f"<p>{escape(words('sure-kill'))}</p>")
            yes_kill = gr.Button(words("yes-kill"), variant="stop", size="sm", elem_id="yes-kill", scale=0)
            no_kill = gr.Button(words("cancel"), size="sm", scale=0)
        with gr.Row(visible=False, elem_classes="sure") as sure_delete:
            gr.HTML(f"<p>{escape(words('sure-delete'))}</p>")
            yes_delete = gr.Button(
                words("yes-delete"), variant="stop", size="sm", elem_id="yes-delete", scale=0
            )
            no_delete = gr.Button(words("cancel"), size="sm", scale=0)
        failure = gr.HTML(elem_id="failure")
        findings = gr.HTML(elem_id="found-out")
        with gr.Row(elem_classes="chart-tools") as tools:
            across = gr.Radio(
                [(words(f"x-{axis}"), axis) for axis in charts.AXES], value="step", label=words("x-axis"),
                elem_classes="field-union", scale=0, min_width=340,
            )  # fmt: skip
            smoothing = gr.Slider(
                0, 0.99, SMOOTHING, step=0.01, label=words("smoothing"), scale=0, min_width=260
            )
            log_scale = gr.Checkbox(False, label=words("log-scale"), scale=0, min_width=140)
        curves = gr.HTML(elem_id="curves")
        with gr.Tabs(elem_classes="below"):
            with gr.Tab(words("log")):
                log = gr.HTML(elem_id="log")
                log_link = gr.HTML(elem_classes="under")
            with gr.Tab(words("samples"), visible=False) as samples_tab:
                written = gr.HTML(elem_id="samples")
            with gr.Tab(words("settings-yaml")):
                settings = gr.HTML()
            with gr.Tab(words("files")):
                files = gr.HTML(elem_id="files")
    stamp, table_stamp = (gr.Textbox(elem_classes="unseen", container=False) for _ in range(2))
    timer, table_timer = gr.Timer(RUN_POLL_SECONDS, active=False), gr.Timer(TABLE_POLL_SECONDS, active=False)

    look_at = [across, smoothing, log_scale]
    moving = [
        stamp, timer, head, stop, kill, resume, clone, delete, chat, export, evaluate, follow, failure, findings, tools, curves, log, samples_tab, written, files,
    ]  # fmt: skip
    still = [table_view, run_view, table_timer, sure_kill, sure_delete, settings, log_link]
    listed = [table_stamp, table, more]

    def draw(run: Run, x: str, smooth: float, log_axis: bool) -> str:
        if run.kind != "training":
            return ""
        stage = STAGES.get(run_facts(run)["stage"])
        return charts.charts(progress.curves(run), words, x, smooth, log_axis, stage.curves if stage else ())

    def now(run: Run, x: str, smooth: float, log_axis: bool) -> list[Any]:
        """What moves while a run goes on."""
        buttons = [
            gr.update(visible=what in run.can and (what != "clone" or run.kind == "training"))
            for what in ("stop", "kill", "resume", "clone", "delete")
        ]
        return [
            stamp_of(run), gr.Timer(active=not run.final), head_html(run, words), *buttons, gr.update(visible=can_chat(run)), *[gr.update(visible=result_of(run) is not None)] * 2,
            follow_update(run, words), failure_html(run, words), findings_html(run, words), gr.update(visible=run.kind == "training"),
            draw(run, x, smooth, log_axis), log_html(progress.log_tail(run), words),
            gr.update(visible=run.dir.samples.exists()), samples_html(samples.latest(run.dir), words),
            files_html(run, root, words),
        ]  # fmt: skip

    def to_table(text: str, count: str) -> list[Any]:
        """The table in place of a run."""
        resting = [gr.Timer(active=False) if component is timer else gr.skip() for component in moving]
        closed = [gr.update(visible=False)] * 2
        return [
            *resting, gr.update(visible=True), gr.update(visible=False), gr.Timer(active=True), *closed, gr.skip(), gr.skip(),
            *rows(text, count),
        ]  # fmt: skip

    def open(run_id: str, x: str, smooth: float, log_axis: bool, text: str, count: str) -> list[Any]:
        """The run with that id in full; the table if there is none."""
        if not run_id:
            return [gr.skip(), gr.skip(), *to_table(text, count)]
        try:
            run = runs.get(saves, run_id)
        except Refusal as refusal:
            return [notices.refused(refusal.problems, words), "", *to_table(text, count)]
        closed = [gr.update(visible=False)] * 2
        link = f'<a class="quiet" download href="{escape(address(run, "log.txt", root))}">{escape(words("log-whole"))}</a>'
        return [
            gr.skip(), gr.skip(), *now(run, x, smooth, log_axis),
            gr.update(visible=False), gr.update(visible=True), gr.Timer(active=False), *closed, settings_html(run, words), link,
            *[gr.skip()] * len(listed),
        ]  # fmt: skip

    def tick(run_id: str, known: str, x: str, smooth: float, log_axis: bool) -> list[Any]:
        """What has changed since `known`; nothing if nothing has."""
        try:
            run = runs.get(saves, run_id)
            return [gr.skip()] * len(moving) if stamp_of(run) == known else now(run, x, smooth, log_axis)
        except Refusal:
            return [gr.Timer(active=False) if component is timer else gr.skip() for component in moving]
        except FileNotFoundError:  # a file went away while it was looked at; the next look sees what is left
            return [gr.skip()] * len(moving)

    def redraw(run_id: str, x: str, smooth: float, log_axis: bool) -> Any:
        try:
            return draw(runs.get(saves, run_id), x, smooth, log_axis)
        except Refusal:
            return gr.skip()

    def rows(text: str, count: str) -> list[Any]:
        """The table, and whether there is more of it."""
        text = text or ""  # an untouched box holds nothing at all
        matching = [run for run in runs.find(saves) if matches(run, text)]
        shown_count = row_limit(count)
        html = table_html(matching[:shown_count], words, text)
        older = len(matching) - shown_count
        button = gr.update(visible=older > 0, value=words("runs-more", count=max(older, 0)))
        return [hashlib.sha1(html.encode()).hexdigest(), html, button]

    def table_tick(known: str, text: str, count: str) -> list[Any]:
        try:
            fresh = rows(text, count)
        except FileNotFoundError:  # a run was deleted while it was looked at
            return [gr.skip()] * len(listed)
        return [gr.skip()] * len(listed) if fresh[0] == known else fresh

    def more_rows(text: str, count: str) -> list[Any]:
        new_limit = str(row_limit(count) + TABLE_ROWS)
        return [new_limit, *rows(text, new_limit)]

    def run_action(act: Callable[[Run, str], None], done: str) -> Callable[..., list[Any]]:
        """A handler that asks engine for one thing, says how it went and shows the run as it is then."""

        def handler(request: gr.Request, run_id: str, *view: Any) -> list[Any]:
            try:
                act(runs.get(saves, run_id), user(request))
            except Refusal as refusal:
                return [notices.refused(refusal.problems, words), *open(run_id, *view)[1:]]
            return [notices.toast(words(done)), *open(run_id, *view)[1:]]

        return handler

    def deleted(request: gr.Request, run_id: str, *view: Any) -> list[Any]:
        try:
            runs.delete(runs.get(saves, run_id))
        except Refusal as refusal:
            return [notices.refused(refusal.problems, words), *open(run_id, *view)[1:]]
        return [notices.toast(words("told-delete")), "", *open("", *view)[2:]]

    view = [*look_at, search, limit]
    outputs = [message_html, selected, *moving, *still, *listed]
    timer.tick(tick, [selected, stamp, *look_at], moving, **QUIET)
    table_timer.tick(table_tick, [table_stamp, search, limit], listed, **QUIET)
    gr.on(
        [control.change for control in look_at],
        redraw,
        [selected, *look_at],
        curves,
        trigger_mode="always_last",
        **QUIET,
    )
    search.change(rows, [search, limit], listed, trigger_mode="always_last", **QUIET)
    more.click(more_rows, [search, limit], [limit, *listed], **QUIET)
    for html in (table, head):
        html.select(clicked_run, None, selected, **QUIET)

    show, hide = (lambda: gr.update(visible=True)), (lambda: gr.update(visible=False))
    for button, row in ((kill, sure_kill), (delete, sure_delete)):
        button.click(show, None, row, **QUIET)
    for button, row in ((no_kill, sure_kill), (no_delete, sure_delete)):
        button.click(hide, None, row, **QUIET)
    acts = [
        (stop, lambda run, by: runs.stop(run, "save", by), "told-stop"),
        (yes_kill, lambda run, by: runs.stop(run, "kill", by), "told-kill"),
        (resume, lambda run, by: runs.resume(run, by), "told-resume"),
    ]
    for button, act, done in acts:
        button.click(run_action(act, done), [selected, *view], outputs, **QUIET)
    yes_delete.click(deleted, [selected, *view], outputs, **QUIET)
    return RunsTab(open, view, outputs, [timer, table_timer], clone, compare, chat, export, evaluate, follow)


def can_chat(run: Run) -> bool:
    """Whether the run has left something that writes answers."""
    result = result_of(run)
    return result is not None and result.stage != "rm"


def status_htmls(run: Run, words: Words) -> tuple[str, str, str]:
    """How far the run is, its state, and why it failed, for a page of another tab."""
    return (
        _progress_html(run, progress.progress(run), words),
        state_html(run, words),
        failure_html(run, words),
    )


def findings_html(run: Run, words: Words) -> str:
    """What an evaluation has found, and the way to all of it; of a training what its probe says."""
    if probe_result := probe.read(run.dir):
        return probes.probe_html(probe_result, words)
    summary = report.summary(run.dir) if run.kind == "evaluation" else None
    if not summary:
        return ""
    link = f'<p><a class="load" href="{escape(reports.link(run.id))}">{escape(words("report-whole"))}</a></p>'
    return reports.summary(summary, words) + link


def follow_update(run: Run, words: Words) -> Any:
    """The stages that can go on from the run, if it has left something."""
    stages = possible_next_stages(run)
    named = [(words("follow-with", stage=words.choice("stage", stage)), stage) for stage in stages]
    return gr.update(choices=[(words("follow"), ""), *named], value="", visible=bool(stages))


def row_limit(count: str) -> int:
    """How many rows are wanted; the page's own number again if somebody else has written something else."""
    return min(int(count), 100_000) if count.isdecimal() and len(count) < 9 else TABLE_ROWS


def clicked_run(event: gr.EventData) -> str:
    """The id of the row that was clicked."""
    return str(event._data.get("run", ""))


# ------------------------------------------------------------------------------------------ what changed


def stamp_of(run: Run) -> str:
    """Changes when anything that the page shows of the run changes."""
    here = run.dir
    files = (
        here.progress, here.metrics, here.samples, here.log, here.exit, here.error, here.report, here.probe, run.path,
    )  # fmt: skip
    return f"{run.state} {queue.position(run)} {rundir.stamp(files)}"


# ------------------------------------------------------------------------------------------ the table


def run_facts(run: Run) -> dict[str, str]:
    """Words about the run for the table and the search; a spec that cannot be read leaves them empty."""
    model = Path(run.facts.base).name or run.id.split("/")[0]
    return {
        "title": run.title, "model": model, "stage": run.facts.stage, "method": run.facts.method, "data": ", ".join(run.facts.data),
    }  # fmt: skip


def kind_of(run: Run, facts: Mapping[str, str], words: Words) -> str:
    """Stage and method of a training; of another run, what it is."""
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


def table_html(table_runs: Sequence[Run], words: Words, text: str = "") -> str:
    if not table_runs:
        if text.strip():
            return f'<p class="empty">{escape(words("runs-no-match", text=text.strip()))}</p>'
        return f'<div class="empty"><b>{escape(words("runs-none"))}</b><p>{escape(words("runs-none-help"))}</p></div>'
    owners = any(run.by for run in table_runs)
    columns = ["state", "run", "stage", "data", *(["owner"] if owners else []), "when", "last", "curve"]
    head = "".join(f'<th class="c-{column}">{escape(words(f"column-{column}"))}</th>' for column in columns)
    body = "".join(_row(run, columns, words) for run in table_runs)
    return f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _row(run: Run, columns: Sequence[str], words: Words) -> str:
    facts, value = run_facts(run), run.facts.headline
    cells = {
        "state": state_html(run, words),
        "run": f'<a href="?run={quote(run.id)}">{escape(facts["title"])}</a><small>{escape(facts["model"])}</small>',
        "stage": escape(kind_of(run, facts, words)),
        "data": escape(facts["data"]),
        "owner": escape(run.by),
        "when": f'<time title="{moment(run.submitted)}">{escape(ago(run.submitted, words))}</time>',
        "last": ""
        if value is None
        else f"{charts.short(value)}<small>{escape(words(f'brief-{progress.headline_curve(run)}'))}</small>",
        "curve": charts.sparkline(progress.sparkline(run)),
    }
    return (
        f'<tr data-run="{escape(run.id)}">'
        + "".join(f'<td class="c-{column}">{cells[column]}</td>' for column in columns)
        + "</tr>"
    )


# ------------------------------------------------------------------------------------------ one run


def head_html(run: Run, words: Words) -> str:
    facts, now = run_facts(run), progress.progress(run)
    fields = {
        "fact-model": facts["model"], "fact-method": kind_of(run, facts, words), "fact-data": facts["data"], "fact-owner": run.by,
        "fact-submitted": moment(run.submitted),
    }  # fmt: skip
    rows = "".join(
        f"<div><dt>{escape(words(code))}</dt><dd>{escape(value)}</dd></div>"
        for code, value in fields.items()
        if value
    )
    return (
        f'<a class="back" href="?tab=runs" data-run="">← {escape(words("all-runs"))}</a>'
        f'<div class="run-title"><h1>{escape(facts["title"])}</h1><span class="badge">{state_html(run, words)}</span></div>'
        f"{_progress_html(run, now, words)}"
        f'<dl class="facts-row">{rows}</dl>'
    )


def _progress_html(run: Run, now: Any, words: Words) -> str:
    """Phase, bar and speed while it goes on; how long it took when it is over."""
    parts = []
    if run.state == "queued":
        parts.append(words("queue-position", position=queue.position(run)))
    elif not run.final:
        parts.append(words(f"phase-{now.phase}"))
    if now.total:
        unit = f"unit-{now.unit}" if words.knows(f"unit-{now.unit}") else "unit-other"
        write = size if now.unit == "B" else "{:,}".format
        parts.append(words(unit, done=write(now.done), total=write(now.total)))
    if now.fraction is not None and not run.final:
        parts.append(f"{now.fraction:.0%}")
    if (value := run.facts.headline) is not None:
        parts.append(f"{words(f'brief-{progress.headline_curve(run)}')} {charts.short(value)}")
    if now.tokens_per_s and not run.final:
        parts.append(words("speed", count=human(now.tokens_per_s)))
    if now.eta_s is not None and now.eta_s > 0:
        parts.append(words("eta", time=duration(now.eta_s, words)))
    if run.started and run.ended:
        parts.append(words("took", time=duration(run.ended - run.started, words)))
    wide = 100 * min(max(now.fraction or 0.0, 0.0), 1.0)
    unknown = " unknown" if now.fraction is None and not run.final and run.state != "queued" else ""
    bar = f'<div class="bar {escape(run.state)}{unknown}"><i style="width:{wide:.1f}%"></i></div>'
    return f'{bar}<p class="told">{" · ".join(f"<span>{escape(part)}</span>" for part in parts)}</p>'


def failure_html(run: Run, words: Words) -> str:
    """What happened, what to do, and the first traceback for those who want it."""
    why = explain(run)
    if not why:
        return ""
    advice, traceback = why.advice(words.language), ""
    if advice:
        advice = f"<p><b>{escape(words('what-to-do'))}</b> {_lines(advice)}</p>"
    if why.traceback:
        traceback = f"<details><summary>{escape(words('traceback'))}</summary><pre>{escape(why.traceback)}</pre></details>"
    return f'<div class="failure" role="alert"><p class="what">{_lines(why.what(words.language))}</p>{advice}{traceback}</div>'


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def log_html(text: str, words: Words) -> str:
    if not text:
        return f'<p class="quiet">{escape(words("log-none"))}</p>'
    return f'<div class="log-box" tabindex="0"><pre class="log">{escape(text)}</pre></div>'


def samples_html(latest_samples: Sequence[Mapping[str, Any]], words: Words) -> str:
    """The newest answers of the model, each with its question and what it scored."""
    if not latest_samples:
        return f'<p class="quiet">{escape(words("samples-none"))}</p>'
    heads = "".join(
        f"<th>{escape(words(f'samples-{column}'))}</th>" for column in ("step", "prompt", "answer", "reward")
    )
    body = "".join(
        f"<tr><td>{sample['step']:,}</td><td>{_lines(_prompt_text(sample['prompt']))}</td>"
        f"<td>{_lines(str(sample['completion'])) or _empty_html(words)}</td><td>{_reward_html(sample, words)}</td></tr>"
        for sample in latest_samples
    )
    return f'<table class="samples"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _empty_html(words: Words) -> str:
    return f'<i class="quiet">{escape(words("samples-empty"))}</i>'


def _prompt_text(prompt: Any) -> str:
    """The messages of a prompt; the roles are named where there is more than one."""
    if isinstance(prompt, str):
        return prompt
    messages = (
        [message for message in prompt if isinstance(message, dict)] if isinstance(prompt, list) else []
    )
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in messages)


def _reward_html(sample: Mapping[str, Any], words: Words) -> str:
    """The reward, and under it what it is made of."""
    parts = sample["rewards"] if isinstance(sample["rewards"], dict) else {}
    parts_text = " · ".join(
        f"{words.choice('stage.rewards', name)} {_number(value)}" for name, value in parts.items()
    )
    return f"{_number(sample['reward'])}<small>{escape(parts_text)}</small>"


def _number(value: Any) -> str:
    return charts.short(value) if isinstance(value, (int, float)) else "—"


def settings_html(run: Run, words: Words) -> str:
    try:
        return notices.code("run-yaml", run.spec.to_yaml(brief=True), words, save=True)
    except (Refusal, OSError) as error:
        problems: list[Problem] = getattr(error, "problems", [])
        return notices.listed(problems, words)


def files_html(run: Run, root: str, words: Words) -> str:
    """The run's files; each link leads to a route that asks engine whether it is one."""
    files = runs.files(run)
    if not files:
        return f'<p class="quiet">{escape(words("files-none"))}</p>'
    rows = "".join(
        f'<tr><td><a download href="{escape(address(run, name, root))}">{escape(name)}</a></td><td>{size(count)}</td></tr>'
        for name, count in files[:MAX_FILES_LISTED]
    )
    rest = (
        f'<p class="quiet">{escape(words("files-more", count=len(files) - MAX_FILES_LISTED))}</p>'
        if len(files) > MAX_FILES_LISTED
        else ""
    )
    heads = f"<th>{escape(words('file-name'))}</th><th>{escape(words('file-size'))}</th>"
    return f'<table class="files"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>{rest}'


def address(run: Run, name: str, root: str) -> str:
    """Where a file of the run is downloaded from."""
    return f"{root}/download/{quote(run.id)}/{quote(name)}"
