"""The Export tab: what finished runs have learned as a model, or an adapter, that other programs run.

An export is a run like any other, so nothing is kept here: the form becomes an ExportSpec, and the list below it is
read from the folders of the exports, in which `engine.worker.export` has left everything that is shown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from engine.core.problems import Problem, Refusal, problem
from engine.export import export_spec
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import Workplace
from engine.runs import publish, runs
from engine.runs.results import Result, new_export_spec, result_of, results, titles
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from webui import clicks, notices
from webui import exports as exports_html
from webui.events import QUIET, concurrent
from webui.numbers import moment, size
from webui.words import Words

EXPORT_POLL_SECONDS = 2  # between two looks at exports that are being made
MAX_CONCURRENT_UPLOADS = 2  # at once: each holds a thread
MAX_EXPORTS_LISTED = 12  # exports in the list
COMBINATION_FIELDS = ("weights", "combination", "density", "svd_rank")  # only where adapters are combined

USE_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-use], [data-retry]');
  if (button) trigger('select', button.dataset.use ? { run: button.dataset.use } : { retry: button.dataset.retry });
});
"""


@dataclass(frozen=True)
class ExportTab:
    """The parts of the tab that the rest of the page is wired to."""

    timer: gr.Timer
    arrive: Callable[..., list[Any]]  # answers what is chosen, and a run besides, into `outputs`
    inputs: list[Any]  # what `arrive` is given
    outputs: list[Any]
    exports: gr.HTML  # its `select` names an export that is wanted in the form
    filled: list[Any]  # what `fill` answers into
    fill: Callable[[ExportSpec], list[Any] | None]  # None: of the adapters, none is the result of a run here
    use: Callable[[str, RunSpec], RunSpec]  # the id of an export and what the form holds → what it is to hold


