"""The studio's side of the servers that answer: start one, find it again, end it. What it is asked: `engine.serving.chat_client`.

A server is a folder `saves/.chat/<id>/` and a child process of its own (`engine.worker.serve`) with one base model in
memory and any number of its adapters. As with a run, the folder is the truth: a studio that is restarted finds its
servers, and whatever kills one is seen.

    serve.json     what to serve             lock           held while the process lives
    key            who may ask               address.json   where it listens, once it has loaded
    log.txt        what it printed           ended.json or error.json, last
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from engine.core import hardware
from engine.core.problems import Problem, Refusal, problem, sentences
from engine.core.rundir import ALIVE, held, read_json, take, wait_for, write_json
from engine.launch import command
from engine.launch.processes import end_processes
from engine.launch.workspace import PROJECT, Workplace, inside
from engine.models.discovery import identity, is_hub_id
from engine.models.facts import may_be_quantized
from engine.runs.results import Result, base_of, results
from engine.serving import vllm
from engine.spec.model_settings import Model, NoRopeScaling
from engine.spec.run_spec import RunSpec

FOLDER = ".chat"
MOST = 2  # servers that a studio keeps at once: each holds a whole model
IDLE_S = 900.0  # without a question, after which a server of a studio ends
LOADING_S = 1800.0


@dataclass(frozen=True)
class Server:
    """One server, by its folder."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @cached_property
    def given(self) -> Mapping[str, Any]:
        """What it was started with."""
        return read_json(self.path / "serve.json") or {}

    @property
    def name(self) -> str:
        """What its base is called, and asked as."""
        return self.given.get("name", "")

    @property
    def engine(self) -> str:
        """What writes its answers: one of vllm.ENGINES."""
        return self.given.get("engine", vllm.ENGINES[0])

    @property
    def state(self) -> Literal["loading", "ready", "ended", "failed"]:
        """Failed is also what has ended without a word: killed, or out of memory."""
        if held(self.path / "lock", ALIVE):
            return "ready" if (self.path / "address.json").exists() else "loading"
        return "ended" if (self.path / "ended.json").exists() else "failed"

    @property
    def alive(self) -> bool:
        return self.state in ("loading", "ready")

    @property
    def problems(self) -> list[Problem]:
        """Why it failed; empty if it has not."""
        if self.state != "failed":
            return []
        error = read_json(self.path / "error.json")
        if error is None:
            return [problem("chat-died", name=self.name)]
        told = [Problem(one["code"], one["field"], one["values"]) for one in error.get("problems", ())]
        if known := [one for one in told if one.code in sentences()]:
            return known
        if "OutOfMemoryError" in error["type"] or "out of memory" in error["message"]:
            return [problem("chat-no-memory", name=self.name)]
        why = f"{error['type']}: {error['message']}".split("\n")[0][:300]
        return [problem("chat-not-loaded", name=self.name, why=why)]


# ------------------------------------------------------------------------------------------ what can be asked


@dataclass(frozen=True)
class Choice:
    """What a person has chosen to talk to: a base and adapters of it. `model` says how the base is loaded."""

    base: Path
    name: str
    adapters: Mapping[str, Path] = field(default_factory=dict)  # name → folder of the result
    model: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "transformers"  # what writes the answers: one of vllm.ENGINES
    rank: int = vllm.USUAL_RANK  # that vLLM has room for: the largest of this base's adapters, wanted or not


