"""A page of the studio without a browser: reads the page's configuration and sends the requests of gradio's client."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

import httpx

CONFIG = re.compile(r"window\.gradio_config = (\{.*?\});</script>", re.DOTALL)
CONNECTIONS = 6  # that a browser opens to one host over HTTP/1.1
SETTLED = re.compile(r"athanorSettled\('([\w-]+)'\)")  # page.js presses the button with this id
LOAD, TICK, CHANGE, SELECT, CLICK = "load", "tick", "change", "select", "click"

# Called with the event, the seconds to the complete response, and whether it succeeded.
Answered = Callable[[str, float, bool], None]


class SimulatedPage:
    """One page with the values of its controls, its timers and its session.

    Each dependency of the configuration is called as gradio's client calls one that is not queued, with what the
    controls hold; answers change controls, which fires further events. The page's JavaScript is followed where it says
    what the address holds; all else that it does keeps to the browser. What Chromium asks at each tick is the same;
    when it arrives, it asks two small things more.
    """

    def __init__(self, address: str, query: str, answered: Answered, session: str = ""):
        self.address, self.query, self.answered = address, query, answered
        self.session = session or secrets.token_hex(6)
        self.client = httpx.AsyncClient(
            base_url=address, trust_env=False, timeout=120, limits=httpx.Limits(max_connections=CONNECTIONS),
            headers={"Accept-Language": "en"},
        )  # fmt: skip
        self.properties: dict[int, dict[str, Any]] = {}
        self.dependencies: list[dict[str, Any]] = []
        self.pending: dict[int, bool] = {}  # running dependencies; True: requested again meanwhile
        self.tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Request the page and everything it loads at the start, until it is idle; its timers run from then on."""
        answer = await self.client.get(f"/?{self.query}")
        answer.raise_for_status()
        config = json.loads(CONFIG.search(answer.text)[1])
        self.properties = {block["id"]: block["props"] for block in config["components"]}
        self.timers = [block["id"] for block in config["components"] if block["type"] == "timer"]
        self.tab_items = {
            block["props"]["id"]: block["id"] for block in config["components"]
            if block["type"] == "tabitem" and isinstance(block["props"].get("id"), str)
        }  # fmt: skip
        first = next(iter(self.tab_items.values()))
        self.dependencies, self.api_prefix = config["dependencies"], config["api_prefix"]
        load = {(LOAD, block) for dep in self.targeted_by(LOAD) for block, _ in dep["targets"]}
        await self._fire([*load, (SELECT, first)])
        for timer in self.timers:
            self._start(self._ring(timer))

    async def close(self) -> None:
        """Disconnect without closing, like a browser that is killed."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.client.aclose()

    def targeted_by(self, event: str, block: int | None = None) -> list[dict[str, Any]]:
        return [
            dep for dep in self.dependencies
            if any(name == event and block in (None, id) for id, name in dep["targets"])
        ]  # fmt: skip

    async def call(self, dependency: dict[str, Any], event: str = LOAD, block: int | None = None) -> None:
        """Call a dependency unless it is running, then everything that follows from its response."""
        id = dependency["id"]
        if id in self.pending:
            self.pending[id] = dependency["trigger_mode"] == "always_last"
            return
        self.pending[id] = False
        try:
            if (data := await self._ask(dependency, event, block)) is None:
                return
        finally:
            again = self.pending.pop(id)
        changed = self._apply(dependency["outputs"], data)
        after = [dep for dep in self.dependencies if dep["trigger_after"] == id]
        await asyncio.gather(*(self.call(dep) for dep in after), self._fire(changed))
        if again:
            await self.call(dependency, event, block)

    async def _ask(self, dependency: dict[str, Any], event: str, block: int | None) -> list[Any] | None:
        """The response of the server; None if it failed, or if none is needed."""
        if not dependency["backend_fn"]:
            if settled := SETTLED.search(str(dependency["js"])):
                await self._fire([(CLICK, self._block(settled[1]))])
            return None
        body = {
            "data": self._inputs(dependency), "event_data": None, "fn_index": dependency["id"], "trigger_id": block,
            "session_hash": self.session,
        }  # fmt: skip
        began = time.perf_counter()
        try:
            answer = await self.client.post(f"{self.api_prefix}/run/{dependency['api_name']}", json=body)
            succeeded = answer.status_code == 200
        except httpx.HTTPError:
            succeeded = False
        self.answered(event, time.perf_counter() - began, succeeded)
        return answer.json()["data"] if succeeded else None

    def _block(self, name: str) -> int:
        return next(id for id, properties in self.properties.items() if properties.get("elem_id") == name)

    def _inputs(self, dependency: dict[str, Any]) -> list[Any]:
        if "athanorArrive" in str(dependency["js"]):
            return arrival(self.query)
        return [self.properties[id].get("value") for id in dependency["inputs"]]

    def _apply(self, outputs: list[int], data: list[Any]) -> list[tuple[str, int]]:
        """Change the controls, and return the events that this fires."""
        events = []
        for id, new in zip(outputs, data, strict=True):
            update = new if isinstance(new, dict) and new.get("__type__") == "update" else {"value": new}
            properties = self.properties[id]
            if "value" in update and shown(update["value"]) != shown(properties.get("value")):
                events.append((CHANGE, id))
            if update.get("selected") not in (None, properties.get("selected")) and self.tab_items:
                events.append((SELECT, self.tab_items[update["selected"]]))
            properties.update(update)
        return events

    async def _fire(self, events: Iterable[tuple[str, int]]) -> None:
        """Each dependency once, however many of the events trigger it."""
        calls = {dep["id"]: (dep, *event) for event in events for dep in self.targeted_by(*event)}
        await asyncio.gather(*(self.call(*call) for call in calls.values()))

    async def _ring(self, timer: int) -> None:
        """Fire the ticks of a timer like a browser: at its interval while it is active, regardless of the responses."""
        properties, dependencies = self.properties[timer], self.targeted_by(TICK, timer)
        await asyncio.sleep(float(properties["value"]) * secrets.randbelow(1000) / 1000)
        while True:
            await asyncio.sleep(properties["value"])
            if properties.get("active"):
                for dependency in dependencies:
                    self._start(self.call(dependency, TICK, timer))

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def shown(value: Any) -> Any:
    """A value as the browser has it, where an untouched text box is empty; the configuration has null for it."""
    return "" if value is None else value


def arrival(query: str) -> list[str]:
    """The values that `athanorArrive` of page.js returns: open run, tab, data set, the address of a comparison,
    report, and the form as it was left."""
    parameters = {name: values[-1] for name, values in parse_qs(query).items()}
    tab, chosen = parameters.get("tab", ""), parameters.get("set")
    return [
        parameters.get("run", ""), tab, f"set:{chosen}" if chosen is not None else "",
        query if tab == "compare" else "", parameters.get("report", ""), "",
    ]  # fmt: skip
