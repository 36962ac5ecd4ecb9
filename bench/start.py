"""From the command to a usable page: seconds, memory, loaded libraries and requested hosts."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Page, Request, sync_playwright

from bench.server import Server, peer, studio, wait_until_quiet
from tests.browser.find_chromium import ARGUMENTS, chromium

REPEATS = 3
IDLE_S = 3.0  # after the page has been used, before the memory is read


@dataclass
class Start:
    """The figures of one start. `page_s` is from requesting the page, `usable_s` from the command."""

    ready_s: float
    resident_mb: float
    page_s: float
    usable_s: float
    torch: bool
    outside: set[str] = field(default_factory=set)


def ours(page: Page) -> None:
    """Filled: the form shows its defaults and their summary, and Start is enabled."""
    page.wait_for_function("document.querySelector('#summary')?.innerText.trim() && document.querySelector('#start')")


def theirs(page: Page) -> None:
    """Filled: the button that starts training has its label."""
    page.get_by_role("button", name="Start", exact=True).first.wait_for(state="visible")


def one_start(
    serve: Callable[[Path], contextlib.AbstractContextManager[Server]], filled: Callable[[Page], None]
) -> Start:
    """Start once, in an empty folder, with a new browser profile."""
    wait_until_quiet()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        with serve(Path(folder)) as server:
            time.sleep(IDLE_S)
            resident, outside = server.resident_mb(), set()

            def note(request: Request) -> None:
                host = urlsplit(request.url).hostname
                if host not in ("127.0.0.1", "localhost", None):
                    outside.add(host)

            page = browser.new_context(locale="en-US").new_page()
            page.set_default_timeout(60_000)
            page.on("request", note)  # a request that is held until it is looked at takes some milliseconds longer
            began = time.perf_counter()
            page.goto(server.address)
            filled(page)
            # A page may look complete but not respond: running scripts delay clicks for seconds.
            page.evaluate("() => new Promise((done) => requestIdleCallback(done))")
            took = time.perf_counter() - began
            time.sleep(IDLE_S)
            used = max(resident, server.resident_mb())
            start = Start(server.ready_s, used, took, server.ready_s + took, server.has_loaded("libtorch"), outside)
        browser.close()
    return start


def median(starts: list[Start]) -> Start:
    """The median of each number."""
    names = ("ready_s", "resident_mb", "page_s", "usable_s")
    middle = {name: statistics.median(getattr(start, name) for start in starts) for name in names}
    outside = set().union(*(start.outside for start in starts))
    return Start(**middle, torch=any(start.torch for start in starts), outside=outside)


def measure(peer_python: Path | None) -> tuple[Start, Start | None]:
    """Ours and the peer's alternately, so that other load on the machine affects both."""
    mine, other = [], []
    for _ in range(REPEATS):
        mine.append(one_start(lambda folder: studio(folder, folder / "saves"), ours))
        if peer_python:
            other.append(one_start(lambda folder: peer(folder, peer_python), theirs))
    return median(mine), median(other) if other else None