def build(
    words: Words, workplace: Workplace, root: str, message_html: gr.HTML, user: Callable[[gr.Request], str]
) -> ExportTab:
    """The tab in the current context. `message_html` shows messages; `user` says who asks."""
    saves = workplace.saves
    timer = gr.Timer(EXPORT_POLL_SECONDS, active=False)
    stamp = gr.Textbox(elem_classes="unseen", container=False)
    with gr.Row(elem_classes="split", equal_height=False):
        with gr.Column(scale=7, min_width=420, elem_classes="sheet export-form"):
            with gr.Column(elem_classes="section grid grid-3"):
                chosen = gr.Dropdown(
                    [], value=[], multiselect=True, label=words("export-runs"), info=words("export-runs-help"),
                    elem_id="export-runs", elem_classes="field", interactive=True,
                )  # fmt: skip
                weights = gr.Textbox(
                    label=words("export-weights"), info=words("export-weights-help"), max_lines=1, visible=False,
                    elem_id="export-weights", elem_classes="field",
                )  # fmt: skip
                combination = _choice("combination", words, visible=False)
                form = gr.Radio(
                    _choices("form", words), value="merged", label=words.of_export("form", "label"),
                    info=words.of_export("form", "help"), elem_id="export-form", elem_classes="field field-union",
                )  # fmt: skip
                precision, quantize, gguf = (
                    _choice(name, words) for name in ("precision", "quantize", "gguf")
                )
            with (
                gr.Column(elem_classes="folds"),
                gr.Accordion(words("section-other"), open=False, elem_classes="fold", elem_id="export-more"),
                gr.Column(elem_classes="grid grid-3"),
            ):
                shard = _text("shard_gb", words)
                license = _text("license", words)
                device = gr.Dropdown(
                    [(words.choice("hardware.device", kind), kind) for kind in ("auto", "cuda", "cpu")], value="auto",
                    label=words.label("hardware.device"), info=words.help("hardware.device"), elem_id="export-device",
                    elem_classes="field field-choice",
                )  # fmt: skip
                check = _text("check_prompts", words)
                density = _text("density", words, visible=False)
                svd_rank = _text("svd_rank", words, visible=False)
                prompts = _text("prompts", words, lines=3, help=words("export-prompts-help"))
                remark = _text("remark", words, lines=2)
        with gr.Column(scale=4, min_width=300, elem_classes="side"), gr.Column(elem_classes="card"):
            name = _text("name", words)
            plan_view = gr.HTML(elem_id="export-card")
            start = gr.Button(words("export-start"), variant="primary", size="lg", elem_id="export-start")
    exports = gr.HTML(js_on_load=USE_JS + clicks.keep_folds_js("export"), elem_id="exports")
    with (
        gr.Column(elem_classes="folds", visible=False) as upload_view,
        gr.Accordion(words("upload-hub"), open=False, elem_classes="fold", elem_id="upload-hub"),
    ):
        gr.HTML(f'<p class="quiet">{escape(words("publish-help"))}</p>')
        with gr.Column(elem_classes="grid grid-3"):
            which = gr.Dropdown(
                [], value=None, label=words("upload-which"), elem_id="upload-which", elem_classes="field field-choice",
                interactive=True,
            )  # fmt: skip
            repo = gr.Textbox(
                label=words("upload-repo"), placeholder="owner/name", max_lines=1, elem_id="upload-repo",
                elem_classes="field field-number",
            )  # fmt: skip
            token = gr.Textbox(
                label=words("upload-token"), type="password", max_lines=1, elem_id="upload-token",
                elem_classes="field field-number",
            )  # fmt: skip
            private = gr.Checkbox(True, label=words("upload-private"), elem_id="upload-private")
        with gr.Row(elem_classes="buttons"):
            upload = gr.Button(words("upload-start"), size="sm", elem_id="upload-start")
        uploaded = gr.HTML(elem_id="uploaded")

    controls = {
        "runs": chosen, "weights": weights, "combination": combination, "form": form, "precision": precision,
        "quantize": quantize, "license": license, "shard_gb": shard, "gguf": gguf, "device": device,
        "check_prompts": check, "density": density, "svd_rank": svd_rank, "prompts": prompts, "remark": remark,
        "name": name,
    }  # fmt: skip
    inputs = list(controls.values())
    changing = [plan_view, *(controls[field] for field in COMBINATION_FIELDS)]

    def spec_of(held: Sequence[Any]) -> ExportSpec:
        """Raises Refusal with everything that cannot be read."""
        return read(dict(zip(controls, held, strict=True)), workplace)

    def look(*held: Any) -> list[Any]:
        """What the export would do, and the settings that apply."""
        several = len(held[0] or ()) > 1
        visible = [gr.update(visible=several)] * len(COMBINATION_FIELDS)
        if not held[0]:
            return [plan_html(None, [], words), *visible]
        try:
            spec = export_spec.frozen(spec_of(held), workplace)
            return [plan_html(spec, export_spec.problems(spec, workplace, wait=False), words), *visible]
        except Refusal as refusal:
            return [plan_html(None, refusal.problems, words), *visible]

    def listed() -> list[Any]:
        """The exports as they are now, and whether there is something to wait for."""
        export_runs = runs.find(saves, ExportSpec.kind)[:MAX_EXPORTS_LISTED]
        html = exports_html.list_html(export_runs, root, words)
        waiting = any(not run.final for run in export_runs)
        done = [
            (f"{run.title} · {moment(run.submitted)}", run.id)
            for run in export_runs
            if run.final and run.dir.result()
        ]
        stamp = hashlib.sha1(html.encode()).hexdigest()
        return [stamp, html, gr.Timer(active=waiting), gr.update(visible=bool(done)), gr.update(choices=done)]

    def arrive(*held: Any) -> list[Any]:
        finished = results(saves)
        named = titles(finished)
        known = [(result_label(result, named[result.run.id], words), result.run.id) for result in finished]
        ids = [id for id in held[0] or () if id in {id for _, id in known}]
        return [gr.update(choices=known, value=ids), *look(ids, *held[1:]), *listed()]

    def fill(spec: ExportSpec) -> list[Any] | None:
        """The form as a spec has it, if its adapters are results of runs here, which is what this tab exports."""
        spec, finished = export_spec.frozen(spec, workplace), results(saves)
        ids = [result.run.id for result in finished if str(result.folder) in spec.adapters]
        if not ids or len(ids) < len(spec.adapters):
            return None
        named = titles(finished)
        known = [(result_label(result, named[result.run.id], words), result.run.id) for result in finished]
        return [
            gr.update(choices=known, value=ids), spec.form, spec.precision, f"{spec.shard_gb:g}", spec.hardware.device,
            spec.name,
        ]  # fmt: skip

    def begun(request: gr.Request, *held: Any) -> list[Any]:
        try:
            runs.submit(spec_of(held), workplace, by=user(request))
        except Refusal as refusal:
            return [notices.toast(notices.counted(refusal.problems, words), "bad"), *look(*held), *listed()]
        return [notices.toast(words("started")), *look(*held), *listed()]

    def tick(known: str) -> list[Any]:
        try:
            fresh = listed()
        except FileNotFoundError:  # a file went away while it was looked at; the next look sees what is left
            return [gr.skip()] * len(seen)
        return [gr.skip()] * len(seen) if fresh[0] == known else fresh

    def again(request: gr.Request, event: gr.EventData) -> list[Any]:
        """Try once more the one step of an export that failed. A click on another button is not for this one."""
        id = event._data.get("retry")
        if not id:
            return [gr.skip()] * (1 + len(seen))
        try:
            runs.resume(runs.get(saves, str(id)), by=user(request))
        except Refusal as refusal:
            return [notices.refused(refusal.problems, words), *listed()]
        return [notices.toast(words("started")), *listed()]

    def use(id: str, spec: RunSpec) -> RunSpec:
        return with_export(runs.get(saves, id), spec)

    def send(
        request: gr.Request, id: str | None, repo: str, secret: str, private: bool
    ) -> Iterator[list[Any]]:
        """Upload an export. The token leaves the page with the click, and its box is empty at once."""
        yield [
            f'<p class="told">{escape(words("uploading", repo=repo or ""))}</p>',
            "",
            gr.update(interactive=False),
        ]
        try:
            published = publish.publish(
                runs.get(saves, id or ""), repo or "", secret or "", private=bool(private), by=user(request)
            )
            status_html = f'<p class="state right">{escape(words("uploaded", url=published["url"]))}</p>'
        except Refusal as refusal:
            status_html = notices.listed(refusal.problems, words)
        yield [status_html, "", gr.update(interactive=True)]

    seen = [stamp, exports, timer, upload_view, which]
    gr.on(
        [control.change for control in inputs], look, inputs, changing, trigger_mode="always_last",
        js="(...held) => athanorSettled(held)", **QUIET,
    )  # fmt: skip
    start.click(begun, inputs, [message_html, *changing, *seen], **QUIET)
    exports.select(again, None, [message_html, *seen], **QUIET)
    timer.tick(tick, stamp, seen, **QUIET)
    upload.click(
        send,
        [which, repo, token, private],
        [uploaded, token, upload],
        **concurrent("uploads", MAX_CONCURRENT_UPLOADS),
    )
    return ExportTab(
        timer,
        arrive,
        inputs,
        [chosen, *changing, *seen],
        exports,
        [chosen, form, precision, shard, device, name],
        fill,
        use,
    )


