"""A chat server, by its folder: its settings, its state, and why it failed.

The state follows from the folder and from whether the server's process is alive: here, its lock says so; of a server in
a Slurm job, Slurm does (`engine.serving.slurm_jobs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from engine.core.locks import is_locked
from engine.core.problems import Problem, problem, sentences
from engine.core.rundir import ALIVE_BYTE, RunDir, read_json, read_object
from engine.serving import slurm_jobs, vllm


@dataclass(frozen=True)
class Server:
    """One server, by its folder."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def folder(self) -> RunDir:
        """Its folder; the files that it shares with runs have the same names."""
        return RunDir(self.path)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The content of serve.json: the settings of its start."""
        return read_object(self.path / "serve.json")

    @property
    def name(self) -> str:
        """The name of its base, also in requests."""
        return self.settings.get("name", "")

    @property
    def engine(self) -> str:
        """Its inference engine: one of vllm.ENGINES."""
        return self.settings.get("engine", vllm.ENGINES[0])

    @property
    def on_slurm(self) -> bool:
        """Whether it is a job of Slurm."""
        return bool(self.settings.get("slurm"))

    @property
    def since(self) -> float:
        """When it was started, in seconds since 1970; of a job of Slurm that has begun, when that was."""
        begun = read_object(self.folder.keeper).get("started") if self.on_slurm else None
        return begun or self.settings.get("started", 0.0)

    @property
    def state(self) -> Literal["waiting", "loading", "ready", "ended", "failed"]:
        """It is waiting until Slurm has started its job. Also "failed" if it ended without a record: killed, or out of
        memory."""
        phase = slurm_jobs.phase(self.folder, self.since) if self.on_slurm else self._phase_here()
        if phase == "waits":
            return "waiting"
        if phase == "alive":
            return "ready" if (self.path / "address.json").exists() else "loading"
        return "ended" if (self.path / "ended.json").exists() else "failed"

    def _phase_here(self) -> Literal["alive", "gone"]:
        return "alive" if is_locked(self.path / "lock", ALIVE_BYTE) else "gone"

    @property
    def alive(self) -> bool:
        """Whether it has a process, or Slurm may start it at any moment."""
        return self.state in ("waiting", "loading", "ready")

    @property
    def problems(self) -> list[Problem]:
        """Why it failed; empty if it has not."""
        if self.state != "failed":
            return []
        if not self.path.exists():
            return [problem("chat-was-unloaded", name=self.name)]
        if self.on_slurm and (by_slurm := slurm_jobs.why_ended(self.folder, self.name)):
            return [by_slurm]  # it explains any error, too: of two processes that are ended, one may miss the other
        error = read_json(self.folder.error)
        if error is None:
            return [problem("chat-died", name=self.name)]
        reported = [Problem(entry["code"], entry["field"], entry["values"]) for entry in error.get("problems", ())]
        if known := [entry for entry in reported if entry.code in sentences()]:
            return known
        if "OutOfMemoryError" in error["type"] or "out of memory" in error["message"]:
            return [problem("chat-no-memory", name=self.name)]
        why = f"{error['type']}: {error['message']}".split("\n")[0][:300]
        return [problem("chat-not-loaded", name=self.name, why=why)]

    @property
    def waits_for(self) -> Problem | None:
        """What Slurm says that its job waits for; None if it does not wait."""
        return slurm_jobs.why_waiting(self.folder) if self.state == "waiting" else None

    @property
    def doubt(self) -> Problem | None:
        """Why its state may be out of date."""
        return slurm_jobs.doubt(self.folder) if self.on_slurm else None
