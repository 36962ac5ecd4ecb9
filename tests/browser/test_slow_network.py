"""A network that takes its time: what a reader does while answers are on their way is neither lost nor undone."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, Route, expect

from engine.launch.workspace import Workplace
from tests.conftest import wait_until
from tests.past_runs import past_run

pytestmark = pytest.mark.usefixtures("forked")

QUESTIONS = "**/gradio_api/run/**"
# The page frees itself after 30 seconds, should the studio not answer, which is not what is to be seen here.
NEVER_BY_ITSELF = "const later = setTimeout; window.setTimeout = (act, ms) => ms === 30_000 ? 0 : later(act, ms);"


class Held:
    """The questions of a page to the studio in which a text occurs, held back until they are let go."""

    def __init__(self, page: Page, text: str = ""):
        self.page, self.text = page, text
        self.routes: list[Route] = []
        page.route(QUESTIONS, self.hold)

    def hold(self, route: Route) -> None:
        if self.text in (route.request.post_data or ""):
            self.routes.append(route)
        else:
            route.continue_()

    def next(self) -> Route:
        """The question that has waited longest, once there is one; it is to be let go by its `continue_`."""
        wait_until(lambda: self.page.title() and self.routes)
        return self.routes.pop(0)

    def end(self) -> None:
        """Let go all that wait, and all later ones."""
        self.page.unroute(QUESTIONS)  # which lets go what was not let go yet


def test_nothing_is_lost_or_undone_while_answers_are_on_their_way(
    refilled: tuple[str, Workplace], open_page: Callable[..., Page]
) -> None:
    address, workplace = refilled
    spec = workplace.default_spec()
    first_run, second_run = (
        past_run(workplace.saves, spec.change("name", name), at=at) for name, at in (("one", 1e9), ("two", 2e9))
    )
    page = open_page("about:blank")
    root = page.locator("html")

    # The page cannot be used before it has been filled in, or that would be done over what was typed.
    page.add_init_script(NEVER_BY_ITSELF)
    held = Held(page)
    page.goto(f"{address}/?tab=runs")
    held.next().abort()
    held.end()
    expect(root).not_to_have_attribute("inert", "")
    held = Held(page)
    page.reload()
    first = held.next()
    assert root.get_attribute("inert") == ""
    first.continue_()
    held.end()
    expect(page.locator("#runs tbody tr")).to_have_count(2)
    expect(root).not_to_have_attribute("inert", "")

    # Of two clicks, the second counts, also if the first has not been answered.
    held = Held(page)
    for run in (first_run, second_run):
        page.locator(f"#runs [data-run='{run.id}']").click()
    page.wait_for_url(f"**run={quote(second_run.id, safe='')}*")

    # Whoever goes to another tab before the answer is not brought back by it.
    evaluate = page.get_by_role("tab", name="Evaluate")
    evaluate.click()
    held.end()
    expect(page.locator("#run-head h1")).to_have_text("two")
    expect(evaluate).to_have_attribute("aria-selected", "true")

    # Of two choices, both count, also if the answer to the first comes after the second.
    results = page.locator("#evaluate-results")
    expect(results).to_contain_text("two")
    held = Held(page, text=str(first_run.dir.adapter))
    results.locator("input").click()
    page.get_by_role("option", name="one").click()
    question = held.next()
    results.locator(".token", has_text="two").locator(".token-remove").click()
    question.continue_()
    later = held.next()
    assert str(second_run.dir.adapter) not in later.request.post_data
    later.continue_()
    held.end()
    expect(results).to_contain_text("one")
    expect(results).not_to_contain_text("two")
