"""Who looks at a form that is ready finds the libraries imported when clicking on Start."""

from __future__ import annotations

import os
from collections.abc import Callable

from playwright.sync_api import Page, expect

from engine.core.rundir import read_json
from engine.launch.handover import PLACE
from engine.launch.workspace import Workplace
from engine.runs import runs
from tests.conftest import start_studio, wait_until
from tests.living import living


def test_a_look_at_a_form_that_is_ready_prepares_the_run(
    demo_workplace: Workplace, open_page: Callable[..., Page]
) -> None:
    def standbys() -> list[int]:
        """Supervisors that have no run yet; the process that starts one has no session of its own."""
        waiting = (process for process in living("STANDBY_TEST=page") if process.supervises and PLACE in process.words)
        return [process.pid for process in waiting if os.getsid(process.pid) == process.pid]

    studio, address = start_studio(demo_workplace, ATHANOR_NO_STANDBY="", STANDBY_TEST="page")
    try:
        page = open_page(address)
        expect(page.locator("#summary .state.right")).to_be_visible()
        assert not standbys()  # a page may be open that nobody looks at
        page.mouse.move(300, 300)
        page.mouse.move(310, 310)
        (supervisor,) = wait_until(standbys, 10)
        page.locator("#start").click()
        run = wait_until(lambda: runs.find(demo_workplace.saves), 20)[0]
        assert wait_until(lambda: read_json(run.dir.keeper), 10)["pid"] == supervisor
        wait_until(lambda: run.dir.metrics.exists(), 60)
        assert not standbys()
    finally:
        studio.kill()
        studio.wait()
