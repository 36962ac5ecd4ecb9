"""Python programs of the tests, each in a process of its own, that find the libraries imported already.

Importing torch and what is built on it takes some 3 s of processor time, most of what the training of a tiny model
costs. A forking process (`serve`) does it once, and forks a process for each program that is asked for on its socket.
Nothing is computed before the fork, so that no random state, thread or weight passes from one program to another.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import inspect
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import psutil

from tests.ports import reserved_ports

PROJECT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch", "pandas", "datasets", "accelerate", "peft", "transformers.trainer",
    "transformers.models.auto.modeling_auto", "transformers.models.qwen2.modeling_qwen2", "tests.weight_names",
)  # fmt: skip
REAL_POPEN = subprocess.Popen
OWNER = "ATHANOR_TEST_OWNER"  # a variable: the process with which forking processes end
ROOM_BYTES = 1 << 15  # of an argument and a variable of a forking process, which its children write over


def run_python(*words: object, input: str = "", timeout_s: int = 500, env: Mapping[str, str] | None = None) -> str:
    """What `python WORDS…` prints, with the environment of this process or `env`.

    None of our modules has been imported: a program that works out by hand what ours should do must not meet what they
    may have done to a library. Raises AssertionError with the end of its output if it fails or takes too long.
    """
    with ForkedProcess(
        [sys.executable, *map(str, words)],
        forking_process("tests.preloaded"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=env,
    ) as process:
        try:
            printed, errors = process.communicate(input, timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, errors = process.communicate()
    assert process.returncode == 0, f"exit code {process.returncode}\n{printed[-3000:]}{errors[-3000:]}"
    return printed


def run_ranks(count: int, *words: object, env: Mapping[str, str]) -> None:
    """`run_python` for each of several processes that train together, as the launcher would start them."""
    meeting = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}

    def run(rank: int) -> None:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        run_python(*words, env=os.environ | env | meeting | place)

    with reserved_ports(1) as [port], ThreadPoolExecutor(count) as ranks:
        meeting["MASTER_PORT"] = str(port)
        list(ranks.map(run, range(count)))


@functools.cache
def forking_process(module: str) -> Path:
    """The socket of a forking process `python -m MODULE`, started when it is first asked for by any of the processes
    that test side by side. It ends with the process that has started these."""
    tester = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    owner = int(os.environ.setdefault(OWNER, str(tester)))  # the programs of the tests have the same
    began = int(100 * psutil.Process(owner).create_time()) % 10**6  # another process may have had its number before
    folder = Path(tempfile.gettempdir(), f"fork-{owner}-{began}-{module.rpartition('.')[2]}")
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is somebody else's"
    address = folder / "socket"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_served(address):
            address.unlink(missing_ok=True)
            # What a test lets programs do at their start is done by the forks of that test alone (`starts_of`).
            variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            # It outlives the program that starts it, and must not hold its pipes, whose end somebody waits for.
            with (folder / "errors.txt").open("w") as errors:
                process = REAL_POPEN(
                    [sys.executable, "-m", module, str(address), "x" * ROOM_BYTES],
                    cwd=PROJECT,
                    # Threads wait for each other without keeping a core busy that another test has in use.
                    env=variables | {"ROOM": "x" * ROOM_BYTES, "OMP_WAIT_POLICY": "PASSIVE"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                )
            assert process.stdout.readline() == b"ready\n", (folder / "errors.txt").read_text()
    return address


def _is_served(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as channel:
        return channel.connect_ex(str(address)) == 0


class ForkedProcess(subprocess.Popen):  # type: ignore[type-arg]
    """A `subprocess.Popen` of [python, words…] whose process is forked: same pipes, signals, session and exit code."""

    def __init__(self, args: Sequence[str], address: Path, **options: Any):
        self._address = address
        super().__init__(args, **options)

    def _execute_child(self, *values: Any) -> None:
        names = list(inspect.signature(REAL_POPEN._execute_child).parameters)[1:]
        how = dict(zip(names, values, strict=True))
        ends = how["p2cread"], how["c2pwrite"], how["errwrite"]
        job = {
            "words": [os.fspath(word) for word in how["args"]],
            "environment": dict(os.environ if how["env"] is None else how["env"]),
            "folder": os.fspath(how["cwd"] or os.getcwd()),
            "new_session": how["start_new_session"],
        }
        self._channel = socket.socket(socket.AF_UNIX)
        self._channel.connect(str(self._address))
        descriptors = [own if end == -1 else end for own, end in enumerate(ends)]
        socket.send_fds(self._channel, [b"\n"], [*descriptors, *how["pass_fds"]])
        self._channel.sendall(json.dumps(job).encode() + b"\n")
        self._answers = self._channel.makefile("rb")
        self.pid = int(self._answers.readline())
        self._child_created = True
        self._close_pipe_fds(*(how[name] for name in names if name in PIPE_ENDS))

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags == os.WNOHANG and not select.select([self._channel], [], [], 0)[0]:
            return 0, 0
        return self.pid, int(self._answers.readline())

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


PIPE_ENDS = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


# ------------------------------------------------------------------------------------------------ the forking process


def serve(libraries: Iterable[str]) -> None:
    """Import the libraries, then fork a process for each program that is asked for, until OWNER has ended."""
    owner = psutil.Process(int(os.environ[OWNER]))
    os.fsync = lambda _descriptor: None  # type: ignore[assignment]  # as in conftest.py
    gc.disable()
    for name in libraries:
        importlib.import_module(name)
    gc.freeze()  # no child has to look through it
    gc.enable()
    # The threads of OpenBLAS and of pyarrow are not Python's; both libraries see to them at a fork.
    assert threading.active_count() == 1, "a library has started a thread, which a child would not have"
    _rooms()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for the programs
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        os.write(1, b"ready\n")
        while owner.is_running():
            if not select.select([listener], [], [], 1)[0]:
                continue
            channel, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _start_and_wait(channel)
            channel.close()
    shutil.rmtree(Path(sys.argv[1]).parent, ignore_errors=True)


def _start_and_wait(channel: socket.socket) -> NoReturn:
    """Fork a program as the other end of the channel says, and tell it the pid, and at its end the status."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 64)
        job = json.loads(channel.makefile("rb").readline())
        pid = os.fork()
        if pid == 0:
            channel.close()
            _become(job, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):  # nobody wants to know any more
            channel.sendall(f"{status}\n".encode())
    finally:
        os._exit(0)


