"""`PageBlocks` gives handlers and browsers what `gr.Blocks` gives them, and holds next to nothing of each page."""

from __future__ import annotations

import asyncio
import collections
import gc
import json
import weakref
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio.block_function import BlockFunction
from gradio.blocks import Block
from gradio.state_holder import SessionState

from engine.launch.workspace import Workplace
from webui import page_sessions
from webui.page_blocks import EVENT_POLL_SECONDS, PageBlocks
from webui.page_sessions import PageSession
from webui.panels import hidden_value
from webui.studio import page
from webui.studio.application import _mounted

VISITORS = 60


class Controls:
    """A page with one control of each kind that handlers answer into."""

    def __init__(self) -> None:
        with PageBlocks() as self.blocks:
            self.text = gr.Textbox("before", label="text")
            self.choice = gr.Dropdown(["a", "b"], value="a", interactive=True)
            self.several = gr.Dropdown([], value=[], multiselect=True, info="none")
            self.kind = gr.Radio([("One", "1"), ("Two", "2")], value="1")
            self.number = gr.Slider(0, 10, 3)
            self.on = gr.Checkbox(False)
            self.html = gr.HTML("before", elem_id="html")
            self.button = gr.Button("go", visible=False)
            self.timer = gr.Timer(2, active=False)
            with gr.Tabs() as self.tabs:
                gr.Tab("first", id="first")
            self.column = gr.Column(visible=False)
            self.upload = gr.UploadButton()
            self.all: list[Block] = [value for value in vars(self).values() if isinstance(value, Block)][1:]
            self.inputs = [
                self.text,
                self.choice,
                self.several,
                self.kind,
                self.number,
                self.on,
            ]
            self.text.change(lambda *held: None, self.inputs, self.all)
        self.event: BlockFunction = self.blocks.fns[0]


@pytest.fixture
def controls() -> Controls:
    return Controls()


def answers(controls: Controls) -> Iterator[dict[Any, Any]]:
    """What handlers answer, one after the other; the later build on the earlier."""
    yield gr.skip()
    yield {controls.html: "after", controls.text: "after", controls.number: 4, controls.on: True}
    yield {
        controls.choice: gr.update(choices=[("A", "a"), "c"], value="c"),
        controls.several: gr.update(choices=[("X", "x"), ("Y", "y")], value=["y"], info="two"),
        controls.kind: gr.update(value="2"),
    }
    yield {controls.choice: gr.update(visible=False), controls.button: gr.update(value="stop", visible=True)}
    yield {controls.timer: gr.Timer(active=True), controls.tabs: gr.Tabs(selected="first")}
    yield {controls.column: gr.update(visible=True), controls.html: gr.update(value="<b>", visible=None)}
    yield {controls.text: None, controls.upload: gr.update(label="other")}
    yield {controls.several: gr.update(choices=[], value=[]), controls.timer: gr.Timer(active=False)}


def as_sent(answers: list[Any]) -> str:
    """As JSON, without what gradio adds to each HTML of which nothing is to change: the type of the update as a
    property,
    for which the browser would write the HTML again."""
    return json.dumps([gr.skip() if value == gr.skip() | {"props": gr.skip()} else value for value in answers])


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns. In a thread: a browser that other tests opened keeps a loop running in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def of_gradio(blocks: gr.Blocks, event: BlockFunction, answer: Any, session: SessionState) -> list[Any]:
    return run(gr.Blocks.postprocess_data(blocks, event, answer, session))


def test_events_wait_as_they_would_in_gradio_and_one_web_app_is_made_of_a_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[gr.Blocks] = []
    create = gr.routes.App.create_app
    monkeypatch.setattr(
        gr.routes.App, "create_app", lambda page, **settings: made.append(page) or create(page, **settings)
    )
    with PageBlocks() as ours:
        pass
    assert made == [ours]
    theirs = gr.Blocks()
    plain = {name for name, value in vars(theirs._queue).items() if isinstance(value, (bool, int, float, type(None)))}
    assert {"live_updates", "max_thread_count", "max_size", "default_concurrency_limit"} <= plain
    for name in plain - {"sleep_when_free"}:  # which is EVENT_POLL_SECONDS here
        assert getattr(ours._queue, name) == getattr(theirs._queue, name), name


def test_browsers_are_sent_what_gradio_would_send(controls: Controls) -> None:
    gradios, ours = SessionState(controls.blocks), PageSession(controls.blocks)
    for answer, same in zip(answers(controls), answers(controls), strict=True):  # gradio takes answers apart
        expected = of_gradio(controls.blocks, controls.event, answer, gradios)
        sent = run(controls.blocks.postprocess_data(controls.event, same, ours))
        assert as_sent(sent) == as_sent(expected)


