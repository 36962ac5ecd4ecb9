"""The studio's side of the chat servers: start one, find it again, end it. Requests to it:
`engine.serving.chat_client`.

A server is a folder `saves/.chat/<id>/` and a process (`engine.worker.serve`) with one base model in memory and any
number of its adapters: a child process here, or a job of Slurm. As with a run, the folder is the truth: a restarted
studio finds its servers, and it is noticed if one is killed (`engine.serving.server`).

    serve.json     what to serve             lock           held while the process lives
    key            the API key               address.json   where it listens, once it has loaded
    log.txt        what it printed           ended.json or error.json, last
    slurm.json     its job, with Slurm       keeper.json    where that computes, once it has begun
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.core import hardware, leases
from engine.core.locks import try_lock, wait_for_lock
from engine.core.problems import LANGUAGES, Problem, Refusal, problem
from engine.core.rundir import ALIVE_BYTE, write_json
from engine.launch import command
from engine.launch.engine_choice import EngineChoice, read_choice
from engine.launch.processes import end_processes
from engine.launch.workspace import PROJECT, Workplace, is_inside
from engine.models.discovery import identity, is_hub_id
from engine.models.facts import may_need_bitsandbytes
from engine.runs.results import Result, base_of, checkpoint, results
from engine.serving import server_gpu, slurm_jobs, vllm
from engine.serving.server import Server
from engine.spec.model_settings import Model, NoRopeScaling
from engine.spec.run_spec import RunSpec

SERVERS_FOLDER = ".chat"
IDLE_S = 900.0  # time without a question after which a studio's server ends
LOADING_S = 1800.0
QUEUE_S = 120.0  # for which a question waits for Slurm to start the server


# ------------------------------------------------------------------------------------------ what can be asked


@dataclass(frozen=True)
class Choice:
    """The choice of models: a base and adapters of it. `model` says how the base is loaded."""

    base: Path
    name: str
    adapters: Mapping[str, Path] = field(default_factory=dict)  # name → folder of the result
    model: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "transformers"  # the inference engine: one of vllm.ENGINES
    rank: int = vllm.DEFAULT_LORA_RANK  # the maximum rank for vLLM: that of this base's largest adapter, chosen or not


def choose(workplace: Workplace, base: str, ids: Sequence[str] = (), engine: str = "transformers") -> Choice:
    """The model folder `base` and the results or checkpoints with these ids, checked before anything is loaded.

    An empty `base` means that of the first run. Raises Refusal if something does not exist, belongs to another base, or
    is not supported by the `engine`.
    """
    if engine not in vllm.ENGINES:
        raise Refusal(problem("spec-choice", "engine", given=engine, choices=", ".join(vllm.ENGINES)))
    by_id = {result.id: result for result in results(workplace.saves)}
    by_id |= {id: saved for id in ids if id not in by_id and (saved := checkpoint(workplace.saves, id))}
    chosen = [_result(by_id, id) for id in ids]
    wholes, adapters = [[result for result in chosen if result.adapter is kind] for kind in (False, True)]
    base = base or next((str(result.folder) for result in wholes), "")
    base = base or next((str(result.run.facts.base) for result in adapters), "")
    if not base:
        raise Refusal(problem("chat-nothing-chosen"))
    folder = _folder(base, adapters)
    if not _cached(folder) and not is_inside(folder, workplace.model_roots):
        raise Refusal(problem("path-outside", path=folder, roots=", ".join(map(str, workplace.model_roots))))
    if not (folder / "config.json").is_file():
        raise Refusal(problem("chat-no-model", folder=folder))
    for result in chosen:
        theirs = result.run.facts.base if result.adapter else str(result.folder)
        if identity(theirs) != identity(str(folder)):
            raise Refusal(problem("chat-other-base", name=result.run.title, theirs=theirs, base=folder))
    whole = next((result for result in by_id.values() if not result.adapter and result.folder == folder), None)
    if whole:
        _result(by_id, whole.run.id)
    choice = Choice(
        folder,
        whole.run.id if whole else identity(str(folder)) if _cached(folder) else folder.name,
        {result.id: result.folder for result in adapters},
        _model_part(workplace, folder, whole, adapters),
        engine,
    )
    if engine != "vllm":
        return choice
    if problems := vllm.problems(choice.model, choice.adapters):
        raise Refusal(problems)
    fitting = [
        result.folder
        for result in by_id.values()
        if result.adapter and identity(result.run.facts.base) == identity(str(folder))
    ]
    return replace(choice, rank=vllm.rank(fitting))


def choose_loaded(workplace: Workplace, base: str, ids: Sequence[str] = ()) -> Choice:
    """`choose`, with the inference engine of a server that has loaded the base already. Raises Refusal."""
    choice = choose(workplace, base, ids)
    server = find(workplace.saves, choice)
    if server and server.alive and server.engine != choice.engine:
        return choose(workplace, base, ids, server.engine)
    return choice


def _result(by_id: Mapping[str, Result], id: str) -> Result:
    if id not in by_id:
        raise Refusal(problem("chat-no-result", id=id))
    if by_id[id].stage == "rm":
        raise Refusal(problem("chat-judge", name=by_id[id].run.title))
    return by_id[id]


def _folder(base: str, adapters: Sequence[Result]) -> Path:
    """The path of the base: for a hub's model, where the adapter's run found it."""
    if os.path.isdir(base) or not is_hub_id(base):
        return Path(os.path.abspath(base))
    return next((base_of(result) for result in adapters), Path(base))


def _cached(folder: Path) -> bool:
    """Whether the folder is a hub's model in the cache of this machine."""
    return is_hub_id(identity(str(folder)))


