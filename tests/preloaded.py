"""Python programs of the tests, each in a process of its own, that find torch imported already.

`python -m tests.preloaded` imports torch and the libraries on top of it, which takes some 3 s of processor time, and
then forks a process for every program that is asked for on its standard input. It imports nothing of ours: a program
that works something out by hand must not meet what our code may have done to a library. Nothing is computed before
the fork, so no random state, no thread and no weight goes from one program to another.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch", "pandas", "datasets", "accelerate", "peft", "transformers.trainer",
    "transformers.models.auto.modeling_auto", "transformers.models.qwen2.modeling_qwen2",
)  # fmt: skip


def run_python(*words: object, input: str = "", timeout_s: int = 500) -> str:
    """What `python WORDS…` prints, with the environment of this process; words[0] is -c or -m.

    Raises AssertionError with the end of its output if it fails, or is not done in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("stdin", "stdout", "stderr")}
        files["stdin"].write_text(input, encoding="utf-8")
        job = {
            "words": [str(word) for word in words],
            "files": {name: str(file) for name, file in files.items()},
            "environment": dict(os.environ),
            "timeout_s": timeout_s,
        }
        parent = _forking_process()
        print(json.dumps(job), file=parent.stdin, flush=True)
        code = parent.stdout.readline().strip()
        told, wrong = (files[name].read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
    assert code == "0", f"exit code {code}\n{told[-3000:]}{wrong[-3000:]}"
    return told


@functools.cache
def _forking_process() -> subprocess.Popen[str]:
    """It ends when this process does, whose end closes its standard input."""
    words = [sys.executable, "-m", "tests.preloaded"]
    return subprocess.Popen(words, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def main() -> None:
    gc.disable()
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # no child has to look through it
    gc.enable()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(words: list[str], files: dict[str, str], environment: dict[str, str], timeout_s: int) -> None:
    """Run the program in this process, and end it."""
    signal.alarm(timeout_s)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(os.open(files[name], os.O_RDWR | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    code: Any = 0
    try:
        _run_program(*words)
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _run_program(kind: str, program: str, *arguments: str) -> None:
    sys.argv = ["-c", *arguments]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
