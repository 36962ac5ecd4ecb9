"""Processes that share a piece of work: tasks go in, and results come out in the order of the tasks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

TASKS_AHEAD = 2  # tasks that have been given to a process and not yet answered
PR_SET_PDEATHSIG = 1


class ProcessPool:
    """`count` forks of this process that run `work`; with 1, this process runs it. End it with `close`.

    A fork knows everything that this process knows; only tasks and results are sent, and should be small. What `work`
    raises is raised here, in place of its result. The forks end with this process, however it ends.

    concurrent.futures.ProcessPoolExecutor would not work: its `map` reads all tasks before it yields a result, `work`
    would have to be picklable, and its processes outlive a killed parent.
    """

    def __init__(self, count: int, work: Callable[[Any], Any]):
        self.work = work
        self.members: list[tuple[int, Connection]] = []
        sys.stdout.flush()
        for _ in range(count if count > 1 else 0):
            ours, theirs = Pipe()
            if pid := os.fork():
                theirs.close()
                self.members.append((pid, ours))
            else:
                for _, other in self.members:
                    other.close()
                ours.close()
                _run_child(theirs, work)

    def map(self, tasks: Iterable[Any]) -> Generator[Any]:
        """The results of the tasks. To be read to the end, or closed.

        Otherwise the pool cannot be used again: a signal may have stopped the reading in the middle of an answer, and
        the next bytes are not the beginning of one.
        """
        if not self.members:
            yield from map(self.work, tasks)
            return
        waiting: deque[Connection] = deque()
        try:
            for number, task in enumerate(tasks):
                _, member = self.members[number % len(self.members)]
                with _dead_child_as_error():
                    member.send(task)
                waiting.append(member)
                if len(waiting) == TASKS_AHEAD * len(self.members):
                    yield _answer(waiting.popleft())
            while waiting:
                yield _answer(waiting.popleft())
        except GeneratorExit:  # closed between two answers, so that the next map gets none of these
            with contextlib.suppress(EOFError, OSError):
                for member in waiting:
                    member.recv()
            raise

    def close(self) -> None:
        """Ends the forks immediately."""
        for pid, connection in self.members:
            connection.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.members.clear()


def _answer(member: Connection) -> Any:
    with _dead_child_as_error():
        good, answer = member.recv()
    if not good:
        raise answer
    return answer


@contextlib.contextmanager
def _dead_child_as_error() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError):
        raise ChildProcessError(
            "A process that prepared rows was killed. There may be too little memory for so many of them."
        ) from None


def _run_child(tasks: Connection, work: Callable[[Any], Any]) -> None:
    """The main loop of a fork. Never returns."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    taken: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive_tasks, args=(tasks, taken), daemon=True).start()
    try:
        while True:
            task = taken.get()
            try:
                answer = (True, work(task))
            except Exception as error:
                traceback.print_exc()
                answer = (False, error)
            tasks.send(answer)
    finally:
        os._exit(0)


def _receive_tasks(tasks: Connection, taken: SimpleQueue[Any]) -> None:
    """Read tasks as they come: while a long answer waits to be read, its reader may be sending a long task."""
    try:
        while True:
            taken.put(tasks.recv())
    finally:
        os._exit(0)
