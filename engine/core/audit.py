"""The audit: a line for every action that somebody has requested, with its outcome, in the saves folder.

The file is append-only and readable by its owner only, who is that of the saves folder. When it has reached MAX_BYTES,
it is renamed, and the oldest of MAX_FILES is deleted; so that nobody can fill it with questions to a model until other
lines are gone, those leave one line an hour. It contains names of runs and data sets, never passwords, tokens or
questions.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from engine.core.locks import wait_for_lock
from engine.core.problems import Refusal, problem, shell_language
from engine.core.regular_files import read_bytes
from engine.core.rights import OPERATOR, Person, may
from engine.core.rundir import append_lines

AUDIT_FILE = ".audit.jsonl"
MAX_BYTES = 4 << 20
MAX_FILES = 10  # 40 MB, some 200,000 actions
MAX_WHAT = 300  # characters of a name
HOURLY = ("ask",)  # actions of which equal lines are written once an hour: by the same user, to the same model
_written: OrderedDict[tuple[object, ...], None] = OrderedDict()  # lines of HOURLY actions, with their hour
MAX_WRITTEN = 10_000


@dataclass(frozen=True)
class Entry:
    """One action: when (seconds since 1970), by whom, from which address, what, to what, and "done", "failed" or
    "refused: " with the codes of the problems."""

    at: float
    user: str
    address: str
    action: str
    what: str
    outcome: str


def record(saves: Path, person: Person, action: str, what: str, outcome: str) -> None:
    """Append a line. If it cannot be written, that is printed: a full disk must not keep anyone from freeing it."""
    entry = Entry(round(time.time(), 3), person.name, person.address, action, what[:MAX_WHAT], outcome)
    if not saves.is_dir() or (action in HOURLY and _is_repeated(saves, entry)):
        return
    try:
        lock = wait_for_lock(saves / f"{AUDIT_FILE}.lock")
        try:
            _give_to_owner(lock, saves)
            _append(saves / AUDIT_FILE, entry)
        finally:
            os.close(lock)
    except OSError as error:
        line = json.dumps(asdict(entry), ensure_ascii=False)
        failed = problem("audit-unwritten", file=saves / AUDIT_FILE, why=error.strerror or error, line=line)
        print(failed.text(shell_language()), file=sys.stderr)


def _is_repeated(saves: Path, entry: Entry) -> bool:
    """Whether this process has written an equal line within this hour; from now on, it has."""
    key = (saves, entry.user, entry.action, entry.what, entry.outcome, int(entry.at // 3600))
    if key in _written:
        return True
    _written[key] = None
    if len(_written) > MAX_WRITTEN:
        _written.popitem(last=False)
    return False


def _append(path: Path, entry: Entry) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size >= MAX_BYTES:
            _rotate(path)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        _give_to_owner(descriptor, path.parent)
    finally:
        os.close(descriptor)
    append_lines(path, [asdict(entry)])


def _give_to_owner(descriptor: int, folder: Path) -> None:
    """Let an open file belong to the owner of its folder: root may have created it, in a shell, and the studio, under
    its own account, has to append to it."""
    if os.geteuid() == 0 and os.fstat(descriptor).st_uid != (status := folder.stat()).st_uid:
        os.fchown(descriptor, status.st_uid, status.st_gid)


def _rotate(path: Path) -> None:
    """Number the files anew: 1 is the newest of the full ones."""
    for number in range(MAX_FILES - 1, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            _numbered(path, number - 1).replace(_numbered(path, number))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def read(saves: Path, most: int, text: str = "") -> list[Entry]:
    """The last `most` entries, newest first; with `text`, only those that contain all of its words somewhere. Raises
    OSError if the file cannot be read."""
    words, entries = text.casefold().split(), []
    for entry in _newest_first(saves / AUDIT_FILE):
        line = f"{entry.user} {entry.address} {entry.action} {entry.what} {entry.outcome}".casefold()
        if all(word in line for word in words):
            entries.append(entry)
            if len(entries) >= most:
                break
    return entries


def _newest_first(path: Path) -> Iterator[Entry]:
    for number in range(MAX_FILES):
        try:
            content = read_bytes(_numbered(path, number))
        except FileNotFoundError:
            continue
        for line in reversed(content.decode("utf-8", "replace").splitlines()):
            if entry := _entry(line):
                yield entry


def _entry(line: str) -> Entry | None:
    try:
        values: Any = json.loads(line)
    except ValueError:  # cut off by a full disk
        return None
    names = [field.name for field in fields(Entry)]
    if not isinstance(values, Mapping) or not isinstance(values.get("at"), (int, float)):
        return None
    return Entry(values["at"], *(str(values.get(name, "")) for name in names[1:]))


@contextlib.contextmanager
def recorded(saves: Path, person: Person, action: str, what: str) -> Iterator[None]:
    """Record what becomes of an action."""
    outcome = "failed"
    try:
        yield
        outcome = "done"
    except Refusal as refusal:
        outcome = "refused: " + ", ".join(dict.fromkeys(issue.code for issue in refusal.problems))
        raise
    finally:
        record(saves, person, action, what, outcome)


@contextlib.contextmanager
def acting(saves: Path, person: Person, action: str, what: str, owner: str | None = None) -> Iterator[None]:
    """Do an action to `what`, which belongs to `owner`, if the person may (see `engine.core.rights`); record what
    becomes of it. Raises Refusal."""
    with recorded(saves, person, action, what):
        if hindrance := may(person, action, owner):
            raise Refusal(hindrance)
        yield


def shell(name: str) -> Person:
    """Who works in a shell of this machine."""
    return Person(name, OPERATOR, "shell")
