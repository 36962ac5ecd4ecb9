"""The folder of a run: all paths in it, atomic writes, and the lock that shows that the run is alive.

docs/architecture.md lists what each file means; `tests/test_contract.py` freezes the names. This module knows nothing
about processes or training.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine.core.locks import is_locked
from engine.core.permissions import apply_umask
from engine.core.problems import Refusal, problem
from engine.core.regular_files import list_folders, open_regular, read_bytes

MAX_LINES_BYTES = 1 << 30  # of a JSON Lines file that is read as a whole
# Three bytes of the lock file, locked independently. ALIVE_BYTE is shared by the supervisor and all worker ranks: if
# anyone holds it, the run is alive. SUPERVISED_BYTE is held by the one supervisor, so that no run gets two. Whoever
# changes the turn of a waiting run holds TURN_BYTE: Slurm is told of changes in the order in which they were written.
ALIVE_BYTE, SUPERVISED_BYTE, TURN_BYTE = 0, 1, 2


T = TypeVar("T")


class _PathBelow:
    """An attribute that is a path in the folder of a run."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, run: RunDir, _owner: type[RunDir]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunDir:
    """The paths of one run."""

    path: Path

    spec = _PathBelow("spec.yaml")
    accelerate = _PathBelow("accelerate.yaml")
    connection = _PathBelow("connection.json")
    request = _PathBelow("request.json")
    lock = _PathBelow("lock")
    keeper = _PathBelow("keeper.json")
    log = _PathBelow("log.txt")
    progress = _PathBelow("progress.json")
    metrics = _PathBelow("metrics.jsonl")
    warnings = _PathBelow("warnings.jsonl")
    stalled = _PathBelow("stalled.txt")
    samples = _PathBelow("samples.jsonl")
    prepared = _PathBelow("prepared")
    initial = _PathBelow("initial_adapter")
    adapter = _PathBelow("adapter")
    model = _PathBelow("model")
    report = _PathBelow("report")
    probe = _PathBelow("probe.json")
    gguf = _PathBelow("gguf.json")
    plot = _PathBelow("training_loss.png")
    error = _PathBelow("error.json")
    exit = _PathBelow("exit.json")
    attempts = _PathBelow("attempts")
    reserve = _PathBelow(".reserve")
    slurm = _PathBelow("slurm.json")
    slurm_refused = _PathBelow("slurm_refused.json")
    heartbeat = _PathBelow("heartbeat")
    pause = _PathBelow("pause.json")
    left_out = _PathBelow("left_out.json")
    notifications = _PathBelow("notifications.json")

    def alive(self) -> bool:
        """Whether any process of the run is alive. One that Slurm runs is on other machines, whose locks are not seen
        here: its supervisor touches a file."""
        if self.on_slurm():
            return not os.path.lexists(self.exit) and heartbeat_age(self) < HEARTBEAT_LOST_SECONDS
        return is_locked(self.lock, ALIVE_BYTE)

    def on_slurm(self) -> bool:
        """Whether the current attempt has been handed to Slurm."""
        return os.path.lexists(self.slurm)

    def attempt(self) -> int:
        """The number of the current attempt: 1, and one more for each resume, and each time that Slurm has started it
        again."""
        ended = [int(folder.name) for folder in list_folders(self.attempts) if folder.name.isdecimal()]
        return max(number + 1 for number in [read_json(self.request)["attempt"] - 1, *ended])

    def log_of(self, machine: int) -> Path:
        """The log of one of several machines; that of the first (0) is `log`."""
        return self.log if machine == 0 else self.path / f"log-{machine + 1}.txt"

    def logs(self) -> list[Path]:
        """The logs that there are, by machine."""
        others = map(self.log_of, itertools.count(1))
        return [self.log, *itertools.takewhile(os.path.lexists, others)]

    def log_from(self, log: Path | None = None) -> int:
        """The position in a log (None: the run's) where this attempt begins."""
        keeper = read_object(self.keeper)
        if log is None or log == self.log:
            return keeper.get("log_from", 0)
        return keeper.get("logs_from", {}).get(log.name, 0)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first. A checkpoint without its marker was interrupted while being written."""
        checkpoints = [path.parent for path in self.path.glob(f"checkpoint-*/{COMPLETE_FILE}")]
        return sorted(checkpoints, key=step_of)

    def result(self) -> Path | None:
        """The folder with the weights that this run has produced, if any."""
        return _folder_with_result(self.adapter, self.model)

    def left(self) -> Path | None:
        """The folder with the result of this run: weights, or the report of an evaluation."""
        return _folder_with_result(self.adapter, self.model, self.report)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps after which a checkpoint was written."""
    return int(checkpoint.name.rsplit("-", 1)[-1])


