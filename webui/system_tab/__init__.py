"""The System tab: the GPUs and who uses them; what works on this machine, with fixes, like `python -m engine doctor`;
disk space that can be freed (`storage_panel`), like `python -m engine prune`; with a login, quotas (`people_panel`),
like `python -m engine quotas`; and what everybody has done (`audit_panel`), like `python -m engine audit`."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import chain
from pathlib import Path

import gradio as gr

from engine.launch.workspace import Workplace
from engine.preflight import machine
from engine.preflight.machine import Finding
from engine.runs import standby
from webui import gpus_html, notices
from webui.events import concurrent
from webui.gpus_panel import GpusPanel
from webui.panels import Panel, Updates
from webui.people import hindrance
from webui.system_tab.audit_panel import AuditPanel
from webui.system_tab.people_panel import PeoplePanel
from webui.system_tab.storage_panel import StoragePanel
from webui.words import Words

DOTS = {"good": "finished", "doubtful": "interrupted", "broken": "failed"}  # levels → dots as used for runs
MAX_REPORTS_AT_ONCE = 2  # each holds a thread and a child process with PyTorch


class ReportPanel(Panel):
    """The report, created on request."""

    def __init__(self, words: Words, workplace: Workplace):
        self.words, self.workplace = words, workplace

    def layout(self) -> None:
        words = self.words
        gr.HTML(f'<p class="lead">{escape(words("system-help"))}</p>')
        with gr.Row(elem_classes="buttons"):
            self.look = gr.Button(
                words("system-check"),
                variant="primary",
                size="sm",
                elem_id="system-check",
                scale=0,
                elem_classes="acts",
            )
            self.hub = gr.Checkbox(False, label=words("system-hub"), scale=0, min_width=280)
        self.report = gr.HTML(elem_id="system-report")

    def wire(self) -> None:
        self.look.click(self.check, self.hub, [self.report, self.look], **concurrent("system", MAX_REPORTS_AT_ONCE))

    def check(self, hub: bool) -> Iterator[Updates]:
        """The report as it grows; at its end also as text to copy."""
        if problem := hindrance("examine"):
            yield {self.report: notices.listed([problem], self.words)}
            return
        seen: list[Finding] = []
        try:
            for finding in chain(standby.findings(), machine.findings(self.workplace, hub=bool(hub))):
                seen.append(finding)
                yield {self.report: report_html(seen, self.words), self.look: gr.update(interactive=False)}
        except OSError as error:  # for example if no child can be started
            seen.append(Finding("broken", "machine-child-silent", {"why": error.strerror or error}))
        yield {self.report: report_html(seen, self.words, done=True), self.look: gr.update(interactive=True)}


def report_html(seen: list[Finding], words: Words, done: bool = False) -> str:
    """A line for each finding, with a dot for its level and the fix below it; at the end the counts, and the text to
    copy."""
    lines = "".join(_line(finding, words.language) for finding in seen)
    if not done:
        return f'<ul class="findings">{lines}</ul><p class="empty">{escape(words("system-looking"))}</p>'
    counts = {level: sum(finding.level == level for finding in seen) for level in DOTS}
    summary = f'<p class="lead"><b>{escape(words("system-counts", **counts))}</b></p>'
    text = notices.code("system-text", machine.as_text(seen, words.language), words, save=True)
    folded = f"<details><summary>{escape(words('system-text'))}</summary>{text}</details>"
    return f'{summary}<ul class="findings">{lines}</ul>{folded}'


def _line(finding: Finding, language: str) -> str:
    fix = finding.fix(language)
    below = f"<small>{escape(fix)}</small>" if fix else ""
    return (
        f'<li data-level="{finding.level}"><span class="dot {DOTS[finding.level]}"></span>'
        f"<div>{escape(finding.text(language))}{below}</div></li>"
    )


def build(words: Words, workplace: Workplace, message: gr.HTML, root: str, users_file: Path | None) -> GpusPanel:
    """The tab in the current context; without a login, there is no `users_file`. Returns its GPUs."""
    gpus = GpusPanel(words, gpus_html.table, "system-gpus")
    gr.HTML(f"<h3>{escape(words('gpus'))}</h3>")
    for panel in (gpus, ReportPanel(words, workplace), StoragePanel(words, workplace, message)):
        panel.layout()
        panel.wire()
    if users_file:
        people = PeoplePanel(words, workplace, users_file, root)
        people.layout()
        people.wire()
    record = AuditPanel(words, workplace)
    record.layout()
    record.wire()
    return gpus
