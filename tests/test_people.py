"""Three people at one studio: what each may not do is refused at every endpoint of the page, and leaves nothing
changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from engine.core import audit, users
from engine.core.locks import try_lock
from engine.core.rights import RIGHTS
from engine.core.rundir import ALIVE_BYTE, read_object, write_json
from engine.data import owners
from engine.launch.workspace import Workplace
from engine.runs import runs
from engine.runs.runs import Run
from tests.conftest import start_studio
from tests.past_runs import run_maker
from tests.written_documents import complete_draft

pytestmark = [pytest.mark.usefixtures("forked"), pytest.mark.slow]

ROWS = [{"instruction": f"What comes after {n}?", "input": "", "output": f"{n + 1}."} for n in range(20)]
PASSWORD = "correct horse"
# What changes by looking: the own form, uploads on their way, results of checks, the list of runs, and this record.
UNRELATED = (".forms", ".tmp", ".errands", ".index", ".audit", ".lock")


@dataclass
class Studio:
    """A running studio, and what there is in it."""

    address: str
    place: Workplace
    runs: dict[str, Run] = field(default_factory=dict)
    clients: dict[str, httpx.Client] = field(default_factory=dict)
    draft: str = ""

    def client(self, name: str) -> httpx.Client:
        if name not in self.clients:
            client = self.clients[name] = httpx.Client(base_url=self.address, trust_env=False, timeout=60)
            assert client.post("/login", data={"name": name, "password": PASSWORD}).status_code == 303
        return self.clients[name]

    def contents(self) -> dict[str, str]:
        """Every file of runs and data, by its path, with a hash of what it contains."""
        files = [path for folder in (self.place.saves, self.place.data) for path in folder.rglob("*") if path.is_file()]
        contents = {}
        for path in files:
            if not any(part.startswith(UNRELATED) or part.endswith(".lock") for part in path.parts):
                with contextlib.suppress(FileNotFoundError):  # one that is on its way to its name
                    contents[str(path)] = hashlib.sha1(path.read_bytes()).hexdigest()
        return contents


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("people")
    place = Workplace(models=(folder / "models",), data=folder / "data", saves=folder / "saves")
    for path in (*place.models, place.data, place.saves):
        path.mkdir()
    for name, role in {"root": "operator", "ada": "user", "bob": "user", "eve": "viewer"}.items():
        users.add_user(folder / "users", name, PASSWORD, role)
    (place.data / "hers.json").write_text(json.dumps(ROWS))
    (place.data / "loose.json").write_text(json.dumps(ROWS))
    write_json(place.data / "dataset_info.json", {"hers": {"file_name": "hers.json"}})
    owners.claim(place.data, ["set:hers", "file:loose.json"], "ada")
    make = run_maker(place.saves)
    made = {"past": make("past"), "waits": make("waits", outcome=None), "lives": make("lives", outcome=None)}
    made["broken"] = make("broken", outcome="failed")
    for name, run in made.items():
        request = {
            "kind": "training",
            "by": "ada",
            "submitted": 1e9,
            "queued": 1,
            "attempt": 1,
            "held": name == "waits",
        }
        write_json(run.dir.request, request)
    made["waits"].dir.keeper.unlink()
    checkpoint = made["past"].path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("x" * 1000)
    lock = try_lock(made["lives"].dir.lock, ALIVE_BYTE, shared=True)
    assert lock is not None
    process, address = start_studio(place, "--auth", str(folder / "users"))
    there = Studio(address, place, {name: runs.get(place.saves, run.id) for name, run in made.items()})
    there.draft = f"draft:{complete_draft(place, 'hers', 'ada').id}"
    assert {name: run.state for name, run in there.runs.items()} == {
        "past": "finished", "waits": "queued", "lives": "preparing", "broken": "failed",
    }  # fmt: skip
    yield there
    process.terminate()
    process.wait()


# ------------------------------------------------------------------------- every endpoint, as a browser calls it


def walk(studio: Studio, name: str, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> int:
    """Call every handler of the page as `name`, with what is Ada's wherever an id fits: her waiting run, and of data
    her set, her file and her draft. Rights are looked at before anything else, so the state of the run does not matter.
    Returns the number of calls. `only`, `without`: buttons, by their elem_id, whose handlers alone are called, or are
    not."""
    client, calls = studio.client(name), 0
    config = client.get("/config").json()
    components = {component["id"]: component for component in config["components"]}
    [of_data] = {event["inputs"][0] for event in config["dependencies"] if "athanorSet(id)" in str(event["js"])}
    run = studio.runs["waits"].id
    named = {id: component["props"].get("elem_id") for id, component in components.items()}
    for event in config["dependencies"]:
        buttons = {named.get(id) for id, _ in event["targets"]}
        if not event["backend_fn"] or buttons & set(without) or (only and not buttons & set(only)):
            continue
        for data_id in ("set:hers", "file:loose.json", studio.draft) if of_data in event["inputs"] else ("set:hers",):
            data = [data_id if id == of_data else value_of(components[id], run) for id in event["inputs"]]
            call(client, event, data, {"run": run, "retry": run, "set": data_id, "act": "remove"})
            calls += 1
    return calls


def value_of(component: dict[str, Any], run: str) -> Any:
    """What the page would send: the id of the run for a hidden value, otherwise what the control shows, and some text
    for an empty box."""
    if component["type"] != "textbox":
        return component["props"].get("value")
    hidden = "unseen" in (component["props"].get("elem_classes") or ())
    return run if hidden else component["props"].get("value") or "x"


def call(client: httpx.Client, event: dict[str, Any], data: list[Any], about: dict[str, str]) -> None:
    body = {"data": data, "fn_index": event["id"], "session_hash": "walk", "event_data": about, "trigger_id": None}
    if event["queue"] is False:
        client.post("/gradio_api/run/predict", json=body)
        return
    client.post("/gradio_api/queue/join", json=body)
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "walk"}) as answer:
        for line in answer.iter_lines():
            if '"close_stream"' in line or '"process_completed"' in line:
                return


def attempted(studio: Studio, name: str) -> dict[str, set[str]]:
    """The outcomes that the audit has of this person's actions, by action."""
    outcomes: dict[str, set[str]] = {}
    for entry in audit.read(studio.place.saves, 100_000):
        if entry.user == name and entry.action in RIGHTS:
            outcomes.setdefault(entry.action, set()).add(entry.outcome)
    return outcomes


