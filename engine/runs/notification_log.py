"""notifications.json in the folder of a run: to which addresses its occurrences have been sent, and what has become of
that. It names addresses by their id in the file of their owner, and never contains one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, sentences
from engine.core.rundir import RunDir, read_object, stamp, write_json


@dataclass(frozen=True)
class Delivery:
    """Of one occurrence to one address. `state`: "trying", "sent" or "failed"; `tries` so far; `next`: when the next
    try is due; `problem`: why the last one failed."""

    service: str
    state: str = "trying"
    tries: int = 0
    next: float = 0.0
    at: float = 0.0
    problem: dict[str, Any] | None = None

    @property
    def reason(self) -> Problem | None:
        """`problem` as a problem; None if there is none, or if this version does not know it."""
        record = self.problem or {}
        with contextlib.suppress(KeyError, TypeError):
            if record["code"] in sentences():
                return Problem(record["code"], record["field"], dict(record["values"]))
        return None


Log = Mapping[str, Mapping[str, Delivery]]  # key of the occurrence → id of the address → delivery


def read_log(run: RunDir) -> Log:
    """What has been sent, or tried; empty if nothing has. Damaged entries are left out."""
    return _read(run.notifications, stamp([run.notifications]))


@lru_cache(maxsize=4096)
def _read(path: Path, stamp: str) -> Log:
    content = read_object(path) if stamp != "-" else {}
    return {
        key: {id: delivery for id, plain in entries.items() if (delivery := _delivery(plain))}
        for key, entries in content.items()
        if isinstance(entries, dict)
    }


def _delivery(plain: Any) -> Delivery | None:
    try:
        delivery = Delivery(**plain)
    except TypeError:
        return None
    numbers = (delivery.tries, delivery.next, delivery.at)
    right = isinstance(delivery.service, str) and all(isinstance(number, (int, float)) for number in numbers)
    return delivery if right and delivery.state in ("trying", "sent", "failed") else None


def write_log(run: RunDir, changes: Mapping[str, Mapping[str, Delivery]]) -> None:
    """Change some deliveries. Only one process does so at a time: `engine.runs.notifier`. Raises OSError."""
    known = {key: dict(entries) for key, entries in read_log(run).items()}
    for key, entries in changes.items():
        known.setdefault(key, {}).update(entries)
    write_json(
        run.notifications,
        {key: {id: asdict(delivery) for id, delivery in entries.items()} for key, entries in known.items()},
    )


def failures(run: RunDir) -> Iterator[Delivery]:
    """The deliveries that have been given up, or have failed so far."""
    for entries in read_log(run).values():
        yield from (delivery for delivery in entries.values() if delivery.state != "sent" and delivery.problem)