def _model_part(workplace: Workplace, folder: Path, whole: Result | None, adapters: Sequence[Result]) -> dict[str, Any]:
    """The `model` part of a spec with which the base is loaded, as in the run of the result."""
    made_by = [*filter(None, [whole]), *adapters]
    model = made_by[0].run.spec.model if made_by else Model(model_name_or_path=str(folder))
    allowed = model.trust_remote_code and workplace.allows_code_of(str(folder))
    changes: dict[str, Any] = {"trust_remote_code": allowed}
    if whole:
        changes["rope_scaling"] = NoRopeScaling()  # its configuration already contains the scaling
    return model.used(str(folder)).model_copy(update=changes).model_dump()


def reward_models(saves: Path) -> list[Result]:
    """The reward models from finished runs."""
    return [result for result in results(saves) if result.stage == "rm"]


# ------------------------------------------------------------------------------------------ start, find, end


def hold_studio_lock(saves: Path) -> int | None:
    """Hold the lock that shows that a studio is alive, as long as this process is. Servers end sooner without one.

    Returns the open descriptor of the lock; None if the saves folder is not writable, and so has no servers.
    """
    with contextlib.suppress(OSError):
        (saves / SERVERS_FOLDER).mkdir(exist_ok=True)
        return try_lock(_studios(saves), ALIVE_BYTE, shared=True)
    return None


def servers(saves: Path) -> list[Server]:
    """All servers that still have their folder, newest last."""
    known = [Server(path.parent) for path in (saves / SERVERS_FOLDER).glob("[!.]*/serve.json")]
    return sorted((server for server in known if server.settings), key=lambda server: server.settings["started"])


def find(saves: Path, choice: Choice) -> Server | None:
    """The studio's server of the chosen base, alive or not, with any engine."""
    server = Server(saves / SERVERS_FOLDER / _id(choice))
    return server if server.settings else None