def choose(workplace: Workplace, base: str, ids: Sequence[str] = (), engine: str = "transformers") -> Choice:
    """The model folder `base` and the results of the runs with these ids, looked at before anything is loaded.

    An empty `base` is what the first of them is or belongs to. Raises Refusal if something is not there, is of another
    base, or is nothing that the `engine` takes.
    """
    if engine not in vllm.ENGINES:
        raise Refusal(problem("spec-choice", "engine", given=engine, choices=", ".join(vllm.ENGINES)))
    left = {one.run.id: one for one in results(workplace.saves)}
    chosen = [_result(left, id) for id in ids]
    wholes, adapters = [[one for one in chosen if one.adapter is kind] for kind in (False, True)]
    base = base or next((str(one.folder) for one in wholes), "")
    base = base or next((str(one.run.spec.model.model_name_or_path) for one in adapters), "")
    if not base:
        raise Refusal(problem("chat-nothing-chosen"))
    folder = _folder(base, adapters)
    if not _cached(folder) and not inside(folder, workplace.model_roots):
        raise Refusal(problem("path-outside", path=folder, roots=", ".join(map(str, workplace.model_roots))))
    if not (folder / "config.json").is_file():
        raise Refusal(problem("chat-no-model", folder=folder))
    for one in chosen:
        theirs = one.run.spec.model.model_name_or_path if one.adapter else str(one.folder)
        if identity(theirs) != identity(str(folder)):
            raise Refusal(problem("chat-other-base", name=one.run.title, theirs=theirs, base=folder))
    whole = next((one for one in left.values() if not one.adapter and one.folder == folder), None)
    if whole:
        _result(left, whole.run.id)
    choice = Choice(
        folder, whole.run.id if whole else identity(str(folder)) if _cached(folder) else folder.name,
        {one.run.id: one.folder for one in adapters}, _loading(workplace, folder, whole, adapters), engine,
    )  # fmt: skip
    if engine != "vllm":
        return choice
    if found := vllm.problems(choice.model, choice.adapters):
        raise Refusal(found)
    fitting = [
        one.folder for one in left.values()
        if one.adapter and identity(one.run.spec.model.model_name_or_path) == identity(str(folder))
    ]  # fmt: skip
    return replace(choice, rank=vllm.rank(fitting))


def _result(left: Mapping[str, Result], id: str) -> Result:
    if id not in left:
        raise Refusal(problem("chat-no-result", id=id))
    if left[id].stage == "rm":
        raise Refusal(problem("chat-judge", name=left[id].run.title))
    return left[id]


def _folder(base: str, adapters: Sequence[Result]) -> Path:
    """Where the base lies: a hub's model is where the run of an adapter found it."""
    if os.path.isdir(base) or not is_hub_id(base):
        return Path(os.path.abspath(base))
    return next((base_of(one) for one in adapters), Path(base))


def _cached(folder: Path) -> bool:
    """Whether the folder is a hub's model in the cache of this machine."""
    return is_hub_id(identity(str(folder)))


def _loading(
    workplace: Workplace, folder: Path, whole: Result | None, adapters: Sequence[Result]
) -> dict[str, Any]:
    """The `model` part of a spec by which the base is loaded: as the run that made the result had it."""
    made_by = [*filter(None, [whole]), *adapters]
    model = made_by[0].run.spec.model if made_by else Model(model_name_or_path=str(folder))
    changes: dict[str, Any] = {
        "model_name_or_path": str(folder), "adapter_path": None, "chat_template": None,
        "trust_remote_code": model.trust_remote_code and workplace.allows_code_of(str(folder)),
    }  # fmt: skip
    if whole:
        changes["rope_scaling"] = NoRopeScaling()  # its configuration has been stretched already
    return model.model_copy(update=changes).model_dump()


def judges(saves: Path) -> list[Result]:
    """The reward models that finished runs have left."""
    return [one for one in results(saves) if one.stage == "rm"]


# ------------------------------------------------------------------------------------------ start, find, end


def attend(saves: Path) -> int | None:
    """Say that a studio lives which may ask, for as long as this process does. Servers end sooner without one.

    Returns the open descriptor that says it; None where the saves folder cannot be written, and so has no servers.
    """
    with contextlib.suppress(OSError):
        (saves / FOLDER).mkdir(exist_ok=True)
        return take(_studios(saves), ALIVE, shared=True)
    return None


def servers(saves: Path) -> list[Server]:
    """All servers that there are or were and have left their folder, the newest last."""
    found = [Server(path.parent) for path in (saves / FOLDER).glob("[!.]*/serve.json")]
    return sorted((one for one in found if one.given), key=lambda one: one.given["started"])


def find(saves: Path, choice: Choice) -> Server | None:
    """The studio's server of the chosen base, alive or not, whatever engine it was started with."""
    found = Server(saves / FOLDER / _id(choice))
    return found if found.given else None


def start(workplace: Workplace, choice: Choice, by: str = "") -> Server:
    """The server of the chosen base: the one that lives, or a new one. Comes back at once; it may still be loading.

    Raises Refusal if it lives with another engine, if as many others live as this machine is allowed, or if no card is
    left for it.
    """
    saves = workplace.saves
    (saves / FOLDER).mkdir(exist_ok=True)
    closed = wait_for(saves / FOLDER / ".lock")
    try:
        server = Server(saves / FOLDER / _id(choice))
        if server.alive:
            if server.engine != choice.engine:
                raise Refusal(problem("chat-other-engine", name=server.name, engine=server.engine))
            return server
        others = [one for one in servers(saves) if one.alive and not one.given.get("shell")]
        if len(others) >= MOST:
            who = "; ".join(f"{one.name} ({one.given['by'] or '—'})" for one in others)
            raise Refusal(problem("chat-too-many", most=MOST, who=who))
        end(server)
        begin(
            server,
            serving(workplace, choice, by) | {"studios": str(_studios(saves))},
            secrets.token_urlsafe(24),
        )
        return Server(server.path)
    except OSError as error:
        raise Refusal(problem("cannot-write", folder=saves, why=error.strerror or error)) from error
    finally:
        os.close(closed)


