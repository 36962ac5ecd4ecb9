"""One answer for all pages that ask the same at about the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from webui.panels import Updates


class SharedAnswers:
    """Answers by their question, kept for so many seconds. While an answer is being computed, others wait for it."""

    def __init__(self, seconds: float = 1.0):
        self.seconds, self.lock = seconds, threading.Lock()
        self.answers: dict[Hashable, tuple[float, Future[Updates]]] = {}  # and when each was requested, oldest first

    def get(self, question: Hashable, answer: Callable[[], Updates]) -> Updates:
        """The result of the first caller's `answer`, as a copy that may be changed; raises what it raised."""
        with self.lock:
            self._drop_old()
            _, future = known = self.answers.get(question) or (time.monotonic(), Future[Updates]())
            first = question not in self.answers
            self.answers[question] = known
        if first:
            try:
                future.set_result(answer())
            except BaseException as error:
                future.set_exception(error)
        return {block: value.copy() if isinstance(value, dict) else value for block, value in future.result().items()}

    def _drop_old(self) -> None:
        now = time.monotonic()
        for question, (since, future) in list(self.answers.items()):
            if now - since < self.seconds:
                return
            if future.done():
                del self.answers[question]
