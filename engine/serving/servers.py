"""The studio's side of the chat servers: start one, find it again, end it. Requests to it:
`engine.serving.chat_client`.

A server is a folder `saves/.chat/<base>-<number>/` and a process (`engine.worker.serve`) with one base model in memory
and any number of its adapters: a child process here, or a job of Slurm. As with a run, the folder is the truth: a
restarted studio finds its servers, and it is noticed if one is killed (`engine.serving.server`). Every start has a
folder of its own, so that what is left of one that has ended touches no other.

    serve.json     what to serve             lock           held while the process lives
    key            the API key               address.json   where it listens, once it has loaded
    log.txt        what it printed           ended.json or error.json, last
    slurm.json     its job, with Slurm       keeper.json    where that computes, once it has begun
    slurm_ended.json   how Slurm has ended the job
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.core import hardware
from engine.core.locks import try_lock, wait_for_lock
from engine.core.problems import LANGUAGES, Problem, Refusal, problem
from engine.core.repetition import repeat
from engine.core.rundir import ALIVE_BYTE
from engine.launch.engine_choice import EngineChoice, read_choice
from engine.launch.processes import end_processes
from engine.launch.workspace import Workplace, is_inside
from engine.models.discovery import identity, is_hub_id
from engine.models.facts import may_need_bitsandbytes
from engine.runs.results import Result, base_of, checkpoint, results
from engine.serving import server_gpu, server_process, slurm_jobs, vllm
from engine.serving.server import Server
from engine.spec.model_settings import Model, NoRopeScaling

SERVERS_FOLDER = ".chat"
IDLE_S = 900.0  # time without a question after which a studio's server ends
LOADING_S = 1800.0
QUEUE_S = 120.0  # for which a question waits for Slurm to start the server
LOOK_S = 5.0  # between two looks at jobs that Slurm may have ended; it forgets them after some minutes


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


def attend(saves: Path) -> None:
    """Be a studio for the servers as long as this process lives: show that it is alive, and note how Slurm has ended
    their jobs."""
    hold_studio_lock(saves)
    repeat(lambda: note_ends(saves), LOOK_S)


def note_ends(saves: Path) -> None:
    """Note in the folders of the servers how Slurm has ended their jobs."""
    for server in servers(saves):
        if server.on_slurm:
            slurm_jobs.note_end(server.folder)


def servers(saves: Path, pattern: str = "[!.]*") -> list[Server]:
    """All servers that still have their folder, newest last. `pattern`: of the folders' names."""
    known = [Server(path.parent) for path in (saves / SERVERS_FOLDER).glob(f"{pattern}/serve.json")]
    return sorted((server for server in known if server.settings), key=lambda server: server.settings["started"])


def find(saves: Path, choice: Choice) -> Server | None:
    """The studio's server of the chosen base, alive or not, with any engine."""
    return max(reversed(_of_base(saves, choice)), key=lambda server: server.alive, default=None)


def start(workplace: Workplace, choice: Choice, by: str = "") -> Server:
    """The server of the chosen base: the one that is alive, or a new one. Returns without waiting for it to load.

    Only the decision is made in turn with others, once more: the first time, Slurm may take long to answer. What else
    may take long comes before it or, like the submission of a job, after it; the folder keeps its place. Raises Refusal
    if the server is alive with another engine, if as many others are alive as engine.yaml permits, if no GPU is left
    for it, if Slurm does not accept its job, or if it is unloaded meanwhile.
    """
    saves, where = workplace.saves, read_choice(workplace.saves)
    if alive := _decide(saves, choice, where):
        return alive
    try:
        _clear_away(saves, choice)
        settings = _common_settings(workplace, choice, by)
        if where.chats_on_slurm:
            settings["slurm"] = slurm_jobs.slurm_settings(where, settings["base"], settings["model"])
        else:
            hardware.gpu_failure()  # the driver may take long to answer; what it says is kept for some seconds
        with _turn(saves):
            if alive := _decide(saves, choice, where):
                return alive
            server = Server(saves / SERVERS_FOLDER / f"{_id(choice)}-{secrets.token_hex(4)}")
            key, settings["started"] = secrets.token_urlsafe(24), time.time()
            if not where.chats_on_slurm:
                server_process.begin(server, _placed_here(settings, saves) | {"studios": str(_studios(saves))}, key)
                return Server(server.path)
            with server_process.new_folder(server):
                server_process.write_settings(server, settings, key)
        return _submitted(Server(server.path), where)
    except OSError as error:
        raise Refusal(problem("cannot-write", folder=saves, why=error.strerror or error)) from error