OF_RUNS = {"stop", "kill", "resume", "delete", "reorder", "mute"}
OF_DATA = {"remove-data", "describe", "review-draft"}
OF_USERS = {"start", "derive", "fetch", "check-data", "make-draft"}


def test_a_viewer_changes_nothing_at_any_endpoint(studio: Studio) -> None:
    before = studio.contents()
    assert walk(studio, "eve") > 120
    assert studio.contents() == before
    outcomes = attempted(studio, "eve")
    assert outcomes.keys() >= OF_RUNS | OF_DATA | OF_USERS
    assert {outcome for each in outcomes.values() for outcome in each} == {"refused: rights-viewer"}


def test_another_user_changes_nothing_of_hers_at_any_endpoint(studio: Studio) -> None:
    before, data = studio.contents(), studio.place.data
    walk(studio, "bob", without=("system-check", "hub-fetch"))  # which he may do, and which takes long
    after = studio.contents()
    lists = {str(data / name) for name in ("dataset_info.json", owners.OWNERS_FILE)}  # he may add sets to them
    assert {path: after.get(path) for path in before if path not in lists} == {
        path: content for path, content in before.items() if path not in lists
    }
    assert read_object(data / "dataset_info.json")["hers"] == {"file_name": "hers.json"}
    assert sorted(owners.owned_by(data, "ada")) == ["file:loose.json", "set:hers"]
    assert {"set:hers-train", "file:hers-train.jsonl"} <= set(owners.owned_by(data, "bob"))
    outcomes = attempted(studio, "bob")
    assert {outcome for action in OF_RUNS | OF_DATA for outcome in outcomes[action]} == {"refused: rights-owner"}


# ------------------------------------------------------------------------------------------ single attacks


