"""What the Chat tab can talk to: bases, adapters of them, and the servers that hold them, as the page tells of them.

Nothing is held: every answer is read from the folders of the runs and of the servers.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from engine.core.problems import Refusal
from engine.launch.workspace import Workplace
from engine.models.discovery import identity
from engine.models.facts import chat_template
from engine.runs import recent
from engine.runs.results import Result, results
from engine.runs.results import titles as called
from engine.serving import servers
from engine.serving.servers import Choice, Server
from engine.serving.vllm import ENGINES
from webui import answers, notices
from webui.words import Words

MAX_ADAPTERS_ASKED = 15  # asked at once, beside the base
THINKING_VARIABLE = "enable_thinking"  # what templates of reasoning models call the switch
TOOLS_VARIABLE = "tools"  # what templates call the tools that they are given


class ModelSelection(NamedTuple):
    """What a person has picked: the folder of a base, ids of runs beside it, and what writes the answers."""

    base: str | None
    ids: Sequence[str] | None = None
    writer: str = ENGINES[0]


@dataclass(frozen=True)
class ChatModels:
    """`bases` lists what can be a base, as (label, folder)."""

    words: Words
    workplace: Workplace
    bases: Callable[[], list[tuple[str, str]]]

    def choice(self, picked: ModelSelection) -> Choice:
        """Raises Refusal if it cannot be talked to."""
        ids = list(picked.ids or ())[:MAX_ADAPTERS_ASKED]
        return servers.choose(self.workplace, picked.base or "", ids, picked.writer or ENGINES[0])

    def titles(self, picked: ModelSelection | None = None) -> dict[str, str]:
        """What each voice is called: a run by its name, the base that is picked as such."""
        named = called(results(self.workplace.saves))
        try:
            base = self.choice(picked).name if picked else None
        except Refusal:
            base = None
        return named | ({base: self.words("chat-base-named", name=named.get(base, base))} if base else {})

    def first(self, writer: str) -> ModelSelection:
        """The newest finished run that can be talked to, with its base; else the model to begin with alone."""
        folders = [folder for _, folder in self.bases()]
        newest = recent.newest_result(self.workplace, folders, lambda result: result.stage != "rm")
        if newest:
            base, result = newest
            return ModelSelection(base, [result.run.id] if result.adapter else [], writer)
        model = recent.first_model(self.workplace)
        return ModelSelection(str(model.path) if model else next(iter(folders), None), [], writer)

    def every_adapter(self) -> list[Result]:
        """What finished runs have left that can be talked to, on whatever base."""
        return [result for result in results(self.workplace.saves) if result.adapter and result.stage != "rm"]

    def adapters(self, base: str | None) -> list[Result]:
        """Those of this base."""
        return [
            result for result in self.every_adapter() if identity(_base_path(result)) == identity(base or "")
        ]

    def of_run(self, picked: ModelSelection) -> ModelSelection:
        """What is picked once a run has been chosen: it brings its base with it."""
        chosen = [result for result in self.every_adapter() if result.run.id in list(picked.ids or ())[-1:]]
        folders = [folder for _, folder in self.bases()]
        return (
            picked._replace(base=recent.matching_folder(_base_path(chosen[0]), folders)) if chosen else picked
        )

    def beside(self, picked: ModelSelection) -> list[Result]:
        """The adapters that are picked and belong to the base."""
        return [result for result in self.adapters(picked.base) if result.run.id in (picked.ids or ())]

    def know(self, word: str, picked: ModelSelection) -> bool:
        """Whether a chat template of what is picked has the `word`."""
        folders = [Path(picked.base or ""), *(result.folder for result in self.beside(picked))]
        return any(word in (chat_template(folder) or ("", ""))[1] for folder in folders)

    def of_voices(self, voices: Sequence[str], picked: ModelSelection) -> ModelSelection:
        """What was picked when those `voices` answered; what is `picked` where that cannot be told."""
        spoke = [result for result in results(self.workplace.saves) if result.run.id in voices]
        bases = [str(result.folder) for result in spoke if not result.adapter] + [
            _base_path(result) for result in spoke if result.adapter
        ]
        bases += [folder for _, folder in self.bases() if Path(folder).name in voices]
        ids = [result.run.id for result in spoke if result.adapter]
        return ModelSelection(bases[0], ids, picked.writer) if bases else picked

    # ---- what the page shows of it

    def updates(self, picked: ModelSelection) -> list[Any]:
        """The base and its adapters, whether they can think aloud and use tools, the judges there are, and how a
        program would ask the same."""
        named, beside = self.titles(), self.beside(picked)
        fits = [
            (f"{named[result.run.id]} · {self.words.choice('stage', result.stage)}", result.run.id)
            for result in self.adapters(picked.base)
        ]
        known = {id for _, id in fits}
        others = [result for result in self.every_adapter() if result.run.id not in known]
        fits += [
            (
                f"{named[result.run.id]} · {self.words.choice('stage', result.stage)} · {Path(_base_path(result)).name}",
                result.run.id,
            )
            for result in others
        ]
        ids = [result.run.id for result in beside]
        judges = [
            (named[result.run.id], result.run.id) for result in servers.reward_models(self.workplace.saves)
        ]
        return [
            gr.update(choices=self.bases(), value=picked.base), gr.update(choices=fits, value=ids),
            *(gr.update(visible=self.know(word, picked)) for word in (THINKING_VARIABLE, TOOLS_VARIABLE)),
            gr.update(choices=[(self.words("chat-judge-none"), ""), *judges], visible=bool(judges)),
            notices.code("serve-text", self._command(picked._replace(ids=ids)), self.words),
        ]  # fmt: skip

    def _command(self, picked: ModelSelection) -> str:
        """How a program would be served the same."""
        command = ["python", "-m", "engine", "serve", *(picked.ids or ["--base", picked.base or "MODEL"])]
        command += ["--engine", picked.writer] if picked.writer != ENGINES[0] else []
        saves = self.workplace.saves
        return shlex.join(command + (["--saves", str(saves)] if saves != Workplace().saves else []))

    # ---- in memory

    def server(self, picked: ModelSelection) -> Server | None:
        """The server of what is picked, whatever engine is picked now and whether that would take it."""
        try:
            return servers.find(self.workplace.saves, self.choice(picked._replace(writer=ENGINES[0])))
        except Refusal:
            return None

    def look(self, picked: ModelSelection) -> list[Any]:
        """What is true of it now, and the buttons that load and unload it."""
        try:
            server = servers.find(self.workplace.saves, self.choice(picked))
        except Refusal as refusal:
            wrong = notices.listed(refusal.problems, self.words) if picked.base or picked.ids else ""
            return [wrong, *self.loading(self.server(picked))]
        return [self.held(server), *self.loading(server)]

    def held(self, server: Server | None) -> str:
        others = [
            other
            for other in servers.servers(self.workplace.saves)
            if not server or other.path != server.path
        ]
        since = time.time() - server.settings["started"] if server else 0
        return answers.status(server, others, self.titles(), since, self.words)

    def loading(self, server: Server | None) -> list[Any]:
        """The buttons Load, or Restart, and Unload."""
        alive, failed = server is not None and server.alive, server is not None and server.state == "failed"
        label = self.words("chat-restart" if failed else "chat-load")
        return [gr.update(visible=not alive, value=label), gr.update(visible=alive)]


def _base_path(result: Result) -> str:
    return result.run.facts.base
