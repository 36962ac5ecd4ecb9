"""The studio's side of the preview: one warm child process that shows what a model sees of a data set.

The child is started with the first question, and again if it has ended; whatever happens to it does not affect the
studio.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from engine.core.problems import Problem, Refusal, problem
from engine.core.stages import STAGES
from engine.data import template_losses
from engine.launch import command
from engine.launch.workspace import PROJECT
from engine.spec.run_spec import RunSpec

ANSWER_TIMEOUT_S = 120.0  # for one answer

_lock = threading.Lock()  # one question at a time
_child: subprocess.Popen[bytes] | None = None


def start_child() -> None:
    """Start the child if there is none, so that it is ready for the first question. Returns immediately."""
    if _lock.acquire(blocking=False):  # otherwise it is busy, and therefore warm
        try:
            _running_child()
        finally:
            _lock.release()


def ask(what: str, spec: RunSpec, data: Path, name: str, **parameters: Any) -> dict[str, Any]:
    """The answer of `engine.worker.data.preview` to a question about the data set `name`. Raises Refusal."""
    question = json.dumps({"what": what, "spec": spec.to_yaml(), "data": str(data), "name": name, **parameters}) + "\n"
    with _lock:
        try:
            response = _ask_child(question.encode()) or _ask_child(question.encode())  # an idle one may be ending
        except TimeoutError:
            raise Refusal(problem("preview-too-slow", seconds=int(ANSWER_TIMEOUT_S))) from None
    if response is None:
        raise Refusal(problem("preview-ended"))
    if "problems" in response:
        raise Refusal([Problem(record["code"], record["field"], record["values"]) for record in response["problems"]])
    return response["answer"]


def first_rows(spec: RunSpec, data: Path) -> tuple[list[Problem], list[Problem]]:
    """What in the rows keeps a run from starting, and what is only noted, from a sample of each data set: rows that the
    chat template rejects, and what it leaves out of the others. Empty if the model is not on this machine, or the rows
    are plain text. Raises Refusal if the rows cannot be examined."""
    wrong: list[Problem] = []
    notes: list[Problem] = []
    if STAGES[spec.stage.kind].form == "text" or not Path(spec.model.model_name_or_path).is_dir():
        return wrong, notes
    for name in spec.data.datasets:
        answer = ask("statistics", spec, data, name)
        refused = [Problem(reason["code"], reason["field"], reason["values"]) for reason in answer["refused"]]
        count = answer["fates"].get("refused", 0)
        if refused and spec.data.skip_bad_rows and answer["usable"]:
            notes += [problem("rows-refused-left-out", name=name, bad=count, rows=answer["seen"]), *refused]
        elif refused:
            wrong += [problem("bad-rows", "data.datasets", name=name, bad=count), *refused]
        notes += template_losses.notes(answer["lost"], answer["seen"])
    return wrong, notes


def _ask_child(question: bytes) -> dict[str, Any] | None:
    """None: the child has ended. Raises TimeoutError if it did not answer in time, and was ended."""
    child = _running_child()
    to_child, from_child = _pipes(child)
    try:
        to_child.write(question)
        to_child.flush()
        return json.loads(_read_line(from_child.fileno()))
    except TimeoutError:
        _end_child()
        raise
    except (OSError, ValueError):
        _end_child()
        return None


def _read_line(pipe: int) -> bytes:
    """One line. Raises TimeoutError if it takes too long, ValueError if the pipe ends."""
    parts: list[bytes] = []
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while not parts or not parts[-1].endswith(b"\n"):
        if not select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
            raise TimeoutError
        parts.append(os.read(pipe, 1 << 16))
        if not parts[-1]:
            raise ValueError("the child has ended")
    return b"".join(parts)


def _running_child() -> subprocess.Popen[bytes]:
    global _child
    if _child is None or _child.poll() is not None:
        _end_child()
        _child = subprocess.Popen(
            [sys.executable, "-m", "engine.worker.data.preview"],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=command.inherited_environment()
            | command.OFFLINE_VARIABLES
            | {"PYTHONUTF8": "1", "TOKENIZERS_PARALLELISM": "true"},
        )
    return _child


def _pipes(child: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """The child's standard input and its standard output."""
    assert child.stdin
    assert child.stdout
    return child.stdin, child.stdout


def _end_child() -> None:
    global _child
    if _child is not None:
        to_child, from_child = _pipes(_child)
        with contextlib.suppress(OSError):
            to_child.close()
        from_child.close()
        _child.kill()
        _child.wait()
        _child = None
