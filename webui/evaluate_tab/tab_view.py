"""Opening the tab: all lists and the open evaluation are refreshed."""

from __future__ import annotations

from collections.abc import Sequence

from gradio.blocks import Block

from webui.evaluate_tab.judge_panel import JudgePanel
from webui.evaluate_tab.models_panel import ModelsPanel
from webui.evaluate_tab.panel import Context, Panel
from webui.evaluate_tab.report_panel import ReportPanel
from webui.evaluate_tab.tasks_panel import TasksPanel
from webui.panels import Updates


class TabView(Panel):
    def __init__(
        self, context: Context, measured: ModelsPanel, tasks: TasksPanel, judge: JudgePanel, report: ReportPanel
    ):
        super().__init__(context)
        self.measured, self.tasks, self.judge, self.report = measured, tasks, judge, report

    @property
    def inputs(self) -> list[Block]:
        return [
            self.opened,
            self.measured.base,
            self.measured.results,
            self.measured.questions.datasets,
            self.tasks.tasks,
            *self.judge.lists,
            *self.report.rows.view,
        ]

    @property
    def outputs(self) -> list[Block]:
        return [
            *self.measured.inputs,
            self.measured.questions.datasets,
            self.tasks.tasks,
            self.tasks.unusable,
            *self.judge.lists,
            self.report.listing.html,
            *self.report.outputs,
        ]

    def arrive(
        self,
        run_id: str,
        id: str,
        base: str | None,
        folders: Sequence[str] | None,
        names: Sequence[str] | None,
        tasks: Sequence[str] | None,
        judge: str | None,
        ratings: Sequence[str] | None,
        order: str,
        text: str,
        number: str,
    ) -> Updates:
        """`run_id` is the open run, `id` the open evaluation; `folders` are those of the selected results, `names` the
        selected data sets. The form begins with what is open."""
        if not base:
            base, folders = self.models.of_open(run_id or id) or self.models.first(folders)
        return {
            **self.measured.show(base, folders, names),
            **self.tasks.show(tasks),
            **self.judge.show(judge, ratings),
            **self.report.listing.show(id),
            **self.report.open(id, order, text, number),
        }
