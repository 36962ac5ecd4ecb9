"""Notice what owners of runs are to be notified of, and start the process that sends it (`engine.runs.notifier`).

Whoever lets the queue move on looks here, too: a studio's tick, a shell command, and every half minute the supervisor
of any run, so that somebody notices that a run waits for its turn. Nobody needs to remember anything: what is due
follows from the folders and from what has been sent.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.core.locks import is_locked
from engine.core.problems import Refusal
from engine.core.rundir import RunDir
from engine.launch import command
from engine.launch.engine_choice import is_local
from engine.launch.workspace import PROJECT
from engine.notifications import subscriptions
from engine.notifications.policy import read_policy
from engine.notifications.subscriptions import Address, Subscription
from engine.runs import index, queue
from engine.runs.notification_log import Delivery, read_log
from engine.runs.occurrences import Occurrence, occurrences
from engine.runs.run import Run, sweep_of

LOCK_FILE = ".notifications.lock"  # in the saves folder; held by the one process that sends
LOOK_SECONDS = 30.0  # between two looks of a supervisor
FORGOTTEN_SECONDS = 7 * 86400.0  # nobody is notified of the end of a run that is older than this
_next_look = time.monotonic() + LOOK_SECONDS


@dataclass(frozen=True)
class Due:
    """An occurrence that an address is to be notified of, and what has become of that so far."""

    occurrence: Occurrence
    person: Subscription
    address: Address
    delivery: Delivery


def look(saves: Path) -> None:
    """Start the process that sends if something is due and there is none. Raises nothing: no run, queue or page is to
    suffer."""
    now = time.time()
    try:
        if not is_locked(saves / LOCK_FILE, 0) and any(due.delivery.next <= now for due in all_due(saves, now)):
            start_notifier(saves)
    except (Refusal, OSError):  # the page says what is wrong with the files
        return


def look_sometimes(run: RunDir) -> None:
    """The same every half minute, on behalf of a run's supervisor; not if Slurm runs it on another machine."""
    global _next_look
    if (now := time.monotonic()) >= _next_look and not run.on_slurm():
        _next_look = now + LOOK_SECONDS
        look(queue.saves_of(run.path))


def start_notifier(saves: Path) -> None:
    """Start it in a session of its own: it outlives whoever has started it."""
    subprocess.Popen(
        [sys.executable, "-m", "engine.runs.notifier", str(saves)],
        cwd=PROJECT,
        env=command.inherited_environment() | {"PYTHONPATH": command.python_path(), "PYTHONUTF8": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def all_due(saves: Path, now: float) -> Iterator[Due]:
    """What is to be sent now or at a later try. Raises Refusal if the file of the addresses, or that of the operator,
    is wrong, and OSError."""
    place = subscriptions.place_of(saves)
    people = {name: person for name, person in subscriptions.read(place).items() if person.addresses and person.events}
    if not people or not read_policy(saves).enabled or not (is_local(saves) or subscriptions.is_sender(saves)):
        return
    known = index.runs(saves)
    sweeps = _sweeps(known)
    for run in known:
        for person, since in subscriptions.readers(people, place, run.by):
            if is_recent(run, person, now):
                yield from _due_of(run, person, since, now, sweeps.get(sweep_of(run).get("id", ""), []))


def _sweeps(known: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each sweep, by its id."""
    sweeps: dict[str, list[Run]] = {}
    for run in known:
        if id := sweep_of(run).get("id"):
            sweeps.setdefault(id, []).append(run)
    return sweeps


def is_recent(run: Run, person: Subscription, now: float) -> bool:
    """Whether a run can have something new to tell; decided without reading a file, for thousands of runs."""
    since = min((address.since for address in person.addresses), default=0.0)
    return run.ended is None or run.ended >= max(since, now - FORGOTTEN_SECONDS)


def _due_of(run: Run, person: Subscription, reads_since: float, now: float, sweep: Sequence[Run]) -> Iterator[Due]:
    choice = choice_of(run)
    if not choice.on:
        return
    log = read_log(run.dir)
    for occurrence in _happened(run, person, now, sweep):
        since = person.events.get(occurrence.event)
        for address in person.addresses if since is not None else ():
            known = log.get(occurrence.key, {}).get(address.id)
            begins = max(since or 0.0, address.since, choice.at, reads_since)
            if known.state == "trying" if known else occurrence.at >= begins:
                yield Due(occurrence, person, address, known or Delivery(address.service))


def news(saves: Path, owner: str | None, person: Subscription, since: float, now: float) -> list[Occurrence]:
    """What has happened since then to the runs of `owner` (None: all) and of those whom the person follows, of what
    they have chosen."""
    known = index.runs(saves)
    runs = (run for run in known if owner is None or run.by == owner or person.follows_since(run.by) is not None)
    recent = [run for run in runs if (run.ended is None or run.ended >= since) and choice_of(run).on]
    sweeps = _sweeps(known) if any(map(sweep_of, recent)) else {}
    return [
        occurrence
        for run in recent
        for occurrence in _happened(run, person, now, sweeps.get(sweep_of(run).get("id", ""), []))
        if occurrence.event in person.events and occurrence.at >= since
    ]


def _happened(run: Run, person: Subscription, now: float, sweep: Sequence[Run]) -> list[Occurrence]:
    try:
        return occurrences(run, person.wait_hours, now, sweep)
    except Exception:  # deleted meanwhile, or whatever is in its files: the others are not to suffer
        return []


@dataclass(frozen=True)
class Choice:
    """Whether somebody wants notifications about a run, and since when."""

    on: bool = True
    at: float = 0.0


def choice_of(run: Run) -> Choice:
    """As its request says; on, unless somebody has switched them off."""
    written = run.request.get("notifications")
    if not isinstance(written, dict) or not isinstance(written.get("at"), (int, float)):
        return Choice()
    return Choice(written.get("on") is not False, written["at"])
