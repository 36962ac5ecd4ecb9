"""The Train tab: a form that is a RunSpec, and beside it what that spec would do, with the button that does it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from engine import importer
from engine.core.problems import Problem, Refusal, problem
from engine.core.stages import STAGES
from engine.data import preview_client
from engine.data.datasets import Dataset, count_rows, read_dataset_info
from engine.data.soundness import flaw, sound_first
from engine.launch.workspace import DEMO_MODEL, Workplace, absolute_path, is_inside
from engine.models.discovery import SMOLLM2, hub_cache
from engine.models.facts import ModelFacts, inspect_model
from engine.models.trainable_modules import ALL_LINEAR, fully_trainable_modules, linear_modules
from engine.preflight.checks import QUANTIZER, optimizer_modules
from engine.runs import recent, runs
from engine.runs.compare import ABSENT, differences
from engine.runs.plan import Summary, first_preset, refitted, start_from, summary
from engine.runs.results import Result, results, titles
from engine.spec.run_spec import RunSpec, fields
from engine.spec.steps import examples_per_step
from webui import form, notices
from webui.events import QUIET
from webui.form import (
    ADAPTER,
    DATASET_NAMES,
    DATASETS,
    MODEL,
    RESULT_SETTINGS,
    SAVED_MODULES,
    TARGET_MODULES,
    Form,
    element_id,
)
from webui.numbers import human, size
from webui.words import Words

RUN_NAME = "name"
SETTINGS_WITH_LISTS = (
    MODEL,
    *DATASET_NAMES,
    *(path for path in RESULT_SETTINGS if path in fields()),
)  # choices: what is on disk
DATASET_CONTROLS = (DATASETS, f"{DATASETS}:weights")  # the controls of the chosen data sets
QUANTIZATION, OPTIMIZER = "model.quantization", "training.optim"
PACKAGE_POLL_SECONDS = 2  # between two looks at a package that is being tried
MAX_YAML_CHARACTERS = 256 * 1024  # characters; a spec is a few hundred


@dataclass(frozen=True)
class TrainTab:
    """The parts of the tab that the rest of the page is wired to."""

    inputs: list[Any]  # every control of the form
    read: Callable[[Sequence[Any]], RunSpec]  # what they hold as a spec; a default where one cannot be read
    filled: list[Any]  # what `fill` answers into: the form and its summary
    fill: Callable[[RunSpec], list[Any]]
    begins: list[Any]  # what `first` answers into: the message, the preset and `filled`
    first: Callable[[], list[Any]]  # answers what a page that is opened begins with
    lists: list[Any]  # what `choices` answers into: the controls that list models and data sets
    choices: Callable[[], list[Any]]
    start: gr.Button
    submit: Callable[..., list[Any]]  # answers into the message, the id of the run, and `outputs`
    outputs: list[Any]  # the summary and the marks
    other: gr.Textbox  # YAML of an evaluation or export that was pasted here; "" = none


def build(
    words: Words, workplace: Workplace, message_html: gr.HTML, user: Callable[[gr.Request], str]
) -> TrainTab:
    """The tab in the current context. `message_html` shows messages; `user` says who asks."""
    built_with = first_preset(workplace)
    controls = Form(words, start_from(workplace, built_with)[0])
    with gr.Row(elem_classes="split", equal_height=False):
        with gr.Column(scale=7, min_width=420, elem_classes="sheet"):
            preset = gr.Dropdown(
                [(settings["title"][words.language], name) for name, settings in workplace.presets().items()],
                label=words("preset"), info=words("preset-help"), value=built_with, elem_id="preset", elem_classes="field", interactive=True,
            )  # fmt: skip
            facts, tried = _essential_settings(controls, words)
            _other_settings(controls, words)
        with gr.Column(scale=4, min_width=300, elem_classes="side"), gr.Column(elem_classes="card"):
            controls.place(RUN_NAME)
            plan_view = gr.HTML(elem_id="summary")
            start = gr.Button(words("start"), variant="primary", size="lg", elem_id="start")
            with gr.Accordion(words("command"), open=False, elem_classes="fold"):
                command = gr.HTML()
            with gr.Accordion(words("settings-yaml"), open=False, elem_classes="fold"):
                yaml = gr.HTML()
            with gr.Accordion(words("load-settings"), open=False, elem_classes="fold"):
                paste = gr.Textbox(
                    label=words("load-paste"), lines=5, max_lines=12, elem_classes="mono", elem_id="paste"
                )
                with gr.Row(elem_classes="buttons"):
                    load = gr.Button(words("load"), size="sm")
                    file = gr.UploadButton(
                        words("load-file"),
                        file_types=[".yaml", ".yml", ".sh", ".bat", ".cmd", ".ps1", ".txt", ".json"],
                        type="binary",
                        size="sm",
                        elem_id="load-file",
                    )
                imported = gr.HTML(elem_id="imported")
                # YAML of an evaluation or an export that was pasted; the page takes it to its own tab.
                other = gr.Textbox(elem_classes="unseen", container=False)
            marks = gr.HTML(elem_classes="marks")
    trying = gr.Timer(PACKAGE_POLL_SECONDS, active=False)

    outputs = [facts, tried, plan_view, marks, command, yaml, trying]
    filled = [*controls.inputs, *outputs]

    def plan_updates(spec: RunSpec, unreadable: list[Problem]) -> list[Any]:
        plan = summary(spec, workplace)
        hidden = {form.setting_of(problem.field) for problem in unreadable}
        problems = unreadable + [
            problem
            for problem in plan.problems
            if form.setting_of(problem.field) not in hidden or not problem.field
        ]
        return [
            model_facts(spec.model.model_name_or_path, workplace, words),
            unusable_packages_html(plan.unusable, words),
            plan_html(spec, plan, problems, words, known=not unreadable),
            notices.marks(problems, words) + disabled_choices_css(plan.unusable or {}, words),
            notices.code("command-text", plan.shell, words),
            notices.code("yaml-text", plan.yaml, words, save=True),
            gr.Timer(active=plan.unusable is None),
        ]

    def look(*held: Any) -> list[Any]:
        return plan_updates(*form.read(controls.values(held)))

    def fill(spec: RunSpec) -> list[Any]:
        return [*controls.updates(spec), *plan_updates(spec, [])]

    def choices() -> list[Any]:
        """The models, data sets and results that there are now."""
        finished = results(workplace.saves)
        there = {path: result_choices(finished, path, words) for path in RESULT_SETTINGS}
        there[MODEL] = models_and_results(workplace, words)
        sets = dataset_choices(workplace, words)
        return [gr.update(choices=there.get(path, sets)) for path in SETTINGS_WITH_LISTS]

    def modules(name_or_path: str) -> list[Any]:
        """The modules of the chosen model: those that LoRA can target, and those that can be trained in full."""
        model = local_model(name_or_path, workplace)
        return [
            gr.update(choices=[ALL_LINEAR, *(linear_modules(model) if model else ())]),
            gr.update(choices=fully_trainable_modules(model) if model else []),
        ]

    def submit(request: gr.Request, *held: Any) -> list[Any]:
        spec, wrong = form.read(controls.values(held))
        try:
            wrong = wrong or rows_refused_by_template(spec, workplace)
            if wrong:
                raise Refusal(wrong)
            run = runs.submit(spec, workplace, by=user(request))
        except Refusal as refusal:
            # The card lists them; the message only says that there are some.
            return [
                notices.toast(notices.counted(refusal.problems, words), "bad"),
                gr.skip(),
                *plan_updates(spec, wrong),
            ]
        return [notices.toast(words("started")), run.id, *[gr.skip()] * len(outputs)]

    def fill_from(name: str, values: Callable[[RunSpec], list[Any]]) -> list[Any]:
        """The form as a preset fills it, after a word on what it could not take from the preset."""
        spec, note = start_from(workplace, name)
        message = notices.toast(notices.sentence(note, words)) if note else gr.skip()
        return [message, *values(spec), *plan_updates(spec, [])]

    def first() -> list[Any]:
        name = first_preset(workplace)
        message, *values = fill_from(name, controls.first)
        return [message, name, *values]

    def refit_datasets(*held: Any) -> list[Any]:
        """The data sets of a stage that has just been chosen."""
        spec, note = refitted(form.read(controls.values(held))[0], workplace)
        if not note:
            return [gr.skip()] * (1 + len(DATASET_CONTROLS))
        now = dict(zip(controls.controls, controls.updates(spec), strict=True))
        return [notices.toast(notices.sentence(note, words)), *(now[path] for path in DATASET_CONTROLS)]

    def from_preset(name: str) -> list[Any]:
        known = name in workplace.presets()
        return fill_from(name, controls.updates) if known else [gr.skip()] * (1 + len(filled))

    def context(name_or_path: str) -> int | None:
        model = local_model(name_or_path, workplace)
        return model.context_length if model else None

    def from_yaml(text: str) -> list[Any]:
        try:
            if len(text) > MAX_YAML_CHARACTERS:
                raise Refusal(problem("spec-too-long", "", limit=MAX_YAML_CHARACTERS))
            loaded = importer.read_any(text, context)
        except Refusal as refusal:
            listed = notices.listed(refusal.problems, words)
            return [notices.refused(refusal.problems, words), listed, "", *[gr.skip()] * len(filled)]
        notes = imported_html(loaded, words)
        if not isinstance(loaded.spec, RunSpec):
            message = notices.toast(words(f"loaded-{loaded.spec.kind}"))
            # The same pasted again is a change again.
            order = f"# {time.time_ns()}\n{loaded.spec.to_yaml()}"
            return [message, notes, order, *[gr.skip()] * len(filled)]
        message = words("loaded-with-notes", count=len(loaded.lost)) if loaded.lost else words("loaded")
        return [notices.toast(message), notes, "", *fill(loaded.spec)]

    def from_file(content: bytes) -> list[Any]:
        try:
            return from_yaml(importer.decoded(content))
        except Refusal:
            return [notices.toast(words("load-not-text"), "bad"), "", "", *[gr.skip()] * len(filled)]

    # Before `look`, which stands at the same event: the page makes the calls of an event one after the other, and an
    # overtaken call of `look` never ends.
    model, named = (
        controls.controls[MODEL],
        [controls.controls[path] for path in (TARGET_MODULES, SAVED_MODULES)],
    )
    model.change(modules, model, named, trigger_mode="always_last", **QUIET)
    # `change` and not `input`: a text box tells of typed letters by `input`, but not of pasting and deleting. The
    # script lets only the last of many changes through, so that a filled form is looked at once.
    gr.on(
        [control.change for control in controls.inputs], look, controls.inputs, outputs, trigger_mode="always_last",
        js="(...held) => athanorSettled(held)", **QUIET,
    )  # fmt: skip
    # A package that is being tried says what it is worth when the trial ends, whether or not anybody types meanwhile.
    trying.tick(look, controls.inputs, outputs, **QUIET)
    named_sets = [controls.controls[path] for path in DATASET_CONTROLS]
    controls.controls["stage"].input(refit_datasets, controls.inputs, [message_html, *named_sets], **QUIET)
    preset.input(from_preset, preset, [message_html, *filled], **QUIET)
    load.click(from_yaml, paste, [message_html, imported, other, *filled], **QUIET)
    file.upload(from_file, file, [message_html, imported, other, *filled], **QUIET)
    lists = [controls.controls[path] for path in SETTINGS_WITH_LISTS]

    def read(held: Sequence[Any]) -> RunSpec:
        return form.read(controls.values(held))[0]

    return TrainTab(
        controls.inputs, read, filled, fill, [message_html, preset, *filled], first, lists, choices, start, submit, outputs, other,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ layout


def _essential_settings(controls: Form, words: Words) -> tuple[gr.HTML, gr.HTML]:
    """The settings in plain view, one section for each part. Returns the line of facts under the model, and the place for
    what is wrong with the package that quantizes."""
    lines: dict[str, gr.HTML] = {}
    for part in RunSpec.model_fields:
        if not any(form.essential(path) and form.part_of(path) == part for path in fields()):
            continue
        with gr.Column(elem_classes="section"):
            gr.HTML(f"<h2>{escape(words.part(part))}</h2>")
            with gr.Column(elem_classes="grid grid-4"):
                for path in fields():
                    if form.essential(path) and form.part_of(path) == part:
                        controls.place(path)
                        if path in (MODEL, QUANTIZATION):
                            lines[path] = gr.HTML(elem_classes="facts")
    return lines[MODEL], lines[QUANTIZATION]


def _other_settings(controls: Form, words: Words) -> None:
    """Everything else, one collapsed group for each part."""
    rest = [path for path in form.paths() if path not in controls.controls and path != RUN_NAME]
    gr.HTML(f"<h2>{escape(words('section-other'))}</h2>", elem_classes="section-title")
    with gr.Column(elem_classes="folds"):
        for part in (
            name for name in RunSpec.model_fields if any(form.part_of(path) == name for path in rest)
        ):
            with (
                gr.Accordion(words.part(part), open=False, elem_id=form.part_id(part), elem_classes="fold"),
                gr.Column(elem_classes="grid grid-3"),
            ):
                for path in (path for path in rest if form.part_of(path) == part):
                    controls.place(path)


# ------------------------------------------------------------------------------------------ words and numbers


def model_choices(workplace: Workplace) -> list[tuple[str, str]]:
    return [(model.name, str(model.path)) for model in recent.models(workplace)]


def models_and_results(workplace: Workplace, words: Words) -> list[tuple[str, str]]:
    """Whole models: those of the model folders, and those that runs have made."""
    return model_choices(workplace) + result_choices(results(workplace.saves), MODEL, words)


def result_choices(finished: Sequence[Result], path: str, words: Words) -> list[tuple[str, str]]:
    """What finished runs left that can stand at `path`: adapters to go on from, reward models, or whole models."""
    fits: dict[str, Callable[[Result], bool]] = {
        ADAPTER: lambda result: result.adapter,
        MODEL: lambda result: not result.adapter and result.stage != "rm",
    }
    named = titles(finished)
    return [
        (
            f"{named[result.run.id]} · {words.choice('stage', result.stage)} · {result.run.id.split('/')[0]}",
            str(result.folder),
        )
        for result in finished
        if fits.get(path, lambda result: result.stage == "rm")(result)
    ]


def dataset_choices(workplace: Workplace, words: Words) -> list[tuple[str, str]]:
    """The data sets; those that cannot be read are called so and stand last."""
    return [
        (dataset_label(dataset, words), dataset.name)
        for dataset in sound_first(read_dataset_info(workplace.data)[0])
    ]


def dataset_label(dataset: Dataset, words: Words) -> str:
    if flaw(dataset):
        return words("broken-set", name=dataset.name)
    try:
        return words("rows-of", name=dataset.name, rows=f"{count_rows(dataset):,}")
    except Refusal:  # it is on a hub
        return dataset.name


def model_facts(name_or_path: str, workplace: Workplace, words: Words) -> str:
    """One line about the chosen model. A folder outside the model roots is not looked into."""
    if not name_or_path:
        return f'<p class="quiet">{escape(words("fact-none"))}</p>'
    model = local_model(name_or_path, workplace)
    if not model:
        return f'<p class="quiet">{escape(words("fact-hub"))}</p>'
    facts = [
        model.architecture or model.model_type,
        model.parameters and words("fact-parameters", count=human(model.parameters)),
        model.bytes and size(model.bytes),
        model.dtype,
        model.quantized,
        model.context_length and words("fact-context", tokens=f"{model.context_length:,}"),
        words("fact-template" if model.has_chat_template else "fact-no-template"),
    ]
    chips = "".join(f"<span>{escape(str(fact))}</span>" for fact in facts if fact)
    return f'<p class="chips">{chips}</p>{_more_models(model, workplace, words)}'


def _more_models(model: ModelFacts, workplace: Workplace, words: Words) -> str:
    """Below the demo model's facts: how to get a real one, as long as the small real one is not there."""
    if model.path != DEMO_MODEL or SMOLLM2.exists():
        return ""
    roots = next((str(root) for root in workplace.models if root not in (DEMO_MODEL, SMOLLM2)), "")
    return f'<p class="quiet">{escape(words("fact-demo", roots=roots))}</p>'


