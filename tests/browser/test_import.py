"""What was made for another program is pasted into the Train tab: it fills the
form, or the tab that it is for, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Outside, click_and_hear

pytestmark = pytest.mark.usefixtures("forked")

TRAINING = """CUDA_VISIBLE_DEVICES=0 llamafactory-cli train \\
  --stage sft --model_name_or_path demo_model --dataset alpaca_translate_zh --finetuning_type lora \\
  --lora_rank 12 --val_size 7 --deepspeed ds_z3_config.json --overwrite_cache --learning_rat 1 <b>
"""
EVALUATION = (
    "model_name_or_path: demo_model\nstage: sft\ndo_predict: true\neval_dataset: alpaca_translate_zh\nmax_samples: 37\n"
)
EXPORT = "model_name_or_path: demo_model\nadapter_name_or_path: elsewhere/adapter\nexport_dir: out/merged\n"


def paste(page: Page, text: str, place: str, sentence: str) -> None:
    """Paste and load; then `place` says what it should."""
    page.locator("#paste textarea").fill(text)
    click_and_hear(page.get_by_role("button", name="Load into the form"), page.locator(place), sentence)


def test_what_is_pasted_fills_the_tab_that_it_is_for(
    untouched: tuple[str, Path], open_page: Callable[..., Page], outside: Outside
) -> None:
    page = open_page(untouched[0])
    page.get_by_role("button", name="Load settings").click()
    told = page.locator("#imported")

    paste(page, TRAINING, "#imported", "deepspeed (ds_z3_config.json) was imported, with a difference: FSDP2 divides")
    expect(page.locator("#f-method-r input")).to_have_value("12")
    expect(told).to_contain_text("Nearest: learning_rate")
    expect(told.get_by_text("overwrite_cache")).to_be_hidden()  # folded: it was not needed
    told.locator("summary").click()
    expect(told.get_by_text("overwrite_cache")).to_be_visible()

    for bad, why in (
        ("", "There are no settings in this text"),
        ("stage: sft\nlora_target: [q\ncutoff_len: 9\n", "Line 3"),
        ("llamafactory-cli chat x.yaml", "Open the Chat tab"),
    ):
        paste(page, bad, "#imported", why)
        expect(page.locator("#f-method-r input")).to_have_value("12")  # nothing of the form is lost

    paste(page, EXPORT, "#imported", "This is an export.")
    expect(page.locator("#imported-yaml")).to_contain_text("elsewhere/adapter: 1.0")

    paste(page, EVALUATION, "#evaluate-data", "alpaca_translate_zh")
    expect(page.locator("#evaluate-rows input")).to_have_value("37")
    assert not outside
