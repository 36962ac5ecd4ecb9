"""On the page: a package that does not work on this machine, here bitsandbytes without its library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from engine.launch.workspace import Workplace
from tests.browser.conftest import studio_on

pytestmark = pytest.mark.usefixtures("forked")


def test_the_page_greys_out_what_does_not_work_says_why_and_lets_lora_start(
    workplace: Workplace,
    without_library: Path,
    open_page: Callable[..., Page],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nobody has tried it yet
    monkeypatch.setenv("PYTHONPATH", str(without_library))
    with studio_on(workplace) as address:
        page = open_page(address)
        expect(page.get_by_text("Testing whether 4-bit")).to_be_visible()
        # The trial imports torch in a process of its own: seconds, or half a minute where the machine is busy.
        expect(page.locator(".doubtful")).to_contain_text("libbitsandbytes_cpu", timeout=120_000)
        for bits in ("4bit", "8bit"):
            radio = page.locator(f'#f-model-quantization label:has(input[value="{bits}"])')
            expect(radio).to_have_css("pointer-events", "none")
        expect(page.locator("#summary .state")).to_have_class("state right")
