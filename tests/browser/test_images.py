"""The demo with images, as a person tries it: pictures seen, trained on, and others of their kind answered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from playwright.sync_api import Page, Route, expect

from engine.evaluation import report
from engine.launch.workspace import DEMO_MODEL, DEMO_VISION_MODEL, Workplace
from engine.runs import runs
from tests.browser.conftest import WORK_MS, Outside, studio_on
from tests.browser.test_data import part
from tests.browser.test_evaluate import choose
from tests.conftest import wait_until
from tests.preloaded import run_python

pytestmark = pytest.mark.usefixtures("forked")

OpenPage = Callable[..., Page]


def test_a_model_learns_to_name_shapes_also_in_pictures_that_it_has_never_seen(
    demo_workplace: Workplace, open_page: OpenPage, outside: Outside
) -> None:
    place = replace(demo_workplace, models=(DEMO_MODEL, DEMO_VISION_MODEL))
    with studio_on(place) as address:
        page = open_page(address)
        expect(page.locator("#summary .state.right")).to_be_visible()
        expect(page.locator("#part-vision")).to_be_hidden()
        choose(page, "#preset", "Demo: images")
        expect(page.locator("#part-vision")).to_be_visible()
        look_at_data(page)
        train(page)
        evaluate(page)
    (training,), (evaluation,) = (runs.find(place.saves, kind) for kind in ("training", "evaluation"))
    values = report.summary(evaluation.dir)["measures"]["exact"]["values"]
    before, after = (values[name]["value"] for name in ("base", training.id))
    assert before < 20
    assert after >= 90
    rows = json.loads((place.data / "shapes_test.json").read_text(encoding="utf-8"))
    questions = [row | {"images": [str(place.data / row["images"][0])]} for row in rows]
    adapter = training.dir.adapter
    printed = run_python("-m", "tests.ask_images", DEMO_VISION_MODEL, "-", adapter, input=json.dumps(questions))
    assert [100 * float(line) for line in printed.splitlines()[-2:]] == [before, after]
    assert outside == []


def look_at_data(page: Page) -> None:
    """Each image before its tokens, in the set that is clicked before the server has answered which one comes first."""
    waiting: list[Route] = []
    page.route("**/gradio_api/run/**", lambda route: hold(route, waiting))
    page.get_by_role("tab", name="Data").click()
    wait_until(lambda: page.title() and waiting)
    entry, title = page.locator("#sets a[data-set='set:shapes']"), page.locator("#set-head h1")
    entry.click()
    expect(title).to_have_text("shapes")
    page.unroute("**/gradio_api/run/**")  # which lets them go
    for route in waiting:
        route.request.response()
    part(page, 2)
    expect(page.locator("#seen .tokens .thumbnail")).to_have_count(5)
    expect(page.locator("#seen .tokens").first).to_contain_text("× 9")
    page.get_by_role("tab", name="Train").click()


def hold(route: Route, waiting: list[Route]) -> None:
    """Let through what is asked about the set that was clicked; all other questions are held in `waiting`."""
    if "set:shapes" in (route.request.post_data or ""):
        route.fallback()
    else:
        waiting.append(route)


def train(page: Page) -> None:
    page.locator("#start").click()
    expect(page.locator("#run-head .badge")).to_have_text(re.compile("Finished"), timeout=WORK_MS)


def evaluate(page: Page) -> None:
    page.locator("#evaluate-it").click()
    choose(page, "#evaluate-data", "shapes_test")
    page.locator("#evaluate-longest input").fill("12")
    page.locator("#evaluate-start").click()
    expect(page.locator("#report .verdict.better")).to_contain_text("is better than the base", timeout=WORK_MS)
    expect(page.locator("#report")).to_contain_text("60 rows")
    expect(page.locator("#report-rows .thumbnail")).to_have_count(20)
    assert page.locator("#report-rows .thumbnail").first.evaluate("image => image.naturalWidth") > 0
