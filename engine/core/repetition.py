"""Something that a server does again and again in a thread."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable


def repeat(act: Callable[[], object], seconds: float) -> None:
    """Call `act` now and every `seconds`, in a thread, as long as this process runs. An error that repeats is printed
    once, so that a full or missing disk does not fill another one with the log."""

    def go_on() -> None:
        before: list[str] = []
        while True:
            place: list[str] = []
            try:
                act()
            except Exception as error:  # the next call may succeed again
                # Without the message, which may name a temporary file.
                place = [type(error).__name__, *traceback.format_tb(error.__traceback__)]
                if place != before:
                    traceback.print_exc()
            before = place
            time.sleep(seconds)

    threading.Thread(target=go_on, daemon=True).start()
