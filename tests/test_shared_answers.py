"""Pages that ask the same at about the same time get one answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
import pytest

from webui.panels import Updates
from webui.shared_answers import SharedAnswers

PAGES = 8


class Counted:
    """An answer that takes a while, and how often it was made."""

    def __init__(self) -> None:
        self.box, self.made = gr.HTML(), 0

    def __call__(self) -> Updates:
        self.made += 1
        time.sleep(0.1)
        return {self.box: gr.update(value=str(self.made))}


@pytest.fixture
def answer() -> Counted:
    return Counted()


def at_once(act: Callable[[], Updates]) -> list[Updates]:
    ready = threading.Barrier(PAGES)

    def go(_: int) -> Updates:
        ready.wait()
        return act()

    with ThreadPoolExecutor(PAGES) as pages:
        return list(pages.map(go, range(PAGES)))


def test_pages_that_ask_at_once_get_one_answer(answer: Counted) -> None:
    shared = SharedAnswers(seconds=600)
    assert at_once(lambda: shared.get("run", answer)) == [{answer.box: gr.update(value="1")}] * PAGES
    assert answer.made == 1


def test_each_question_has_its_own_answer(answer: Counted) -> None:
    shared = SharedAnswers()
    assert shared.get("run", answer) != shared.get("other run", answer)


def test_an_answer_is_made_again_when_it_is_old(answer: Counted) -> None:
    shared = SharedAnswers(seconds=0.01)
    for number in (1, 2, 3):
        assert shared.get("run", answer) == {answer.box: gr.update(value=str(number))}
        assert len(shared.answers) == 1
        time.sleep(0.02)


def test_an_answer_that_somebody_takes_apart_is_whole_for_others(answer: Counted) -> None:
    shared = SharedAnswers(seconds=600)
    shared.get("run", answer)[answer.box].pop("value")
    assert shared.get("run", answer) == {answer.box: gr.update(value="1")}


def test_whoever_waited_for_an_error_is_told_it() -> None:
    shared = SharedAnswers()

    def fail() -> Updates:
        time.sleep(0.1)
        raise FileNotFoundError

    def outcome() -> Updates:
        with pytest.raises(FileNotFoundError):
            shared.get("run", fail)
        return {}

    assert at_once(outcome) == [{}] * PAGES
