"""A draft: rows that a model has made from documents, which wait to be reviewed. Each is a folder
`saves/.documents/<id>/`.

    request.json     what was asked for           documents/        the documents, as uploaded
    reading.json     what was read of each        passages.jsonl    the passages, once all are read
    rows.jsonl       a line for each passage about which the model has been asked
    duplicates.json  rows that are like earlier ones
    decisions.jsonl  what people have decided, the last line about a row counts
    lock, progress.json, stop, error.json, result.json, log.txt   of the process that asks

Everything is derived from these files: the state, the rows and where an interrupted process continues.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from engine.core import hardware
from engine.core.locks import is_locked, try_lock
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import ALIVE_BYTE, read_json, read_lines, read_object, write_json
from engine.data import data_jobs, dataset_info_edits, uploads
from engine.data.draft_folders import DRAFTS_FOLDER, REQUEST_FILE, draft_folders, read_request
from engine.documents.document_reader import MAX_DOCUMENT_BYTES, READERS
from engine.documents.passages import Passage
from engine.documents.settings import DraftSettings
from engine.launch.processes import end_processes
from engine.launch.workspace import Workplace
from engine.runs import quota_use
from engine.serving import servers
from engine.serving.servers import Choice

MAX_DOCUMENTS = 200
PROCESS = "engine.documents.generate"
State = Literal["working", "done", "stopped", "failed", "interrupted"]


@dataclass(frozen=True)
class Draft:
    """One draft, by its folder."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @cached_property
    def request(self) -> Mapping[str, Any]:
        return read_request(self.path)

    @property
    def name(self) -> str:
        return str(self.request.get("name", ""))

    @property
    def owner(self) -> str:
        """The name of its owner; "" if it belongs to nobody."""
        return str(self.request.get("by", ""))

    @property
    def settings(self) -> DraftSettings:
        return DraftSettings.from_record(self.request.get("settings", {}))

    @property
    def files(self) -> list[Path]:
        """The documents, in the order in which they are read."""
        return [self.path / "documents" / name for name in self.request.get("files", ())]

    @property
    def state(self) -> State:
        """ "interrupted": its process was killed; it can be continued, as if it was stopped or has failed."""
        if is_locked(self.path / "lock", ALIVE_BYTE):
            return "working"
        for file, state in STATES.items():
            if (self.path / file).exists():
                return state
        return "interrupted"

    @property
    def problems(self) -> list[Problem]:
        """Why its process has failed."""
        records = read_json(self.path / "error.json") or []
        return [Problem(record["code"], record["field"], record["values"]) for record in records]

    @property
    def progress(self) -> Mapping[str, Any]:
        """How far it is: done, total and unit."""
        return read_object(self.path / "progress.json")

    @property
    def reading(self) -> list[dict[str, Any]]:
        """What was read of each document: its file, pages, passages, empty and unreadable pages, problems."""
        return read_json(self.path / "reading.json") or []

    def passages(self) -> list[Passage]:
        """All passages; none until every document has been read."""
        return [Passage.from_record(record) for record in _lines(self.path / "passages.jsonl")]

    def records(self) -> dict[int, dict[str, Any]]:
        """What the model has made of passages: by their numbers."""
        return {record["passage"]: record for record in _lines(self.path / "rows.jsonl")}

    @property
    def stopping(self) -> bool:
        return (self.path / "stop").exists()

    @property
    def workplace(self) -> Workplace:
        """The folders with which it was made, for its process."""
        place = self.request["workplace"]
        return Workplace(
            models=tuple(map(Path, place["models"])),
            data=Path(place["data"]),
            saves=self.path.parents[1],
            remote_code=tuple(place["remote_code"]),
        )