def _folder_with_result(*folders: Path) -> Path | None:
    # os.path treats a folder that cannot be accessed as one without a result.
    return next((folder for folder in folders if os.path.exists(folder / RESULT_FILE)), None)


def distinct_titles(titles: Mapping[str, str]) -> dict[str, str]:
    """Distinct names of runs by their ids: as `titles` gives them, with the folder added to duplicates."""
    titles = dict(titles)
    for disambiguate in (lambda id, title: f"{title} · {id.split('/')[-1]}", lambda id, _: id):
        counts = Counter(titles.values())
        titles = {id: disambiguate(id, title) if counts[title] > 1 else title for id, title in titles.items()}
    return titles


def scan_methods(saves: Path) -> Iterator[tuple[str, str]]:
    """Every folder in `saves` that may contain runs, saves/<model>/<method>: the start of their ids, and its path."""
    for model in list_folders(saves):
        if not model.name.startswith("."):
            for method in list_folders(model.path):
                yield f"{model.name}/{method.name}", method.path


def run_folders(saves: Path) -> list[Path]:
    """Every completely submitted run in `saves`."""
    folders = (run.path for _, method in scan_methods(saves) for run in list_folders(method))
    return [Path(folder) for folder in folders if os.path.lexists(f"{folder}/request.json")]


def any_run_alive(saves: Path) -> bool:
    """Whether a run is alive."""
    return any(RunDir(folder).alive() for folder in run_folders(saves))


HEARTBEAT_SECONDS, HEARTBEAT_LOST_SECONDS = 5.0, 120.0  # between two heartbeats; without one, until it counts as lost


def heartbeat_age(run: RunDir) -> float:
    """Seconds since the supervisor of a run on another machine has last shown that it is alive."""
    try:
        return time.time() - run.heartbeat.stat().st_mtime
    except OSError:
        return math.inf


COMPLETE_FILE = "complete.json"  # marks a checkpoint whose files are all on disk
WAITING_FOR_SPACE = "waiting for space"  # the phase of a training whose next checkpoint does not fit on the disk
RESULT_FILE = "result.json"  # marks a result, and contains the attempt that wrote it


def write_text(path: Path, text: str, *, durable: bool = True, private: bool = False) -> None:
    """Write a file atomically: readers never see half of it, and a full disk leaves the old one in place.

    `durable`: it also survives a power failure, for which the writer waits for the disk; `private`: only its owner may
    read it.
    """
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp's mode is 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if not private:
            apply_umask(partial)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n", durable=durable)


def read_json(path: Path) -> Any:
    """The JSON in `path`; None if it cannot be read: no file, a folder, no permission, not JSON."""
    try:
        return json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        return None


def read_to_change(path: Path, empty: T) -> T:
    """The JSON list or object in a file that is about to be replaced; `empty` without a file. Raises Refusal if it
    cannot be read, so that what it contains is not lost."""
    try:
        value = json.loads(read_bytes(path))
    except FileNotFoundError:
        return empty
    except OSError as error:
        raise Refusal(problem("file-not-replaced", file=path, why=error.strerror or error)) from error
    except (ValueError, RecursionError) as error:
        raise Refusal(problem("file-not-replaced", file=path, why=error)) from error
    if type(value) is not type(empty):
        raise Refusal(problem("file-not-replaced", file=path, why=f"{type(value).__name__} ≠ {type(empty).__name__}"))
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} if it cannot be read."""
    value = read_json(path)
    return value if isinstance(value, dict) else {}


def stamp(paths: Iterable[str | os.PathLike[str]]) -> str:
    """A value that changes when one of the files is changed, created or deleted."""
    stamps = []
    for path in paths:
        try:
            status = os.stat(path)
            stamps.append(f"{status.st_mtime_ns}:{status.st_size}")
        except OSError:
            stamps.append("-")
    return "|".join(stamps)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete JSON objects of a JSON Lines file. Lines damaged by a kill or power loss are left out."""
    objects = []
    try:
        lines = read_bytes(path, MAX_LINES_BYTES).splitlines()
    except OSError:  # missing, or not a file
        lines = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects


def append_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON objects to a JSON Lines file, after any half line that a kill has left. JSON has no NaN, so it
    becomes null."""
    lines = "".join(json.dumps(_plain(value), ensure_ascii=False) + "\n" for value in values)
    with path.open("a", encoding="utf-8") as file:
        torn = file.tell() and not end_of(path, 1).endswith(b"\n")
        file.write("\n" * bool(torn) + lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def end_of(path: Path, size: int, after: int = 0) -> bytes:
    """The last `size` bytes of a file, but none before `after`; empty if there is no file."""
    try:
        with open_regular(path) as file:
            file.seek(max(file.seek(0, os.SEEK_END) - size, after))
            return file.read()
    except OSError:
        return b""
