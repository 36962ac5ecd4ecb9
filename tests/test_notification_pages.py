"""The page of one's own notifications, asked as a browser asks it, and as somebody who should not."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from engine.core import audit, users
from engine.core.rights import Person
from engine.core.rundir import read_object, write_json
from engine.notifications import subscriptions
from engine.runs import notification_choice, runs
from engine.spec.run_spec import RunSpec
from tests.inbox import Inbox, inbox
from tests.past_runs import falling, past_run
from webui.notification_pages import NotificationPages

SECRET = "sEcReT8713"


class Visitor:
    """The page as it answers somebody whom the login has let through."""

    def __init__(self, pages: NotificationPages, name: str, role: str):
        inner = Starlette(routes=pages.routes())

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await inner({**scope, "state": {"user": name, "role": role}}, receive, send)

        self.client = TestClient(app, headers={"accept-language": "en"})

    def post(self, **fields: object) -> tuple[int, str]:
        answer = self.client.post("/notifications", data=fields)
        return answer.status_code, answer.text


@pytest.fixture(scope="module")
def servers() -> Iterator[Inbox]:
    with inbox() as kept:
        yield kept


@pytest.fixture
def pages(tmp_path: Path) -> NotificationPages:
    for name, role in {"ada": "user", "eve": "viewer"}.items():
        users.add_user(tmp_path / "users.txt", name, None, role)
    (tmp_path / "saves").mkdir()
    return NotificationPages(tmp_path / "saves", tmp_path / "users.txt", "")


def test_an_address_is_added_tested_and_removed_and_never_shown_again(pages: NotificationPages, servers: Inbox) -> None:
    ada, url = Visitor(pages, "ada", "user"), f"http://127.0.0.1:{servers.web}/hook?key={SECRET}"
    assert "Add address" in ada.client.get("/notifications").text
    for own in (url, "http://localhost/hook", "http://[::1]/hook"):
        status, text = ada.post(url=own)
        assert (status, "leads to an address that is not public" in text) == (422, True), own
    (pages.saves / "notifications.yaml").write_text("internal: [127.0.0.1]")
    status, text = ada.post(url=url)
    assert (status, "Address added (Webhook)" in text) == (200, True)
    (pages.saves / "notifications.yaml").unlink()
    assert f"http://127.0.0.1:{servers.web}/…" in text
    [id] = re.findall(r'name="test" value="(\w+)"', text)
    status, text = ada.post(test=id)
    assert (status, "leads to an address that is not public (127.0.0.1)" in text) == (422, True)
    (pages.saves / "notifications.yaml").write_text("internal: [127.0.0.1]")
    status, text = ada.post(test=id)
    assert (status, "Webhook has accepted the message" in text) == (200, True)
    assert servers.posts[-1][1]["event"] == "test"
    servers.status = 410
    assert "answered with status 410" in ada.post(test=id)[1]
    servers.status = 200
    with pages._asking(Person("ada")):  # a test that has not ended
        for fields in ({"test": id}, {"url": url}, {"url": f"{url}&second"}):
            assert "being checked or tested" in ada.post(**fields)[1]
        with pages._asking(Person("bob")):
            pass
    assert "You have this address" in ada.post(url=url)[1]
    assert "has been removed" in ada.post(remove=id)[1]
    assert ada.post(remove=id)[0] == ada.post(test=id)[0] == 422
    lines = str(audit.read(pages.saves, 100))
    assert f"'notify', what='test {id}'" in lines.replace("action=", "")
    assert SECRET not in lines
    assert SECRET not in ada.client.get("/notifications").text


def test_bad_values_are_sentences_and_viewers_get_nothing(pages: NotificationPages) -> None:
    ada, eve = Visitor(pages, "ada", "user"), Visitor(pages, "eve", "viewer")
    for fields in (
        {}, {"url": ""}, {"url": "x" * 5000}, {"url": "<script>"}, {"choose": "1", "event": "all"},
        {"choose": "1", "hours": ""}, {"choose": "1", "hours": "nan"}, {"choose": "1", "hours": "-1"},
        {"choose": "1", "hours": "1e9"}, {"remove": "<b>"}, {"test": "'"},
    ):  # fmt: skip
        status, text = ada.post(**fields)
        assert (status, 'class="error"' in text) == (422, True), fields
        assert "<script>" not in text
    assert ada.post(choose="1", event=["failed", "turn"], hours="0.5")[0] == 200
    person = subscriptions.of_person(pages.place, "ada")
    assert (list(person.events), person.wait_hours) == (["failed", "turn"], 0.5)
    refused = eve.client.get("/notifications")
    assert (refused.status_code, "signed in as a viewer" in refused.text, "<form" in refused.text) == (403, True, False)
    assert 'class="back"' in refused.text
    assert eve.post(url="https://h.example/")[0] == 403
    (pages.saves / "notifications.yaml").write_text("enabled: false")
    assert "switched notifications off" in ada.client.get("/notifications").text
    assert ada.post(url="https://h.example/")[0] == 422


def test_whose_runs_one_follows_is_chosen_among_the_users(pages: NotificationPages) -> None:
    ada = Visitor(pages, "ada", "user")
    users.add_user(pages.place.users_file, "bob", None, "user")
    text = ada.client.get("/notifications").text
    assert ('value="bob"' in text, 'value="ada"' in text) == (True, False)
    status, text = ada.post(follow="1", user=["bob", "*"])
    assert (status, "runs of: bob, everybody" in text) == (200, True)
    assert re.search(r'value="bob" checked', text)
    for wrong in ("zoe", "<script>", "x" * 5000):
        status, text = ada.post(follow="1", user=wrong)
        assert (status, 'class="error"' in text, "<script>" in text) == (422, True, False)
    assert set(subscriptions.of_person(pages.place, "ada").follows) == {"bob", "*"}
    assert "your own runs only" in ada.post(follow="1")[1]
    assert Visitor(pages, "eve", "viewer").post(follow="1", user="ada")[0] == 403


def test_a_page_in_the_background_hears_of_ones_own_runs_since_it_last_asked(pages: NotificationPages) -> None:
    ada, eve = Visitor(pages, "ada", "user"), Visitor(pages, "eve", "viewer")
    begun = ada.client.get("/notifications/events").json()
    assert begun["events"] == []
    spec = RunSpec.read({"model": {"model_name_or_path": "org/base"}, "data": {"datasets": ["names"]}})
    for name, owner in {"hers": "ada", "other": "bob", "muted": "ada"}.items():
        run = past_run(pages.saves, spec.change("name", name), falling(5), "failed", at=time.time() - 60)
        write_json(run.dir.request, read_object(run.dir.request) | {"by": owner})
        if name == "muted":
            notification_choice.choose(runs.read(run.path, pages.saves), False)
    answer = ada.client.get("/notifications/events", params={"since": begun["at"]}).json()
    assert [(event["event"], event["name"]) for event in answer["events"]] == [("failed", "hers")]
    assert answer["events"][0]["title"] == "Athanor: hers has failed"
    later = {"since": answer["at"] + 60}
    assert ada.client.get("/notifications/events", params=later).json()["events"] == []
    assert eve.client.get("/notifications/events", params={"since": begun["at"]}).json()["events"] == []
    run = past_run(pages.saves, spec.change("name", "strange"), falling(5), "stopped", at=time.time() - 60)
    write_json(run.dir.request, read_object(run.dir.request) | {"by": "ada", "stop": "yes"})
    run = past_run(pages.saves, spec.change("name", "whose"), falling(5), "failed", at=time.time() - 60)
    write_json(run.dir.request, read_object(run.dir.request) | {"by": ["ada"]})
    assert ada.post(choose="1", event=["failed", "stopped"], hours="2")[0] == 200
    events = ada.client.get("/notifications/events", params={"since": begun["at"]}).json()["events"]
    assert {event["name"]: event["title"] for event in events} == {
        "hers": "Athanor: hers has failed", "strange": "strange",
    }  # fmt: skip
    assert ["could not be made" in event["text"] for event in events if event["name"] == "strange"] == [True]
    for since in ("", "x", "nan", "-1e9", "1e999"):
        assert ada.client.get("/notifications/events", params={"since": since}).status_code == 200
    assert ada.client.get("/notifications.js").headers["content-type"].startswith("text/javascript")
