"""Read an untrusted file in a separate process with limited memory, time and disk.

Question and answer are JSON on standard input and output. Problems of the file come back as a Refusal, and so does a
crash of the process, because native libraries abort when memory runs out.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.core import hardware
from engine.core.problems import Problem, Refusal, problem
from engine.core.project import PROJECT

MAX_MEMORY = 8 << 30  # bytes of address space, but at most half of the free memory
MAX_SECONDS = 300  # of CPU time
MAX_WRITTEN_BYTES = 8 << 30  # maximum bytes of a file that it writes


def ask(module: str, file: Path, *, seconds: int = MAX_SECONDS, **question: Any) -> Mapping[str, Any]:
    """The answer of the module, run as a process. Raises Refusal if it refuses, uses too much or ends without an
    answer; OSError if it cannot write."""
    free_memory, _ = hardware.memory()
    limits = {
        "memory": min(MAX_MEMORY, free_memory // 2),
        "seconds": seconds,
        "written": MAX_WRITTEN_BYTES,
    }
    child = subprocess.run(
        [sys.executable, "-m", module],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        input=json.dumps({"file": str(file.absolute()), "limits": limits, "question": question}),
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    if child.returncode < 0:
        raise Refusal(problem("file-takes-too-much", file=file.name))
    if child.returncode:
        reason = child.stderr.strip().rpartition("\n")[2]
        raise Refusal(problem("data-file-unreadable", file=file.name, why=reason))
    answer = json.loads(child.stdout)
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]))
    if "problems" in answer:
        raise Refusal(Problem(**record) for record in answer["problems"])
    return answer


# -------------------------------------------------------------------------------------- in the process


def reply(act: Callable[..., dict[str, Any]]) -> None:
    """Answer the question on standard input with the result of `act` for the file and the question."""
    request = json.load(sys.stdin)
    _limit(**request["limits"])
    file = Path(request["file"])
    try:
        answer = act(file, **request["question"])
    except Refusal as refusal:
        answer = {"problems": [asdict(issue) for issue in refusal.problems]}
    except (MemoryError, OSError) as error:
        number = errno.ENOMEM if isinstance(error, MemoryError) else error.errno or errno.EIO
        too_much = {"problems": [asdict(problem("file-takes-too-much", file=file.name))]}
        answer = too_much if number in (errno.ENOMEM, errno.EFBIG) else {"errno": number}
    json.dump(answer, sys.stdout, default=str)  # the exception may contain values of a problem


def _limit(memory: int, seconds: int, written: int) -> None:
    """Limit this process. Exceeding a limit ends it or raises an exception."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (written, written))