def test_an_endpoint_for_programs_asks_for_rights_too(studio: Studio) -> None:
    run = studio.runs["waits"]
    for name, status in {"eve": "viewer", "bob": "belongs to ada"}.items():
        client = studio.client(name)
        event = client.post("/gradio_api/call/stop", json={"data": [run.id, "kill"]}).json()["event_id"]
        assert "error" in client.get(f"/gradio_api/call/stop/{event}").text, status
    assert runs.get(studio.place.saves, run.id).state == "queued"


def test_a_viewer_cannot_even_upload_a_file(studio: Studio) -> None:
    uploads = studio.place.saves / ".tmp"
    before = sorted(uploads.rglob("*"))
    refused = studio.client("eve").post("/gradio_api/upload", files={"files": ("x.json", b"[]")})
    assert (refused.status_code, "signed in as a viewer" in refused.text) == (403, True)
    assert sorted(uploads.rglob("*")) == before
    assert studio.client("bob").post("/gradio_api/upload", files={"files": ("x.json", b"[]")}).status_code == 200


@pytest.mark.parametrize("name", ["eve", "bob"])
def test_what_is_not_for_the_page_cannot_be_downloaded(studio: Studio, name: str) -> None:
    client, saves = studio.client(name), studio.place.saves
    audit.record(saves, audit.shell("root"), "stop", "x", "done")
    run = studio.runs["past"].id
    for path in (
        f"/gradio_api/file={saves / audit.AUDIT_FILE}",
        f"/gradio_api/file={saves.parent / 'users'}",
        f"/gradio_api/file={saves.parent / 'users.secret'}",
        f"/gradio_api/file={studio.place.data / owners.OWNERS_FILE}",
        f"/download/{run}/../../../{audit.AUDIT_FILE}",
        f"/download/{run}/..%2F..%2F..%2F{audit.AUDIT_FILE}",
        "/data/..%2F..%2Fusers/bad-rows.jsonl",
    ):
        assert client.get(path).status_code in (403, 404), path


def test_a_header_and_a_state_of_ones_own_make_nobody_an_operator(studio: Studio) -> None:
    forged = {"X-Forwarded-User": "root", "Remote-User": "root", "X-User": "root", "X-Role": "operator"}
    with httpx.Client(base_url=studio.address, trust_env=False, timeout=60, headers=forged) as stranger:
        assert stranger.get("/config").status_code == 401
    answer = studio.client("eve").post("/gradio_api/upload", files={"files": ("x", b"")}, headers=forged)
    assert answer.status_code == 403


def test_names_are_shown_and_not_run(studio: Studio) -> None:
    evil = "<img src=x onerror=alert(1)>"
    entries = read_object(studio.place.data / "dataset_info.json") | {evil: {"file_name": "hers.json"}}
    write_json(studio.place.data / "dataset_info.json", entries)
    owners.claim(studio.place.data, [f"set:{evil}"], "ada")
    client = studio.client("bob")
    config = client.get("/config").json()
    [event] = [event for event in config["dependencies"] if "athanorSet(id)" in str(event["js"])]
    answer = client.post(
        "/gradio_api/run/predict", json={"data": [f"set:{evil}"], "fn_index": event["id"], "session_hash": "x"}
    ).text
    assert "&lt;img src=x" in answer
    assert "<img src=x" not in answer.replace('"set:<img src=x onerror=alert(1)>"', "").replace(f'"{evil}"', "")
    assert "belongs to ada" in answer


def test_an_operator_may_do_what_was_refused(studio: Studio) -> None:
    """What the other tests rely on: that the same calls do change something, if they are allowed."""
    run = studio.runs["waits"]
    client = studio.client("root")
    event = client.post("/gradio_api/call/stop", json={"data": [run.id, "kill"]}).json()["event_id"]
    assert "complete" in client.get(f"/gradio_api/call/stop/{event}").text
    assert walk(studio, "root", only=("yes-delete", "yes-remove")) == 4
    outcomes = attempted(studio, "root")
    assert {action for action, results in outcomes.items() if "done" in results} >= {"kill", "delete", "remove-data"}
    assert not run.path.exists()
    assert not any(outcome.startswith("refused: rights") for results in outcomes.values() for outcome in results)
