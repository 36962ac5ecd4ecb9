"""Take the pictures of the README anew, of a real run on the demo data: `python -m docs.pictures` (two minutes)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from engine.serving import servers
from tests.browser.find_chromium import ARGUMENTS, chromium
from tests.conftest import start_studio

FOLDER = Path(__file__).parent
PICTURE_SUFFIXES = {"en-US": "", "zh-CN": "_zh"}  # locale → how the names of its pictures end
RUN_NAMES = {"en-US": "company names", "zh-CN": "机构译名"}
QUESTIONS = ("World Health Organization", "International Maritime Organization", "Standard Chartered")
TIMEOUT_MS = 180_000  # ms


def train(page: Page, address: str, locale: str, take: Callable[[str], None]) -> None:
    """The form as it begins; then its run, to its end."""
    page.goto(address)
    expect(page.locator("#summary .state.right")).to_be_visible()
    take("train")
    page.locator("#f-name textarea, #f-name input").fill(RUN_NAMES[locale])
    page.locator("#start").click()
    expect(page.locator("#run-head .bar.finished")).to_be_visible()
    page.wait_for_timeout(3000)  # until all that is read at the end is there
    take("run")


def chat(page: Page, take: Callable[[str], None]) -> None:
    """The base and the run beside each other, an answer rated, another question asked in two ways."""
    page.locator("#chat-with").click()
    page.locator("#chat-remember input").uncheck()
    for number, name in enumerate(QUESTIONS, start=1):
        page.locator("#prompt textarea").fill(f"将{name}翻译成中文。")
        page.locator("#send").click()
        expect(page.locator("#talk .turn")).to_have_count(number)
        expect(page.locator("#chat-stop")).to_have_count(0)
    page.locator("#chat-again").click()
    expect(page.locator("#talk .asked").last).to_contain_text("2 / 2")
    for rating in ("up", "better"):
        page.locator(f"#talk [data-do={rating}]").nth(1).click()
        expect(page.locator(f"#talk [data-do={rating}].on")).to_have_count(1)
    page.wait_for_timeout(6000)  # until what was told is gone
    page.evaluate("scrollTo(0, 0)")
    take("chat")


def measure(page: Page, run: str, take: Callable[[str], None]) -> None:
    """What the run has learned, beside its base."""
    page.goto(run)
    page.locator("#evaluate-it").click()
    page.locator("#evaluate-data input").first.click()
    page.get_by_role("option").filter(has_text="alpaca_translate_zh").click()
    page.keyboard.press("Escape")
    page.locator("#evaluate-longest input").fill("24")
    page.locator("#evaluate-start").click()
    expect(page.locator("#report table.report")).to_be_visible()
    page.wait_for_timeout(2000)
    take("evaluate")


def all_in(browser: Browser, workplace: Workplace, locale: str) -> None:
    """The pictures in one language."""
    studio, address = start_studio(workplace)
    context = browser.new_context(locale=locale, viewport={"width": 1280, "height": 900})
    page = context.new_page()

    def take(name: str) -> None:
        page.wait_for_timeout(1000)
        path = FOLDER / f"{name}{PICTURE_SUFFIXES[locale]}.png"
        page.screenshot(path=path, full_page=name == "run")
        print(path.relative_to(PROJECT), flush=True)

    try:
        train(page, address, locale, take)
        run = page.url
        chat(page, take)
        measure(page, run, take)
    finally:
        context.close()
        studio.terminate()
        studio.wait()
        for server in servers.servers(workplace.saves):
            servers.end(server)


def main() -> None:
    expect.set_options(timeout=TIMEOUT_MS)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        for locale in PICTURE_SUFFIXES:
            place = Path(folder) / locale
            shutil.copytree(PROJECT / "data", place / "data")
            (place / "saves").mkdir()
            all_in(browser, Workplace((DEMO_MODEL.parent,), place / "data", saves=place / "saves"), locale)
        browser.close()


if __name__ == "__main__":
    main()
