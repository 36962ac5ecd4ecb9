"""The Evaluate tab: what is measured on which rows, and what was found.

An evaluation is a run like others, with a state in its folder; so nothing is kept here but which one is open. A short
poll shows how far it is, and its report when there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from engine.core import rundir
from engine.core.problems import Refusal, problem
from engine.data import uploads
from engine.data.datasets import read_dataset_info
from engine.data.row_files import truncation_problem
from engine.evaluation import harness, report
from engine.evaluation.evaluation_spec import (
    EvaluationSpec,
    add_questions,
    fitting_datasets,
    frozen,
    model_part_of_base,
    trained_result,
)
from engine.launch.workspace import Workplace, is_inside
from engine.models.discovery import identity
from engine.runs import recent, runs
from engine.runs.results import Result, result_of, results, titles
from engine.runs.runs import Run
from webui import boxes, clicks, notices, reports
from webui.events import QUIET
from webui.words import Words

EVALUATION_POLL_SECONDS = 2  # between two looks at the open evaluation
MAX_EVALUATIONS_LISTED = 50  # evaluations in the list
MAX_RESULTS_MEASURED = 6  # measured together, at most


@dataclass(frozen=True)
class EvaluateTab:
    """The parts of the tab that the rest of the page is wired to."""

    opened: gr.Textbox  # the id of the open evaluation; "" = none
    timer: gr.Timer
    arrive: Callable[..., list[Any]]  # answers the choices and the open evaluation into `outputs`
    inputs: list[Any]  # what `arrive` is given
    outputs: list[Any]
    pick: Callable[[Run], tuple[str, list[str]]]  # the base and the results to evaluate a run
    form: list[Any]  # every control of the form
    fill: Callable[[EvaluationSpec], list[Any]]  # answers a spec into `form`


def build(
    words: Words,
    workplace: Workplace,
    root: str,
    message_html: gr.HTML,
    user: Callable[[gr.Request], str],
    models: Callable[[], list[tuple[str, str]]],
    progress_of: Callable[[Run], tuple[str, str, str]],
) -> EvaluateTab:
    """The tab in the current context. `models` lists what can be a base, as (label, folder); `progress_of` tells the
    progress, the state and the failure of a run as HTML."""
    saves, data = workplace.saves, workplace.data

    def box(what: str, value: str, **about: Any) -> gr.Textbox:
        called = {"label": words(f"evaluate-{what}"), "elem_id": f"evaluate-{what}"}
        return boxes.number(value, **called, **about)

    opened, stamp = (gr.Textbox(elem_classes="unseen", container=False) for _ in range(2))
    timer = gr.Timer(EVALUATION_POLL_SECONDS, active=False)
    with gr.Row(elem_classes="split data evaluate", equal_height=False):
        with (
            gr.Column(scale=4, min_width=300, elem_classes="shelf"),
            gr.Column(elem_classes="card evaluate-card"),
        ):
            about = {"elem_classes": "field", "interactive": True}
            base = gr.Dropdown(
                [],
                value=None,
                label=words("chat-base"),
                allow_custom_value=True,
                elem_id="evaluate-base",
                **about,
            )
            measured = gr.Dropdown(
                [], value=[], label=words("evaluate-results"), info=words("evaluate-results-help"), multiselect=True,
                max_choices=MAX_RESULTS_MEASURED, elem_id="evaluate-results", **about,
            )  # fmt: skip
            with_base = gr.Checkbox(True, label=words("evaluate-with-base"), elem_id="evaluate-with-base")
            sets = gr.Dropdown(
                [], value=[], label=words("evaluate-data"), info=words("evaluate-data-help"), multiselect=True,
                elem_id="evaluate-data", **about,
            )  # fmt: skip
            upload = gr.UploadButton(
                words("evaluate-upload"),
                type="filepath",
                size="sm",
                elem_id="evaluate-upload",
                file_types=None,
            )
            with gr.Column(elem_classes="grid grid-2"):
                most = box("rows", "200", info=words("evaluate-rows-help"))
                longest = box("longest", "256", info=words("evaluate-longest-help"))
            alone = gr.Checkbox(
                False,
                label=words("evaluate-alone"),
                info=words("evaluate-alone-help"),
                elem_id="evaluate-alone",
            )
            with gr.Accordion(words("tasks"), open=False, elem_classes="fold", elem_id="tasks-fold"):
                tasks = gr.Dropdown(
                    [], value=[], label=words("evaluate-tasks"), info=words("evaluate-tasks-help"), multiselect=True,
                    elem_id="evaluate-tasks", **about,
                )  # fmt: skip
                unfit = gr.HTML(elem_id="evaluate-unfit")
                with gr.Column(elem_classes="grid grid-2"):
                    shots = box("shots", "", info=words("evaluate-shots-help"))
                    limit = box("limit", "", info=words("evaluate-limit-help"))
                templated = gr.Checkbox(
                    True, label=words("evaluate-templated"), info=words("evaluate-templated-help"),
                    elem_id="evaluate-templated",
                )  # fmt: skip
            with gr.Accordion(words("more"), open=False, elem_classes="fold"):
                name = gr.Textbox(label=words("evaluate-name"), max_lines=1, **about)
                with gr.Column(elem_classes="grid grid-2"):
                    temperature = box("temperature", "0", info=words("evaluate-temperature-help"))
                    top_p = box("top-p", "1")
                with gr.Column(elem_classes="grid grid-2"):
                    seed = box("seed", "42")
                    batch = box("batch", "16")
            start = gr.Button(words("evaluate-start"), variant="primary", elem_id="evaluate-start")
            wrong = gr.HTML(elem_id="evaluate-wrong")
        with gr.Column(scale=9, min_width=420, elem_classes="one-set"):
            with gr.Accordion(words("reports"), open=True, elem_classes="fold", elem_id="reports-fold"):
                listing = gr.HTML(elem_id="reports", js_on_load=clicks.kept_rows_of("run"))
            nothing = gr.HTML(
                f'<div class="empty"><b>{escape(words("report-none"))}</b><p>{escape(words("report-none-help"))}</p></div>'
            )
            head = gr.HTML(elem_id="report-head")
            failure = gr.HTML()
            summary = gr.HTML(elem_id="report")
            with gr.Column(visible=False, elem_classes="report-rows-part") as part:
                with gr.Row(elem_classes="bar-row"):
                    order = gr.Dropdown(
                        [(words(f"order-{row_order}"), row_order) for row_order in report.ORDERS], value="asked", show_label=False,
                        container=False, elem_id="report-order", interactive=True, scale=0, min_width=170,
                        label=words("report-order"),
                    )  # fmt: skip
                    text = gr.Textbox(
                        placeholder=words("report-search"), show_label=False, container=False, max_lines=1,
                        elem_id="report-search", scale=1, label=words("report-search"),
                    )  # fmt: skip
                    back = gr.Button("‹", size="sm", scale=0, min_width=40, elem_id="report-back")
                    number = gr.Textbox(
                        "1", show_label=False, container=False, max_lines=1, scale=0, min_width=70,
                        elem_id="report-where", label=words("report-page"),
                    )  # fmt: skip
                    on = gr.Button("›", size="sm", scale=0, min_width=40, elem_id="report-on")
                    count = gr.HTML(elem_classes="report-count")
                shown_rows = gr.HTML(elem_id="report-rows")

    form = [
        base, measured, with_base, sets, most, longest, alone, name, temperature, top_p, seed, batch, tasks, shots, limit,
        templated,
    ]  # fmt: skip
    view = [order, text, number]
    turning = [number, count, shown_rows]
    open_parts = [stamp, timer, nothing, head, failure, summary, part, *turning]
    choices = [base, measured, with_base, sets, tasks, unfit]

    # ------------------------------------------------------------------------------------ what can be chosen

    def fits(result: Result, folder: str | None) -> bool:
        """Whether a result belongs to that base: made of it, whole or as an adapter."""
        return result.run.kind == "training" and identity(
            result.run.spec.model.model_name_or_path
        ) == identity(folder or "")

    def of_base(folder: str | None, chosen: Sequence[str] | None, names: Sequence[str] | None) -> list[Any]:
        """Results, those of the base first, and the sets that those which are chosen can be measured on."""
        known = [result for result in results(saves) if result.run.kind == "training"]
        known.sort(key=lambda result: not fits(result, folder))
        named = titles(known)
        labels = [
            (
                " · ".join(
                    [named[result.run.id], words.choice("stage", result.stage), *other_base(result, folder)]
                ),
                str(result.folder),
            )
            for result in known
        ]
        kept = [result for result in known if fits(result, folder) and str(result.folder) in (chosen or ())]
        are_reward_models = bool(kept) and all(result.stage == "rm" for result in kept)
        sets = fitting_datasets(read_dataset_info(data)[0], "pairs" if are_reward_models else "answers")
        return [
            gr.update(choices=labels, value=[str(result.folder) for result in kept]), gr.update(visible=not are_reward_models),
            gr.update(choices=sets, value=[name for name in names or () if name in sets]),
        ]  # fmt: skip

    def other_base(result: Result, folder: str | None) -> list[str]:
        return [] if fits(result, folder) else [Path(recent.base_named(result)).name]

    def of_result(folder: str | None, chosen: Sequence[str] | None, names: Sequence[str] | None) -> list[Any]:
        """A run that is chosen brings its base with it."""
        last = next(
            (result for result in results(saves) if str(result.folder) in list(chosen or ())[-1:]), None
        )
        if last and not fits(last, folder):
            folder = recent.matching_folder(recent.base_named(last), [value for _, value in models()])
        return [folder, *of_base(folder, chosen, names)]

    def of_tasks(chosen: Sequence[str] | None) -> list[Any]:
        """The tasks that can be run, and why the others cannot."""
        known = harness.tasks(data)
        sound = [task.name for task in known if not task.problem]
        kept = [name for name in chosen or () if name in sound]
        return [
            gr.update(choices=sound, value=kept),
            reports.task_notes(known, data / harness.TASKS_FOLDER, harness.installed(), words),
        ]

    def arrive(id: str, folder: str | None, chosen: Any, names: Any, jobs: Any, *view: Any) -> list[Any]:
        """The choices as they are now, and the open evaluation."""
        known = models()
        if not folder:
            folder, chosen = begin_with([value for _, value in known], chosen)
        return [
            gr.update(choices=known, value=folder), *of_base(folder, chosen, names), *of_tasks(jobs), list_html(id),
            *open(id, *view),
        ]  # fmt: skip

    def begin_with(folders: Sequence[str], chosen: Any) -> tuple[str | None, Any]:
        """The base and the results to begin with: those of the newest finished run, else the model used last."""
        bases = [folder for folder in folders if not is_inside(Path(folder), (saves,))]
        if newest := recent.newest_result(workplace, bases, lambda _: True):
            base, result = newest
            return base, chosen or [str(result.folder)]
        model = recent.first_model(workplace)
        return (str(model.path) if model else next(iter(folders), None)), chosen

    def received(request: gr.Request, path: str, chosen: Any, folder: Any, held: Any) -> list[Any]:
        """A file of questions as a data set, chosen at once."""
        try:
            file = uploads.receive(Path(path), Path(path).name, data)
            Path(path).unlink(missing_ok=True)
            made, broken = add_questions(data, file), truncation_problem(file)
        except Refusal as refusal:
            return [notices.refused(refusal.problems, words), gr.skip()]
        updated = of_base(folder, held, [*(chosen or ()), made])[-1]
        if broken:
            return [notices.refused([broken], words), updated]
        return [notices.toast(words("evaluate-uploaded", name=made)), updated]

    # ------------------------------------------------------------------------------------ start

    def spec_of(
        folder: Any, chosen: Any, base_too: bool, names: Any, rows: Any, tokens: Any, without: bool, title: str, heat: Any,
        share: Any, chance: Any, at_once: Any, jobs: Any, examples: Any, first: Any, chat: bool,
    ) -> EvaluationSpec:  # fmt: skip
        """What the controls say. The base is loaded as the run of the first result had it. Raises Refusal."""
        result = trained_result(chosen[0]) if chosen else None
        model = model_part_of_base(result).model_dump() if result else {}
        data = boxes.typed_values({"max_samples": rows, "seed": chance})
        if data.get("max_samples") == "0":
            data["max_samples"] = None
        generation = boxes.typed_values({
            "max_new_tokens": tokens, "temperature": heat, "top_p": share, "seed": chance, "batch_size": at_once,
        })  # fmt: skip
        harness_settings = boxes.typed_values({"num_fewshot": examples, "limit": first})
        return EvaluationSpec.read({
            "name": (title or "").strip(), "model": model | {"model_name_or_path": folder or ""},
            "with_base": bool(base_too), "results": list(chosen or ()),
            "data": data | {"datasets": list(names or ()), "without_references": bool(without)},
            "generation": generation,
            "harness": harness_settings | {"tasks": list(jobs or ()), "apply_chat_template": bool(chat)},
        })  # fmt: skip

    def started(request: gr.Request, order: str, text: str, *held: Any) -> list[Any]:
        try:
            run = runs.submit(spec_of(*held), workplace, by=user(request))
        except Refusal as refusal:
            listed = notices.listed(boxes.with_labels(refusal.problems, SETTING_LABELS, words), words)
            return [gr.skip(), gr.skip(), listed, *[gr.skip()] * (1 + len(open_parts))]
        return [
            notices.toast(words("started")),
            run.id,
            "",
            list_html(run.id),
            *open(run.id, order, text, "1"),
        ]

    # ------------------------------------------------------------------------------------ one evaluation

    def list_html(id: str) -> str:
        return reports.listed(runs.find(saves, "evaluation")[:MAX_EVALUATIONS_LISTED], id or "", words)

    def stamp_of(run: Run) -> str:
        return "|".join(
            [
                run.id,
                run.state,
                rundir.stamp((run.dir.progress, run.dir.exit, run.dir.report)),
            ]
        )

    def open(id: str, order: str, text: str, number: str) -> list[Any]:
        """One evaluation: how far it is, or what it found."""
        try:
            run = runs.get(saves, id) if id else None
            if run and run.kind != "evaluation":
                raise Refusal(problem("run-unknown", id=id))
        except Refusal:
            run = None
        if run is None:
            hidden = gr.update(visible=False)
            return ["", gr.Timer(active=False), gr.update(visible=True), "", "", "", hidden, "1", "", ""]
        bar, state, failed = progress_of(run)
        report_summary = report.summary(run.dir)
        report_html = reports.summary(report_summary, words) + downloads_html(run) if report_summary else ""
        return [
            stamp_of(run), gr.Timer(active=not run.final), gr.update(visible=False), reports.head(run, bar, state, words),
            failed, report_html, gr.update(visible=bool(report_summary and report_summary["measures"])), *turn(id, order, text, number),
        ]  # fmt: skip

    def downloads_html(run: Run) -> str:
        links = "".join(
            f'<a class="load" download href="{escape(f"{root}/download/{quote(run.id)}/report/{file}")}">'
            f"{escape(words('report-download', kind=file.rpartition('.')[2].upper()))}</a> "
            for file in report.files(run.dir)
        )
        return f'<p class="loads">{links}</p>'

    def turn(id: str, order: str, text: str, number: str) -> list[Any]:
        """A page of the rows."""
        try:
            run = runs.get(saves, id)
        except Refusal:
            return ["1", "", ""]
        report_summary = report.summary(run.dir)
        if not report_summary:
            return ["1", "", ""]
        page = report.page(run.dir, order, text or "", _page_number(number))
        count_text = words("report-pages", pages=page.pages, total=f"{page.total:,}")
        return [
            str(page.number),
            f'<p class="quiet">{escape(count_text)}</p>',
            reports.rows(page, report_summary["voices"], words),
        ]

    def step(by: int) -> Callable[..., list[Any]]:
        return lambda id, order, text, number: turn(id, order, text, str(_page_number(number) + by))

    def first(id: str, order: str, text: str) -> list[Any]:
        return turn(id, order, text, "1")

    def tick(id: str, known: str, *view: Any) -> list[Any]:
        try:
            run = runs.get(saves, id)
            if stamp_of(run) == known:
                return [gr.skip()] * (1 + len(open_parts))
            return [list_html(id), *open(id, *view)]
        except Refusal:
            return [gr.skip(), *open("", *view)]
        except FileNotFoundError:  # it went away while it was looked at
            return [gr.skip()] * (1 + len(open_parts))

    def picked(event: gr.EventData, *view: Any) -> list[Any]:
        id = str(event._data.get("run", ""))
        return [id, list_html(id), *open(id, view[0], view[1], "1")]

    base.input(of_base, [base, measured, sets], [measured, with_base, sets], **QUIET)
    measured.input(of_result, [base, measured, sets], [base, measured, with_base, sets], **QUIET)
    upload.upload(received, [upload, sets, base, measured], [message_html, sets], **QUIET)
    start.click(started, [order, text, *form], [message_html, opened, wrong, listing, *open_parts], **QUIET)
    listing.select(picked, view, [opened, listing, *open_parts], **QUIET)
    timer.tick(tick, [opened, stamp, *view], [listing, *open_parts], **QUIET)
    opened.change(lambda id: None, opened, None, js="(id) => { athanorReport(id); return [id]; }", **QUIET)
    gr.on(
        [order.change, text.change],
        first,
        [opened, order, text],
        turning,
        trigger_mode="always_last",
        **QUIET,
    )
    number.submit(turn, [opened, *view], turning, **QUIET)
    back.click(step(-1), [opened, *view], turning, **QUIET)
    on.click(step(1), [opened, *view], turning, **QUIET)

    def pick(run: Run) -> tuple[str, list[str]]:
        """Raises Refusal if the run has left nothing to measure."""
        result = result_of(run)
        if result is None:
            raise Refusal(problem("chat-no-result", id=run.id))
        if run.kind != "training":  # a whole model that was made of others
            return str(result.folder), []
        return run.spec.model.model_name_or_path, [str(result.folder)]

    def fill(spec: EvaluationSpec) -> list[Any]:
        """The form as a spec has it. Results that are not here are left out, and then the base itself is measured."""
        spec = frozen(spec, workplace)
        folder, writing = spec.model.model_name_or_path, spec.generation
        chosen, _, names = of_base(folder, spec.results, spec.data.datasets)
        values = [
            spec.data.max_samples or 0, writing.max_new_tokens, spec.data.without_references, spec.name, writing.temperature,
            writing.top_p, spec.data.seed, writing.batch_size,
        ]  # fmt: skip
        written = [value if isinstance(value, (bool, str)) else f"{value:g}" for value in values]
        harness_values = [spec.harness.num_fewshot, spec.harness.limit]
        return [
            gr.update(choices=models(), value=folder), chosen, gr.update(value=spec.with_base or not chosen["value"]), names,
            *written, of_tasks(spec.harness.tasks)[0], *("" if value is None else str(value) for value in harness_values),
            spec.harness.apply_chat_template,
        ]  # fmt: skip

    inputs = [opened, base, measured, sets, tasks, *view]
    return EvaluateTab(opened, timer, arrive, inputs, [*choices, listing, *open_parts], pick, form, fill)


def _page_number(number: str) -> int:
    number = str(number or "").strip()
    return int(number) if number.isdecimal() and len(number) < 9 else 1


# What a setting is called on this page. Its bounds are those of EvaluationSpec.
SETTING_LABELS = {
    "name": "evaluate-name", "data.max_samples": "evaluate-rows", "data.seed": "evaluate-seed",
    "generation.max_new_tokens": "evaluate-longest", "generation.temperature": "evaluate-temperature",
    "generation.top_p": "evaluate-top-p", "generation.seed": "evaluate-seed", "generation.batch_size": "evaluate-batch",
    "harness.num_fewshot": "evaluate-shots", "harness.limit": "evaluate-limit",
}  # fmt: skip