def unusable_packages_html(unusable: Mapping[str, Problem] | None, words: Words) -> str:
    """Why quantization, or an optimizer of bitsandbytes, cannot be chosen here; that it is being tried; or nothing."""
    if unusable is None:
        return f'<p class="quiet" role="status">{escape(words("bitsandbytes-tried"))}</p>'
    named: dict[str, list[str]] = {}  # one sentence for all that fail alike
    for check, error in unusable.items():
        sentence = notices.sentence(replace(error, values={**error.values, "what": "{what}"}), words)
        label = (
            words.choice(QUANTIZATION, check)
            if check in form.choices(QUANTIZATION)
            else words("optimizers-8bit")
        )
        named.setdefault(sentence, []).append(label)
    texts = (sentence.replace("{what}", " / ".join(names)) for sentence, names in named.items())
    return "".join(f'<p class="doubtful">{escape(text)}</p>' for text in texts)


def disabled_choices_css(unusable: Mapping[str, Problem], words: Words) -> str:
    """A style sheet that greys out the choices that cannot work here; whoever chooses one all the same is refused."""
    greyed = [
        f'#{element_id(QUANTIZATION)} label:has(input[value="{check}"])'
        for check in unusable
        if check in form.choices(QUANTIZATION)
    ]
    if "optimizer" in unusable:
        greyed += [
            f'#{element_id(OPTIMIZER)} li[aria-label="{words.choice(OPTIMIZER, name)}"]'
            for name in form.choices(OPTIMIZER)
            if QUANTIZER in optimizer_modules(name)
        ]
    return f"<style>{','.join(greyed)}{{opacity:.4;pointer-events:none}}</style>" if greyed else ""


