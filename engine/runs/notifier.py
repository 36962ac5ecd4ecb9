"""The process that sends notifications of a saves folder: `python -m engine.runs.notifier SAVES`.

There is one at a time, however many have noticed that something is due. It notes each try before it is made, tries
again after pauses, and ends once nothing is left; if it is killed, the next who looks starts another. So nothing is
lost and, unless it is killed in the very moment of sending, nothing is sent twice.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from engine.core.locks import try_lock
from engine.core.problems import NOTHING, Problem, Refusal, problem
from engine.notifications import sending
from engine.notifications.notice import Notice
from engine.notifications.policy import Policy, read_policy
from engine.notifications.services import SERVICES
from engine.runs.notice_text import notice_of
from engine.runs.notification_log import Delivery, write_log
from engine.runs.notify import LOCK_FILE, Due, all_due

PAUSES_SECONDS = (15.0, 120.0, 600.0)  # after the first try, and after the next ones; after the last, it is given up
LOOK_SECONDS = 2.0  # between two looks while it waits for the next try
UNWRITABLE_SECONDS = 30.0  # the same while nothing can be noted, so that nothing may be sent
MAX_AT_ONCE = 100  # addresses of one round


def main() -> int:
    saves = Path(sys.argv[1])
    while True:
        lock = try_lock(saves / LOCK_FILE, 0, shared=False)
        if lock is None:  # another one sends
            return 0
        try:
            while left := list(all_due(saves, time.time())):
                time.sleep(send_due(saves, left, PAUSES_SECONDS))
        except (Refusal, FileNotFoundError):  # the page says what is wrong with the files; or there is no folder left
            return 2
        finally:
            os.close(lock)
        # What has become due after the last look was not noticed by others, because the lock was still held.
        if not any(True for _ in all_due(saves, time.time())):
            return 0


def send_due(saves: Path, left: Sequence[Due], pauses: Sequence[float]) -> float:
    """One round: send what is due now, all at the same time. Returns the seconds until the next look."""
    now, policy = time.time(), read_policy(saves)
    due_now = [due for due in left if due.delivery.next <= now][:MAX_AT_ONCE]
    tries = [due for due in due_now if _note_try(due, now, pauses)]
    for due, outcome in zip(tries, _send(tries, policy), strict=True):
        _note_result(due, _result(due.delivery, outcome, pauses))
    if tries:
        return 0.0
    return UNWRITABLE_SECONDS if due_now else LOOK_SECONDS


def _note_try(due: Due, now: float, pauses: Sequence[float]) -> bool:
    """Note that a try begins; False if that is not possible, or its owner has deleted the run."""
    pause = pauses[min(due.delivery.tries, len(pauses) - 1)] if pauses else 0.0
    begun = replace(due.delivery, tries=due.delivery.tries + 1, at=now, next=now + sending.SEND_SECONDS + pause)
    try:
        _note(due, begun)
    except OSError:
        return False
    return True


def _note(due: Due, delivery: Delivery) -> None:
    write_log(due.occurrence.run.dir, {due.occurrence.key: {due.address.id: delivery}})


def _note_result(due: Due, delivery: Delivery) -> None:
    """Note what a try has come to; once there is no other, also for what the occurrence covers, even if its own run has
    been deleted meanwhile."""
    with contextlib.suppress(OSError):  # deleted, or the disk is full
        _note(due, delivery)
    if delivery.state != "trying":
        entry = {due.address.id: replace(delivery, problem=None)}  # it is shown at the run of the occurrence
        for run, keys in due.occurrence.covers:
            with contextlib.suppress(OSError):
                write_log(run.dir, dict.fromkeys(keys, entry))


def _send(tries: Sequence[Due], policy: Policy) -> list[Problem | None]:
    """What has become of each: None if it was sent."""
    notices = [_notice(due, policy) for due in tries]
    whole = [
        (due.address.url, notice) for due, notice in zip(tries, notices, strict=True) if isinstance(notice, Notice)
    ]
    sent = iter(sending.send(whole, policy) if whole else [])
    return [next(sent) if isinstance(notice, Notice) else notice for notice in notices]


def _notice(due: Due, policy: Policy) -> Notice | Problem:
    try:
        return notice_of(due.occurrence, policy, due.person.language)
    except Exception as error:  # whatever is in a file of that run: the others are sent
        return problem("notify-broken", what=type(error).__name__)


def _result(before: Delivery, outcome: Problem | None, pauses: Sequence[float]) -> Delivery:
    now, tries = time.time(), before.tries + 1
    if outcome is None:
        return replace(before, state="sent", tries=tries, at=now, next=0.0, problem=None)
    is_last = tries > len(pauses)
    record = asdict(_without_address(outcome, before.service))
    next_try = 0.0 if is_last else now + pauses[before.tries]
    return replace(before, state="failed" if is_last else "trying", tries=tries, at=now, next=next_try, problem=record)


def _without_address(outcome: Problem, service: str) -> Problem:
    """The problem for the folder of the run, which others may read: even the host of a webhook can be a secret, and
    what a server answers may name its user."""
    hidden = {"host": SERVICES[service].name, "address": NOTHING, "what": NOTHING}
    return replace(outcome, values={name: hidden.get(name, value) for name, value in outcome.values.items()})


if __name__ == "__main__":
    sys.exit(main())
