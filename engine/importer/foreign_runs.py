"""The finished trainings in LLaMA-Factory's `saves`: which there are, and what each has left. Nothing is written.

A folder may belong to somebody else. So a link is followed only within the folder in which the trainings are looked
for, checked on what has been opened, and no pickle is read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from engine.core import regular_files
from engine.core.problems import Problem, Refusal, problem
from engine.core.regular_files import list_folders
from engine.core.rundir import RESULT_FILE, stamp, step_of
from engine.importer.run_logs import LOG_FILE, MAX_LOG_BYTES, STATE_FILE
from engine.models.adapters import ADAPTER_FILES
from engine.models.json_objects import read_json_object
from engine.models.safetensors_headers import PICKLE_SUFFIXES

SETTINGS_FILES = ("training_args.yaml", "llamaboard_config.yaml")  # of LLaMA Board, with and without paths
MARKS = (LOG_FILE, STATE_FILE, *SETTINGS_FILES, ADAPTER_FILES[0])  # a folder with one of these is a training's
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")
CONVERTED = "pissa_converted"  # the folder of a PiSSA adapter as an ordinary one
# Initial weights that are taken away from those of the base: such an adapter does not fit the base as it is.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
SCORE_HEADS = ("value_head.safetensors", "value_head.bin")
ENDED_FILE = "train_results.json"  # written when a training has ended
QUIET_SECONDS = 600.0  # after which a training that has logged nothing more is no longer in progress
MAX_DEPTH = 6  # saves/model/method/training, and above
MAX_FOLDERS = 20_000


@dataclass(frozen=True)
class ForeignRun:
    """One training. `root` is the folder outside which nothing is read; `weights` is where the weights are: the folder
    itself, that of a converted adapter, or the newest checkpoint's."""

    folder: Path
    root: Path
    weights: Path
    form: Literal["adapter", "model"]

    @property
    def checkpoint(self) -> bool:
        """Whether the training left no result, only checkpoints."""
        return self.weights.name.startswith("checkpoint-")

    @property
    def main_file(self) -> Path:
        """The file that every result of this form has."""
        names = ADAPTER_FILES[1:] if self.form == "adapter" else MODEL_FILES
        return next(self.weights / name for name in names if os.path.isfile(self.weights / name))

    @property
    def stamp(self) -> str:
        """Changes when the training has gone on, or another has taken its place."""
        names = (*ADAPTER_FILES, *MODEL_FILES)
        return stamp([*(self.weights / name for name in names), self.folder / LOG_FILE, self.folder / STATE_FILE])

    def open(self, path: Path) -> BinaryIO:
        """A file for reading. Raises OSError, and Refusal if it is outside of `root`."""
        file = regular_files.open_regular(path)
        if not Path(regular_files.path_of(file)).is_relative_to(self.root):
            file.close()
            raise Refusal(problem("import-run-outside", file=path, root=self.root))
        return file

    def read(self, name: str, limit: int = regular_files.MAX_BYTES) -> bytes:
        """The content of a file of the training's folder; empty if there is none, or it has more than `limit` bytes.
        Raises Refusal if it cannot be read."""
        try:
            with self.open(self.folder / name) as file:
                return b"" if os.fstat(file.fileno()).st_size > limit else file.read(limit)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise Refusal(problem("file-unreadable", file=self.folder / name, why=error.strerror)) from error

    def size(self, name: str) -> int:
        """The bytes of a file of the training's folder; 0 if there is none."""
        try:
            return os.stat(self.folder / name).st_size
        except OSError:
            return 0

    def too_long(self) -> list[Problem]:
        """The logs that are not read."""
        sizes = {name: self.size(name) for name in (LOG_FILE, STATE_FILE)}
        return [
            problem("import-run-log-long", file=name, size=size >> 20, limit=MAX_LOG_BYTES >> 20)
            for name, size in sizes.items()
            if size > MAX_LOG_BYTES
        ]


