"""What the form would do, and what prevents it, with the button that starts it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core import kept_forms
from engine.core.problems import Problem, Refusal
from engine.data import preview_client
from engine.launch.workspace import Workplace
from engine.runs import quota_use, quotas, runs, standby
from engine.runs.plan import ALWAYS_CHOSEN, changed_settings, defaults_for, summary
from engine.spec.run_spec import SPEC_CHOICES, RunSpec, fields
from webui import clicks, notices
from webui.events import QUIET, on_settled, settled_trigger
from webui.form import kept
from webui.form.settings import RUN_NAME, setting_of
from webui.form.writing import control_values
from webui.panels import Updates
from webui.people import acting, asking, hindrance
from webui.train_tab import changed_html, model_html, plan_html, strategy_html
from webui.train_tab.panel import Context, Panel
from webui.train_tab.settings_panel import SettingsPanel

PACKAGE_POLL_SECONDS = 2  # between two checks of a package that is being tried


class SummaryPanel(Panel):
    def __init__(self, context: Context, settings: SettingsPanel):
        super().__init__(context)
        self.settings = settings
        self.trial_timer = gr.Timer(PACKAGE_POLL_SECONDS, active=False)

    def layout(self) -> None:
        words = self.words
        self.plan = gr.HTML(elem_id="summary", js_on_load=clicks.row_click_js("reset") + clicks.keep_folds_js("fold"))
        self.start = gr.Button(words("start"), variant="primary", size="lg", elem_id="start", elem_classes="acts")
        self.settled = settled_trigger("form-settled")
        self.looked = gr.Button(elem_id="looked", elem_classes="unseen")  # pressed by the page's script
        with gr.Accordion(words("command"), open=False, elem_classes="fold"):
            self.command = gr.HTML()
        with gr.Accordion(words("settings-yaml"), open=False, elem_classes="fold"):
            self.yaml = gr.HTML()

    def layout_of_marks(self) -> None:
        """A style sheet that marks fields."""
        self.marks = gr.HTML(elem_classes="marks")

    def wire(self) -> None:
        inputs = [self.settings.preset, *self.settings.inputs]
        keep = f"(...held) => athanorKeep({json.dumps(list(self.settings.form.controls))}, held)"
        on_settled(self.settled, self.look_and_keep, inputs, self.outputs, js=keep)
        # The result of a package trial is shown when it ends, whether or not anyone is typing.
        self.trial_timer.tick(self.look, inputs, self.outputs, **QUIET)
        outputs = [self.message, self.context.selected, *self.outputs]
        self.start.click(self.submit, inputs, outputs, **QUIET)
        self.looked.click(self.offer_standby, self.settings.inputs, None, **QUIET)
        # What the page shows of it follows, as for any other change.
        self.plan.select(self.reset, inputs, self.settings.inputs, **QUIET)

    @property
    def outputs(self) -> list[Block]:
        """The components that change with the values of the form."""
        facts = [self.settings.model_facts, self.settings.packages, self.settings.conversion.button]
        return [*facts, self.plan, self.marks, self.command, self.yaml, self.trial_timer]

    @property
    def filled(self) -> list[Block]:
        """The outputs of `fill`."""
        return [*self.settings.inputs, *self.outputs]

    def look(self, preset: Any, *held: Any) -> Updates:
        return self.of_spec(*self.settings.read(held), start=self.settings.start(preset))

    def look_and_keep(self, preset: Any, *held: Any) -> Updates:
        """The same when somebody has changed the form, which is kept for them. Without a login, their browser does."""
        if name := asking().name:
            kept_forms.keep(self.workplace.saves, name, kept.as_text(preset, self.settings.form.values(held)))
        return self.look(preset, *held)

    def reset(self, event: gr.EventData, preset: Any, *held: Any) -> Updates:
        """A setting as the preset has it; or all of them, except what everybody has to choose."""
        start, path = self.settings.start(preset), event._data.get("reset")
        if start is None:
            return gr.skip()
        if path == changed_html.ALL:
            values, paths = control_values(start), set(fields()) - {RUN_NAME, *ALWAYS_CHOSEN}
        else:
            spec = self.settings.read(held)[0]
            values, paths = control_values(start if path in SPEC_CHOICES else defaults_for(spec, start)), {path}
        controls = self.settings.form.controls.items()
        # A setting with weights has two controls.
        return {control: values[name] for name, control in controls if name.split(":")[0] in paths} or gr.skip()

    def fill(self, spec: RunSpec) -> Updates:
        """The form with the values of the spec, and its preview."""
        return self.settings.form.updates(spec) | self.of_spec(spec)

    def of_spec(self, spec: RunSpec, unreadable: Sequence[Problem] = (), start: RunSpec | None = None) -> Updates:
        """A preview of the spec; if something in the form is `unreadable`, the spec has a default instead. `start` is
        the spec that the form began with, if that is known."""
        words, plan = self.words, summary(spec, self.workplace)
        hidden = {setting_of(problem.field) for problem in unreadable}
        problems = [*unreadable] + [
            problem for problem in plan.problems if setting_of(problem.field) not in hidden or not problem.field
        ]
        changes = [change for change in changed_settings(spec, start) if change.path not in hidden] if start else []
        styles = model_html.disabled_choices_css(plan.unusable or {}, words)
        styles += model_html.hidden_parts_css(spec, self.workplace) + strategy_html.hidden_choices_css(spec)
        styles += strategy_html.disabled_choices_css(spec, words)
        return {
            self.settings.model_facts: model_html.model_facts(spec.model.model_name_or_path, self.workplace, words),
            self.settings.packages: model_html.unusable_packages(plan.unusable, words),
            self.plan: plan_html.plan(spec, plan, problems, words, known=not unreadable)
            + self._hours_left()
            + changed_html.changed(changes, words),
            self.marks: notices.marks(problems, words) + styles,
            self.command: notices.code("command-text", plan.shell, words),
            self.yaml: notices.code("yaml-text", plan.yaml, words, save=True),
            self.trial_timer: gr.Timer(active=plan.unusable is None),
        } | self.settings.conversion.offer(spec.model)

    def _hours_left(self) -> str:
        """How many GPU hours the person who is asking may still use; "" without a limit."""
        saves = self.workplace.saves
        try:
            left = quota_use.hours_left(saves, asking().name)
            return plan_html.hours_left(*left, quotas.read_quotas(saves).stops, self.words) if left else ""
        except Refusal:  # the file is wrong, as the start says
            return ""

    def offer_standby(self, request: gr.Request, *held: Any) -> None:
        """Somebody is looking at the form, which is ready: what a start has to wait for can be done now."""
        spec, problems = self.settings.read(held)
        if not problems and not hindrance("start") and standby.offer(spec, self.workplace, request.session_hash or ""):
            rows_refused_by_template(spec, self.workplace)  # remembered until the start

    def submit(self, request: gr.Request, preset: Any, *held: Any) -> Updates:
        spec, problems = self.settings.read(held)
        try:
            with acting(self.workplace.saves, "start", f"training {spec.name}".strip()):
                problems = problems or rows_refused_by_template(spec, self.workplace)
                if problems:
                    raise Refusal(problems)
                run = runs.submit(spec, self.workplace, by=self.context.user(request))
        except Refusal as refusal:
            # The summary lists them; the message only says that there are some.
            message = notices.toast(notices.counted(refusal.problems, self.words), "bad")
            return {self.message: message} | self.of_spec(spec, problems, self.settings.start(preset))
        return {self.message: notices.toast(self.words("started")), self.context.selected: run.id}


def rows_refused_by_template(spec: RunSpec, workplace: Workplace) -> list[Problem]:
    """Rows that the chat template would reject once the run has started. If they cannot be examined, the problems of
    the spec show why, or the run does."""
    try:
        spec = workplace.frozen(spec)
        return preview_client.first_rows(spec, Path(spec.data.dataset_dir))[0]
    except Refusal:
        return []