def _of_base(saves: Path, choice: Choice) -> list[Server]:
    """The studio's servers of a base: the newest is the last, and at most one of them is alive."""
    return servers(saves, f"{_id(choice)}*")


def _decide(saves: Path, choice: Choice, where: EngineChoice) -> Server | None:
    """The server of the chosen base that is alive; None if a new one can be started. Raises Refusal."""
    server = find(saves, choice)
    if server and server.alive:
        if server.engine != choice.engine:
            raise Refusal(problem("chat-other-engine", name=server.name, engine=server.engine))
        return server
    others = [other for other in servers(saves) if other.alive and not other.settings.get("shell")]
    if len(others) >= where.chat_servers:
        who = "; ".join(f"{other.name} ({other.settings['by'] or '—'})" for other in others)
        raise Refusal(problem("chat-too-many", most=where.chat_servers, who=who))
    return None


@contextlib.contextmanager
def _turn(saves: Path) -> Iterator[None]:
    """Decide in turn with the others that start servers. Nothing that may take long belongs in it."""
    (saves / SERVERS_FOLDER).mkdir(exist_ok=True)
    closed = wait_for_lock(saves / SERVERS_FOLDER / ".lock")
    try:
        yield
    finally:
        os.close(closed)


def _clear_away(saves: Path, choice: Choice) -> None:
    """Remove servers of the base that have ended, and what may be left of their processes and folders."""
    for server in _of_base(saves, choice):
        if not server.alive:
            with contextlib.suppress(Refusal):  # Slurm does not cancel its job: a later start tries again
                end(server, waits=False)
    for removed in (saves / SERVERS_FOLDER).glob(f".{_id(choice)}*"):  # by somebody who was killed meanwhile
        shutil.rmtree(removed, ignore_errors=True)


def serve_settings(workplace: Workplace, choice: Choice, by: str) -> dict[str, Any]:
    """The content of serve.json for a server on this machine. Raises Refusal if no GPU is left for it."""
    return _placed_here(_common_settings(workplace, choice, by), workplace.saves)


def _placed_here(settings: Mapping[str, Any], saves: Path) -> dict[str, Any]:
    return server_process.on_gpu(settings, server_gpu.free_gpu(settings, saves)) | {"host": "127.0.0.1"}


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


def _submitted(server: Server, where: EngineChoice) -> Server:
    """Submit the job of a server. Its machine has no locks of studios, so that it ends only when it has been idle.
    Raises Refusal, whose reason others find in the folder, or OSError."""
    try:
        slurm_jobs.submit(server.folder, server.settings, where)
    except Refusal:
        raise
    except BaseException:
        shutil.rmtree(server.path, ignore_errors=True)
        raise
    return server


def end(server: Server, waits: bool = True) -> None:
    """End the process of a server, and wait until it has completely ended; then delete its folder. A job of Slurm is
    not waited for unless it `waits`. Raises Refusal if Slurm does not end it, or the folder cannot be deleted."""
    if server.on_slurm:
        slurm_jobs.cancel(server.folder, server.name, waits)
    else:
        end_processes(server.path, kill_timeout_s=3)
    removed = server.path.with_name(f".{server.path.name}")
    shutil.rmtree(removed, ignore_errors=True)  # left by an end that was killed
    try:
        server.path.rename(removed)  # all at once: nobody can claim half a folder
    except FileNotFoundError:  # unloaded by somebody else, too
        return
    except OSError as error:
        raise Refusal(problem("cannot-write", folder=server.path.parent, why=error.strerror or error)) from error
    shutil.rmtree(removed, ignore_errors=True)


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