def test_plain_answers_are_not_left_to_gradio(controls: Controls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gr.Blocks, "postprocess_data")
    monkeypatch.delattr(gr.Blocks, "preprocess_data")
    session = PageSession(controls.blocks)
    for answer in list(answers(controls))[:-2]:
        run(controls.blocks.postprocess_data(controls.event, answer, session))
    held = ["typed", "c", ["x"], "2", 5, True]
    assert run(controls.blocks.preprocess_data(controls.event, held, session)) == held


async def answer_of(blocks: PageBlocks, event: BlockFunction, held: list[Any], answer: Any) -> dict[Any, Any]:
    """What the browser is sent for an answer to an event with these values, without what stays as it is."""
    session = PageSession(blocks)
    await blocks.preprocess_data(event, held, session)
    sent = await blocks.postprocess_data(event, answer, session)
    return {block: value for block, value in zip(event.outputs, sent, strict=True) if value != gr.skip()}


def test_a_value_that_comes_back_as_it_was_sent_is_not_sent_over_a_newer_one(controls: Controls) -> None:
    def answer_to(held: list[Any], answer: dict[Any, Any]) -> Coroutine[Any, Any, dict[Any, Any]]:
        return answer_of(controls.blocks, controls.event, held, answer)

    held = ["typed", "a", [], "1", 5, True]
    same = {controls.text: "typed", controls.number: 5.0, controls.on: True, controls.html: "after"}
    assert run(answer_to(held, same)) == {controls.html: "after"}
    other = {controls.text: "", controls.number: 6, controls.on: False}
    assert run(answer_to(held, other)) == other
    lists = {
        controls.choice: gr.update(choices=["a", "b"], value="a"),
        controls.several: gr.update(choices=["x", "y"], value=[]),
        controls.kind: gr.update(value="2"),
    }
    assert run(answer_to(held, lists)) == {
        controls.choice: {"choices": [("a", "a"), ("b", "b")], "__type__": "update"},
        controls.several: {"choices": [("x", "x"), ("y", "y")], "__type__": "update"},
        controls.kind: {"value": "2", "__type__": "update"},
    }


def test_what_only_handlers_change_and_answers_in_pieces_are_sent_in_any_case() -> None:
    def pieces(*_: str) -> Iterator[str]:
        yield "1"

    with PageBlocks() as blocks:
        first, chosen = hidden_value("1"), hidden_value("a", by_reader=True)
        first.change(lambda *_: None, [first, chosen], [first, chosen])
        chosen.change(pieces, [first, chosen], [first, chosen])
    once, several = blocks.fns.values()
    same = {first: "1", chosen: "a"}
    assert run(answer_of(blocks, once, ["1", "a"], same)) == {first: "1"}  # it says which rows are shown
    assert run(answer_of(blocks, several, ["1", "a"], same)) == same


@pytest.mark.parametrize(
    "held",
    [
        ["typed", "b", [], "2", 5, True],
        [None, None, None, None, 0, None],
        ["typed", "c", [], "1", 5, True],  # no such choice
        ["typed", "a", ["x"], "1", 5, True],
        ["typed", "a", [], "3", 5, True],
        ["typed", "a", [], "1", 11, True],  # above the slider
        ["typed", "a"],  # too few
        [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "a", [], "1", 5, True],
    ],
)
def test_handlers_are_given_what_gradio_would_give_them(controls: Controls, held: list[Any]) -> None:
    def outcome(preprocess: Any, session: SessionState) -> Any:
        try:
            return run(preprocess(controls.event, list(held), session))
        except Exception as error:
            return type(error), str(error)

    gradios = outcome(lambda *given: gr.Blocks.preprocess_data(controls.blocks, *given), SessionState(controls.blocks))
    assert outcome(controls.blocks.preprocess_data, PageSession(controls.blocks)) == gradios


def test_a_choice_that_an_event_has_offered_is_valid_on_that_page_alone(controls: Controls) -> None:
    offered, other = PageSession(controls.blocks), PageSession(controls.blocks)
    answer = {controls.choice: gr.update(choices=["c"])}
    run(controls.blocks.postprocess_data(controls.event, answer, offered))
    held = ["typed", "c", [], "1", 5, True]
    assert run(controls.blocks.preprocess_data(controls.event, held, offered))[1] == "c"
    with pytest.raises(gr.Error, match="not in the list of choices"):
        run(controls.blocks.preprocess_data(controls.event, held, other))


