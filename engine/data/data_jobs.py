"""Jobs about data that take a while: to check a set, take a workbook in, make one set of another, fetch one from a hub.

Like a run, each is a folder and a child process that fills it; the folder is the truth, so a page that is closed loses
nothing, and a studio that is restarted finds what was done. Unlike a run it needs no queue and no supervisor: what it was
asked is in its name, and who asks the same of the same data meanwhile finds it there, and its answer if it is one that
changes nothing.

    request.json    what was asked                  progress.json   how far it is
    lock            held while it goes on           result.json or error.json, last
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
from typing import Any, Literal

from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import ALIVE, held, read_json, take, write_json
from engine.data import derive, uploads, validation
from engine.data.datasets import find
from engine.data.row_files import broken_off, version
from engine.launch import command
from engine.launch.processes import end_processes
from engine.launch.workspace import PROJECT

FOLDER = ".errands"
RULES = 2  # by which rows are judged: one more whenever the same rows are judged otherwise
KEPT = 40  # finished ones
MOST = 50  # problems of a set that its page shows, and warnings of each sort
LEAVING_S = 5  # a process that has said its last is gone by then
BAD_ROWS = "bad-rows.jsonl"
ANSWERS = frozenset(
    {"check"}
)  # what is only looked up; the others make something, which may be gone when asked again
Report = Callable[[int, int | None, str], None]  # done, of how many, of what


@dataclass(frozen=True)
class Errand:
    """One job, by its folder."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def state(self) -> Literal["working", "done", "failed"]:
        """Failed is also what has ended without a word: killed, or out of memory."""
        if (self.path / "result.json").exists():
            return "done"
        return "working" if held(self.path / "lock", ALIVE) else "failed"

    @property
    def asked(self) -> Mapping[str, Any]:
        """What was given: the set it is about, and more."""
        return (read_json(self.path / "request.json") or {}).get("given", {})

    @property
    def progress(self) -> Mapping[str, Any]:
        return read_json(self.path / "progress.json") or {}

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


def start(saves: Path, what: str, arguments: Mapping[str, Any]) -> Errand:
    """Have `what` done, unless it is being done, or is an answer that is known already. Comes back at once."""
    errand = _named(saves, what, arguments)
    errand.path.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LEAVING_S
    while (lock := take(errand.path / "lock", ALIVE, shared=False)) is None:
        if what in ANSWERS or errand.state == "working" or time.monotonic() > deadline:
            return errand
        time.sleep(0.01)  # it has said its last and is about to be gone: what it made may be gone before
    try:
        if what not in ANSWERS or not (errand.path / "result.json").exists():
            for stale in ("result.json", "error.json", "progress.json"):
                (errand.path / stale).unlink(missing_ok=True)
            write_json(errand.path / "request.json", {"what": what, "given": arguments, "at": time.time()})
            _begin(errand, MODULES.get(what, __spec__.name), lock)
    finally:
        os.close(lock)  # the child has it now
    _prune(saves)
    return errand


def known(saves: Path, what: str, arguments: Mapping[str, Any]) -> Errand | None:
    """The errand that has done just that with the data as it is now; None if it has not been done."""
    errand = _named(saves, what, arguments)
    return errand if errand.state == "done" else None


def _named(saves: Path, what: str, arguments: Mapping[str, Any]) -> Errand:
    key = json.dumps([RULES, what, arguments, _versions(arguments)], sort_keys=True, ensure_ascii=False)
    return Errand(saves / FOLDER / f"{what}-{hashlib.sha256(key.encode()).hexdigest()[:20]}")


def get(saves: Path, id: str) -> Errand | None:
    """The errand with that id; None if there is none."""
    errand = Errand(saves / FOLDER / id)
    fine = id and errand.path.parent == saves / FOLDER and not id.startswith(".")
    return errand if fine and (errand.path / "request.json").is_file() else None


def wait(errand: Errand, seconds: float = 3600) -> Any:
    """The result, once it is there. Raises Refusal if there will be none."""
    deadline = time.monotonic() + seconds
    while errand.state == "working" and time.monotonic() < deadline:
        time.sleep(0.05)
    if errand.state != "done":
        raise Refusal(errand.problems or [problem("errand-ended")])
    return errand.result


def stop(errand: Errand) -> None:
    """End it, if it goes on."""
    end_processes(errand.path, grace_s=1)


def _begin(errand: Errand, module: str, lock: int) -> None:
    with (errand.path / "log.txt").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(errand.path)], cwd=PROJECT, pass_fds=(lock,), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=command.inherited() | {command.MARKER: str(errand.path), "PYTHONUTF8": "1"},
        )  # fmt: skip
    threading.Thread(target=child.wait, daemon=True, name="errand").start()  # leaves no zombie