def start(workplace: Workplace, choice: Choice, by: str = "") -> Server:
    """The server of the chosen base: the one that is alive, or a new one. Returns immediately; it may still be loading.

    Raises Refusal if it is alive with another engine, if as many others are alive as engine.yaml permits, if no GPU is
    left for it, or if Slurm does not accept its job.
    """
    saves, where = workplace.saves, read_choice(workplace.saves)
    (saves / SERVERS_FOLDER).mkdir(exist_ok=True)
    closed = wait_for_lock(saves / SERVERS_FOLDER / ".lock")
    try:
        server = Server(saves / SERVERS_FOLDER / _id(choice))
        if server.alive:
            if server.engine != choice.engine:
                raise Refusal(problem("chat-other-engine", name=server.name, engine=server.engine))
            return server
        others = [other for other in servers(saves) if other.alive and not other.settings.get("shell")]
        if len(others) >= where.chat_servers:
            who = "; ".join(f"{other.name} ({other.settings['by'] or '—'})" for other in others)
            raise Refusal(problem("chat-too-many", most=where.chat_servers, who=who))
        end(server)
        key = secrets.token_urlsafe(24)
        if where.chats_on_slurm:
            _begin_on_slurm(server, _common_settings(workplace, choice, by), key, where)
        else:
            begin(server, serve_settings(workplace, choice, by) | {"studios": str(_studios(saves))}, key)
        return Server(server.path)
    except OSError as error:
        raise Refusal(problem("cannot-write", folder=saves, why=error.strerror or error)) from error
    finally:
        os.close(closed)


def serve_settings(workplace: Workplace, choice: Choice, by: str) -> dict[str, Any]:
    """The content of serve.json for a server on this machine. Raises Refusal if no GPU is left for it."""
    gpu = server_gpu.free_gpu(choice.engine)
    device = {"card": gpu.index, "gpu": gpu.uuid} if gpu else {}
    return _common_settings(workplace, choice, by) | {"host": "127.0.0.1"} | device


def _common_settings(workplace: Workplace, choice: Choice, by: str) -> dict[str, Any]:
    """The content of serve.json for the choice, wherever it is served."""
    loaded = [Model(**choice.model), *(model.run.spec.model for model in reward_models(workplace.saves))]
    return {
        "quantized": any(may_need_bitsandbytes(model.model_name_or_path, model.quantization.kind) for model in loaded),
        "base": str(choice.base),
        "name": choice.name,
        "model": dict(choice.model),
        "adapters": {name: str(folder) for name, folder in choice.adapters.items()},
        "roots": [str(root) for root in workplace.model_roots],
        "host": "",
        "port": 0,
        "idle_s": IDLE_S,
        "studios": None,
        "by": by,
        "started": time.time(),
        "engine": choice.engine,
        "card": None,
        "gpu": None,
        "vllm": {"command": [vllm.program()], "rank": choice.rank} if choice.engine == "vllm" else None,
    }


