"""A finished training of LLaMA-Factory becomes a run: a folder of ours is written, and nothing of theirs is changed.

An adapter is copied: another training into the same folder may overwrite its files in place, and a run that has ended
must not change. So is a model where the file system can copy without using space; elsewhere its weights are hard links.
A training that has changed since its import becomes another run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.core.hardware import SPARED_BYTES, free_disk
from engine.core.locks import wait_for_lock
from engine.core.permissions import apply_umask
from engine.core.problems import Problem, Refusal, problem, sentences
from engine.core.regular_files import list_files, open_regular, path_of, read_bytes
from engine.core.rundir import RESULT_FILE, RunDir, append_lines, read_object, write_json, write_text
from engine.importer.foreign_runs import ForeignRun, find_runs, open_run
from engine.importer.run_logs import LOG_FILE, MAX_LOG_BYTES, STATE_FILE, Logged, read_logged
from engine.importer.run_specs import spec_of
from engine.launch.workspace import Workplace
from engine.models.adapters import ADAPTER_FILES
from engine.models.discovery import allowed_roots, root_of
from engine.runs import index, quota_use, runs
from engine.runs.run import Run, read
from engine.spec.run_spec import RunSpec

TOOL = "LLaMA-Factory"
OUTPUT_FILE = "running_log.txt"  # what a training started by LLaMA Board has printed
MAX_TEXT_BYTES = 256 << 20  # of a tokenizer's file, or a configuration; the largest tokenizers have some 35 MB
LOCK_FILE = ".imports.lock"  # in the saves folder
FICLONE = 0x40049409  # as in linux/fs.h: the copy shares its blocks with the original until either is changed
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)
TOKENIZER_STARTS = ("tokenizer", "vocab", "merges.", "special_tokens_map.", "added_tokens.", "chat_template")
TOKENIZER_ENDS = (".model", ".tiktoken", ".jinja", "processor_config.json")
MODEL_NAMES = ("config.json", "generation_config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Candidate:
    """A folder that can be imported, unless there is a `hindrance` or it is already a run."""

    folder: Path
    base: str = ""
    changed: float = 0.0  # when its weights were written (seconds since 1970)
    run: Run | None = None
    hindrance: Problem | None = None


def candidates(root: Path, saves: Path) -> list[Candidate]:
    """The trainings in `root`, the newest first, those that cannot be imported last. Raises Refusal as `find_runs`
    does."""
    imported = _imported(saves)
    listed = [_candidate(folder, root, imported) for folder in find_runs(root)]
    return sorted(listed, key=lambda candidate: (candidate.hindrance is not None, -candidate.changed))


def _candidate(folder: Path, root: Path, imported: dict[tuple[str, str], Run]) -> Candidate:
    try:
        run = open_run(folder, root)
        config = read_object(run.weights / ADAPTER_FILES[0])
        changed = os.stat(run.main_file).st_mtime
    except Refusal as refusal:
        return Candidate(folder, hindrance=refusal.problems[0])
    except OSError as error:
        return Candidate(folder, hindrance=problem("file-unreadable", file=folder, why=error.strerror))
    return Candidate(folder, str(config.get("base_model_name_or_path") or ""), changed, _earlier(run, imported))


def import_run(folder: Path, root: Path, workplace: Workplace, by: str) -> tuple[Run, list[Problem]]:
    """The run of the training in `folder`, which is inside `root`, and what a reader has to know of it; the earlier one
    if it has been imported before. Raises Refusal."""
    try:
        lock = wait_for_lock(workplace.saves / LOCK_FILE)
        try:
            theirs, imported = open_run(folder, root), _imported(workplace.saves)
            if earlier := _earlier(theirs, imported):
                return earlier, []
            if excess := quota_use.excess(workplace.saves, workplace.data, by):
                raise Refusal(excess)
            return _import(theirs, workplace, by, imported)
        finally:
            os.close(lock)
    except OSError as error:
        raise Refusal(unreadable(folder, error)) from error


def unreadable(folder: Path, error: OSError) -> Problem:
    """Why a folder was not imported, or not looked at: no permission, a full disk, a network that is gone."""
    values = {"folder": folder, "file": error.filename or "—", "why": error.strerror or error}
    return problem("import-run-unreadable", **values)


def _imported(saves: Path) -> dict[tuple[str, str], Run]:
    """The runs that have been imported, by folder and stamp of what they were imported from."""
    origins = ((run.request.get("imported"), run) for run in index.runs(saves))
    return {(str(at.get("folder")), str(at.get("stamp"))): run for at, run in origins if isinstance(at, dict)}


def _earlier(theirs: ForeignRun, imported: dict[tuple[str, str], Run]) -> Run | None:
    return imported.get((str(theirs.folder), theirs.stamp))


def _import(
    theirs: ForeignRun, workplace: Workplace, by: str, imported: dict[tuple[str, str], Run]
) -> tuple[Run, list[Problem]]:
    """The new run, and what a reader has to know of it."""
    logged = read_logged(theirs.read(LOG_FILE, MAX_LOG_BYTES), theirs.read(STATE_FILE, MAX_LOG_BYTES))
    spec, notes = spec_of(theirs, logged, workplace)
    spec = _continuing_ours(spec, imported)
    notes += theirs.too_long()
    if not logged.lines:
        notes.append(problem("import-run-no-log", files=f"{LOG_FILE}, {STATE_FILE}"))
    if theirs.checkpoint:
        notes.append(problem("import-run-from-checkpoint", checkpoint=theirs.weights.name))
    ended = os.stat(theirs.main_file).st_mtime
    started = ended - (logged.seconds if logged.seconds > 0 else 0.0)
    before = next((run for (folder, _), run in imported.items() if folder == str(theirs.folder)), None)
    if before:
        notes.append(problem("import-run-changed", run=before.id))
    folder = runs.new_folder(spec, workplace.saves, at=started)
    try:
        notes += _write(RunDir(folder), theirs, spec, logged, ended, workplace.model_roots)
        write_json(RunDir(folder).left_out, [_as_json(note) for note in notes])
        origin = {"tool": TOOL, "folder": str(theirs.folder), "stamp": theirs.stamp}
        request = {"kind": spec.kind, "by": by, "submitted": started, "queued": time.time_ns(), "attempt": 1}
        # Last: a folder without a request is not a run yet.
        write_json(RunDir(folder).request, request | {"stop": None, "imported": origin})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return read(folder, workplace.saves), notes


def _continuing_ours(spec: RunSpec, imported: dict[tuple[str, str], Run]) -> RunSpec:
    """The spec, with the adapter that it continues as the run that was made of it, if there is one."""
    before = os.path.realpath(spec.model.adapter_path) if spec.model.adapter_path else ""
    run = next((run for (folder, _), run in imported.items() if folder == before), None)
    return spec.change("model.adapter_path", str(run.dir.adapter)) if run else spec


def _write(
    run: RunDir, theirs: ForeignRun, spec: RunSpec, logged: Logged, ended: float, roots: Sequence[Path]
) -> list[Problem]:
    """Write everything but the request; returns remarks on the copy."""
    result = run.adapter if theirs.form == "adapter" else run.model
    result.mkdir()
    shares = any([_bring(theirs, path, result / path.name) for path in _files(theirs)])
    complete = not theirs.checkpoint and logged.complete is not False
    state = {"attempt": 1, "complete": complete, "step": logged.step, "saved": ended, "stage": spec.stage.kind}
    base = spec.model.model_name_or_path
    write_json(result / RESULT_FILE, state | {"base": base, "peak_device_memory": None})
    write_text(run.spec, spec.to_yaml())
    if logged.lines:
        append_lines(run.metrics, logged.lines)
    if printed := theirs.read(OUTPUT_FILE):
        write_text(run.log, printed.decode("utf-8", "replace"))
    progress = {"phase": "training", "done": logged.step, "total": logged.total, "unit": "steps", "at": ended}
    write_json(run.progress, progress)
    outcome = "finished" if complete else "stopped"
    end = {"outcome": outcome, "reason": outcome, "code": 0, "signal": None, "ended": ended, "attempt": 1}
    write_json(run.exit, end | {"peak_memory": None})
    notes = [problem("import-run-shares", folder=theirs.weights)] if shares else []
    if not any(os.path.isfile(result / name) for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        notes.append(_tokenizer_of_base(Path(base), result, roots))
    return notes


def _files(theirs: ForeignRun) -> list[Path]:
    """The files of the result: weights, and tokenizer with chat template and processor, from the training's folder if
    they are not beside the weights."""
    beside, above = ([Path(entry.path) for entry in list_files(place)] for place in (theirs.weights, theirs.folder))
    if theirs.form == "adapter":
        weights = [theirs.weights / name for name in ADAPTER_FILES]
    else:
        weights = [path for path in beside if path.name in MODEL_NAMES or path.name.endswith(".safetensors")]
        weights = [path for path in weights if not path.name.startswith(("value_head", "adapter_"))]
    texts = ([path for path in place if _is_tokenizer(path.name)] for place in (beside, above))
    return [*weights, *next(filter(None, texts), [])]


def _is_tokenizer(name: str) -> bool:
    return name.startswith(TOKENIZER_STARTS) or name.endswith(TOKENIZER_ENDS)


def _bring(theirs: ForeignRun, source: Path, target: Path) -> bool:
    """Copy a file, without using space if possible; whether it is a hard link, as large weights are otherwise. Raises
    OSError and Refusal."""
    links = False
    with theirs.open(source) as original:
        with target.open("xb") as copy:
            if not _cloned(original, copy):
                links = theirs.form == "model" and source.suffix == ".safetensors"
                if not links:
                    _copy(source, original, copy)
        if links:
            _link(theirs, source, original, target)
    if not links:
        apply_umask(target)
    return links


def _copy(source: Path, original: BinaryIO, copy: BinaryIO) -> None:
    """Copy as many bytes as the file has now. Raises Refusal for a text that is none by its size, or if the disk would
    not have enough space left: a file may be sparse, and far larger than what it takes."""
    size, free = os.fstat(original.fileno()).st_size, free_disk(Path(copy.name).parent)
    if source.suffix != ".safetensors" and size > MAX_TEXT_BYTES:
        raise Refusal(problem("import-run-file-large", file=source, size=size >> 20, limit=MAX_TEXT_BYTES >> 20))
    if size > free - SPARED_BYTES:
        raise Refusal(problem("import-run-no-space", file=source, size=size >> 20, free=free >> 20))
    left = size
    while left and (piece := original.read(min(left, 1 << 20))):
        left -= copy.write(piece)


def _cloned(original: BinaryIO, copy: BinaryIO) -> bool:
    """Whether the file system has made the copy, which it can within itself."""
    try:
        fcntl.ioctl(copy.fileno(), FICLONE, original.fileno())
        return True
    except OSError:
        return False


def _link(theirs: ForeignRun, source: Path, original: BinaryIO, target: Path) -> None:
    """Replace the target by a hard link to the file that has been opened."""
    target.unlink()
    try:
        os.link(os.path.realpath(source), target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        code = "import-run-model-elsewhere" if error.errno == errno.EXDEV else "import-run-model-no-link"
        raise Refusal(problem(code, folder=theirs.weights, why=error.strerror)) from error
    if not os.path.samestat(os.stat(target, follow_symlinks=False), os.fstat(original.fileno())):
        raise Refusal(problem("import-run-outside", file=source, root=theirs.root))


def _tokenizer_of_base(base: Path, result: Path, roots: Sequence[Path]) -> Problem:
    """Give a result without a tokenizer that of its base, and say so. The training says where the base is, and whoever
    wrote that must not get other files of this machine, so it is looked for where models are, and links are followed
    only within the same root."""
    allowed = allowed_roots(roots)
    root = root_of(base, allowed)
    paths = [Path(entry.path) for entry in list_files(base) if _is_tokenizer(entry.name)] if root else []
    with ExitStack() as opened:
        files = {path.name: opened.enter_context(open_regular(path)) for path in paths}
        if any(root_of(path_of(file), allowed) != root for file in files.values()):
            files = {}
        for name, file in files.items():
            with (result / name).open("wb") as copy:
                _copy(base / name, file, copy)
    return problem("import-run-tokenizer" if files else "import-run-no-tokenizer", base=base)


def _as_json(note: Problem) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(dict(note.values), default=str))
    return {"code": note.code, "field": note.field, "values": values}


def remarks(run: RunDir) -> list[Problem]:
    """What a reader has to know of an imported run: what could not be taken over; [] for any other run."""
    try:
        noted = json.loads(read_bytes(run.left_out))
        return [Problem(note["code"], note["field"], note["values"]) for note in noted if note["code"] in sentences()]
    except (OSError, ValueError, LookupError, TypeError):
        return []