def test_whole_tabs_are_answered_as_gradio_would(workplace: Workplace) -> None:
    blocks = page(workplace, "en")
    events = {getattr(event.fn, "__qualname__", ""): event for event in blocks.fns.values()}
    arrive = events["RunView.catch_up"]
    answer, same = (arrive.fn("", "", "step", 0.6, False, "", "", "100") for _ in range(2))
    expected = of_gradio(blocks, arrive, answer, SessionState(blocks))
    sent = run(blocks.postprocess_data(arrive, same, PageSession(blocks)))
    assert as_sent(sent) == as_sent(expected)


class Visits:
    """The English page, and pages that ask it for the table of runs, each in a session of its own."""

    def __init__(self, workplace: Workplace):
        self.blocks = page(workplace, "en")
        self.transport = httpx.ASGITransport(_mounted(self.blocks, ""))
        by_name = {getattr(event.fn, "__qualname__", ""): event for event in self.blocks.fns.values()}
        self.event = by_name["RunView.catch_up"]
        self.sessions = self.blocks.state_holder

    def come_and_go(self, names: Iterable[str]) -> None:
        run(self._ask(names))
        gc.collect()

    async def _ask(self, names: Iterable[str]) -> None:
        async with httpx.AsyncClient(transport=self.transport, base_url="http://127.0.0.1") as client:
            for name in names:
                held = ["", "", "step", 0.6, False, "", "", "100"]
                body = {"data": held, "fn_index": self.event._id, "session_hash": name}
                answer = await client.post(f"/gradio_api/run/{self.event.api_name}", json=body)
                assert answer.status_code == 200, answer.text


@pytest.fixture
def visits(workplace: Workplace) -> Visits:
    return Visits(workplace)


def test_pages_that_came_and_went_leave_next_to_nothing(visits: Visits) -> None:
    visits.come_and_go(["first"])
    left = min((objects_left_by(visits, turn) for turn in range(3)), key=collections.Counter.total)
    assert not any(issubclass(kind, Block) for kind in left)  # no component of its own for any of them
    assert left.total() < 20 * VISITORS, left.most_common(8)
    assert len(visits.sessions.session_data) == 3 * VISITORS + 1


def objects_left_by(visits: Visits, turn: int) -> collections.Counter[type]:
    """How many more objects of each type there are once so many have come. The whole process is counted: what a
    library imports late, or a thread of an earlier test makes, is in the first count alone."""
    before = collections.Counter(type(item) for item in gc.get_objects())
    visits.come_and_go(f"visitor {number} of {turn}" for number in range(VISITORS))
    return collections.Counter(type(item) for item in gc.get_objects()) - before


def test_pages_that_were_silent_for_long_are_forgotten(visits: Visits, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"visitor {number}" for number in range(VISITORS)]
    visits.come_and_go(names)
    sessions = [weakref.ref(visits.sessions[name]) for name in names]
    visits.come_and_go(["within the time"])
    assert all(session() for session in sessions)
    monkeypatch.setattr(page_sessions, "KEPT", timedelta(0))
    visits.come_and_go(["later"])
    assert not any(session() for session in sessions)
    assert list(visits.sessions.session_data) == list(visits.sessions.time_last_used) == ["later"]


def test_a_page_that_was_forgotten_goes_on(visits: Visits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_sessions, "KEPT", timedelta(0))
    visits.come_and_go(["early", "late", "early"])
    assert list(visits.sessions.session_data) == ["early"]


def test_no_more_sessions_are_held_than_a_number(visits: Visits) -> None:
    visits.sessions.capacity = 3
    visits.come_and_go(["a", "b", "c", "a", "d", "e"])
    assert list(visits.sessions.session_data) == ["a", "d", "e"]


def test_without_events_nobody_looks_for_them_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep, naps = asyncio.sleep, []

    async def count(seconds: float) -> None:
        naps.append(seconds)
        queue.stopped = len(naps) == 5
        await sleep(0)

    async def wait_for_events() -> None:
        monkeypatch.setattr(asyncio, "sleep", count)
        await queue.start_processing()

    queue = Controls().blocks._queue

    with ThreadPoolExecutor(1) as thread:  # Playwright, in a test before, leaves a running loop in this one
        thread.submit(lambda: asyncio.run(wait_for_events())).result()
    assert naps == [EVENT_POLL_SECONDS] * 5  # gradio looks every millisecond
