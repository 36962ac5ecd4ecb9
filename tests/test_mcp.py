"""The tools of the MCP server, called by the official client: on standard input and output, and through a studio."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import anyio
import httpx
import pytest

from engine.api.callers import MAX_TURNS, Caller
from engine.core import audit, tokens, users
from engine.core.problems import Refusal, problem
from engine.core.rights import Person
from engine.core.run_warnings import write_warning
from engine.core.rundir import run_folders, write_json
from engine.launch.workspace import PROJECT, Workplace
from engine.mcp import run_tools
from engine.mcp.answers import TOOLS, answer
from engine.mcp.call import ASK, READ, Call, NoArguments, Tool
from engine.mcp.package import load_server
from engine.runs import runs
from engine.runs.run import ALIVE_STATES, FINAL_STATES, Run
from engine.spec.run_spec import RunSpec
from tests.conftest import end_runs, flags_of, short_training, start_studio
from tests.past_runs import falling, run_maker

pytest.importorskip("mcp")
import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from engine.mcp.server import MAX_CALLS_OF_CALLER, Calls

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]

Ask = Callable[..., Awaitable[Any]]


def run_async(conversation: Callable[[], Awaitable[None]]) -> None:
    """Run it in a thread of its own: Playwright, in a test before, leaves a running loop in this one."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: anyio.run(conversation)).result()


