"""The logs of a run, one for each machine: their last lines, the end of what the current attempt has printed, and which
of its ranks failed first, as torch's launchers say there."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from engine.core.rundir import RunDir, end_of

# A failed rank in the summary that torch's launcher prints.
RANK_END = re.compile(
    r"^\s*time\s*:\s*(\S+)\s*\n\s*host\s*:.*\n\s*rank\s*:\s*(\d+).*\n\s*exitcode\s*:\s*(-?\d+)", re.MULTILINE
)
LAST = "~"  # sorts after every time


@dataclass(frozen=True)
class RankEnd:
    """How a rank failed. `at`: when, to the second, as text that can be sorted; `code`: minus the signal that ended it,
    or its exit code."""

    at: str
    rank: int
    code: int

    @property
    def signal(self) -> str:
        """The name of the signal that ended it; "" if none did."""
        return signal.Signals(-self.code).name if -self.code in set(signal.Signals) else ""


@dataclass(frozen=True)
class LogEnd:
    """The end of a machine's log, as far as the current attempt has written it."""

    path: Path
    text: str

    def failed_ranks(self) -> list[RankEnd]:
        """The ranks that the launcher there has seen fail, the first one first."""
        ends = {RankEnd(at, int(rank), int(code)) for at, rank, code in RANK_END.findall(self.text)}
        return sorted(ends, key=lambda end: end.at)


def log_ends(run: RunDir, size: int) -> list[LogEnd]:
    """The last `size` bytes of each log. That of the machine where a rank failed first comes first: what others print
    is likely to be a consequence."""
    logs = [LogEnd(log, end_of(log, size, run.log_from(log)).decode("utf-8", errors="replace")) for log in run.logs()]
    return sorted(logs, key=lambda log: next((end.at for end in log.failed_ranks()), LAST)) if len(logs) > 1 else logs


def log_tail(log: Path, lines: int = 200) -> str:
    """The last lines of a log. Of a line that a progress bar rewrote, the last state."""
    text = end_of(log, 64 * 1024).decode("utf-8", errors="replace")
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(shown[-lines - 1 :]).strip("\n")
