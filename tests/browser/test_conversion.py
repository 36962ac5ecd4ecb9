"""A model with pickled weights: told, converted by the button below it, and chosen as what it has become."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from engine.launch.workspace import Workplace
from engine.models.checks import model_problems
from tests.browser.conftest import studio_on
from tests.conftest import made_once

pytestmark = pytest.mark.usefixtures("forked")


def test_a_model_is_converted_by_the_button_below_it_and_then_chosen(
    demo_workplace: Workplace,
    tiny: Path,
    tmp_path: Path,
    open_page: Callable[..., Page],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    packed = made_once(tmp_path_factory, "packed", "tests.packed_models", str(tiny))
    root = tmp_path / "mine"
    shutil.copytree(packed / "pt", root / "mine")
    with studio_on(replace(demo_workplace, models=(*demo_workplace.models, root))) as address:
        page = open_page(address)
        expect(page.locator("#summary")).to_contain_text("Ready to start")  # the page has begun with the demo
        model, button = page.locator("#f-model-model_name_or_path input"), page.locator("#convert")
        expect(button).to_be_hidden()
        model.fill(str(root / "mine"))
        model.press("Enter")
        expect(page.locator("#summary")).to_contain_text("a pickle file")
        expect(button).to_be_visible()
        button.click()
        expect(model).to_have_value(str(root / "mine-safetensors"))
        expect(button).to_be_hidden()
        expect(page.locator("#summary")).not_to_contain_text("a pickle file")
    assert model_problems(root / "mine-safetensors", [root]) == []