def local_model(name_or_path: str, workplace: Workplace) -> ModelFacts | None:
    """The model that the text means, if it is a folder that the studio may look into."""
    folder = Path(absolute_path(name_or_path or "", workplace.model_roots, "config.json"))
    known = os.path.isfile(folder / "config.json") and is_inside(
        folder, (*workplace.model_roots, hub_cache())
    )
    return inspect_model(folder) if known else None


def imported_html(loaded: importer.Imported, words: Words) -> str:
    """What an import has left out or taken otherwise, and folded below it what was not needed; and a spec that is no training's,
    as a file to be submitted."""
    needless = [problem for problem in loaded.left_out if problem not in loaded.lost]
    html = notices.listed(loaded.lost, words) if loaded.lost else ""
    if needless:
        title = escape(words("loaded-needless", count=len(needless)))
        html += (
            f'<details class="needless"><summary>{title}</summary>{notices.listed(needless, words)}</details>'
        )
    if not isinstance(loaded.spec, RunSpec):
        help = escape(words(f"loaded-{loaded.spec.kind}-help"))
        yaml = notices.code("imported-yaml", loaded.spec.to_yaml(brief=True), words, save=True)
        html = f'<p class="quiet">{help}</p>{yaml}{html}'
    return html


def plan_html(spec: RunSpec, plan: Summary, problems: list[Problem], words: Words, known: bool) -> str:
    """The numbers of the plan, and what stands in its way."""

    def about(exact: bool) -> Callable[[int], str]:
        return "{:,}".format if exact else "≈ {:,}".format

    share = ""
    if plan.trainable and plan.parameters:
        share = words("stat-share", percent=f"{plan.trainable / plan.parameters:.2%}")
    stats = [
        ("stat-rows", plan.rows, about(plan.exact), ""),
        (
            "stat-answers" if STAGES[spec.stage.kind].answers else "stat-batch",
            examples_per_step(spec),
            "{:,}".format,
            "",
        ),
        ("stat-steps", plan.steps, about(plan.exact or bool(spec.training.max_steps)), ""),
        ("stat-trainable", plan.trainable, human, share),
    ]
    if plan.needed:
        of = words("stat-memory-of", there=size(plan.room.bytes)) if plan.room else ""
        stats.append(
            (
                "stat-memory" if plan.room and not plan.room.card else "stat-device-memory",
                plan.needed.total,
                size_about,
                of,
            )
        )
    cells = "".join(
        f"<div><dt>{escape(words(code))}</dt><dd>{escape(write(value)) if value is not None and known else '—'}"
        f"<small>{escape(note) if known else ''}</small></dd></div>"
        for code, value, write, note in stats
    )
    if problems:
        state = f'<p class="state wrong">{escape(notices.counted(problems, words))}</p>{notices.listed(problems, words)}'
    else:
        state = f'<p class="state right">{escape(words("ready"))}</p>{doubts_html(plan, words)}{memory_html(plan, spec, words)}'
    return (
        f'<h2>{escape(words("summary"))}</h2><dl class="stats">{cells}</dl>{state}{remarks_html(plan, words)}'
    )


