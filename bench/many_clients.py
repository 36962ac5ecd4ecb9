"""Response times of a studio with many open pages, and whether its memory stops growing.

`python -m bench.many_clients --minutes 10`. A real studio with dozens of runs, one of which is running; pages that send
the requests of a browser (`simulated_page`), some in a real Chromium if requested; and visitors that open the page,
stay for a few ticks and disconnect without closing, some of which return in the same session.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.bigrun import BigRun
from bench.figures import Figure, table
from bench.server import MB, Server, free_port
from bench.simulated_page import TICK, SimulatedPage
from engine.launch.workspace import PROJECT

PAST_RUNS, PAST_LINES = 40, 400
LIVE_LINES, LIVE_LOG_BYTES, LIVE_STEP_SECONDS = 3_000, 1_000_000, 0.5
VISIT_SECONDS = 9.0
SHARE_COMING_BACK = 4  # one visitor in this many returns in the same session
SETTLED_MINUTES = 3.0  # after which memory should not grow any more
RAMP_SECONDS = 10.0  # in which the pages are opened, one after another
TARGET_P95_SECONDS, TARGET_MB_PER_HOUR = 1.0, 20.0

# The views of the pages, in turn: most have the running run open.
RUN = "bench/lora/live"
LOOKS = (
    f"run={RUN}", "tab=runs", f"run={RUN}", f"tab=compare&runs={RUN}&runs=base/lora/run-01", f"run={RUN}", "tab=chat",
    f"run={RUN}", "tab=runs", "tab=train", "tab=evaluate",
)  # fmt: skip


@dataclass
class Answers:
    """Durations of ticks in seconds since the last report, and in total."""

    recent: list[float] = field(default_factory=list)
    all: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)  # of other events, in total
    failed: int = 0

    def note(self, event: str, seconds: float, succeeded: bool) -> None:
        self.failed += not succeeded
        (self.recent if event == TICK else self.other).append(seconds)

    def take(self) -> list[float]:
        recent, self.recent = self.recent, []
        self.all += recent
        return recent


@dataclass
class Sample:
    """The state of the studio at one moment; memory in MB."""

    at: float  # seconds since all pages were open
    rss: float
    uss: float
    threads: int
    sockets: int
    counts: dict[str, int]


def watched_studio(folder: Path, saves: Path) -> tuple[Server, str]:
    """The studio, and the address of its counts."""
    port, watch = free_port(), free_port()
    command = [sys.executable, "-m", "bench.watched_studio", "--port", str(port), "--saves", str(saves)]
    return Server(command, port, folder, WATCH_PORT=str(watch), PYTHONPATH=str(PROJECT)), f"http://127.0.0.1:{watch}"


def ask(address: str, question: str = "/") -> dict:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(address + question, timeout=120) as answer:
        return json.load(answer)


def look(server: Server, watch: str, began: float) -> Sample:
    process = server.process
    memory = process.memory_full_info()
    return Sample(
        time.monotonic() - began, memory.rss / MB, memory.uss / MB, process.num_threads(),
        len(process.net_connections("tcp")), ask(watch),
    )  # fmt: skip


def build_past_runs(saves: Path) -> None:
    from tests.past_runs import falling, run_maker

    make = run_maker(saves)
    for number in range(PAST_RUNS):
        make(f"run-{number:02d}", falling(PAST_LINES), None if number % 7 == 6 else "finished")


async def go_on(run: BigRun) -> None:
    """Log a step at regular intervals, as a trainer does."""
    while True:
        await asyncio.sleep(LIVE_STEP_SECONDS)
        run.add()


async def begin_tracing(watch: str, after_minutes: float) -> None:
    await asyncio.sleep(after_minutes * 60 + RAMP_SECONDS)
    await asyncio.to_thread(ask, watch, "/lines")


async def visit(address: str, answers: Answers, per_minute: float) -> None:
    """Visitors, one after another, as long as the studio is measured."""
    async with asyncio.TaskGroup() as visits:
        for number in itertools.count():
            await asyncio.sleep(60 / per_minute)
            visits.create_task(_one_visit(address, answers, LOOKS[number % len(LOOKS)], number))


async def _one_visit(address: str, answers: Answers, query: str, number: int) -> None:
    page = SimulatedPage(address, query, answers.note)
    await page.open()
    await asyncio.sleep(VISIT_SECONDS)
    await page.close()
    if number % SHARE_COMING_BACK == 0:
        again = SimulatedPage(address, query, answers.note, page.session)
        await again.open()
        await asyncio.sleep(VISIT_SECONDS)
        await again.close()


@contextlib.asynccontextmanager
async def browsers(address: str, count: int) -> AsyncIterator[None]:
    """Pages in real browsers with the live run open."""
    if not count:
        yield
        return
    from playwright.async_api import async_playwright

    from tests.browser.find_chromium import ARGUMENTS, chromium

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        for number in range(count):
            page = await (await browser.new_context(locale="en-US")).new_page()
            await page.goto(f"{address}/?{LOOKS[number % 2]}", timeout=120_000)
        yield
        await browser.close()


async def watch_pages(options: argparse.Namespace, server: Server, watch: str) -> tuple[list[Sample], Answers]:
    """Open the pages, and measure the studio until the time is over."""
    answers, samples = Answers(), []
    pages = [
        SimulatedPage(server.address, LOOKS[number % len(LOOKS)], answers.note) for number in range(options.clients)
    ]
    async with browsers(server.address, options.browsers), asyncio.TaskGroup() as group:
        for page in pages:
            group.create_task(page.open())
            await asyncio.sleep(RAMP_SECONDS / len(pages))
        if options.visits:
            visiting = group.create_task(visit(server.address, answers, options.visits))
        answers.take()
        began = time.monotonic()
        while time.monotonic() - began < options.minutes * 60:
            await asyncio.sleep(options.every)
            samples.append(await asyncio.to_thread(look, server, watch, began))
            print(line(samples[-1], answers.take(), answers.failed), flush=True)
        if options.visits:
            visiting.cancel()
        for page in pages:
            await page.close()
    return samples, answers


def line(sample: Sample, took: list[float], failed: int) -> str:
    p50, p95, most = (1000 * value for value in percentiles(took))
    counts = sample.counts
    used, free = counts["malloc_used"] / MB, counts["malloc_free"] / MB
    return (
        f"{sample.at:5.0f} s  ticks {len(took):4} p50 {p50:5.0f} p95 {p95:5.0f} max {most:5.0f} ms  failed {failed}  "
        f"rss {sample.rss:6.1f} uss {sample.uss:6.1f} MB  malloc {used:5.1f} used {free:5.1f} free  "
        f"blocks {counts['python_blocks']:,}  threads {sample.threads} sockets {sample.sockets} "
        f"sessions {counts['sessions']}  load {os.getloadavg()[0]:.1f}"
    )


def percentiles(took: list[float]) -> tuple[float, float, float]:
    """The median, the 95th percentile and the maximum; zeros without values."""
    if not took:
        return 0.0, 0.0, 0.0
    return statistics.median(took), float(np.percentile(took, 95)), max(took)


def slope(samples: list[Sample], after_minutes: float) -> float:
    """Growth of the resident memory in MB per hour, by least squares over the samples after this many minutes."""
    late = [sample for sample in samples if sample.at >= after_minutes * 60]
    hours, memory = [sample.at / 3600 for sample in late], [sample.rss for sample in late]
    return float(np.polyfit(hours, memory, 1)[0])


@contextlib.contextmanager
def studio_with_runs() -> Iterator[tuple[Server, str, BigRun]]:
    """A studio with finished runs and a running one."""
    with tempfile.TemporaryDirectory() as folder:
        saves = Path(folder) / "saves"
        saves.mkdir()
        build_past_runs(saves)
        run = BigRun(saves, LIVE_LINES, LIVE_LOG_BYTES, RUN)
        server, watch = watched_studio(Path(folder), saves)
        try:
            yield server, watch, run
        finally:
            server.end()
            run.close()


async def measure(options: argparse.Namespace) -> list[Figure]:
    with studio_with_runs() as (server, watch, run):
        training = asyncio.create_task(go_on(run))
        tracing = asyncio.create_task(begin_tracing(watch, options.settled)) if options.trace else None
        samples, answers = await watch_pages(options, server, watch)
        training.cancel()
        if tracing:
            await tracing
            print(*ask(watch, "/lines"), sep="\n\n")
        collected, trimmed = ask(watch, "/collect"), ask(watch, "/trim")
        after_trim = server.process.memory_info().rss / MB
    p50, p95, most = (1000 * value for value in percentiles(answers.all))
    growth = slope(samples, options.settled)
    print(f"after a collection: {collected}\nafter trimming: {trimmed}")
    return [
        Figure("ticks answered", len(answers.all)),
        Figure("requests that failed", answers.failed, "", 0),
        Figure("a tick, median", p50, "ms"),
        Figure("… 95 in a hundred", p95, "ms", 1000 * TARGET_P95_SECONDS),
        Figure("… the slowest", most, "ms"),
        Figure("other events, median", 1000 * percentiles(answers.other)[0], "ms"),
        Figure("resident when all pages were open", samples[0].rss, "MB"),
        Figure("resident at the end", samples[-1].rss, "MB"),
        Figure("… given back when asked for", samples[-1].rss - after_trim, "MB"),
        Figure(f"growth after {options.settled:g} minutes, per hour", growth, "MB", TARGET_MB_PER_HOUR),
        Figure("load of the machine at the end", os.getloadavg()[0]),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long to watch")
    parser.add_argument("--clients", type=int, default=30, help="pages that stay open")
    parser.add_argument("--browsers", type=int, default=0, help="pages in a real Chromium besides")
    parser.add_argument(
        "--visits",
        type=float,
        default=6,
        help="visitors a minute who open a page and are gone again; 0: none",
    )
    parser.add_argument("--every", type=float, default=15, help="seconds between two lines")
    parser.add_argument("--settled", type=float, default=SETTLED_MINUTES, help="minutes before growth is counted")
    parser.add_argument(
        "--trace", action="store_true", help="tell where memory is held that was allocated after it has settled; slow"
    )
    options = parser.parse_args()
    if (options.minutes - options.settled) * 60 < 3 * options.every:
        parser.error("too short to see memory grow: there must be three lines after it has settled")
    figures = asyncio.run(measure(options))
    print(table(figures, ""))
    return 1 if any(figure.met is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
