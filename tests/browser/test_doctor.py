"""On the page: a package that does not work on this machine, here bitsandbytes without its library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from engine.launch.workspace import Workplace
from tests.browser.conftest import WORK_MS, studio_on

pytestmark = pytest.mark.usefixtures("forked")

# The trial may be over before anybody has looked.
NOTES_THE_TRIAL = """new MutationObserver(() => {
  window.trial_seen ||= Boolean(document.body?.textContent.includes('Testing whether 4-bit'));
}).observe(document, { subtree: true, childList: true, characterData: true });"""


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
        page = open_page("about:blank")
        page.add_init_script(NOTES_THE_TRIAL)
        page.goto(address)
        # The trial imports torch in a process of its own: seconds, or half a minute where the machine is busy.
        expect(page.locator(".doubtful")).to_contain_text("libbitsandbytes_cpu", timeout=WORK_MS)
        assert page.evaluate("window.trial_seen")
        for bits in ("4bit", "8bit"):
            radio = page.locator(f'#f-model-quantization label:has(input[value="{bits}"])')
            expect(radio).to_have_css("pointer-events", "none")
        expect(page.locator("#summary .state")).to_have_class("state right")
