"""Known ways to fail → what happened and what to do about it, in the reader's language.

The patterns are looked for in the first failing rank's error and the end of the log. Order matters: the
particular before the general.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.problems import say, sentences
from engine.rundir import end_of, read_json
from engine.runs import Run

PATTERNS = {
    "device-memory": r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
    "disk-full": r"No space left on device|Disk quota exceeded|Errno 28",
    "not-writable": r"Permission denied: '(?P<what>[^']+)'|Read-only file system",
    "port": r"EADDRINUSE|[Aa]ddress already in use",
    "kernels": r"no kernel image is available",
    "driver": r"NVIDIA driver on your system is too old|CUDA driver version is insufficient",
    "bitsandbytes": r"libbitsandbytes|CUDA Setup failed|bitsandbytes.*not.*(?:found|available)",
    "network": r"OfflineModeIsEnabled|LocalEntryNotFoundError|ConnectionError|MaxRetryError|Network is unreachable",
    "package": r"(?:ModuleNotFoundError: No module named|requires the) '?(?P<what>[\w.-]+)'?",
    "configuration": r"AssertionError: (?P<what>.*the spec says.*)",
    "nccl": r"NCCL error|ncclSystemError|Watchdog caught collective operation timeout",
    "architecture": r"does not recognize this architecture",
    "damaged": r"ignore_mismatched_sizes|JSONDecodeError|ClassValidationError|SafetensorError",
    "shapes": r"size mismatch for (?P<what>[\w.]+)",
}


@dataclass(frozen=True)
class Explanation:
    """Why a run did not finish."""

    code: str
    values: Mapping[str, Any]
    traceback: str
    problems: tuple[Mapping[str, Any], ...] = ()

    def what(self, language: str = "en") -> str:
        """What happened, in one or two sentences."""
        if self.problems:
            return "\n".join(_told(one, language) for one in self.problems)
        return say(f"failure-{self.code}", language, **self.values)

    def advice(self, language: str = "en") -> str:
        """What to do about it; empty where what happened says so already."""
        return "" if self.problems else say(f"failure-{self.code}-advice", language, **self.values)


def _told(one: Mapping[str, Any], language: str) -> str:
    return say(one["code"], language, **{"field": one["field"], **one["values"]})


def explain(run: Run) -> Explanation | None:
    """Why the run failed or was interrupted; None if it did neither."""
    if run.state not in ("failed", "interrupted"):
        return None
    error = read_json(run.dir.error) or {}
    log = end_of(run.dir.log, 65_536, run.dir.log_from()).decode("utf-8", errors="replace")
    traceback = error.get("traceback") or _first_traceback(log)
    known = tuple(one for one in error.get("problems", ()) if one["code"] in sentences())
    exit = {"reason": "interrupted", "code": None, "signal": None} | (run.exit or {})
    values = {"code": exit["code"], "signal": exit["signal"], "what": "", "last": _last_line(error, log)}
    if known:
        return Explanation("", {}, traceback, known)
    text = f"{error.get('type', '')}: {error.get('message', '')}\n{traceback}\n{'' if run.exit else log}"
    for code, pattern in PATTERNS.items():
        # A disk that filled up may have kept the keeper itself from saying so: then only the log knows.
        told = error or exit["reason"] == "exit" or (code == "disk-full" and exit["reason"] == "interrupted")
        if told and (found := re.search(pattern, text)):
            return Explanation(code, values | {"what": found.groupdict().get("what") or ""}, traceback)
    return Explanation(exit["reason"], values, traceback)


def _first_traceback(log: str) -> str:
    """The first traceback in the end of the log: later ones are of what broke in consequence."""
    found = re.search(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*\S.*", log)
    return found[0] if found else ""


def _last_line(error: Mapping[str, Any], log: str) -> str:
    if error:
        return f"{error['type']}: {error['message']}"[:300]
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "—"