# ------------------------------------------------------------------------------------------ controls


def _choices(name: str, words: Words) -> list[tuple[str, str]]:
    values = get_args(ExportSpec.model_fields[name].annotation)
    return [(words.export_choice(name, value), value) for value in values]


def _attributes(name: str, words: Words) -> dict[str, Any]:
    return {
        "label": words.of_export(name, "label"),
        "info": words.of_export(name, "help"),
        "elem_id": f"export-{name}",
    }


def _choice(name: str, words: Words, visible: bool = True) -> gr.Dropdown:
    value = ExportSpec.model_fields[name].default
    return gr.Dropdown(
        _choices(name, words), value=value, elem_classes="field field-choice", visible=visible, interactive=True,
        **_attributes(name, words),
    )  # fmt: skip


def _text(name: str, words: Words, lines: int = 1, visible: bool = True, help: str = "") -> gr.Textbox:
    default = ExportSpec.model_fields[name].get_default(call_default_factory=True)
    about = _attributes(name, words) | ({"info": help} if help else {})
    shown = "" if default in (None, []) else f"{default:g}" if isinstance(default, (int, float)) else default
    kind = "field field-number" if isinstance(default, (int, float)) or default is None else "field"
    return gr.Textbox(
        shown, lines=lines, max_lines=max(lines, 1) * 4 if lines > 1 else 1, elem_classes=kind, visible=visible, **about
    )  # fmt: skip


