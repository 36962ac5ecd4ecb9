"""All that a chat server has: the thread that writes, the voices by name, and what is being answered."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import RunDir
from engine.launch.workspace import inside
from engine.spec.run_spec import RunSpec
from engine.worker.generation.generator import Answer, Writer
from engine.worker.generation.served_models import Voice, voice
from engine.worker.models.loading import DTYPES, load_base, precision
from engine.worker.models.reward_model import load_reward_model, scores
from engine.worker.serving.vllm import VllmWriter
from engine.worker.templates.conversations import Conversations


@dataclass
class House:
    run: RunDir
    given: dict[str, Any]
    spec: RunSpec
    writer: Writer | VllmWriter
    voices: dict[str, Voice] = field(default_factory=dict)
    judges: dict[str, Any] = field(default_factory=dict)  # by folder: model and conversations
    answering: dict[str, list[Answer]] = field(default_factory=dict)  # by the id that the asker gave
    asked: float = field(default_factory=time.monotonic)  # when the last question or answer was

    def add(self, name: str, folder: str) -> None:
        """One more voice: the adapter in `folder`. Raises Refusal if it cannot be one."""
        if name in self.voices:
            return
        self._allow(folder)
        made = voice(name, folder, self.spec, self.writer.model, adapter=True)
        try:
            self.writer.call(lambda: self.writer.load_adapter(folder)).result()
        except Refusal:
            raise
        except Exception as error:
            last = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            raise Refusal(problem("chat-adapter", name=name, why=last)) from error
        self.voices[name] = made

    def add_base(self) -> None:
        """The voice of the base itself. It is left out if it has no template, and an adapter has one."""
        instead = next(iter(self.voices.values()), None)
        name, folder = self.given["name"], self.given["base"]
        base = voice(name, folder, self.spec, self.writer.model, adapter=False, instead=instead)
        self.voices = {name: base, **self.voices}

    def score(self, folder: str, conversations: list[list[dict[str, Any]]]) -> list[float]:
        """The scores of a reward model, which is loaded beside the base when it is first asked. Raises Refusal."""
        if isinstance(self.writer, VllmWriter):
            raise Refusal(problem("vllm-no-judge"))
        self._allow(folder)
        return self.writer.call(lambda: self._score(Path(folder), conversations)).result()

    def _score(self, folder: Path, conversations: list[list[dict[str, Any]]]) -> list[float]:
        if str(folder) not in self.judges:
            model, tokenizer = load_reward_model(folder)
            self.judges[str(folder)] = model, Conversations(tokenizer)
        model, reading = self.judges[str(folder)]
        told = reading.encode([{"messages": one, "tools": None} for one in conversations])
        if bad := [one for one in told if isinstance(one, Problem)]:
            raise Refusal(bad)
        # As it was trained: up to the token that ends the last answer.
        if any(not one.answers for one in told):
            raise Refusal(problem("score-without-answer"))
        return scores(model, [one.ids[: one.answers[-1][1]].tolist() for one in told]).tolist()

    def _allow(self, folder: str) -> None:
        if not inside(Path(folder), tuple(map(Path, self.given["roots"]))):
            raise Refusal(problem("path-outside", path=folder, roots=", ".join(self.given["roots"])))

    def busy(self) -> bool:
        return any(self.answering.values())


def _in_this_process(_run: RunDir, given: dict[str, Any], spec: RunSpec, _closing: Any) -> Writer:
    model = load_base(spec, given["base"], DTYPES[precision(spec)]).requires_grad_(False).eval()
    return Writer(model)


WRITERS = {"transformers": _in_this_process, "vllm": VllmWriter.start}


def load(run: RunDir, given: dict[str, Any], closing: contextlib.ExitStack) -> House:
    """The model and its voices in memory; `closing` ends what holds it, if that is another process. Raises Refusal, or
    whatever a library raises at a broken model."""
    spec = RunSpec.read({"model": given["model"]})
    house = House(run, given, spec, WRITERS[given["engine"]](run, given, spec, closing))
    for name, folder in given["adapters"].items():
        house.add(name, folder)
    house.add_base()
    return house
