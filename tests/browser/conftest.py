"""A real Chromium and a real studio. Whatever the page asks of anybody but the studio is refused and noted."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from tests.browser.find_chromium import ARGUMENTS, chromium
from tests.conftest import start_studio

PATIENCE_MS = 60_000  # with a machine that has other things to do
WORK_MS = 300_000  # for what a process of its own loads, trains, measures or exports there
expect.set_options(timeout=PATIENCE_MS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "browser" in Path(item.fspath).parts:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        yield opened
        opened.close()


# Chosen by the browser's driver: each request that had to be let through here would cost as much as its answer.
ELSEWHERE = re.compile(r"^(?!http://127\.0\.0\.1:|data:|blob:)")


class Outside(list[str]):
    """Addresses outside the studio that a page asked for."""


@pytest.fixture
def outside() -> Outside:
    return Outside()


@pytest.fixture
def open_page(browser: Browser, outside: Outside) -> Iterator[Callable[..., Page]]:
    """Open a page as a new person would: own cookies, own language, own screen."""
    contexts = []

    def refuse(route: Route) -> None:
        outside.append(route.request.url)
        route.abort()

    def open_(address: str, locale: str = "en-US", width: int = 1280, **settings: Any) -> Page:
        # A dot that glows while a run goes on is sixty pictures a second, which take a fifth of a core.
        chosen = {"reduced_motion": "reduce"} | settings
        context = browser.new_context(locale=locale, viewport={"width": width, "height": 900}, **chosen)
        contexts.append(context)
        context.route(ELSEWHERE, refuse)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(address)
        return page

    yield open_
    for context in contexts:
        context.close()


def click_and_hear(button: Locator, place: Locator, sentence: str | re.Pattern[str]) -> None:
    """Click, and wait for a sentence that only the answer to this click contains: until then, the page drops another
    click on the same button."""
    button.click()
    expect(place).to_contain_text(sentence)


@pytest.fixture
def trained(workplace: Workplace, demo_results: Path) -> Workplace:
    """The demo model, two finished runs of it, "one" and "two", and a data folder of this test's own."""
    shutil.copytree(demo_results, workplace.saves, dirs_exist_ok=True)
    return Workplace(models=(DEMO_MODEL,), data=workplace.data, saves=workplace.saves)


@pytest.fixture
def demo_workplace(workplace: Workplace) -> Workplace:
    """As on a fresh machine: the demo model and the bundled data; runs in a folder of this test's own."""
    return Workplace(models=(DEMO_MODEL, *workplace.models), data=PROJECT / "data", saves=workplace.saves)


@contextlib.contextmanager
def studio_on(workplace: Workplace) -> Iterator[str]:
    """Address of a studio, started under a useless proxy and the C locale."""
    nowhere = "http://127.0.0.1:9"
    process, address = start_studio(workplace, http_proxy=nowhere, https_proxy=nowhere, LANG="C", LC_ALL="C")
    try:
        yield address
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def studio(demo_workplace: Workplace) -> Iterator[str]:
    """Address of a studio on a fresh workplace."""
    with studio_on(demo_workplace) as address:
        yield address


@pytest.fixture(scope="module")
def lasting_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Workplace]]:
    """A studio for all tests of a module, and the folders that it looks into."""
    folder = tmp_path_factory.mktemp("lasting")
    workplace = Workplace(models=(DEMO_MODEL,), data=folder / "data", saves=folder / "saves")
    for path in (workplace.data, workplace.saves):
        path.mkdir()
    with studio_on(workplace) as address:
        yield address, workplace


@pytest.fixture
def refilled(lasting_studio: tuple[str, Workplace]) -> tuple[str, Workplace]:
    """The module's studio as it would be if it had just begun: with the bundled data, and without runs."""
    _, workplace = lasting_studio
    for path in (workplace.data, workplace.saves):
        for entry in path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    bundled = shutil.ignore_patterns("demo_*")
    shutil.copytree(PROJECT / "data", workplace.data, ignore=bundled, dirs_exist_ok=True)
    return lasting_studio


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and runs folder of a studio in which nothing is ever started: for all who only look, or are refused."""
    saves = tmp_path_factory.mktemp("untouched")
    with studio_on(Workplace(models=(DEMO_MODEL,), data=PROJECT / "data", saves=saves)) as address:
        yield address, saves
