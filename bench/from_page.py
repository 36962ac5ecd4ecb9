"""From a click on Start in a real browser to the first optimizer step, with rows that have been prepared before.

The same run is started again and again, with a standby (`engine.runs.standby`) and without one: somebody has read the
form for a while and then clicks. `python -m bench.from_page [--repeats N]` prints both, and the memory of the standby.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from playwright.sync_api import Page, sync_playwright

from bench.prepare import SHORT_ROWS, describe, proportional_memory, short_rows, spec_of
from bench.server import MB, studio, wait_until_quiet
from engine.core.rundir import RunDir, run_folders
from engine.launch.workspace import DEMO_MODEL
from tests.browser.find_chromium import ARGUMENTS, chromium

REPEATS = 5
READING_S = 8.0  # that somebody looks at the form before the click
QUIET_S = 20.0  # to wait at most for a quiet machine before each run


def measure(folder: Path, repeats: int, *flags: str) -> tuple[float, float]:
    """Seconds from the click to the first logged step (median), and the memory of the standby in MB, with the rows and
    runs in `folder`."""
    data = ("--data", str(folder), "--models", str(DEMO_MODEL))
    seconds, memory = [], 0.0
    with studio(folder, folder / "runs", *data, *flags) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        for number in range(repeats + 1):
            page = browser.new_context(locale="en-US").new_page()
            fill(page, server.address, folder)
            wait_until_quiet(QUIET_S)
            look(page)
            memory = max(memory, standby_mb())
            took = click_to_step(page, folder / "runs")
            seconds += [took] if number else []  # the first one prepares the rows
            page.context.close()
        browser.close()
    return statistics.median(seconds), memory


def fill(page: Page, address: str, folder: Path) -> None:
    """Open the page, and load the settings into the form."""
    page.set_default_timeout(60_000)
    page.goto(address)
    page.wait_for_selector("#summary .state.right")
    page.get_by_text("Load settings", exact=False).first.click()
    page.locator("#paste textarea").fill(spec_of(folder, "short", max_length=512).to_yaml())
    page.get_by_role("button", name="Load into the form").click()
    page.wait_for_function(f"document.querySelector('#summary').innerText.includes('{SHORT_ROWS:,}')")


def look(page: Page) -> None:
    """Move the pointer now and then, as a reader does."""
    for number in range(int(READING_S)):
        page.mouse.move(200 + number, 300)
        time.sleep(1)


def click_to_step(page: Page, saves: Path) -> float:
    """Click on Start, and wait for the first step of the run and its end."""
    before = set(run_folders(saves)) if saves.is_dir() else set()
    start = page.locator("#start")
    start.scroll_into_view_if_needed()
    began = time.perf_counter()
    start.click(no_wait_after=True)
    while not (new := set(run_folders(saves)) - before):
        time.sleep(0.02)
    run = RunDir(new.pop())
    while not run.metrics.exists():
        time.sleep(0.02)
    took = time.perf_counter() - began
    while not run.exit.exists():
        time.sleep(0.2)
    return took


def standby_mb() -> float:
    """Memory in MB of the processes that wait for a run, with shared pages counted once."""
    waiting = [process for process in psutil.process_iter(["cmdline"]) if is_supervisor(process.info["cmdline"] or ())]
    return sum(map(proportional_memory, waiting)) / MB


def is_supervisor(words: list[str]) -> bool:
    return "engine.runs.supervisor" in words and words[-1].strip() == "standby"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        short_rows(folder, SHORT_ROWS, "short")
        describe(folder, "short")
        for flags in ((), ("--no-standby",)):
            seconds, memory = measure(folder, repeats, *flags)
            print(f"{' '.join(flags) or 'standby':12s} click → first step {seconds:.2f} s, standby {memory:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
