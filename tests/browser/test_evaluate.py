"""The Evaluate tab as a person uses it: from a finished run to a verdict, worst rows first, and a file taken away."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from engine.launch.workspace import Workplace
from tests.browser.conftest import WORK_MS, Outside, click_and_hear
from tests.conftest import start_studio

pytestmark = pytest.mark.usefixtures("forked")

RUN = "demo_model/lora/one"


def choose(page: Page, field: str, name: str) -> None:
    page.locator(f"{field} input").first.click()
    page.get_by_role("option", name=name).first.click()
    page.keyboard.press("Escape")


def look_at_unusable_tasks(page: Page) -> None:
    start, wrong = page.locator("#evaluate-start"), page.locator("#evaluate-wrong")
    page.locator("#tasks-fold button").first.click()
    expect(page.locator("#evaluate-unfit")).to_contain_text("takes its data from a hub (cais/mmlu)")
    page.locator("#evaluate-limit input").fill("none")
    click_and_hear(start, wrong, "Questions must be")
    page.locator("#evaluate-limit input").fill("")


def check_a_judge_before_anything_was_rated(page: Page) -> None:
    page.locator("#judge-fold button").first.click()
    criterion = page.locator("#evaluate-criterion textarea")
    expect(criterion).to_have_attribute("placeholder", re.compile("correct, complete and helpful"))
    page.locator("#evaluate-judge-language input").click()
    page.get_by_role("option", name="中文").click()
    expect(criterion).to_have_attribute("placeholder", re.compile("正确、完整"))
    wrong = page.locator("#evaluate-wrong")
    click_and_hear(page.locator("#evaluate-judge-check"), wrong, "no rated answers yet")


def upload_questions(page: Page, file: Path) -> None:
    """Without references: that is said first, and gone on with if it is wanted."""
    file.write_text("".join(json.dumps({"question": f"What is {n}?"}) + "\n" for n in range(25)), "utf-8")
    with page.expect_file_chooser() as chooser:
        page.locator("#evaluate-upload").click()
    chooser.value.set_files(file)
    expect(page.locator("#evaluate-data")).to_contain_text("mine")
    click_and_hear(page.locator("#evaluate-start"), page.locator("#evaluate-wrong"), "no reference answers")


def type_numbers_out_of_bounds(page: Page) -> None:
    start, wrong = page.locator("#evaluate-start"), page.locator("#evaluate-wrong")
    for box, called in (("rows", "Rows"), ("longest", "Max answer length")):
        for value in ("-5", "1e99", "<b>many</b>"):
            held = page.locator(f"#evaluate-{box} input").input_value()
            page.locator(f"#evaluate-{box} input").fill(value)
            click_and_hear(start, wrong, re.compile(f"{called} must be.*{re.escape(value)}"))
            page.locator(f"#evaluate-{box} input").fill(held)


def evaluate_to_a_verdict(page: Page) -> None:
    choose(page, "#evaluate-data", "chat")
    page.locator("#evaluate-alone input").check()
    page.locator("#evaluate-longest input").fill("16")
    page.set_viewport_size({"width": 800, "height": 700})
    page.locator("#evaluate-start").scroll_into_view_if_needed()
    click_and_hear(page.locator("#evaluate-start"), page.locator("#report-head"), "mine")
    expect(page.locator("#report table.report")).to_be_visible(timeout=WORK_MS)
    expect(page.locator("#report-head")).to_be_in_viewport()
    page.evaluate("scrollTo(0, 0)")
    expect(page.locator("#report-head")).not_to_be_in_viewport()
    page.locator("#reports .on").evaluate("(row) => row.click()")  # playwright's click would scroll to it
    expect(page.locator("#report-head")).to_be_in_viewport()
    page.set_viewport_size({"width": 1280, "height": 900})
    expect(page.locator("#report")).to_contain_text("65 rows")
    expect(page.locator("#report .verdict")).to_contain_text("than the base in")
    expect(page.locator("#report-rows article")).to_have_count(20)


def read_rows_and_take_them_away(page: Page) -> None:
    choose(page, "#report-order", "Most changed first")
    expect(page.locator("#report-rows article").first).to_contain_text("changed")
    page.locator("#report-on").click()
    expect(page.locator("#report-where input, #report-where textarea")).to_have_value("2")
    page.locator("#report-search input, #report-search textarea").fill("after 23?")
    expect(page.locator("#report-rows article")).to_have_count(1)
    expect(page.locator("#report-rows article")).to_contain_text("What comes after 23?")
    with page.expect_download() as download:
        page.locator("#report a.load").first.click()
    table = Path(download.value.path()).read_bytes()
    assert table.startswith(b"\xef\xbb\xbfrow,set,place,prompt,reference")


def make_a_data_set_of_right_answers(page: Page) -> None:
    panel = page.locator("#right-answers")
    panel.get_by_role("button", name="Make a data set").click()
    choose(page, "#right-answers-by", "its last number equals the reference's")
    click_and_hear(page.locator("#right-answers-save"), page.locator(".toast"), "right")


def find_the_report_again(page: Page) -> None:
    page.reload()  # the report is in the address
    expect(page.locator("#report table.report")).to_be_visible()
    page.locator("#report-head a").click()
    expect(page.locator("#run-head")).to_contain_text("Evaluation")
    expect(page.locator("#found-out table.report")).to_be_visible()


def test_a_run_is_measured_beside_its_base_and_its_rows_are_read(
    trained: Workplace, open_page: Callable[..., Page], outside: Outside, tmp_path: Path
) -> None:
    """One story, since each of its parts would have to measure anew."""
    tasks = trained.data / "harness"
    tasks.mkdir()
    (tasks / "far.yaml").write_text("task: far\ndataset_path: cais/mmlu\n", encoding="utf-8")
    studio, address = start_studio(trained)
    try:
        page = open_page(f"{address}/?run={RUN}")
        page.locator("#evaluate-it").click()
        expect(page.locator("#evaluate-results")).to_contain_text("one")
        start, wrong = page.locator("#evaluate-start"), page.locator("#evaluate-wrong")
        click_and_hear(start, wrong, "No data set or task is chosen")
        look_at_unusable_tasks(page)
        check_a_judge_before_anything_was_rated(page)
        upload_questions(page, tmp_path / "mine.jsonl")
        type_numbers_out_of_bounds(page)
        evaluate_to_a_verdict(page)
        read_rows_and_take_them_away(page)
        make_a_data_set_of_right_answers(page)
        find_the_report_again(page)
    finally:
        studio.kill()
        studio.wait()
    assert outside == []
