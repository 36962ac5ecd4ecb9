"""A training on two machines of a real Slurm, worked from the page."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from engine.core.rundir import read_lines, read_object
from engine.launch.processes import find_processes
from engine.launch.workspace import Workplace
from engine.runs import runs
from engine.runs.run import Run
from tests.browser.conftest import WORK_MS
from tests.conftest import start_studio, wait_until
from tests.forked import start_forking_process
from tests.slurm_cluster import running_cluster

pytestmark = pytest.mark.usefixtures("forked")


def last_step(run: Run) -> int:
    return max((line["step"] for line in read_lines(run.dir.metrics) if "loss" in line), default=0)


def test_a_run_on_two_machines_is_submitted_stopped_resumed_and_killed_on_the_page(
    demo_workplace: Workplace,
    open_page: Callable[..., Page],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_forking_process()
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        for name, value in cluster.variables.items():
            monkeypatch.setenv(name, value)
        studio, address = start_studio(demo_workplace, "--engine", "slurm")
        try:
            page = open_page(address)
            run = submit_for_two_machines(page, demo_workplace)
            badge = page.locator("#run-head .badge")
            expect(badge).to_have_text(re.compile("Running"), timeout=WORK_MS)
            expect(page.locator("#curves svg").first).to_be_visible(timeout=WORK_MS)
            assert read_object(run.dir.keeper)["machines"] == "n[1-2]"
            first_job = read_object(run.dir.slurm)["job"]

            page.locator("#stop").click()
            expect(badge).to_have_text(re.compile("Stopped"), timeout=WORK_MS)
            stopped_at = last_step(run)
            assert run.dir.checkpoints()[-1].name == f"checkpoint-{stopped_at}"
            wait_until(lambda: cluster.command("squeue", "--noheader") == "")

            page.locator("#resume").click()
            expect(badge).to_have_text(re.compile("Running"), timeout=WORK_MS)
            wait_until(lambda: last_step(run) > stopped_at)
            assert read_object(run.dir.slurm)["job"] != first_job
            steps = [line["step"] for line in read_lines(run.dir.metrics) if "loss" in line]
            assert steps == sorted(set(steps))  # no step again, and none left out
            expect(page.locator("#log")).to_contain_text("Machine 2")

            page.locator("#kill").click()
            page.locator("#yes-kill").click()
            expect(badge).to_have_text(re.compile("Stopped"), timeout=WORK_MS)
            assert (run.dir.attempt(), find_processes(run.path)) == (2, [])
            wait_until(lambda: cluster.command("squeue", "--noheader") == "")
        finally:
            studio.kill()
            studio.wait()


def submit_for_two_machines(page: Page, workplace: Workplace) -> Run:
    """The demo with more epochs than anybody waits for, a process on each machine, started on the form."""
    expect(page.locator("#summary .state.right")).to_be_visible()
    page.locator("#part-hardware button").first.click()
    values = {"training-num_train_epochs": "20000", "hardware-num_machines": "2", "hardware-num_processes": "2"}
    for field, value in values.items():
        page.locator(f"#f-{field} input").first.fill(value)
        page.keyboard.press("Tab")
    expect(page.locator("#summary")).to_contain_text("80,000")
    page.locator("#start").click()
    expect(page.locator("#run-head h1")).to_be_visible()
    (run,) = runs.find(workplace.saves)
    return run
