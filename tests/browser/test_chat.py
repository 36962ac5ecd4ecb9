"""The Chat tab as a person uses it: from a finished run to two answers side by side, a rating, a crash, an end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Request, expect

from engine.core import users
from engine.data.datasets import count_rows, find
from engine.launch.processes import find_processes
from engine.launch.workspace import Workplace
from engine.serving import conversation_tree, servers
from tests.browser.conftest import WORK_MS, Outside
from tests.conftest import start_studio, wait_until

pytestmark = pytest.mark.usefixtures("forked")

RUN = "demo_model/lora/one"


def send(page: Page, text: str) -> None:
    """A question that is taken leaves the box empty."""
    prompt = page.locator("#prompt textarea")
    prompt.fill(text)
    page.locator("#send").click()
    expect(prompt).to_have_value("")


def ask(page: Page, text: str, turns: int) -> None:
    send(page, text)
    expect(page.locator("#talk .question").last).to_have_text(text, timeout=WORK_MS)
    expect(page.locator("#talk .turn")).to_have_count(turns)


@contextlib.contextmanager
def studio_with_servers(workplace: Workplace, *flags: str, **environment: str) -> Iterator[str]:
    """The address of a studio; whatever it has loaded is ended with it."""
    studio, address = start_studio(workplace, *flags, **environment)
    try:
        yield address
    finally:
        studio.kill()
        studio.wait()
        for server in servers.servers(workplace.saves):
            servers.end(server)


@contextlib.contextmanager
def whole_answer(page: Page) -> Iterator[None]:
    """Wait until the stream of an answer has ended: the page drops a question before that."""
    ended: list[str] = []

    def note(request: Request) -> None:
        ended.extend([request.url] if "/queue/data" in request.url else [])

    events = ("requestfinished", "requestfailed")  # whoever of the two closes it first
    for event in events:
        page.on(event, note)
    yield
    wait_until(lambda: page.title() and ended)
    for event in events:
        page.remove_listener(event, note)


def type_numbers_out_of_bounds(page: Page) -> None:
    page.locator("#prompt textarea").fill("What is wrong?")
    page.locator("#chat-greedy input").uncheck()
    for box, called, value in (
        ("longest", "Max tokens", "0"),
        ("longest", "Max tokens", "<b>many</b>"),
        ("temperature", "Temperature", "11"),
        ("top-p", "Top-p", "1.01"),
        ("top-k", "Top-k", "2.5"),
        ("seed", "Seed", "1e99"),
        ("penalty", "Repetition penalty", "nan"),
    ):
        field = page.locator(f"#chat-{box} input")
        held = field.input_value()
        field.fill(value)
        with whole_answer(page):
            page.locator("#send").click()
        expect(page.locator("#told .toast.bad")).to_contain_text(re.compile(f"{called} must be.*{re.escape(value)}"))
        expect(page.locator("#prompt textarea")).to_have_value("What is wrong?")
        field.fill(held)
    page.locator("#chat-greedy input").check()
    expect(page.locator("#held")).to_contain_text("Not loaded")  # nothing is loaded for what cannot be asked


def ask_base_and_run(page: Page) -> tuple[str, str]:
    """What each of them says."""
    page.locator("#chat-longest input").fill("40")
    ask(page, "Translate BSIC Group", 1)
    replies = page.locator("#talk .said")
    expect(replies).to_have_count(2)
    base, tuned = replies.all_inner_texts()
    assert base
    assert tuned
    assert base != tuned
    expect(page.locator("#talk .answer header").first).to_contain_text("/s")  # tokens a second
    expect(page.locator("#held")).to_contain_text("Loaded")
    return base, tuned


def rate_answers(page: Page, data: Path, base: str, tuned: str) -> None:
    page.locator("#talk [data-do=down]").first.click()
    expect(page.locator("#told")).to_contain_text(conversation_tree.RATINGS_DATASET)
    page.locator("#talk [data-do=better]").nth(1).click()
    expect(page.locator("#told")).to_contain_text(conversation_tree.PREFERENCES_DATASET)
    expect(page.locator("#talk .answer.best")).to_have_count(1)
    assert count_rows(find(data, conversation_tree.RATINGS_DATASET)) == 1
    pair = json.loads((data / f"{conversation_tree.PREFERENCES_DATASET}.jsonl").read_text(encoding="utf-8"))
    assert (pair["rejected"]["content"], pair["chosen"]["content"]) == (base, tuned)


def choose_long_answers(page: Page) -> None:
    """Who stops an answer must not race with its end; a reload of the page brings the defaults back."""
    page.locator("#chat-longest input").fill("1900")
    page.locator("#chat-greedy input").uncheck()
    # Any token is as good as another now, and with this seed none ends the answers for a thousand tokens.
    page.locator("#chat-temperature input").fill("10")
    page.locator("#chat-seed input, #chat-seed textarea").fill("4")


def stop_long_answers(page: Page) -> None:
    choose_long_answers(page)
    send(page, "Go on")
    expect(page.locator("#live .said").nth(1)).not_to_be_empty()
    expect(page.locator("#talk .tools").first).to_be_hidden()  # the end of the answer would undo it
    page.locator("#chat-stop").click()
    expect(page.locator("#talk .turn")).to_have_count(2)
    assert page.locator("#talk .said").nth(3).inner_text()
    expect(page.locator("#talk .tools").first).to_be_visible()


def reload_in_the_middle_of_an_answer(page: Page) -> None:
    send(page, "And on")
    expect(page.locator("#live .said").nth(1)).not_to_be_empty()
    page.reload()
    expect(page.locator("#talk .turn")).to_have_count(3)
    expect(page.locator("#talk .question").last).to_have_text("And on")
    choose_long_answers(page)
    page.locator("#talk [data-do=again]").click()  # with nothing to be typed
    expect(page.locator("#live .said").nth(1)).not_to_be_empty()
    page.locator("#chat-stop").click()
    expect(page.locator("#talk .turn")).to_have_count(3)
    expect(page.locator("#talk [data-do=again]")).to_be_visible()
    page.locator("#talk [data-do=edit]").nth(2).click()
    expect(page.locator("#talk .turn")).to_have_count(2)
    page.locator("#prompt textarea").fill("")


def reload_and_export(page: Page, tuned: str) -> None:
    page.reload()
    expect(page.locator("#talk .turn")).to_have_count(2)
    expect(page.locator("#talk .answer.best")).to_have_count(1)
    expect(page.locator("#chat-adapters")).to_contain_text("one")
    with page.expect_download() as download:
        page.locator("#chat-export button").click()
    rows = [json.loads(line) for line in Path(download.value.path()).read_text("utf-8").splitlines()]
    assert [row["model"] for row in rows] == ["demo_model", RUN]
    assert [message["role"] for message in rows[1]["messages"]] == ["user", "assistant"] * 2
    assert rows[1]["messages"][1]["content"] == tuned


def kill_and_restart_the_server(page: Page, saves: Path) -> None:
    [server] = servers.servers(saves)
    [process] = find_processes(server.path)
    os.kill(process.pid, signal.SIGKILL)
    expect(page.locator("#held")).to_contain_text("was killed")
    expect(page.locator("#chat-load")).to_have_text("Restart")
    page.locator("#chat-load").click()
    expect(page.locator("#held")).to_contain_text("Loaded", timeout=WORK_MS)


def edit_a_question_into_another_branch(page: Page) -> None:
    page.locator("#talk [data-do=edit]").nth(1).click()
    expect(page.locator("#prompt textarea")).to_have_value("Go on")
    expect(page.locator("#prompt textarea")).to_be_focused()
    expect(page.locator("#talk .turn")).to_have_count(1)
    page.locator("#talk .onward button").click()  # who changed his mind has lost nothing
    expect(page.locator("#talk .turn")).to_have_count(3)
    page.locator("#talk [data-do=edit]").nth(1).click()
    expect(page.locator("#talk .turn")).to_have_count(1)
    expect(page.locator("#prompt textarea")).to_have_value("Go on")
    page.locator("#chat-greedy input").check()
    page.locator("#chat-longest input").fill("10")
    ask(page, "Another way", 2)
    branch, question = page.locator("#talk .asked").nth(1), page.locator("#talk .question").nth(1)
    expect(branch).to_contain_text("2 / 2")
    branch.locator("[data-do=go]").first.click()
    expect(question).to_have_text("Go on")


def put_away_and_take_up_again(page: Page) -> None:
    page.locator("#chat-new").click()
    expect(page.locator("#talk .empty")).to_be_visible()
    page.reload()
    page.locator("#chat-earlier button").first.click()
    page.locator("#chat-shelf [data-do=open]").click()
    expect(page.locator("#talk .question").nth(1)).to_have_text("Go on")
    expect(page.locator("#talk .asked").nth(1)).to_contain_text("1 / 2")
    expect(page.locator("#chat-earlier")).to_be_hidden()
    expect(page.locator("#chat-adapters")).to_contain_text("one")  # who answered in it goes on


def unload_and_clear(page: Page, saves: Path) -> None:
    [server] = servers.servers(saves)
    page.locator("#chat-unload").click()
    expect(page.locator("#held")).to_contain_text("Not loaded")
    wait_until(lambda: not find_processes(server.path))
    page.locator("#chat-clear").click()
    expect(page.locator("#talk .empty")).to_be_visible()


def test_a_run_is_talked_to_beside_its_base_rated_killed_and_unloaded(
    trained: Workplace, open_page: Callable[..., Page], outside: Outside
) -> None:
    """One story, since each of its parts would have to load the model anew."""
    with studio_with_servers(trained) as address:
        page = open_page(f"{address}/?run={RUN}")
        page.locator("#chat-with").click()
        expect(page.locator("#chat-adapters")).to_contain_text("one")
        expect(page.locator("#held")).to_contain_text("Not loaded")
        # Where vLLM is not installed there is no choice.
        expect(page.locator("#chat-engine")).to_have_count(0)
        type_numbers_out_of_bounds(page)
        base, tuned = ask_base_and_run(page)
        rate_answers(page, trained.data, base, tuned)
        stop_long_answers(page)
        reload_in_the_middle_of_an_answer(page)
        reload_and_export(page, tuned)
        kill_and_restart_the_server(page, trained.saves)
        edit_a_question_into_another_branch(page)
        put_away_and_take_up_again(page)
        unload_and_clear(page, trained.saves)
    assert outside == []


def test_vllm_is_a_choice_where_it_is_installed(
    trained: Workplace, open_page: Callable[..., Page], outside: Outside, vllm_path: str
) -> None:
    """Its program is a stand-in, as this machine has no card for vLLM."""
    with studio_with_servers(trained, PATH=vllm_path) as address:
        page = open_page(f"{address}/?run={RUN}")
        page.locator("#chat-with").click()
        page.locator("#chat-engine").get_by_text("vllm", exact=True).click()
        ask(page, "Hello!", 1)
        expect(page.locator("#talk")).to_contain_text("one")
        expect(page.locator("#chat-unload")).to_be_visible()
        [server] = servers.servers(trained.saves)
        assert server.settings["engine"] == "vllm"
        page.locator("#chat-unload").click()
        expect(page.locator("#chat-load")).to_be_visible()
        assert servers.servers(trained.saves) == []
    assert outside == []


def enter(page: Page, address: str, name: str) -> None:
    """Log in under that name, in place of whoever was there before."""
    page.context.clear_cookies()
    page.goto(f"{address}/?tab=chat")
    page.locator("input[name=name]").fill(name)
    page.locator("input[name=password]").fill("correct horse")
    page.keyboard.press("Enter")
    expect(page.locator("#head")).to_contain_text(name)
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#held")).not_to_be_empty()


def test_people_who_share_a_browser_find_each_their_own_conversations(
    trained: Workplace, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    file = tmp_path / "users.txt"
    for name in ("ada", "bob"):
        users.add_user(file, name, "correct horse")
    with studio_with_servers(trained, "--auth", str(file)) as address:
        page = open_page(address)
        enter(page, address, "ada")
        page.locator("#chat-longest input").fill("5")
        ask(page, "What Ada asks", 1)
        page.locator("#chat-new").click()
        expect(page.locator("#talk .empty")).to_be_visible()
        ask(page, "And again", 1)
        enter(page, address, "bob")
        expect(page.locator("#talk .empty")).to_be_visible()
        expect(page.locator("#chat-earlier")).to_be_hidden()
        ask(page, "What Bob asks", 1)
        enter(page, address, "ada")
        expect(page.locator("#talk .question")).to_have_text("And again")
        page.locator("#chat-earlier button").first.click()
        expect(page.locator("#chat-shelf")).to_contain_text("What Ada asks")
