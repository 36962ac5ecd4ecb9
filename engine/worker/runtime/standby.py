"""A launcher that has no run yet: it is handed one while it imports, or later."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

from engine.launch import handover
from engine.launch.command import STANDBY_VARIABLE


@dataclass(frozen=True)
class Standby:
    """What to import, and the thread that waits for the run. The socket from the supervisor is the standard input."""

    stage: str
    quantizes: bool
    given: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def begin(cls) -> Standby:
        """Begin to wait. A run is taken while the imports go on, so that its processes are found, stopped and counted
        from its start. The process ends here if it could not be found, and later at the end of its supervisor."""
        if not handover.has_place():
            sys.exit("Others cannot be shown the folder of a run here.")
        standby = cls(**json.loads(os.environ.pop(STANDBY_VARIABLE)))
        threading.Thread(target=standby._take_run, daemon=True, name="standby").start()
        return standby

    def wait_for_run(self) -> None:
        """Returns once this process has a run, like any other launcher of it."""
        self.given.wait()

    def _take_run(self) -> None:
        try:
            with socket.socket(fileno=os.dup(0)) as channel:
                message, descriptors = handover.receive(channel)
                _become(message, *descriptors)
                handover.send(channel, {"taken": True})
        except BaseException:  # without its supervisor, it has nothing to wait for
            os._exit(1)
        self.given.set()


def _become(message: dict[str, Any], _lock: int, log: int, *_leases: int) -> None:
    """Take folder, arguments, environment and log of a run. The descriptors of the lock and of the leases stay open
    until the end."""
    if not handover.write_folder(message["folder"]):
        raise ValueError("the path is too long")
    # Only variables that exist, with the same names: their places in memory stay the same while libraries read others.
    os.environ.update(message["environment"])
    sys.argv[1:] = message["arguments"]
    printed = os.pread(1, os.fstat(1).st_size, 0)
    os.write(log, printed)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
