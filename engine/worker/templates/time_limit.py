"""A time limit for chat templates: programs from a model's folder that may never end."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

RENDER_SECONDS = 5.0  # of CPU time, for one conversation; real templates take less than a thousandth
MAX_TIMEOUTS = 2  # timeouts of one template; after that it is not tried again

_timeouts: Counter[str] = Counter()


class RenderTimeout(TemplateError):
    """A template took too long for one conversation."""

    def __init__(self) -> None:
        super().__init__(f"it takes more than {RENDER_SECONDS:g} seconds for one conversation")


@contextmanager
def time_limit(template: str) -> Iterator[None]:
    """Raises RenderTimeout if the block, which renders `template`, takes longer, or immediately if the template has
    done so before. In threads other than the main one, which get no signals, there is no limit. CPU time counts,
    because a busy machine or a suspended process must not make a sound template look endless."""
    if _timeouts[template] >= MAX_TIMEOUTS:
        raise RenderTimeout
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        _timeouts[template] += 1
        raise RenderTimeout

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