def serving(workplace: Workplace, choice: Choice, by: str) -> dict[str, Any]:
    """The content of serve.json for what is chosen. Raises Refusal if no card is left for it."""
    loaded = [Model(**choice.model), *(one.run.spec.model for one in judges(workplace.saves))]
    return {
        "quantized": any(may_be_quantized(one.model_name_or_path, one.quantization.kind) for one in loaded),
        "base": str(choice.base), "name": choice.name, "model": dict(choice.model),
        "adapters": {name: str(folder) for name, folder in choice.adapters.items()},
        "roots": [str(root) for root in workplace.model_roots], "host": "127.0.0.1", "port": 0, "idle_s": IDLE_S,
        "studios": None, "by": by, "started": time.time(), "engine": choice.engine,
        "card": _card(workplace.saves, choice.engine),
        "vllm": {"command": [vllm.program()], "rank": choice.rank} if choice.engine == "vllm" else None,
    }  # fmt: skip


def _card(saves: Path, engine: str) -> int | None:
    """The card with the most free memory; None where there is none. vLLM demands nine tenths of one, so it has it alone.

    Raises Refusal with who is there if every card is taken.
    """
    cards, alive = hardware.gpus(), [one for one in servers(saves) if one.alive]
    there = {one.given.get("card"): one for one in alive if "vllm" in (engine, one.engine)}
    left = [card for card in cards if card.index not in there]
    if cards and not left:
        who = "; ".join(
            f"{there[card.index].name} ({there[card.index].given['by'] or '—'})" for card in cards
        )
        raise Refusal(problem("chat-card-taken", who=who))
    return max(left, key=lambda card: card.free).index if left else None


def begin(
    server: Server, given: Mapping[str, Any], key: str, foreground: bool = False
) -> subprocess.Popen[bytes]:
    """Start the process of a server whose folder is new. In the `foreground` it prints to this terminal and ends
    with it; else into its log, and it outlives whoever started it."""
    server.path.mkdir(parents=True)
    # The lock is handed down: the server is alive before it has imported anything.
    lock = take(server.path / "lock", ALIVE, shared=True)
    if key:
        (server.path / "key").touch(0o600)
        (server.path / "key").write_text(key, encoding="utf-8")
    write_json(server.path / "serve.json", given)
    log = None if foreground else (server.path / "log.txt").open("ab")
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "engine.worker.serve", str(server.path)], cwd=PROJECT, env=_environment(given, server.path),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=not foreground, pass_fds=(lock,),
        )  # fmt: skip
    finally:
        os.close(lock)
        if log:
            log.close()


def _environment(given: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """That of a run on one device: its card, or the CPU where there is none."""
    spec = RunSpec.read({"model": given["model"]})
    cards = hardware.gpus()
    told = (
        command.inherited()
        | command.environment(spec, folder, len(cards), hardware.threads())
        | command.OFFLINE
    )
    if given["card"] is not None:
        told["CUDA_VISIBLE_DEVICES"] = str(given["card"])
    return told


def end(server: Server) -> None:
    """End the process of a server, and wait until nothing of it is left; then its folder goes, too."""
    end_processes(server.path, grace_s=3)
    shutil.rmtree(server.path, ignore_errors=True)


def _id(choice: Choice) -> str:
    stretched = json.dumps(choice.model.get("rope_scaling"), sort_keys=True)
    told = f"{identity(str(choice.base))}\n{stretched}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _studios(saves: Path) -> Path:
    return saves / FOLDER / ".studios"


def wait(server: Server, seconds: float = LOADING_S) -> None:
    """Come back once the server answers. Raises Refusal if it has ended instead."""
    deadline = time.monotonic() + seconds
    while server.state == "loading" and time.monotonic() < deadline:
        time.sleep(0.1)
    if server.state != "ready":
        raise Refusal(server.problems or [problem("chat-died", name=server.name)])