def read(held: Mapping[str, Any], workplace: Workplace) -> ExportSpec:
    """The spec that the controls say. Raises Refusal."""
    ids = list(held["runs"] or ())
    plain = {
        name: held[name].strip() if isinstance(held[name], str) else held[name]
        for name in held
        if name not in ("runs", "weights", "device", "prompts") and held[name] is not None
    }
    plain["svd_rank"] = plain.get("svd_rank") or None
    plain["prompts"] = [line for line in str(held["prompts"] or "").splitlines() if line.strip()]
    plain["hardware"] = {"device": held["device"]}
    return new_export_spec(workplace, _weights(str(held["weights"] or ""), ids), **plain)


def _weights(text: str, ids: Sequence[str]) -> dict[str, float]:
    """One number for each run, in their order; 1 for those that have none. Raises Refusal."""
    typed = [part for part in re.split(r"[,，;；\s]+", text.strip()) if part] if len(ids) > 1 else []
    try:
        numbers = [float(part) for part in typed]
    except ValueError as error:
        raise Refusal(problem("spec-type-float", "adapters.weights", given=text[:60])) from error
    if len(numbers) > len(ids):
        raise Refusal(problem("export-weights-many", "adapters", given=len(numbers), runs=len(ids)))
    return dict(zip(ids, [*numbers, *[1.0] * (len(ids) - len(numbers))], strict=True))


def result_label(result: Result, title: str, words: Words) -> str:
    kind = words("export-kind-adapter" if result.adapter else "export-kind-model")
    return f"{title} · {words.choice('stage', result.stage)} · {kind} · {result.run.id.split('/')[0]}"


def with_export(run: Run, spec: RunSpec) -> RunSpec:
    """What the form holds, with an export in place of its model; LoRA alone goes on its base. Raises Refusal."""
    result = result_of(run)
    if result is None:
        raise Refusal(problem("export-no-result", id=run.id))
    base = str(run.spec.model.model_name_or_path if result.adapter else result.folder)
    adapter = str(result.folder) if result.adapter else None
    spec = spec.change("model.model_name_or_path", base).change("model.adapter_path", adapter)
    return spec.change("model.chat_template", None).change("model.quantization", {"kind": "none"})


# ------------------------------------------------------------------------------------------ what it would do


def plan_html(spec: ExportSpec | None, problems: Sequence[Problem], words: Words) -> str:
    """What the chosen export needs, and what stands in its way."""
    title = f"<h2>{escape(words('export-summary'))}</h2>"
    if spec is None and not problems:
        return f'{title}<p class="quiet">{escape(words("export-choose"))}</p>'
    stats = ""
    if spec:
        base = Path(spec.model.model_name_or_path).name
        cells = [
            ("export-base", base), ("export-precision-stat", spec.precision),
            ("export-disk", size(export_spec.disk_needed(spec))), ("export-prompts-stat", str(spec.check_prompts + len(spec.prompts))),
        ]  # fmt: skip
        stats = "".join(
            f"<div><dt>{escape(words(code))}</dt><dd>{escape(value)}</dd></div>" for code, value in cells
        )
        stats = f'<dl class="stats small">{stats}</dl>'
    if problems:
        count = escape(notices.counted(problems, words))
        state = f'<p class="state wrong">{count}</p>{notices.listed([_with_label(problem, words) for problem in problems], words)}'
    else:
        state = f'<p class="state right">{escape(words("ready"))}</p>'
    return title + stats + state


def _with_label(problem: Problem, words: Words) -> Problem:
    """The problem with its field called as on this page: the links of others lead to the form of a training."""
    name, _, inner = problem.field.partition(".")
    if name == "adapters" and inner:
        return replace(problem, field=words("export-weights"))
    label = (
        words.of_export(name, "label")
        if name in ExportSpec.model_fields and name not in ("model", "hardware")
        else ""
    )
    return replace(problem, field=label)
