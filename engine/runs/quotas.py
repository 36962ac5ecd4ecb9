"""Limits by user: how many runs at once, GPU hours in 30 days, disk space. They are in one file that an operator edits.

`quotas.yaml` in the saves folder has `default` limits and those of single `users`; what a user's own entry leaves out
is the default, and null means no limit. `when_used_up` says what becomes of a run in progress whose owner has used up
their GPU hours. Without the file, there are no limits. The page changes single lines of it, and leaves the others as
they are. How much somebody uses is counted by `engine.runs.quota_use`; the limit of runs at once is kept by
`engine.runs.schedule`, the end of a run in progress by `engine.runs.quota_watch`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from engine.core.locks import wait_for_lock
from engine.core.problems import Refusal, problem
from engine.core.regular_files import read_text
from engine.core.rundir import write_text
from engine.runs.quota_edits import Entry, with_entry

QUOTAS_FILE = "quotas.yaml"
KEYS = ("default", "users", "when_used_up")
WARN, STOP = "warn", "stop"


@dataclass(frozen=True)
class Limits:
    """The limits of one user; None: no limit."""

    runs_at_once: float | None = None
    gpu_hours: float | None = None  # in any 30 days; on the CPU, a process counts as a GPU
    disk_gb: float | None = None  # of runs and data sets, in units of 10**9 bytes


NAMES = tuple(limit.name for limit in fields(Limits))


@dataclass(frozen=True)
class Quotas:
    """The whole file."""

    default: Limits = Limits()
    users: Mapping[str, Limits] = field(default_factory=dict)
    stops: bool = False  # a run is ended, a training with a checkpoint, when the GPU hours of its owner are used up
    # What each entry says; "" is the default's.
    own: Mapping[str, Entry] = field(default_factory=lambda: {"": {}}, compare=False)

    def of(self, user: str) -> Limits:
        """The limits of a user; none without a name, as without a login."""
        return self.users.get(user, self.default) if user else Limits()


def read_quotas(saves: Path) -> Quotas:
    """The quotas of a saves folder. Raises Refusal if the file says something else than limits: nobody should find out
    later that a limit was never kept."""
    path = saves / QUOTAS_FILE
    try:
        return _parsed(path, read_text(path))
    except FileNotFoundError:
        return Quotas()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise Refusal(problem("quotas-unreadable", file=path, why=" ".join(str(error).split())[:200])) from None


def _parsed(path: Path, text: str) -> Quotas:
    """What a text of the file says. Raises Refusal or YAMLError."""
    content = yaml.safe_load(text)
    content = {} if content is None else content
    known = _object(path, "", content, KEYS)
    default = _limits(path, "default", known.get("default") or {}, Limits())
    users = {str(name): own or {} for name, own in _object(path, "users", known.get("users") or {}).items()}
    when = known.get("when_used_up", WARN)
    if when not in (WARN, STOP):
        values = {"file": path, "place": "when_used_up", "given": str(when)[:80]}
        raise Refusal(problem("quotas-key", **values, known=f"{WARN}, {STOP}"))
    limits = {name: _limits(path, f"users.{name}", own, default) for name, own in users.items()}
    return Quotas(default, limits, when == STOP, {"": known.get("default") or {}, **users})


def _object(path: Path, place: str, value: Any, known: tuple[str, ...] = ()) -> Mapping[Any, Any]:
    if not isinstance(value, dict) or (known and set(value) - set(known)):
        strange = ", ".join(map(str, set(value) - set(known))) if isinstance(value, dict) else value
        values = {"file": path, "place": place or QUOTAS_FILE, "given": str(strange)[:80]}
        raise Refusal(problem("quotas-key", **values, known=", ".join(known) or "NAME: {…}"))
    return value


def _limits(path: Path, place: str, value: Any, default: Limits) -> Limits:
    own = _object(path, place, value, NAMES)
    for name, limit in own.items():
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if limit is not None and not (number and 0 <= limit < math.inf):
            raise Refusal(problem("quotas-number", file=path, place=f"{place}.{name}", given=str(limit)[:80]))
    return Limits(**{name: own.get(name, getattr(default, name)) for name in NAMES})


def change_limits(saves: Path, user: str, own: Entry) -> None:
    """Give a user limits of their own or, for "", change the default; what `own` leaves out is the default or, there,
    not limited. Every other line of the file stays as it is. Raises Refusal if the file or a limit is wrong, or if the
    file cannot be changed in this way."""
    path = saves / QUOTAS_FILE
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(os.close, wait_for_lock(saves / f".{QUOTAS_FILE}.lock"))
            before = read_quotas(saves)
            text = read_text(path) if os.path.lexists(path) else ""
            changed = with_entry(text, ("users", user) if user else ("default",), own)
            after = Quotas() if changed is None else _parsed(path, changed)
            if changed is None or (after.own, after.stops) != ({**before.own, user: dict(own)}, before.stops):
                raise Refusal(problem("quotas-not-changed", file=path))
            write_text(path, changed)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:200]
            raise Refusal(problem("quotas-unwritten", file=path, why=why or "—")) from None
