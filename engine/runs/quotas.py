"""Limits by user: how many runs at once, GPU hours in 30 days, disk space. They are in one file that an operator edits.

`quotas.yaml` in the saves folder has `default` limits and those of single `users`; what a user's own entry leaves out
is the default, and null means no limit. Without the file, there are no limits. How much somebody uses is counted by
`engine.runs.quota_use`; the limit of runs at once is kept by `engine.runs.schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from engine.core.problems import Refusal, problem
from engine.core.regular_files import read_text

QUOTAS_FILE = "quotas.yaml"


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

    def of(self, user: str) -> Limits:
        """The limits of a user; none without a name, as without a login."""
        return self.users.get(user, self.default) if user else Limits()


def read_quotas(saves: Path) -> Quotas:
    """The quotas of a saves folder. Raises Refusal if the file says something else than limits: nobody should find out
    later that a limit was never kept."""
    path = saves / QUOTAS_FILE
    try:
        content = yaml.safe_load(read_text(path))
    except FileNotFoundError:
        return Quotas()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise Refusal(problem("quotas-unreadable", file=path, why=" ".join(str(error).split())[:200])) from None
    content = {} if content is None else content
    known = _object(path, "", content, ("default", "users"))
    default = _limits(path, "default", known.get("default") or {}, Limits())
    users = _object(path, "users", known.get("users") or {}).items()
    return Quotas(default, {str(name): _limits(path, f"users.{name}", own or {}, default) for name, own in users})


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
