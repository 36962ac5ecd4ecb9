"""The models that one can chat with: bases, their adapters, and the servers that have loaded them.

Nothing is cached: everything is read from the folders of the runs and of the servers.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.core.problems import Refusal
from engine.launch.workspace import Workplace
from engine.models.discovery import identity
from engine.models.facts import chat_template
from engine.models.processor_files import has_image_processor
from engine.runs import recent, results
from engine.runs.results import Result
from engine.runs.runs import Run
from engine.serving import servers
from engine.serving.server import Server
from engine.serving.servers import Choice
from engine.serving.vllm import ENGINES
from webui.words import Words

MAX_ADAPTERS_ASKED = 15  # answer at once, besides the base
THINKING_VARIABLE = "enable_thinking"  # the name of the switch in templates of reasoning models
TOOLS_VARIABLE = "tools"  # the name of the tools in templates


class ModelSelection(NamedTuple):
    """The models that a user has selected: the folder of a base, ids of runs and their checkpoints, and the inference
    engine."""

    base: str | None
    run_ids: Sequence[str] | None = None
    engine: str = ENGINES[0]


@dataclass(frozen=True)
class ChatModels:
    """`bases` lists the possible bases as (label, folder)."""

    words: Words
    workplace: Workplace
    bases: Callable[[], list[tuple[str, str]]]

    def choice(self, selection: ModelSelection) -> Choice:
        """The selection as `engine.serving.servers` takes it. Raises Refusal if these models cannot be served."""
        ids = list(selection.run_ids or ())[:MAX_ADAPTERS_ASKED]
        return servers.choose(self.workplace, selection.base or "", ids, selection.engine or ENGINES[0])

    def server(self, selection: ModelSelection) -> Server | None:
        """The server of the selected base, whichever engine it was started with; None if there is none."""
        try:
            return servers.find(self.workplace.saves, self.choice(selection._replace(engine=ENGINES[0])))
        except Refusal:
            return None

    def titles(self, selection: ModelSelection | None = None) -> dict[str, str]:
        """The title of each served model by its id: the name of a run; the selected base is marked as the base."""
        titles = results.titles(results.results(self.workplace.saves))
        try:
            base = self.choice(selection).name if selection else None
        except Refusal:
            base = None
        for id in selection.run_ids or () if selection else ():
            match = results.CHECKPOINT_ID.fullmatch(id)
            if match and match[1] in titles:
                titles[id] = self.words("chat-checkpoint", name=titles[match[1]], step=match[2])
        return titles | ({base: self.words("chat-base-named", name=titles.get(base, base))} if base else {})

    # ---- adapters and reward models

    def every_adapter(self) -> list[Result]:
        """The adapters of finished runs on any base, reward models excepted."""
        known = results.results(self.workplace.saves)
        return [result for result in known if result.adapter and result.stage != "rm"]

    def adapters_of(self, base: str | None) -> list[Result]:
        identity_of = functools.cache(identity)  # thousands of runs have a few bases
        return [result for result in self.every_adapter() if identity_of(_base_path(result)) == identity_of(base or "")]

    def selected_adapters(self, selection: ModelSelection) -> list[Result]:
        """The selected adapters that belong to the selected base."""
        ids = set(selection.run_ids or ())
        fitting = self.adapters_of(selection.base)
        return [result for run in fitting for result in (run, *self._checkpoints(run, ids)) if result.id in ids]

    def _checkpoints(self, result: Result, ids: Collection[str]) -> list[Result]:
        """The checkpoints of a run, if it or one of them is among the `ids`; those of all would be too many."""
        of_it = any(id == result.id or id.startswith(f"{result.id}/") for id in ids)
        return results.checkpoints_of(result.run) if of_it else []

    def adapter_choices(self, selection: ModelSelection) -> list[tuple[str, str]]:
        """Every adapter as (label, id): those of the selected base first, with the checkpoints of selected runs; the
        labels of the others name their base."""
        titles, fitting = self.titles(), self.adapters_of(selection.base)
        fitting_ids, ids = {result.run.id for result in fitting}, set(selection.run_ids or ())

        def label(result: Result) -> str:
            title = titles[result.run.id]
            if result.step is not None:
                return self.words("chat-checkpoint", name=title, step=result.step)
            return f"{title} · {self.words.choice('stage', result.stage)}"

        others = [result for result in self.every_adapter() if result.run.id not in fitting_ids]
        own = [result for run in fitting for result in (run, *self._checkpoints(run, ids))]
        return [(label(result), result.id) for result in own] + [
            (f"{label(result)} · {Path(_base_path(result)).name}", result.run.id) for result in others
        ]

    def reward_model_choices(self) -> list[tuple[str, str]]:
        """The reward models as (label, id of its run)."""
        titles = self.titles()
        return [(titles[result.run.id], result.run.id) for result in servers.reward_models(self.workplace.saves)]

    # ---- selections

    def first(self, engine: str) -> ModelSelection:
        """The default: the newest finished run with its base, or the default model if there is none."""
        folders = [folder for _, folder in self.bases()]
        newest = recent.newest_result(self.workplace, folders, lambda result: result.stage != "rm")
        if newest:
            base, result = newest
            return ModelSelection(base, [result.run.id] if result.adapter else [], engine)
        model = recent.first_model(self.workplace)
        return ModelSelection(str(model.path) if model else next(iter(folders), None), [], engine)

    def with_base_of_last(self, selection: ModelSelection) -> ModelSelection:
        """The selection with the base changed to that of the run which was selected last."""
        last_ids = list(selection.run_ids or ())[-1:]
        runs = [results.run_of(id) for id in last_ids]
        last = [result for result in self.every_adapter() if result.run.id in runs]
        if not last:
            return selection
        folders = [folder for _, folder in self.bases()]
        return selection._replace(base=recent.matching_folder(_base_path(last[0]), folders))

    def of_models(self, ids: Sequence[str], selection: ModelSelection) -> ModelSelection:
        """The selection in which the served models with these `ids` answered; `selection` if their base is unknown."""
        runs = {results.run_of(id) for id in ids}
        answered = [result for result in results.results(self.workplace.saves) if result.run.id in runs]
        bases = [str(result.folder) for result in answered if not result.adapter]
        bases += [_base_path(result) for result in answered if result.adapter]
        bases += [folder for _, folder in self.bases() if Path(folder).name in ids]
        if not bases:
            return selection
        adapters = {result.run.id for result in answered if result.adapter}
        return ModelSelection(bases[0], [id for id in ids if results.run_of(id) in adapters], selection.engine)

    def of_run(self, run: Run) -> tuple[str, list[str]]:
        """The base and the adapters with which to chat with a run. Raises Refusal if it has no result."""
        choice = servers.choose(self.workplace, "", [run.id])
        return str(choice.base), list(choice.adapters)

    # ---- facts about a selection

    def template_has(self, variable: str, selection: ModelSelection) -> bool:
        """Whether the chat template of a selected model mentions `variable`."""
        folders = [
            Path(selection.base or ""),
            *(result.folder for result in self.selected_adapters(selection)),
        ]
        return any(variable in (chat_template(folder) or ("", ""))[1] for folder in folders)

    def reads_images(self, selection: ModelSelection) -> bool:
        """Whether the base has an image processor, and the engine supports images."""
        return selection.engine == ENGINES[0] and has_image_processor(Path(selection.base or "none"))

    def command(self, selection: ModelSelection) -> str:
        """The shell command that serves the same models to other programs."""
        command = ["python", "-m", "engine", "serve"]
        command += selection.run_ids or ["--base", selection.base or "MODEL"]
        command += ["--engine", selection.engine] if selection.engine != ENGINES[0] else []
        saves = self.workplace.saves
        return shlex.join(command + (["--saves", str(saves)] if saves != Workplace().saves else []))


def _base_path(result: Result) -> str:
    return result.run.facts.base
