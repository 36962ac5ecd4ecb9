"""Known failures → what happened and what to do about it, in the reader's language.

The patterns are searched in the first failing rank's error with its causes and, if that says nothing specific, in the
whole logs of the attempt, of all machines: a library may catch the reason, print it, and raise an error about something
else. If an error only says that another rank has gone, and that one was killed, the kill is the cause.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.core import regular_files
from engine.core.problems import Problem, say, sentences
from engine.core.rundir import end_of, read_object
from engine.runs.failure_signatures import ECHO_PATTERN, FATAL_PATTERNS, GENERIC_CODES, PATTERNS
from engine.runs.logs import LogEnd, log_ends
from engine.runs.runs import Run

LOG_END_BYTES = 64 << 10  # bytes at the end of a log in which its last lines are searched
LOG_SEARCH_BYTES = 16 << 20  # bytes at the beginning and at the end of an attempt's log that are searched


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
            problems = (Problem(entry["code"], entry["field"], entry["values"]) for entry in self.problems)
            return "\n".join(problem.text(language) for problem in problems)
        return say(f"failure-{self.code}", language, **self.values)

    def advice(self, language: str = "en") -> str:
        """What to do about it; empty if the description already says so."""
        return "" if self.problems else say(f"failure-{self.code}-advice", language, **self.values)


def explain(run: Run) -> Explanation | None:
    """Why the run failed or was interrupted; None if it did neither."""
    if run.state not in ("failed", "interrupted"):
        return None
    error = _read_error(run)
    logs = log_ends(run.dir, LOG_END_BYTES)
    log = "\n".join(log.text for log in logs)
    traceback = error.get("traceback") or _first_traceback(log)
    known = tuple(entry for entry in error.get("problems", ()) if entry["code"] in sentences())
    exit = {"reason": "interrupted", "code": None, "signal": None} | (run.exit or {})
    values = {"code": exit["code"], "signal": exit["signal"], "what": "", "last": _last_line(error, logs[0].text)}
    if known:
        return Explanation("", {}, traceback, known)
    lines = [f"{error.get('type', '')}: {error.get('message', '')}", *error.get("causes", ()), traceback]
    text = "\n".join(lines + ([] if run.exit else [log]))
    if (killed := _killed_rank(logs, error.get("rank"))) and re.search(ECHO_PATTERN, text):
        return Explanation("rank-killed", values | killed, traceback)
    particular = {code: pattern for code, pattern in PATTERNS.items() if code not in GENERIC_CODES}
    code, what = (
        _match(particular, text) or _match_in_logs(run, logs, bool(error)) or _match(PATTERNS, text) or ("", "")
    )
    # A full disk may have kept the supervisor from recording it: then only the log shows it.
    known_end = error or exit["reason"] == "exit" or (code == "disk-full" and exit["reason"] == "interrupted")
    if code and known_end:
        return Explanation(code, values | {"what": what}, traceback)
    return Explanation(exit["reason"], values, traceback)


def _read_error(run: Run) -> dict[str, Any]:
    """error.json with texts and lists in the right places; {} if it is missing or empty."""
    error = read_object(run.dir.error)
    if not error:
        return {}
    texts = {name: str(error.get(name) or "") for name in ("type", "message", "traceback")}
    problems, causes = (
        [*value] if isinstance(value := error.get(name), list) else [] for name in ("problems", "causes")
    )
    whole = [
        entry
        for entry in problems
        if isinstance(entry, dict)
        and isinstance(entry.get("code"), str)
        and isinstance(entry.get("values"), dict)
        and isinstance(entry.get("field"), str)
    ]
    return {"rank": error.get("rank"), **texts, "problems": whole, "causes": [str(cause) for cause in causes]}


def _killed_rank(logs: Sequence[LogEnd], but: int | None) -> dict[str, Any] | None:
    """The first rank, other than the one that reported the error, that was ended by a signal: its number and the
    signal. The launcher sends SIGTERM to the remaining ones."""
    ends = sorted((end for log in logs for end in log.failed_ranks()), key=lambda end: end.at)
    killed = (end for end in ends if end.rank != but and end.signal not in ("", "SIGTERM"))
    return next(({"rank": end.rank, "signal": end.signal} for end in killed), None)


def _match(patterns: Mapping[str, str], text: str) -> tuple[str, str] | None:
    """(code, matched name) of the first pattern that matches the text."""
    matches = ((code, re.search(pattern, text)) for code, pattern in patterns.items())
    return next(((code, match.groupdict().get("what") or "") for code, match in matches if match), None)


def _match_in_logs(run: Run, logs: Sequence[LogEnd], has_error: bool) -> tuple[str, str] | None:
    """(code, matched name) of a failure whose pattern is in a log of the attempt."""
    for log in logs:
        with contextlib.suppress(OSError):
            status = log.path.stat()
            begins = run.dir.log_from(log.path)
            if match := _search_log(log.path, begins, status.st_size, status.st_mtime_ns, has_error):
                return match
    return None


@lru_cache(maxsize=64)
def _search_log(log: Path, begins: int, size: int, _modified: int, has_error: bool) -> tuple[str, str] | None:
    """If a log is longer than twice LOG_SEARCH_BYTES, its middle is not read. Without an error.json, a process died
    while printing, and every pattern in the first traceback counts."""
    try:
        with regular_files.open_regular(log) as file:
            file.seek(begins)
            printed = file.read(LOG_SEARCH_BYTES)
    except OSError:
        return None
    if begins + LOG_SEARCH_BYTES < size:
        printed += end_of(log, LOG_SEARCH_BYTES, begins + LOG_SEARCH_BYTES)
    text = printed.decode("utf-8", errors="replace")
    return (None if has_error else _match(PATTERNS, _first_traceback(text))) or _match(FATAL_PATTERNS, text)


def _first_traceback(log: str) -> str:
    """The first traceback near the end of the log; later ones are consequences."""
    match = re.search(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*\S.*", log)
    return match[0] if match else ""


def _last_line(error: Mapping[str, Any], log: str) -> str:
    if error:
        return f"{error['type']}: {error['message']}"[:300]
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "—"
