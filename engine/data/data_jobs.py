"""Data jobs that take a while: check a data set, import a workbook, derive one set from another, download one from a
hub; and convert the weights of a model.

Like a run, each job is a folder and a child process that fills it. The folder is the truth, so closing a page loses
nothing, and a restarted studio finds what was done. Unlike a run, a job needs no queue and no supervisor. Its name is a
hash of its request, so whoever starts the same job on the same data finds it in progress, or finds its result if the
job only reads.

    request.json    what was asked                  progress.json   how far it is
    lock            held while it is running        result.json or error.json, last
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from engine.core.locks import is_locked, try_lock
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import ALIVE_BYTE, read_json, read_object, write_json
from engine.data import derive, owners, uploads, validation
from engine.data.datasets import find
from engine.data.row_files import truncation_problem, version
from engine.launch import command
from engine.launch.processes import end_processes
from engine.launch.workspace import PROJECT

JOBS_FOLDER = ".errands"
VALIDATION_VERSION = 2  # raise it whenever the same rows would be validated differently
MAX_FINISHED_JOBS = 40
MAX_PROBLEMS_SHOWN = 50  # problems of a set shown on its page, and warnings of each kind
MAX_PAIRS_SHOWN = 20  # similar rows that were removed
EXIT_TIMEOUT_S = 5  # a process that has written its result has exited by then
BAD_ROWS_FILE = "bad-rows.jsonl"
CACHEABLE_JOBS = frozenset({"check"})  # these only read; the result of others may be deleted before the next request


class ReportProgress(Protocol):
    """Called with the number done, the total if it is known, and the unit."""

    def __call__(self, done: int, total: int | None = None, unit: str = "rows") -> None: ...


@dataclass(frozen=True)
class DataJob:
    """One job, by its folder."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def state(self) -> Literal["working", "done", "failed"]:
        """ "failed" includes a process that ended without a result: killed, or out of memory."""
        alive = is_locked(self.path / "lock", ALIVE_BYTE)  # looked at first: it may end with its result in between
        if (self.path / "result.json").exists():
            return "done"
        return "working" if alive else "failed"

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments of the job: the name of the data set, and more."""
        return read_object(self.path / "request.json").get("given", {})

    @property
    def progress(self) -> Mapping[str, Any]:
        return read_object(self.path / "progress.json")

    @property
    def result(self) -> Any:
        return read_json(self.path / "result.json")

    @property
    def problems(self) -> list[Problem]:
        """Why it failed."""
        records = read_json(self.path / "error.json")
        if records is None:
            return [problem("errand-ended")] if self.state == "failed" else []
        return [Problem(record["code"], record["field"], record["values"]) for record in records]


def start(saves: Path, what: str, arguments: Mapping[str, Any]) -> DataJob:
    """Start the job `what`, unless it is running, or its result is known and cacheable. Returns immediately."""
    job = _job_for(saves, what, arguments)
    job.path.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while (lock := try_lock(job.path / "lock", ALIVE_BYTE, shared=False)) is None:
        if what in CACHEABLE_JOBS or job.state == "working" or time.monotonic() > deadline:
            return job
        time.sleep(0.01)  # it has written its result and is about to exit: what it created may be deleted before
    try:
        if what not in CACHEABLE_JOBS or not (job.path / "result.json").exists():
            for stale in ("result.json", "error.json", "progress.json"):
                (job.path / stale).unlink(missing_ok=True)
            write_json(job.path / "request.json", {"what": what, "given": arguments, "at": time.time()}, durable=False)
            start_process(job.path, JOB_MODULES.get(what, __spec__.name), lock)
    finally:
        os.close(lock)  # the child has it now
    _prune(saves)
    return job


def find_finished(saves: Path, what: str, arguments: Mapping[str, Any]) -> DataJob | None:
    """The finished job with the same arguments on the current data; None if there is none."""
    job = _job_for(saves, what, arguments)
    return job if job.state == "done" else None


def _job_for(saves: Path, what: str, arguments: Mapping[str, Any]) -> DataJob:
    key = json.dumps(
        [VALIDATION_VERSION, what, arguments, _data_versions(arguments)], sort_keys=True, ensure_ascii=False
    )
    return DataJob(saves / JOBS_FOLDER / f"{what}-{hashlib.sha256(key.encode()).hexdigest()[:20]}")


def get(saves: Path, id: str) -> DataJob | None:
    """The job with that id; None if there is none."""
    job = DataJob(saves / JOBS_FOLDER / id)
    fine = id and job.path.parent == saves / JOBS_FOLDER and not id.startswith(".")
    return job if fine and (job.path / "request.json").is_file() else None


def wait(job: DataJob, seconds: float = 3600) -> Any:
    """The result, once it exists. Raises Refusal if there will be none."""
    deadline = time.monotonic() + seconds
    while job.state == "working" and time.monotonic() < deadline:
        time.sleep(0.05)
    if job.state != "done":
        raise Refusal(job.problems or [problem("errand-ended")])
    return job.result


def stop(job: DataJob) -> None:
    """End it, if it is running."""
    end_processes(job.path, kill_timeout_s=1)


def start_process(folder: Path, module: str, lock: int) -> None:
    """Start the process of the job in `folder`, which holds the lock from now on."""
    with (folder / "log.txt").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            cwd=PROJECT,
            pass_fds=(lock,),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=command.inherited_environment() | {command.RUN_VARIABLE: str(folder), "PYTHONUTF8": "1"},
        )
    threading.Thread(target=child.wait, daemon=True, name="job").start()  # avoids a zombie


def _data_versions(arguments: Mapping[str, Any]) -> list[Any]:
    """A value that changes when a file of the job changes."""
    with contextlib.suppress(Refusal, OSError):
        names = [arguments["name"], *arguments.get("against", ())] if "name" in arguments else []
        datasets = [find(Path(arguments["data"]), name) for name in names]
        return [[str(file), *version(file)] for dataset in datasets for file in dataset.files] + [repr(datasets)]
    return []


def _prune(saves: Path) -> None:
    """Delete the oldest finished jobs beyond MAX_FINISHED_JOBS."""
    finished = [folder for folder in (saves / JOBS_FOLDER).iterdir() if not is_locked(folder / "lock", ALIVE_BYTE)]
    finished.sort(key=lambda folder: folder.stat().st_mtime)
    for folder in finished[: max(len(finished) - MAX_FINISHED_JOBS, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


# -------------------------------------------------------------------------------------- in the child


@contextlib.contextmanager
def job_process(folder: str) -> Iterator[tuple[Path, Mapping[str, Any], ReportProgress]]:
    """The frame of a job's child process: yields its folder, its arguments and the function that reports progress.

    Errors are recorded as codes, which can be shown in any language.
    """
    path, due = Path(folder), 0.0

    def report(done: int, total: int | None = None, unit: str = "rows") -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + 0.4
            with contextlib.suppress(OSError):
                write_json(path / "progress.json", {"done": done, "total": total, "unit": unit}, durable=False)

    try:
        yield path, read_json(path / "request.json")["given"], report
    except Exception as error:
        traceback.print_exc()
        problems = error.problems if isinstance(error, Refusal) else [problem("errand-error", what=repr(error))]
        records = [
            {"code": issue.code, "field": issue.field, "values": {k: str(v) for k, v in issue.values.items()}}
            for issue in problems
        ]
        write_json(path / "error.json", records)
        sys.exit(1)


def _check(folder: Path, arguments: Mapping[str, Any], report: ReportProgress) -> dict[str, Any]:
    """Validate a whole set; write the bad rows to a file, each with the reason."""
    data = Path(arguments["data"])
    dataset = find(data, arguments["name"])
    against = [find(data, name) for name in arguments["against"]]
    with (folder / BAD_ROWS_FILE).open("w", encoding="utf-8") as bad:

        def keep(place: Any, wrong: Problem, row: Any) -> None:
            record = {
                "file": place.file.name,
                "row": place.row,
                "line": place.line,
                "code": wrong.code,
                "problem": wrong.text(arguments["language"]),
                "content": row,
            }
            bad.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")

        result = validation.check(
            dataset,
            dataset.kind,
            max_problems=MAX_PROBLEMS_SHOWN,
            against=against,
            on_bad=keep,
            on_rows=lambda done: report(done, None, "rows"),
        )

    return {
        "good": result.good,
        "bad": result.bad,
        "problems": as_records(result.problems),
        "warnings": as_records(result.warnings),
        "counts": dict(result.counts),
        "scripts": dict(result.scripts),
    }


def as_records(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    return [
        {"code": issue.code, "values": {name: str(value) for name, value in issue.values.items()}} for issue in problems
    ]


def _receive(folder: Path, arguments: Mapping[str, Any], report: ReportProgress) -> dict[str, Any]:
    data = Path(arguments["data"])
    notes: list[Problem] = []
    arrived = uploads.receive(Path(arguments["source"]), arguments["called"], data, notes.append)
    broken = truncation_problem(arrived)
    return {
        "file": str(arrived.relative_to(data)),
        "problems": as_records([broken] if broken else []),
        "notes": as_records(notes),
    }


def _deduplicate(folder: Path, arguments: Mapping[str, Any], report: ReportProgress) -> dict[str, Any]:
    made = derive.deduplicate(Path(arguments["data"]), arguments["name"], arguments.get("similarity", 1.0), report)
    pairs = [(str(pair.place), str(pair.earlier), pair.similarity) for pair in made.similar[:MAX_PAIRS_SHOWN]]
    return {"made": made.names, "counts": made.counts, "similar": len(made.similar), "pairs": pairs}


def _split(folder: Path, arguments: Mapping[str, Any], report: ReportProgress) -> dict[str, Any]:
    made = derive.split(
        Path(arguments["data"]),
        arguments["name"],
        arguments["share"],
        arguments["seed"],
        report,
    )
    return {"made": made.names, "counts": made.counts}


JOBS: dict[str, Callable[[Path, Mapping[str, Any], ReportProgress], dict[str, Any]]] = {
    "check": _check,
    "receive": _receive,
    "deduplicate": _deduplicate,
    "split": _split,
}
# Jobs that need more than the engine have their own module.
JOB_MODULES = {"download": "engine.worker.data.download", "convert": "engine.worker.models.convert"}


def main() -> int:
    with job_process(sys.argv[1]) as (folder, arguments, report):
        what = read_json(folder / "request.json")["what"]
        result = JOBS[what](folder, arguments, report)
        owners.claim_result(arguments, result)
        write_json(folder / "result.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