def _versions(arguments: Mapping[str, Any]) -> list[Any]:
    """Changes when a file changes that the errand is about."""
    with contextlib.suppress(Refusal, OSError):
        names = [arguments["name"], *arguments.get("against", ())] if "name" in arguments else []
        datasets = [find(Path(arguments["data"]), name) for name in names]
        return [[str(file), *version(file)] for dataset in datasets for file in dataset.files] + [
            repr(datasets)
        ]
    return []


def _prune(saves: Path) -> None:
    """Forget the oldest finished ones beyond KEPT."""
    finished = [folder for folder in (saves / FOLDER).iterdir() if not held(folder / "lock", ALIVE)]
    finished.sort(key=lambda folder: folder.stat().st_mtime)
    for folder in finished[: max(len(finished) - KEPT, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


# -------------------------------------------------------------------------------------- in the child


@contextlib.contextmanager
def errand(folder: str) -> Iterator[tuple[Path, Mapping[str, Any], Report]]:
    """What an errand's process does in between is its job: it gets the folder, what is given, and whom to report to.

    An error is left behind as codes, to be told in any language.
    """
    path, due = Path(folder), 0.0

    def report(done: int, total: int | None = None, unit: str = "rows") -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + 0.4
            with contextlib.suppress(OSError):
                write_json(path / "progress.json", {"done": done, "total": total, "unit": unit})

    try:
        yield path, read_json(path / "request.json")["given"], report
    except Exception as error:
        traceback.print_exc()
        problems = (
            error.problems if isinstance(error, Refusal) else [problem("errand-error", what=repr(error))]
        )
        records = [
            {"code": issue.code, "field": issue.field, "values": {k: str(v) for k, v in issue.values.items()}}
            for issue in problems
        ]
        write_json(path / "error.json", records)
        sys.exit(1)


def _check(folder: Path, arguments: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Validate a whole set; the bad rows go into a file, each with what is wrong with it."""
    data = Path(arguments["data"])
    dataset = find(data, arguments["name"])
    against = [find(data, name) for name in arguments["against"]]
    with (folder / BAD_ROWS).open("w", encoding="utf-8") as bad:

        def keep(place: Any, wrong: Problem, row: Any) -> None:
            record = {
                "file": place.file.name, "row": place.row, "line": place.line, "code": wrong.code,
                "problem": wrong.text(arguments["language"]), "content": row,
            }  # fmt: skip
            bad.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")

        result = validation.check(
            dataset, dataset.kind, most=MOST, against=against, on_bad=keep,
            on_rows=lambda done: report(done, None, "rows"),
        )  # fmt: skip

    return {
        "good": result.good, "bad": result.bad, "problems": plain(result.problems), "warnings": plain(result.warnings),
        "counts": dict(result.counts), "scripts": dict(result.scripts),
    }  # fmt: skip


def plain(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    return [
        {"code": issue.code, "values": {name: str(value) for name, value in issue.values.items()}}
        for issue in problems
    ]


def _receive(folder: Path, arguments: Mapping[str, Any], report: Report) -> dict[str, Any]:
    data = Path(arguments["data"])
    notes: list[Problem] = []
    arrived = uploads.receive(Path(arguments["source"]), arguments["called"], data, notes.append)
    broken = broken_off(arrived)
    return {"file": arrived.name, "problems": plain([broken] if broken else []), "notes": plain(notes)}


def _deduplicate(folder: Path, arguments: Mapping[str, Any], report: Report) -> dict[str, Any]:
    made = derive.deduplicate(Path(arguments["data"]), arguments["name"], lambda done: report(done))
    return {"made": made.names, "counts": made.counts}


def _split(folder: Path, arguments: Mapping[str, Any], report: Report) -> dict[str, Any]:
    made = derive.split(
        Path(arguments["data"]),
        arguments["name"],
        arguments["share"],
        arguments["seed"],
        lambda done: report(done),
    )
    return {"made": made.names, "counts": made.counts}


ERRANDS: dict[str, Callable[[Path, Mapping[str, Any], Report], dict[str, Any]]] = {
    "check": _check, "receive": _receive, "deduplicate": _deduplicate, "split": _split,
}  # fmt: skip
MODULES = {
    "download": "engine.worker.data.download"
}  # what needs more than the engine has a module of its own


def main() -> int:
    with errand(sys.argv[1]) as (folder, arguments, report):
        what = read_json(folder / "request.json")["what"]
        write_json(folder / "result.json", ERRANDS[what](folder, arguments, report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