def _become(job: dict[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """Run a program with what it would have of the process that asked for it."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, descriptor in enumerate(descriptors[:3]):
            os.dup2(descriptor, number)
            os.close(descriptor)
        if job["new_session"]:
            os.setsid()
        os.chdir(job["folder"])
        os.environ.clear()
        os.environ.update(job["environment"])
        variables = [f"{name}={value}" for name, value in job["environment"].items()]
        for address, lines in zip(_rooms(), (job["words"], variables), strict=False):
            text = b"".join(line.encode("utf-8", "surrogateescape") + b"\0" for line in lines)[: ROOM_BYTES - 1]
            ctypes.memmove(address, text.ljust(ROOM_BYTES, b"\0"), ROOM_BYTES)
        sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", 1, encoding="utf-8", errors="surrogateescape", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
        for start in starts_of(job["environment"]):
            runpy.run_path(str(start))
        _run_to_its_end([word for word in job["words"][1:] if word != "-u"])
    finally:
        os._exit(1)  # and never go on as the process that it was forked from


def starts_of(environment: Mapping[str, str]) -> list[Path]:
    """The modules in PYTHONPATH that Python runs when it starts."""
    folders = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    return [start for folder in folders if (start := Path(folder, "sitecustomize.py")).is_file()]


def memory_of_words() -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Where /proc/PID/cmdline and /proc/PID/environ of this process are read in its memory: begin and end of each.

    None where the kernel does not tell, as sandboxes such as gVisor do not. See proc(5), fields 48 to 51 of `stat`.
    """
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    places = [int(field) for field in fields[45:49]]
    if len(places) < 4 or not all(places):
        return None
    return (places[0], places[1]), (places[2], places[3])


@functools.cache
def _rooms() -> tuple[int, ...]:
    """The addresses of the two rooms that this process was started with; none where they cannot be shown."""
    places = memory_of_words() or ()
    assert all(end - begin > ROOM_BYTES for begin, end in places)
    return tuple(begin for begin, _ in places)


def _run_to_its_end(words: Sequence[str]) -> NoReturn:
    """Do in this process what `python WORDS…` does."""
    code: Any = 0
    try:
        _run_program(*words)
    except SystemExit as exit:
        code = exit.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does at its end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def _run_program(first: str, *others: str) -> None:
    if first == "-m":
        sys.argv = list(others)
        sys.modules.pop(others[0], None)  # it may be among the libraries, and is to run as the main module now
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *others]
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(LIBRARIES)