def _lines(path: Path) -> Sequence[dict[str, Any]]:
    """The lines of a file of a draft, parsed once as long as it does not change: a page looks at it every second."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return _parsed_lines(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _parsed_lines(path: Path, mtime_ns: int, size: int) -> Sequence[dict[str, Any]]:
    return read_lines(path)


STATES: dict[str, State] = {"result.json": "done", "error.json": "failed", "stop": "stopped"}


def choice_of(workplace: Workplace, settings: DraftSettings) -> Choice:
    """The model that is asked, as servers take it. Raises Refusal if it cannot be served."""
    ids = [settings.run] if settings.run else []
    return servers.choose_loaded(workplace, settings.base, ids)


def make(
    workplace: Workplace,
    name: str,
    documents: Sequence[tuple[Path, str]],
    settings: DraftSettings,
    by: str = "",
) -> Draft:
    """Make a draft of these documents, as (file, the name under which it was uploaded), and start its process. Raises
    Refusal with all that is wrong before anything is made."""
    refused = settings.problems()
    for act in (
        lambda: check_documents(documents),
        lambda: choice_of(workplace, settings),
        lambda: dataset_info_edits.valid_name(name),
    ):
        try:
            act()
        except Refusal as refusal:
            refused += refusal.problems
    saves = workplace.saves
    if refused := refused or [*quota_use.disk_excess(saves, workplace.data, by), *_without_space(documents, saves)]:
        raise Refusal(refused)
    draft = Draft(saves / DRAFTS_FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}")
    try:
        (draft.path / "documents").mkdir(parents=True)
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, draft.path, ignore_errors=True)
            names = [_copy(source, called, draft.path / "documents") for source, called in documents]
            place = {
                "models": [str(root) for root in workplace.models],
                "data": str(workplace.data),
                "remote_code": list(workplace.remote_code),
            }
            wishes = {"name": name.strip(), "by": by, "files": names, "settings": settings.as_record()}
            request = {"what": "documents", "given": wishes | {"workplace": place}, "at": time.time()}
            write_json(draft.path / REQUEST_FILE, request)
            undo.pop_all()
    except OSError as error:
        raise Refusal(problem("cannot-write", folder=saves, why=error.strerror or error)) from error
    proceed(draft)
    return draft


def check_documents(documents: Sequence[tuple[Path, str]]) -> None:
    """Raises Refusal if there are none, too many, of another format, or too large ones."""
    if not documents:
        raise Refusal(problem("draft-no-documents", known=", ".join(READERS)))
    if len(documents) > MAX_DOCUMENTS:
        raise Refusal(problem("draft-many-documents", files=len(documents), limit=MAX_DOCUMENTS))
    refused = []
    for source, called in documents:
        file = uploads.safe_name(called)
        if Path(file).suffix not in READERS:
            refused.append(problem("document-format", file=file, known=", ".join(READERS)))
        elif not source.is_file():
            refused.append(problem("data-file-unreadable", file=file, why="No such file or directory"))
        elif (size := source.stat().st_size) > MAX_DOCUMENT_BYTES:
            values = {"size": f"{size >> 20:,} MB", "limit": f"{MAX_DOCUMENT_BYTES >> 20:,} MB"}
            refused.append(problem("document-too-large", file=file, **values))
    if refused:
        raise Refusal(refused)


def _without_space(documents: Sequence[tuple[Path, str]], saves: Path) -> Iterator[Problem]:
    """The problem, if the disk would not have enough space left with copies of the documents."""
    size, free = sum(source.stat().st_size for source, _ in documents), hardware.free_disk(saves)
    if size > free - hardware.SPARED_BYTES:
        spared = hardware.SPARED_BYTES >> 20
        values = {"size": f"{size >> 20:,}", "free": f"{free >> 20:,}", "spared": f"{spared:,}"}
        yield problem("draft-no-space", **values)


def _copy(source: Path, called: str, folder: Path) -> str:
    """Copy a document under its name, or the next free variant; returns that."""
    arrived = folder / f".{secrets.token_hex(8)}-{uploads.safe_name(called)}"
    shutil.copyfile(source, arrived)
    named = arrived.with_name(uploads.safe_name(called))
    number = 1
    while named.exists():
        number += 1
        named = arrived.with_name(f"{Path(uploads.safe_name(called)).stem}-{number}{named.suffix}")
    arrived.rename(named)
    return named.name


def proceed(draft: Draft) -> None:
    """Start the process of a draft, or continue it where it has ended; nothing if it is working or done."""
    lock = try_lock(draft.path / "lock", ALIVE_BYTE, shared=False)
    if lock is None:
        return
    try:
        if not (draft.path / "result.json").exists():
            for stale in ("stop", "error.json", "progress.json"):
                (draft.path / stale).unlink(missing_ok=True)
            data_jobs.start_process(draft.path, PROCESS, lock)
    finally:
        os.close(lock)  # the child has it now


def stop(draft: Draft) -> None:
    """Have its process end; what it has made stays. Returns immediately."""
    if draft.state == "working":
        (draft.path / "stop").touch()


def remove(draft: Draft) -> None:
    """Delete a draft with its documents and decisions, and end its process. Data sets saved from it stay. Raises
    Refusal if it cannot be deleted."""
    end_processes(draft.path, kill_timeout_s=1)
    try:
        shutil.rmtree(draft.path)
    except OSError as error:
        raise Refusal(problem("cannot-write", folder=draft.path, why=error.strerror or error)) from error


def every_draft(saves: Path) -> list[Draft]:
    """All drafts, newest first."""
    return list(map(Draft, draft_folders(saves)))


def get(saves: Path, id: str) -> Draft:
    """The draft with that id. Raises Refusal if there is none."""
    draft = Draft(saves / DRAFTS_FOLDER / id)
    plain = id and "\0" not in id and not id.startswith(".") and draft.path.parent == saves / DRAFTS_FOLDER
    if not plain or not (draft.path / REQUEST_FILE).is_file():
        raise Refusal(problem("draft-unknown", id=id[:100] or "—"))
    return draft
