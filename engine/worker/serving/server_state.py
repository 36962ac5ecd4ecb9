"""The state of a chat server: the generating thread, the served models by name, and the answers in progress."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import RunDir
from engine.launch.workspace import is_inside
from engine.spec.run_spec import RunSpec
from engine.worker.generation.answer import Answer
from engine.worker.generation.generator import Generator
from engine.worker.generation.served_models import ServedModel, load_served_model
from engine.worker.models.loading import DTYPES, load_base, precision
from engine.worker.models.reward_model import load_reward_model, score_conversations
from engine.worker.serving.vllm import VllmGenerator
from engine.worker.templates.conversations import ConversationEncoder


@dataclass
class ServerState:
    run: RunDir
    settings: dict[str, Any]
    spec: RunSpec
    generator: Generator | VllmGenerator
    models: dict[str, ServedModel] = field(default_factory=dict)
    reward_models: dict[str, Any] = field(default_factory=dict)  # by folder: model and conversations
    answering: dict[str, list[Answer]] = field(default_factory=dict)  # by request_id
    last_activity: float = field(default_factory=time.monotonic)  # time.monotonic() of the last request or answer

    def add_adapter(self, name: str, folder: str) -> None:
        """Also serve the adapter in `folder`. Raises Refusal if it cannot be served."""
        if name in self.models:
            return
        self._check_allowed(folder)
        model = load_served_model(name, folder, self.spec, self.generator.model, adapter=True)
        try:
            self.generator.call(lambda: self.generator.load_adapter(folder)).result()
        except Refusal:
            raise
        except Exception as error:
            last = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            raise Refusal(problem("chat-adapter", name=name, why=last)) from error
        self.models[name] = model

    def add_base(self) -> None:
        """Serve the base itself, first in the list. Without a template of its own it uses that of the first adapter."""
        fallback = next(iter(self.models.values()), None)
        name, folder = self.settings["name"], self.settings["base"]
        base = load_served_model(name, folder, self.spec, self.generator.model, adapter=False, fallback=fallback)
        self.models = {name: base, **self.models}

    def score(self, folder: str, conversations: list[list[dict[str, Any]]]) -> list[float]:
        """The scores of a reward model, which is loaded next to the base at the first request. Raises Refusal."""
        if isinstance(self.generator, VllmGenerator):
            raise Refusal(problem("vllm-no-judge"))
        self._check_allowed(folder)
        return self.generator.call(lambda: self._score(Path(folder), conversations)).result()

    def _score(self, folder: Path, conversations: list[list[dict[str, Any]]]) -> list[float]:
        if str(folder) not in self.reward_models:
            model, tokenizer = load_reward_model(folder)
            self.reward_models[str(folder)] = model, ConversationEncoder(tokenizer)
        model, templates = self.reward_models[str(folder)]
        encoded = templates.encode([{"messages": conversation, "tools": None} for conversation in conversations])
        if bad := [row for row in encoded if isinstance(row, Problem)]:
            raise Refusal(bad)
        # As in training: up to the token that ends the last answer.
        if any(not row.answers for row in encoded):
            raise Refusal(problem("score-without-answer"))
        return score_conversations(model, [row.ids[: row.answers[-1][1]].tolist() for row in encoded]).tolist()

    def _check_allowed(self, folder: str) -> None:
        if not is_inside(Path(folder), tuple(map(Path, self.settings["roots"]))):
            raise Refusal(problem("path-outside", path=folder, roots=", ".join(self.settings["roots"])))

    def busy(self) -> bool:
        return any(self.answering.values())


def _in_this_process(_run: RunDir, settings: dict[str, Any], spec: RunSpec, _closing: Any) -> Generator:
    model = load_base(spec, settings["base"], DTYPES[precision(spec)], settings["adapters"].values())
    return Generator(model.requires_grad_(False).eval())


StartGenerator = Callable[[RunDir, dict[str, Any], RunSpec, Any], Generator | VllmGenerator]
GENERATORS: dict[str, StartGenerator] = {"transformers": _in_this_process, "vllm": VllmGenerator.start}


def load(run: RunDir, settings: dict[str, Any], closing: contextlib.ExitStack) -> ServerState:
    """The model and its adapters in memory; `closing` ends the process that holds it, if it is another one. Raises
    Refusal, or whatever a library raises for a broken model."""
    spec = RunSpec.read({"model": settings["model"]})
    state = ServerState(run, settings, spec, GENERATORS[settings["engine"]](run, settings, spec, closing))
    for name, folder in settings["adapters"].items():
        state.add_adapter(name, folder)
    state.add_base()
    return state
