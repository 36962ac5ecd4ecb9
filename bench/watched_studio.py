"""The studio as `python app.py` starts it, with a second port on loopback that reports the memory of its process.

`WATCH_PORT=… python -m bench.watched_studio --port … --saves …`. `GET /` returns counts as JSON, `/collect` the same
after a garbage collection, `/trim` after the C library has returned free memory, `/types` objects by type, and `/lines`
the source lines of the memory allocated since the first request of it. From that request on, the studio runs several
times slower.
"""

from __future__ import annotations

import collections
import ctypes
import gc
import json
import os
import sys
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import app

FRAMES, LINES, TYPES = 8, 40, 60


class Mallinfo2(ctypes.Structure):
    """As in malloc.h of glibc 2.33; all in bytes except for the counts `ordblks`, `smblks` and `hblks`."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def sessions() -> int:
    """The number of gradio's sessions, of the pages in both languages."""
    from gradio import Blocks  # only now that the studio has set the environment variables that gradio reads

    return sum(len(blocks.state_holder.session_data) for blocks in Blocks.get_instances())


def counts() -> dict[str, Any]:
    """Counts of the process that do not require walking over all objects."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    malloc = libc.mallinfo2()
    return {
        "sessions": sessions(),
        "python_blocks": sys.getallocatedblocks(),
        "malloc_used": malloc.uordblks + malloc.hblkhd,
        "malloc_free": malloc.fordblks,
        "collections": [generation["collections"] for generation in gc.get_stats()],
    }


def types() -> dict[str, int]:
    counter = collections.Counter(type(item).__name__ for item in gc.get_objects())
    return dict(counter.most_common(TYPES))


def lines() -> list[str]:
    """The source lines with the most memory allocated since the first request and still in use; nothing at first."""
    if not tracemalloc.is_tracing():
        tracemalloc.start(FRAMES)
    snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, tracemalloc.__file__)])
    held = snapshot.statistics("traceback")[:LINES]
    return [
        "\n".join([f"{entry.size / 1e3:,.0f} KB in {entry.count} blocks", *entry.traceback.format()]) for entry in held
    ]


class Counts(BaseHTTPRequestHandler):
    """Answers these requests."""

    def do_GET(self) -> None:
        if self.path in ("/collect", "/trim", "/lines"):
            gc.collect()
        if self.path == "/trim":
            ctypes.CDLL(None).malloc_trim(0)
        answers = {"/types": types, "/lines": lines}
        body = json.dumps(answers.get(self.path, counts)()).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""


def main() -> int:
    server = HTTPServer(("127.0.0.1", int(os.environ["WATCH_PORT"])), Counts)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return app.main()


if __name__ == "__main__":
    sys.exit(main())
