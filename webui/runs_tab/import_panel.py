"""Finished trainings of LLaMA-Factory in the folders that the operator has named: which there are, and their import.

Nothing of it is on the page without such a folder, and the folders are read only when the part is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import gradio as gr

from engine.core.problems import Problem, Refusal, problem
from engine.importer.run_import import Candidate, candidates, import_run, unreadable
from engine.launch.workspace import is_inside
from engine.runs.run import Run
from webui import notices
from webui.events import QUIET, concurrent
from webui.numbers import ago
from webui.panels import Updates
from webui.people import acting, asking, hindrance
from webui.runs_tab.panel import Context, Panel


class ImportPanel(Panel):
    def __init__(self, context: Context):
        super().__init__(context)
        self.roots = context.workplace.import_from

    def layout(self) -> None:
        if not self.roots:
            return
        words = self.words
        with gr.Accordion(words("import-runs"), open=False, elem_classes="fold", elem_id="import-runs") as self.fold:
            gr.HTML(f'<p class="quiet">{escape(words("import-runs-help"))}</p>')
            self.chosen = gr.CheckboxGroup(
                [], label=words("import-runs-choose"), elem_id="import-runs-chosen", visible=False
            )
            with gr.Row(elem_classes="buttons"):
                self.go = gr.Button(
                    words("import-runs-go"), size="sm", scale=0, elem_id="import-runs-go", visible=False
                )
            self.report = gr.HTML(elem_id="import-runs-report")

    def wire(self) -> None:
        if not self.roots:
            return
        outputs = [self.chosen, self.go, self.report]
        self.fold.expand(self.look, None, outputs, **QUIET)
        self.go.click(self.bring, self.chosen, outputs, **concurrent("import-runs", 1))

    def look(self) -> Updates:
        """What is in the folders now."""
        return self._listed("")

    def bring(self, chosen: list[str] | None) -> Iterator[Updates]:
        """Import the chosen folders, the oldest first, and say after each what has become of it."""
        done: list[Run] = []
        refused: list[Problem] = []
        folders = list(reversed(chosen or []))  # the newest is the first in the list
        for number, folder in enumerate(folders, 1):
            yield {self.report: escape(self.words("import-runs-progress", number=number, count=len(folders)))}
            try:
                done.append(self._import(Path(folder)))
            except Refusal as refusal:
                refused += refusal.problems
            except OSError as error:
                refused.append(unreadable(Path(folder), error))
        yield self._listed(self._done(done, refused))

    def _import(self, folder: Path) -> Run:
        """Import one folder, which must be inside of those that the operator has named. Raises Refusal."""
        with acting(self.saves, "import", str(folder)):
            root = next((root for root in self.roots if is_inside(folder, (root,))), None)
            if root is None:
                raise Refusal(problem("import-run-not-listed", folder=folder))
            return import_run(folder, root, self.context.workplace, asking().name)[0]

    def _done(self, done: Sequence[Run], refused: Sequence[Problem]) -> str:
        links = "".join(f'<li><a href="?run={quote(run.id)}">{escape(run.title)}</a></li>' for run in done)
        text = escape(self.words("import-runs-done", count=len(done)))
        listed = notices.listed(refused, self.words) if refused else ""
        return (f'<p role="status">{text}</p><ul>{links}</ul>' if done else "") + listed

    def _listed(self, above: str) -> Updates:
        """The trainings to choose from, below what has just been done."""
        listed: list[tuple[Path, Candidate]] = []
        hindrances: list[Problem] = []
        for root in self.roots:
            try:
                listed += ((root, candidate) for candidate in candidates(root, self.saves))
            except Refusal as refusal:
                hindrances += refusal.problems
            except OSError as error:
                hindrances.append(unreadable(root, error))
        new = [(root, each) for root, each in listed if not each.run and not each.hindrance]
        choices = [(self._label(root, each), str(each.folder)) for root, each in new]
        known = sum(each.run is not None for _, each in listed)
        hindrances += [each.hindrance for _, each in listed if each.hindrance]
        allowed = hindrance("import")
        return {
            self.chosen: gr.update(choices=choices, value=[value for _, value in choices], visible=bool(choices)),
            self.go: gr.update(visible=bool(choices), interactive=allowed is None),
            self.report: above
            + self._rest(known, len(new), hindrances)
            + (notices.noted([allowed], self.words) if allowed else ""),
        }

    def _label(self, root: Path, candidate: Candidate) -> str:
        """The folder as seen from above `root`, its base model and its age."""
        folder = candidate.folder.relative_to(root.parent.resolve()).as_posix()
        parts = [folder, Path(candidate.base).name, ago(candidate.changed, self.words)]
        return " · ".join(filter(None, parts))

    def _rest(self, known: int, new: int, hindrances: Sequence[Problem]) -> str:
        """What is not offered, and why."""
        words = self.words
        lines = ""
        if not new and not known and not hindrances:
            lines = words("import-runs-none", folder=", ".join(map(str, self.roots)))
        elif known:
            lines = words("import-runs-some" if new else "import-runs-all", count=known)
        text = f'<p class="quiet">{escape(lines)}</p>' if lines else ""
        if hindrances:
            title = escape(words("import-runs-not", count=len(hindrances)))
            text += f"<details><summary>{title}</summary>{notices.noted(hindrances, words)}</details>"
        return text
