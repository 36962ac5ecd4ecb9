"""Growth of the studio's memory over many ticks from several open browser pages.

The pages are real, with a very long run open; only their timers are accelerated: the script below makes the page's
two-second timer fire more often, and everything after that is as usual.
"""

from __future__ import annotations

import re
import statistics
import threading
import time
from pathlib import Path

from playwright.sync_api import Page, Response, sync_playwright

from bench.bigrun import LINES, LOG_BYTES, BigRun
from bench.server import studio
from tests.browser.find_chromium import ARGUMENTS, chromium

PAGES, TICKS = 5, 2000
WARMUP_TICKS = 100  # after these ticks, all code has run once and all caches are full
FAST_TIMER_JS = """
const real = window.setInterval;
window.setInterval = (act, ms, ...rest) => real(act, ms === RINGS_MS ? 100 : ms, ...rest);
"""


def measure(folder: Path, ticks: int = TICKS, lines: int = LINES, log_bytes: int = LOG_BYTES) -> dict[str, float]:
    """Memory before and after, and the milliseconds to the response while all pages send requests at once."""
    from webui.runs_tab.run_view import POLL_SECONDS  # imports gradio, which the other parts do not need

    saves = folder / "saves"
    run = BigRun(saves, lines, log_bytes)
    done = threading.Event()
    writer = threading.Thread(target=_write, args=(run, done))
    with studio(folder, saves) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        took: list[float] = []
        pages = [
            browser.new_context(locale="en-US", viewport={"width": 800, "height": 600}).new_page() for _ in range(PAGES)
        ]
        for page in pages:
            page.add_init_script(FAST_TIMER_JS.replace("RINGS_MS", str(1000 * POLL_SECONDS)))
            page.set_default_timeout(60_000)
            page.goto(f"{server.address}/?run={run.id}")
            page.locator("#curves svg").first.wait_for(state="visible")
        opened = server.resident_mb()
        for page in pages:
            page.on("response", lambda answer: _note(answer, took))
        writer.start()
        began, warm = time.monotonic(), None
        try:
            while len(took) < ticks:
                pages[0].wait_for_timeout(200)
                if warm is None and len(took) >= WARMUP_TICKS:
                    warm = server.resident_mb()
                if time.monotonic() - began > 900:
                    break
        finally:
            done.set()
            writer.join()
        seconds = time.monotonic() - began
        after, shown = server.resident_mb(), min(map(_shown_step, pages))
        browser.close()
    run.close()
    return {
        "ticks": len(took),
        "seconds": seconds,
        "opened_mb": opened,
        "after_mb": after,
        "grown_mb": after - opened,
        "grown_warm_mb": after - (warm or opened),
        "answer_ms": statistics.median(took),
        "behind": run.step - shown,
    }


def _write(run: BigRun, done: threading.Event) -> None:
    """A new line of metrics between any two ticks of a page."""
    while not done.wait(0.05):
        run.add()


def _note(answer: Response, took: list[float]) -> None:
    if answer.request.method == "POST" and answer.status == 200 and "/run/" in answer.url:
        took.append(answer.request.timing["responseStart"])


def _shown_step(page: Page) -> int:
    """The step in the head of the open run."""
    numbers = re.findall(r"\d[\d,]*", page.locator("#run-head .told").inner_text())
    return int(numbers[0].replace(",", ""))