@dataclass(frozen=True)
class Studio:
    """A studio with three users, and runs of ada."""

    place: Workplace
    address: str
    users: Path
    done: Run
    failed: Run
    spec: RunSpec


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("mcp")
    place = Workplace(models=(tiny.parent,), data=folder / "data", saves=folder / "saves")
    place.data.mkdir()
    place.saves.mkdir()
    rows = [{"instruction": f"What comes after {n}?", "output": f"{n + 1}."} for n in range(40)]
    (place.data / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    write_json(place.data / "dataset_info.json", {"chat": {"file_name": "chat.json"}, "gone": {"file_name": "no.json"}})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(users, "SCRYPT_COST", (16, 8, 1))  # nobody signs in with a password
        for name, role in {"root": "operator", "ada": "user", "bob": "user", "vic": "viewer"}.items():
            users.add_user(folder / "users", name, "correct horse", role)
    make = run_maker(place.saves)
    done = make("done", falling(20), training__learning_rate=1e-4)
    make("other", falling(20, end=0.5), training__learning_rate=2e-4)
    failed = make("failed", falling(3), outcome="failed")
    write_json(failed.dir.error, {"type": "OutOfMemoryError", "message": "CUDA out of memory", "traceback": ""})
    write_warning(done.dir, problem("loss-zero", count=3, step=3), 3)
    done.dir.log.write_text("one\r 5%\r10%\nlast\n", encoding="utf-8")
    failed.dir.log.write_text("first\n", encoding="utf-8")
    failed.dir.log_of(1).write_text("second\n", encoding="utf-8")
    for run in runs.find(place.saves):
        write_json(run.dir.request, run.request | {"by": "ada", "kind": "training"})
    process, address = start_studio(place, "--auth", str(folder / "users"), "--mcp")
    yield Studio(place, address, folder / "users", done, failed, short_training(tiny, place.data))
    process.terminate()
    process.wait()
    end_runs(place.saves)


def over_http(
    studio: Studio, user: str, talk: Callable[[Ask], Awaitable[None]], *scopes: str, mode: Any = "auto"
) -> None:
    """Have the client of a user call tools; `ask` returns the structured content, and whether it is an error."""
    token = tokens.add_token(studio.users, user, f"{user} {os.urandom(4).hex()}", scopes or tokens.SCOPES)

    async def converse() -> None:
        async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {token}"}, timeout=60) as http:
            transport = streamable_http_client(f"{studio.address}/mcp", http_client=http)
            async with Client(transport, mode=mode) as client:
                await talk(asking(client))

    run_async(converse)


def asking(client: Client) -> Ask:
    async def ask(name: str, **arguments: Any) -> Any:
        result = await client.call_tool(name, arguments)
        (text,) = result.content
        if not result.is_error:
            assert json.loads(text.text) == result.structured_content
            return result.structured_content
        return [issue["code"] for issue in result.structured_content["problems"]], text.text

    return ask


def test_a_user_looks_starts_stops_and_resumes_with_the_rights_and_the_audit_of_the_page(studio: Studio) -> None:
    spec = studio.spec.change("name", "mine").change("training.max_steps", 100_000).to_yaml(brief=True)

    async def ada(ask: Ask) -> None:
        listed = await ask("list_runs", text="base", state="finished")
        assert [run["name"] for run in listed["runs"]] == ["other", "done"]
        assert listed["runs"][0]["value"]["loss"] == pytest.approx(0.5, abs=0.2)
        shown = await ask("show_run", run="done")
        assert (shown["state"], shown["by"], shown["latest"]["loss"] > 0.5) == ("finished", "ada", True)
        assert RunSpec.from_yaml(shown["spec"]) == studio.done.spec
        assert len(shown["warnings"]) == 1
        assert "Halve the batch size" in (await ask("show_run", run=studio.failed.id))["failure"]["what_to_do"]
        logged = {"run": studio.done.id, "lines": ["10%", "last"]}
        assert await ask("run_log", run="done", lines=2) == logged
        logged = {"run": studio.failed.id, "lines": ["first"], "other_machines": {"log-2.txt": ["second"]}}
        assert await ask("run_log", run="failed") == logged
        compared = await ask("compare_runs", runs=["done", "other"])
        (difference,) = compared["differences"]
        assert difference["setting"] == "training.learning_rate"
        assert sorted(difference["values"].values()) == [1e-4, 2e-4]
        datasets = {data["name"]: data["problem"] for data in (await ask("list_datasets"))["datasets"]}
        assert datasets["chat"] is None
        assert "no.json" in datasets["gone"]
        assert (await ask("list_models"))["models"][0]["name"] == "tiny"

        checked = await ask("check_spec", spec=spec.replace("chat", "nothing"))
        assert not checked["ready"]
        assert {issue["code"] for issue in checked["problems"]} == {"data-unknown"}
        assert (await ask("start_run", spec=spec.replace("chat", "nothing")))[0] == ["data-unknown"]
        run_maker(studio.place.saves)("mine", falling(3))  # what has ended is never stopped nor resumed
        started = await ask("start_run", spec=spec)
        assert (started["by"], started["name"]) == ("ada", "mine")
        with anyio.fail_after(120):
            while (await ask("show_run", run=started["id"]))["state"] == "queued":
                await anyio.sleep(0.1)
        assert (await ask("stop_run", run="mine"))["state"] in ("stopping", "stopped")
        with anyio.fail_after(120):
            while (await ask("show_run", run=started["id"]))["state"] != "stopped":
                await anyio.sleep(0.1)
        assert (await ask("resume_run", run="mine"))["state"] in ("queued", "preparing", "running")
        assert (await ask("stop_run", run="mine", kill=True))["id"] == started["id"]

    over_http(studio, "ada", ada)
    actions = [(entry.user, entry.action, entry.outcome) for entry in reversed(audit.read(studio.place.saves, 9))]
    assert actions == [
        ("ada", "start", "refused: data-unknown"), ("ada", "start", "done"), ("ada", "stop", "done"),
        ("ada", "resume", "done"), ("ada", "kill", "done"),
    ]  # fmt: skip


def test_what_somebody_may_not_do_is_refused_and_changes_nothing(studio: Studio) -> None:
    spec = studio.spec.to_yaml(brief=True)

    async def other(ask: Ask) -> None:
        assert (await ask("resume_run", run=studio.failed.id))[0] == ["rights-owner"]
        for tool in ("stop_run", "resume_run"):  # an abbreviation is not enough
            assert (await ask(tool, run="fail"))[0] == ["run-unknown"]
        assert (await ask("ask_model", question="?", run="don"))[0] == ["run-unknown"]

    async def viewer(ask: Ask) -> None:
        assert (await ask("list_runs"))["total"] >= 3
        assert (await ask("start_run", spec=spec))[0] == ["rights-viewer"]
        assert (await ask("ask_model", question="?", base=str(studio.spec.model.model_name_or_path)))[0] == [
            "rights-viewer"
        ]

    async def reader(ask: Ask) -> None:
        assert (await ask("show_run", run="done"))["name"] == "done"
        assert (await ask("start_run", spec=spec))[0] == ["api-scope"]
        assert (await ask("ask_model", question="?", run="done"))[0] == ["api-scope"]

    before = sorted(run_folders(studio.place.saves))
    over_http(studio, "bob", other)
    over_http(studio, "vic", viewer, mode="legacy")
    over_http(studio, "ada", reader, "read")
    assert sorted(run_folders(studio.place.saves)) == before

    with httpx.Client(base_url=studio.address, trust_env=False, timeout=60) as client:
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
        accepted = {"Accept": "application/json, text/event-stream"}
        for headers in ({}, {"Authorization": "Bearer sk-athanor-000000000000-" + "x" * 43}):
            refused = client.post("/mcp", json=call, headers=accepted | headers)
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert client.get("/mcp").status_code == 405
        assert client.post("/mcp", json=call, headers={"Origin": "http://evil.example"}).status_code == 403
        assert client.get("/mcpx").status_code == 401  # the studio's own login


def test_wrong_arguments_are_errors_that_say_what_is_wrong(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(studio.place, Caller(audit.shell("root")))
    for name, arguments, code in (
        ("delete_run", {}, "mcp-no-tool"),
        ("show_run", {}, "mcp-argument"),
        ("show_run", {"run": "done", "really": True}, "mcp-argument"),
        ("show_run", {"run": "../../etc"}, "run-unknown"),
        ("show_run", {"run": ""}, "run-unknown"),
        ("show_run", {"run": "\0"}, "run-unknown"),
        ("list_runs", {"limit": 10**9}, "mcp-argument"),
        ("list_runs", {"state": "succeeded"}, "mcp-argument"),
        ("run_log", {"run": "done", "lines": -1}, "mcp-argument"),
        ("compare_runs", {"runs": ["done"]}, "mcp-argument"),
        ("check_spec", {"spec": "a: [" * 5000}, None),
        ("start_run", {"spec": ""}, None),
        ("start_run", {"spec": "kind: party"}, "spec-choice"),
        ("ask_model", {"question": "?"}, "chat-nothing-chosen"),
        ("ask_model", {"question": "?", "base": "/etc"}, "path-outside"),
    ):
        done = answer(call, name, arguments)
        assert done.failed, name
        assert code in (None, done.content["problems"][0]["code"]), done.text
        assert done.text
    assert set(get_args(run_tools.State)) == {"queued", *ALIVE_STATES, *FINAL_STATES}
    studio.failed.dir.spec.write_text("model: [", encoding="utf-8")
    assert answer(call, "show_run", {"run": "failed"}).content["spec"] is None
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda _name: None)
        with pytest.raises(Refusal, match=r"requirements-mcp\.txt"):
            load_server()
    for language in ("en", "zh"):
        assert answer(Call(studio.place, Caller(audit.shell("")), language), "no", {}).text
    assert all(tool.description and tool.arguments.model_json_schema()["type"] == "object" for tool in TOOLS.values())


def test_on_standard_input_and_output_it_has_the_rights_of_the_shell(studio: Studio) -> None:
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "engine", "mcp", *flags_of(studio.place)],
        cwd=PROJECT,
        env={"USER": "root", "LANG": "C.UTF-8"},
    )

    async def converse() -> None:
        async with Client(server) as client:
            assert {tool.name for tool in (await client.list_tools()).tools} == set(TOOLS)
            ask = asking(client)
            assert (await ask("show_run", run="done"))["name"] == "done"
            codes, text = await ask("start_run", spec="model: {model_name_or_path: /nowhere}")
            assert "model-missing-alone" in codes
            assert "/nowhere" in text

    run_async(converse)
    newest = audit.read(studio.place.saves, 1)[0]
    assert (newest.user, newest.address, newest.action) == ("root", "shell", "start")


