"""One story from an empty machine to a model in use, each part as a person does it: a real browser, a real training."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from playwright.sync_api import Page, expect

from engine.core.rundir import read_json
from engine.data.datasets import count_rows, find
from engine.launch.handover import PLACE
from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from engine.runs import progress, runs
from engine.runs.runs import Run
from engine.serving import conversation_tree, servers
from tests.browser.conftest import WORK_MS, Outside
from tests.conftest import by_hand, flags_of, start_studio, wait_until
from tests.living import living
from webui.studio import first_steps

pytestmark = pytest.mark.usefixtures("forked")

OpenPage = Callable[..., Page]
ROWS = json.loads((PROJECT / "data" / "alpaca_translate_zh.json").read_text(encoding="utf-8"))
QUESTION, ANSWER = ROWS[1]["instruction"], ROWS[1]["output"]


@pytest.fixture
def fresh(workplace: Workplace, tmp_path: Path) -> Workplace:
    """As on a fresh machine, but with a copy of the bundled data: ratings are written into it."""
    data = tmp_path / "bundled"
    shutil.copytree(PROJECT / "data", data, ignore=shutil.ignore_patterns("demo_*"))
    return Workplace(models=(DEMO_MODEL,), data=data, saves=workplace.saves)


def test_a_stranger_trains_talks_measures_exports_and_serves(
    fresh: Workplace, open_page: OpenPage, outside: Outside
) -> None:
    """With a kill -9 of the studio in the middle of the training, and a second person watching in Chinese."""
    studio, address = start_studio(fresh, ATHANOR_NO_STANDBY="", STANDBY_TEST="story")
    try:
        page = open_page(address)
        expect(page.locator("#summary")).to_contain_text("240")  # optimizer steps
        standby = looks_at_the_form(page)
        page.locator("#start").click()
        expect(page.locator("#run-head .badge")).to_have_text(re.compile("Running"))
        expect(page.locator("#curves svg").first).to_be_visible()
        expect(page.locator("#tour li.now")).to_have_text("Watch it learn")
        run_address = page.url
        assert "?run=demo_model" in run_address
        [run] = runs.find(fresh.saves)
        assert read_json(run.dir.keeper)["pid"] == standby
        assert not standbys()
    finally:
        studio.kill()
        studio.wait()
    studio, _ = start_studio(fresh, port=int(address.rsplit(":", 1)[-1]))
    try:
        page.reload()
        expect(page.locator("#run-head .badge")).to_have_text(re.compile("Running|Finished"))
        other = open_page(run_address, locale="zh-CN", width=800)
        expect(other.locator("#run-head .badge")).to_have_text(re.compile("运行中|已完成"))
        expect(page.locator("#run-head .badge")).to_have_text(re.compile("Finished"), timeout=WORK_MS)
        expect(other.locator("#run-head .badge")).to_have_text(re.compile("已完成"))
        expect(other.locator("#tour")).to_have_count(0)  # there is a run by now
        other.close()
        [run] = runs.find(fresh.saves)
        loss = progress.curves(run)["loss"].value
        assert loss[0] > 1
        assert loss[-3:].mean() < 0.1
        assert run.dir.plot.exists()
        zooms(page)
        expect(page.locator(".probe")).to_contain_text("now answered as in the data")
        page.get_by_role("tab", name="Files").click()
        with page.expect_download() as download:
            page.locator("#files a", has_text="adapter_model.safetensors").first.click()
        kept = (run.dir.adapter / "adapter_model.safetensors").read_bytes()
        assert Path(download.value.path()).read_bytes() == kept

        talks(page, fresh)
        page.goto(run_address)
        measures(page)
        page.goto(run_address)
        exports(page, fresh)
    finally:
        studio.kill()
        studio.wait()
        for server in servers.servers(fresh.saves):
            servers.end(server)
    assert outside == []
    before, after = by_hand(DEMO_MODEL, None, run.dir.adapter, rows=ROWS)
    assert before["exact"] < 0.1
    assert after["exact"] >= 0.9
    assert served(fresh, run) == ANSWER


def standbys() -> list[int]:
    """Supervisors that have no run yet; the process that starts one has no session of its own."""
    waiting = (process for process in living("STANDBY_TEST=story") if process.supervises and PLACE in process.words)
    return [process.pid for process in waiting if leads_a_session(process.pid)]


def leads_a_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:  # it has ended in the meantime
        return False


def looks_at_the_form(page: Page) -> int:
    """The supervisor that is started when somebody looks at a form that is ready."""
    expect(page.locator("#summary .state.right")).to_be_visible()
    expect(page.locator("#tour li.now")).to_have_text("Start the training")  # the demo is chosen
    assert not standbys()  # a page may be open that nobody looks at
    page.mouse.move(300, 300)
    page.mouse.move(310, 310)
    (supervisor,) = wait_until(standbys)
    return supervisor


def zooms(page: Page) -> None:
    """A part of a chart that is dragged over is shown alone, in all charts, until a double click."""
    chart = page.locator("#curves svg").first
    whole = chart.get_attribute("data-across")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 60, steps=4)
    page.mouse.up()
    expect(page.locator(".zoom-out")).to_be_visible()
    low, high = map(float, chart.get_attribute("data-across").split()[:2])
    first, last = map(float, whole.split()[:2])
    assert first + (last - first) * 0.2 < low < high < first + (last - first) * 0.7
    chart.dblclick()
    expect(page.locator(".zoom-out")).to_have_count(0)
    expect(chart).to_have_attribute("data-across", whole)


def talks(page: Page, workplace: Workplace) -> None:
    """Base and adapter answer side by side; the difference is seen, and becomes a row."""
    expect(page.locator("#tour li.now")).to_have_text("Open the chat")
    page.locator("#chat-with").click()
    expect(page.locator("#held")).to_contain_text("Not loaded")
    expect(page.locator("#tour li.now")).to_have_text("Ask it")
    page.locator("#tour .insert").click()
    expect(page.locator("#prompt textarea")).to_have_value(first_steps.QUESTION)
    page.locator("#prompt textarea").fill(QUESTION)
    page.locator("#prompt textarea").press("Enter")
    expect(page.locator("#talk .turn")).to_have_count(1, timeout=WORK_MS)
    base, tuned = page.locator("#talk .said").all_inner_texts()
    assert tuned == ANSWER
    assert base != ANSWER
    expect(page.locator("#tour li.past")).to_have_count(5)
    page.locator("#tour .close").click()
    page.locator("#talk [data-do=better]").nth(1).click()
    expect(page.locator("#told")).to_contain_text(conversation_tree.PREFERENCES_DATASET)
    assert count_rows(find(workplace.data, conversation_tree.PREFERENCES_DATASET)) == 1
    page.locator("#chat-unload").click()
    expect(page.locator("#held")).to_contain_text("Not loaded")


def measures(page: Page) -> None:
    """Base and adapter on the data; the verdict is no chance."""
    page.locator("#evaluate-it").click()
    page.locator("#evaluate-data input").first.click()
    page.get_by_role("option", name="alpaca_translate_zh").first.click()
    page.keyboard.press("Escape")
    page.locator("#evaluate-longest input").fill("24")
    page.locator("#evaluate-start").click()
    expect(page.locator("#report .verdict.better")).to_contain_text("is better than the base", timeout=WORK_MS)
    expect(page.locator("#report .verdict.caution")).to_contain_text("was trained on alpaca_translate_zh")
    expect(page.locator("#report .verdict.better")).to_contain_text("Exact match")


def exports(page: Page, workplace: Workplace) -> None:
    """Merged, compared, and in the form as the model of a next training."""
    page.locator("#export-it").click()
    expect(page.locator("#export-card")).to_contain_text("Ready to start")
    page.locator("#export-start").click()
    made = page.locator("#exports details.export")
    expect(made.locator(".state.right")).to_contain_text("8 of 8 answers are identical", timeout=WORK_MS)
    made.locator("[data-use]").click()
    expect(page.locator("#summary .state.right")).to_be_visible()
    page.get_by_role("button", name="Settings as YAML").click()
    [export] = runs.find(workplace.saves, "export")
    expect(page.locator("#yaml-text")).to_contain_text(str(export.dir.model))


def served(workplace: Workplace, run: Run) -> str:
    """What OpenAI's client is answered by `python -m engine serve`, greedily."""
    serving = subprocess.Popen(
        [sys.executable, "-m", "engine", "serve", run.id, "--port", "0", *flags_of(workplace)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = next(line for line in serving.stdout if line.startswith("serving"))
        client = openai.OpenAI(base_url=line.split()[-1], api_key="none", max_retries=0)
        told = client.chat.completions.create(
            model=run.id, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40
        )
        return told.choices[0].message.content
    finally:
        serving.terminate()
        serving.wait()