def remarks_html(plan: Summary, words: Words) -> str:
    """What of the data is worth knowing before the start, though it keeps nobody from starting."""
    if not plan.remarks:
        return ""
    items = "".join(f"<li>{escape(notices.sentence(remark, words))}</li>" for remark in plan.remarks)
    heading = escape(words("remarks", count=len(plan.remarks)))
    return f'<details class="remarks" open><summary>{heading}</summary><ul>{items}</ul></details>'


def doubts_html(plan: Summary, words: Words) -> str:
    """What runs, and may not do what is expected of it."""
    return "".join(
        f'<p class="doubtful">{escape(notices.sentence(doubt, words))}</p>' for doubt in plan.doubts
    )


def size_about(count: float) -> str:
    return f"≈ {size(count)}"


def memory_html(plan: Summary, spec: RunSpec, words: Words) -> str:
    """What to change if the run may need more memory than there is. It is a guess, so it keeps nobody from starting."""
    if not plan.needed or not plan.room or plan.needed.total <= plan.room.bytes:
        return ""
    values = {"there": size(plan.room.bytes), "card": plan.room.card or words("memory-here")}
    if plan.fits is None:
        sentence = words("memory-too-large", **values)
    else:
        changes = [
            words(
                "memory-change",
                name=words.label(difference.path),
                value=words.value(difference.path, difference.values[1]),
            )
            for difference in differences([spec, plan.fits])
            if ABSENT not in difference.values
        ]
        sentence = words("memory-short", changes=words("memory-and").join(changes), **values)
    return f'<p class="doubtful">{escape(sentence)}</p>'


def rows_refused_by_template(spec: RunSpec, workplace: Workplace) -> list[Problem]:
    """Rows that the chat template would refuse once the run has been started. Where no look at them is possible, what is
    wrong with the spec says why, or the run does."""
    try:
        spec = workplace.frozen(spec)
        return preview_client.first_rows(spec, Path(spec.data.dataset_dir))[0]
    except Refusal:
        return []