def find_runs(root: Path) -> Iterator[Path]:
    """Every folder of a training in `root`, itself included, with links resolved; none inside another. Raises Refusal
    if `root` is not a folder, or if it has too many folders."""
    root = Path(os.path.realpath(root))
    if not root.is_dir():
        raise Refusal(problem("import-run-no-folder", folder=root))
    seen: set[Path] = set()
    waiting = [(root, 0)]
    while waiting:
        folder, depth = waiting.pop()
        if folder in seen or not folder.is_relative_to(root):
            continue
        seen.add(folder)
        if len(seen) > MAX_FOLDERS:
            raise Refusal(problem("import-run-many-folders", folder=root, most=f"{MAX_FOLDERS:,}"))
        if any(os.path.lexists(folder / name) for name in MARKS) or _checkpoints(folder):
            yield folder
        elif depth < MAX_DEPTH:
            below = (entry.path for entry in list_folders(folder) if not entry.name.startswith("."))
            waiting += [(Path(os.path.realpath(path)), depth + 1) for path in sorted(below, reverse=True)]


def open_run(folder: Path, root: Path) -> ForeignRun:
    """The training in `folder`. Raises Refusal if it has nothing that can be used here, or is still in progress."""
    if "\0" in str(folder):
        raise Refusal(problem("import-run-outside", file=folder, root=root))
    folder, root = Path(os.path.realpath(folder)), Path(os.path.realpath(root))
    if not folder.is_relative_to(root):
        raise Refusal(problem("import-run-outside", file=folder, root=root))
    if os.path.lexists(folder / RESULT_FILE) or os.path.lexists(folder / "request.json"):
        raise Refusal(problem("import-run-own", folder=folder))
    if not os.access(folder, os.R_OK | os.X_OK):
        raise Refusal(problem("file-unreadable", file=folder, why=os.strerror(13)))
    if _in_progress(folder):
        raise Refusal(problem("import-run-in-progress", folder=folder, minutes=round(QUIET_SECONDS / 60)))
    for place in (folder / CONVERTED, folder, *reversed(_checkpoints(folder))):
        if linked := next((path for path in place.glob("*") if not _is_below(path, root)), None):
            raise Refusal(problem("import-run-outside", file=linked, root=root))
        if os.path.isfile(place / ADAPTER_FILES[0]) and os.path.isfile(place / ADAPTER_FILES[1]):
            run = ForeignRun(folder, root, place, "adapter")
            if unusable := _unusable_adapter(place):
                raise Refusal(unusable)
            return run
        if place != folder / CONVERTED and _is_model(place):
            return ForeignRun(folder, root, place, "model")
    pickled = next((entry.name for entry in regular_files.list_files(folder) if _is_pickled(entry.name)), None)
    if pickled:
        raise Refusal(problem("import-run-pickled", folder=folder, file=pickled))
    raise Refusal(problem("import-run-no-weights", folder=folder))


def score_head(run: ForeignRun) -> str:
    """The file with the score head that a reward model and a PPO training have beside the weights; "" if none."""
    return next((name for name in SCORE_HEADS if os.path.isfile(run.folder / name)), "")


def _unusable_adapter(folder: Path) -> Problem | None:
    config = read_json_object(folder / ADAPTER_FILES[0])
    if isinstance(config, Problem):
        return config.at(folder)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        return problem("import-run-method", folder=folder, method=kind)
    initial = str(config.get("init_lora_weights", True)).lower()
    if folder.name != CONVERTED and initial.startswith(CHANGES_BASE):
        return problem("import-run-changed-base", folder=folder, initial=initial, converted=CONVERTED)
    return None


def _is_below(path: Path, root: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root)


def _is_model(folder: Path) -> bool:
    return os.path.isfile(folder / "config.json") and any(os.path.isfile(folder / name) for name in MODEL_FILES)


def _is_pickled(name: str) -> bool:
    return name.startswith(("adapter_model", "pytorch_model")) and name.endswith(PICKLE_SUFFIXES)


def _checkpoints(folder: Path) -> list[Path]:
    """The folders of checkpoints, oldest first."""
    numbered = (entry for entry in list_folders(folder) if entry.name.startswith("checkpoint-"))
    folders = [Path(entry.path) for entry in numbered if entry.name.rpartition("-")[2].isdecimal()]
    return sorted(folders, key=step_of)


def _in_progress(folder: Path) -> bool:
    """Whether a training has logged something lately without having ended."""
    try:
        logged = os.stat(folder / LOG_FILE).st_mtime
    except OSError:
        return False
    return not os.path.exists(folder / ENDED_FILE) and 0 <= time.time() - logged < QUIET_SECONDS