def test_one_caller_leaves_answers_of_models_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()

    def wait(call: Call, _arguments: NoArguments) -> dict[str, Any]:
        if call.caller.name == "ada":
            done.wait(600)
        return {"for": call.caller.name}

    monkeypatch.setitem(TOOLS, "ask_model", Tool(wait, NoArguments, ASK, waits=True))
    ada, bob = (Call(Workplace(), Caller(Person(name, "user", ""))) for name in ("ada", "bob"))

    async def converse() -> None:
        calls = Calls()
        async with anyio.create_task_group() as waiting:
            for _ in range(MAX_TURNS):
                waiting.start_soon(calls.answer, ada, "ask_model", {})
            await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(120):
                refused = await calls.answer(ada, "ask_model", {})
                assert refused.content["problems"][0]["code"] == "api-turns"
                assert (await calls.answer(bob, "ask_model", {})).content == {"for": "bob"}
                assert (await calls.answer(ada, "no", {})).content["problems"][0]["code"] == "mcp-no-tool"
            done.set()
        assert not calls.turns.taken

    try:
        run_async(converse)
    finally:
        done.set()


def test_one_caller_does_not_occupy_the_server_with_quick_calls_either(monkeypatch: pytest.MonkeyPatch) -> None:
    done, most = threading.Event(), MAX_CALLS_OF_CALLER

    def hold(call: Call, _arguments: NoArguments) -> dict[str, Any]:
        if call.caller.name == "ada":
            done.wait(600)
        return {"for": call.caller.name}

    monkeypatch.setitem(TOOLS, "list_runs", Tool(hold, NoArguments, READ))
    # The same person with two tokens, one of them to read alone; and somebody else.
    ada, reader = (
        Call(Workplace(), Caller(Person("ada", "user", ""), scopes)) for scopes in (("fine-tune",), ("read",))
    )
    bob = Call(Workplace(), Caller(Person("bob", "user", "")))

    async def converse() -> None:
        calls = Calls()
        async with anyio.create_task_group() as waiting:
            for number in range(most):
                waiting.start_soon(calls.answer, ada if number % 2 else reader, "list_runs", {})
            await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(120):
                for call in (ada, reader):
                    refused = await calls.answer(call, "list_runs", {})
                    assert refused.content["problems"][0]["code"] == "mcp-turns"
                    assert str(most) in refused.text
                assert (await calls.answer(bob, "list_runs", {})).content == {"for": "bob"}
            done.set()
        assert not calls.quick_turns.taken

    try:
        run_async(converse)
    finally:
        done.set()
