"""The outcome of a run from the end of its processes: finished, stopped or failed, and why.

"Finished" needs exit code 0 *and* a result written by this very attempt.
"""

from __future__ import annotations

import re
import resource
import signal
import time
from typing import Any

from engine.core import hardware
from engine.core.rundir import RESULT_FILE, RunDir, read_object, write_json
from engine.runs.logs import log_ends

FULL_BYTES = 1 << 20  # a disk with less space left is full


def requested_stop(run: RunDir) -> str | None:
    """ "save", "kill", or None: the request to stop the run. "save", too, if its own supervisor wants it to end."""
    how = (read_object(run.request).get("stop") or {}).get("how")
    return how or ("save" if run.pause.exists() else None)


def pause(run: RunDir, *, again: bool) -> None:
    """Let the run that this process supervises save a checkpoint and end, to be started `again` or not. A file of its
    own: request.json belongs to whoever holds the lock of the queue, and no lock can be trusted on a machine of a
    cluster. Raises OSError."""
    if not (again and run.pause.exists()):  # it may be meant to end for good
        write_json(run.pause, {"at": time.time(), "again": again})


def ends_for_good(run: RunDir) -> bool:
    """Whether somebody has stopped the run, or its own supervisor has, other than to be started again."""
    return bool(read_object(run.request).get("stop")) or read_object(run.pause).get("again") is False


def determine_outcome(run: RunDir, code: int) -> dict[str, Any]:
    """What the end of the children means: the content of exit.json."""
    folder = run.left()
    result = read_object(folder / RESULT_FILE) if folder else {}
    written = bool(result) and result["attempt"] == run.attempt()
    reported = run.error.exists()  # a program that reports an error was not killed, whatever happened to its siblings
    killed_by = None if reported else _signal(code, run)
    stopped = {"kill": True, "save": not reported}.get(requested_stop(run) or "", False)
    if code == 0 and written and result["complete"]:
        outcome, reason = "finished", "finished"
    elif stopped and (code != 0 or written or not result):
        outcome, reason = "stopped", "stopped"
    elif code == 0:
        outcome, reason = "failed", "no-result"
    else:
        unreported = "disk-full" if not reported and disk_is_full(run) else "exit"
        outcome, reason = "failed", "killed" if killed_by else unreported
    return {
        "outcome": outcome,
        "reason": reason,
        "code": code,
        "signal": killed_by,
        "ended": time.time(),
        "attempt": run.attempt(),
        "peak_memory": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def disk_is_full(run: RunDir) -> bool:
    """Whether no reason for a failure could be written, neither to error.json nor to the log."""
    return hardware.free_disk(run.path) < FULL_BYTES


def _signal(code: int, run: RunDir) -> str | None:
    """Name of the signal that ended the training: the launcher's own, or the one it reports of its child."""
    number = -code if code < 0 else 0
    for log in log_ends(run, 16_384) if code > 0 else ():
        if matches := re.findall(r"died with <Signals\.(SIG\w+)|exitcode\s*:\s*-(\d+)", log.text):
            name, digits = matches[-1]
            if name:
                return name
            number = int(digits)
            break
    return signal.Signals(number).name if number in set(signal.Signals) else None
