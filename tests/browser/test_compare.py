"""The Compare tab as a person meets it: two runs beside each other, a link to them, and files to take away."""

from __future__ import annotations

import csv
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from engine.core.locks import try_lock
from engine.core.rundir import ALIVE_BYTE, append_lines
from engine.launch.workspace import Workplace
from engine.runs.runs import Run
from tests.browser.conftest import Outside
from tests.conftest import wait_until
from tests.past_runs import falling, past_run

pytestmark = pytest.mark.usefixtures("forked")

OpenPage = Callable[..., Page]


@pytest.fixture
def studio(refilled: tuple[str, Workplace]) -> str:
    return refilled[0]


@pytest.fixture
def pair(refilled: tuple[str, Workplace]) -> tuple[Run, Run]:
    """Two runs that differ in their learning rate; the second was interrupted."""
    _, workplace = refilled
    spec = workplace.default_spec()
    slow, fast = spec.change("name", "slow"), spec.change("name", "快的")
    return (
        past_run(workplace.saves, slow, falling(120, end=1.0), at=1e9),
        past_run(
            workplace.saves,
            fast.change("training.learning_rate", 5e-3),
            falling(200, end=0.5),
            None,
            at=2e9,
        ),
    )


def choose(page: Page, name: str) -> None:
    """The run of that name, found by typing it."""
    page.locator("#compare-runs input").fill(name)
    page.get_by_role("option", name=name).click()


def test_two_runs_are_chosen_seen_beside_each_other_and_taken_away(
    pair: tuple[Run, Run], studio: str, open_page: OpenPage, outside: Outside, tmp_path: Path
) -> None:
    page = open_page(studio)
    page.get_by_role("tab", name="Compare").click()
    expect(page.locator("#compare-note")).to_contain_text("Choose runs to compare")
    choose(page, "slow")
    expect(page.locator("#compare-tables")).to_contain_text("Choose a second run")
    choose(page, "快的")
    curves = page.locator("#compare-chart g.run")
    expect(curves).to_have_count(2)
    settings = page.locator(".compare-settings tbody tr")
    expect(settings).to_have_count(1)
    expect(settings).to_contain_text("Learning rate")
    expect(settings.locator("td")).to_have_text(["0.002", "0.005"])
    best = page.locator(".compare-figures tr", has_text="Loss (validation), final").locator("td")
    expect(best.nth(1)).to_have_class("best")

    # What is typed beside the slider is held within its bounds, and refused by nobody.
    smoothing = page.get_by_role("tabpanel").locator("input[type=number]:visible")
    chart = page.locator("#compare-chart")
    for typed in ("5", "-3"):
        drawn = chart.inner_html()
        smoothing.fill(typed)
        wait_until(lambda drawn=drawn: chart.inner_html() != drawn)
        smoothing.blur()
    expect(curves).to_have_count(2)

    # The pointer tells the values of both.
    box = page.locator("#compare-chart svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] / 2)
    expect(page.locator(".chart-tip .key")).to_have_count(2)

    with page.expect_download() as picture:
        page.get_by_role("button", name="Save as PNG").click()
    image = Path(picture.value.path()).read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(image) > 10_000
    assert struct.unpack(">I", image[16:20])[0] == 2400

    with page.expect_download() as told:
        page.get_by_role("button", name="Tables as CSV").click()
    text = Path(told.value.path()).read_bytes()
    assert text.startswith(b"\xef\xbb\xbf")
    rows = list(csv.reader(text.decode("utf-8-sig").splitlines()))
    assert rows[0] == ["", "slow", "快的"]
    assert ["Learning rate", "0.002", "0.005"] in rows

    with page.expect_download() as told:
        page.locator("#compare-curves-csv").click()
    rows = list(csv.reader(Path(told.value.path()).read_text(encoding="utf-8-sig").splitlines()))
    assert len(rows) == 1 + 120 + 200
    assert {row[0] for row in rows[1:]} == {"slow", "快的"}
    assert outside == []


def test_a_link_shows_the_same_in_the_reader_s_language_without_what_is_gone(
    pair: tuple[Run, Run], studio: str, open_page: OpenPage
) -> None:
    page = open_page(studio)
    page.get_by_role("tab", name="Compare").click()
    for name in ("slow", "快的"):
        choose(page, name)
    expect(page.locator("#compare-chart g.run")).to_have_count(2)
    page.locator("#compare-x").get_by_text("Tokens").click()
    page.locator("#compare-log input").check()
    expect(page.locator("#compare-chart .axis")).to_have_text("Tokens")
    page.wait_for_url(re.compile("x=tokens.*log=true"))
    other = open_page(f"{page.url}&runs=demo_model/lora/gone", locale="zh-CN")
    expect(other.locator("#compare-chart g.run")).to_have_count(2)
    expect(other.locator("#compare-chart .axis")).to_have_text("词元")
    expect(other.locator("#compare-log input")).to_be_checked()
    expect(other.locator("#compare-note")).to_contain_text("已不存在：demo_model/lora/gone")
    expect(other.locator(".compare-settings")).to_contain_text("学习率")


def test_from_a_run_to_its_siblings_and_what_is_logged_meanwhile_is_drawn(
    pair: tuple[Run, Run], studio: str, open_page: OpenPage
) -> None:
    going = pair[1]
    lock = try_lock(going.dir.lock, ALIVE_BYTE, shared=True)  # as a training holds it
    try:
        page = open_page(f"{studio}/?run={going.id}")
        page.locator("#compare").click()
        expect(page.locator("#compare-chart g.run")).to_have_count(2)
        assert "tab=compare" in page.url
        assert page.url.count("runs=") == 2
        steps = page.locator(".compare-figures tr", has_text="Steps").locator("td")
        expect(steps).to_have_text(["200", "120"])
        append_lines(going.dir.metrics, [{"step": 201, "epoch": 1.1, "time": 101.0, "loss": 0.1}])
        expect(steps).to_have_text(["201", "120"])
    finally:
        os.close(lock)