def begin(server: Server, settings: Mapping[str, Any], key: str, foreground: bool = False) -> subprocess.Popen[bytes]:
    """Start the process of a server with a new folder. In the `foreground` it prints to this terminal and ends with it;
    otherwise it prints to its log and outlives the process that started it. Raises Refusal if its GPU is taken."""
    with contextlib.ExitStack() as closing:
        leased = _lease(server, settings)
        for descriptor in leased:
            closing.callback(os.close, descriptor)
        with _new_folder(server):
            # The lock is passed on: the server is alive before it has imported anything.
            lock = try_lock(server.path / "lock", ALIVE_BYTE, shared=True)
            assert lock is not None  # nobody locks this byte exclusively
            closing.callback(os.close, lock)
            _write(server, settings, key)
            log = None if foreground else closing.enter_context((server.path / "log.txt").open("ab"))
            return subprocess.Popen(
                [sys.executable, "-m", "engine.worker.serve", str(server.path)],
                cwd=PROJECT,
                env=_environment(settings, server.path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=not foreground,
                pass_fds=(lock, *leased),
            )


def _begin_on_slurm(server: Server, settings: Mapping[str, Any], key: str, where: EngineChoice) -> None:
    """Submit the job of a server with a new folder. Its machine has no locks of studios, so that it ends only when it
    has been idle. Raises Refusal if Slurm does not accept it."""
    settings = {**settings, "slurm": slurm_jobs.slurm_settings(where, settings["base"], settings["model"])}
    with _new_folder(server):
        _write(server, settings, key)
        slurm_jobs.submit(server.folder, settings, where)


@contextlib.contextmanager
def _new_folder(server: Server) -> Iterator[None]:
    """The folder of a server that is being started; it is removed if that fails."""
    server.path.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(server.path, ignore_errors=True)
        raise


def _write(server: Server, settings: Mapping[str, Any], key: str) -> None:
    if key:
        (server.path / "key").touch(0o600)
        (server.path / "key").write_text(key, encoding="utf-8")
    write_json(server.path / "serve.json", settings, durable=False)


def _lease(server: Server, settings: Mapping[str, Any]) -> list[int]:
    """The descriptors that hold the lease of its GPU, if it has one."""
    if not settings["gpu"]:
        return []
    saves = server.path.parents[1]
    kind = server_gpu.KINDS[settings["engine"]]
    holder = leases.Holder(settings["name"], kind, by=settings["by"], saves=str(saves))
    return server_gpu.lease(settings["gpu"], settings["engine"], holder)


def _environment(settings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Its environment, as for a run on one device: its GPU, or the CPU if there is none."""
    spec = RunSpec.read({"model": settings["model"]})
    gpus = [gpu for gpu in hardware.gpus() if gpu.uuid == settings["gpu"]]
    if settings["gpu"] and not gpus:  # without one, the model would be loaded on the CPU
        raise Refusal(hardware.gpu_failure() or problem("gpu-gone", uuid=settings["gpu"]))
    return (
        command.inherited_environment()
        | command.environment(spec, folder, gpus, hardware.threads())
        | command.OFFLINE_VARIABLES
        | {leases.HELD_VARIABLE: settings["gpu"] or ""}
    )


def end(server: Server) -> None:
    """End the process of a server, and wait until it has completely ended; then delete its folder. Raises Refusal if
    Slurm does not end its job."""
    if server.on_slurm:
        slurm_jobs.cancel(server.folder, server.name)
    else:
        end_processes(server.path, kill_timeout_s=3)
    shutil.rmtree(server.path, ignore_errors=True)


def _id(choice: Choice) -> str:
    stretched = json.dumps(choice.model.get("rope_scaling"), sort_keys=True)
    text = f"{identity(str(choice.base))}\n{stretched}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _studios(saves: Path) -> Path:
    return saves / SERVERS_FOLDER / ".studios"


def wait(server: Server, seconds: float = LOADING_S) -> None:
    """Return once the server responds. Raises Refusal as `until_ready`."""
    for _ in until_ready(server, seconds):
        pass


def until_ready(
    server: Server, seconds: float = LOADING_S, goes_on: Callable[[], bool] = lambda: True
) -> Iterator[Problem | None]:
    """Yield what the server waits for in Slurm's queue, None while it is loading, whenever this has changed; end once
    it responds, or `goes_on` is false. Raises Refusal if it has ended instead, has not loaded within `seconds`, or
    still waits after QUEUE_S."""
    shown: list[Problem | None] = []
    patience, deadline = time.monotonic() + QUEUE_S, time.monotonic() + seconds
    while (state := server.state) in ("waiting", "loading") and time.monotonic() < deadline:
        if not goes_on():
            return
        waits_for = server.waits_for if state == "waiting" else None
        if waits_for:
            deadline = time.monotonic() + seconds  # loading has not begun
            if time.monotonic() > patience:
                why = {language: waits_for.text(language) for language in LANGUAGES}
                raise Refusal(problem("chat-waits", name=server.name, why=why))
        if shown != [waits_for]:
            shown = [waits_for]
            yield waits_for
        time.sleep(0.1)
    if server.state != "ready":
        raise Refusal(server.problems or [problem("chat-died", name=server.name)])
