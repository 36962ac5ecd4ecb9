"""The page of users and quotas, asked as a browser asks it, and as somebody who should not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from engine.core import audit, kept_forms, tokens, users
from engine.core.rights import Person
from engine.core.rundir import write_json
from engine.data import owners
from engine.launch.workspace import Workplace
from engine.runs import accounts
from engine.runs.quotas import QUOTAS_FILE, Limits, read_quotas
from tests.past_runs import run_maker
from webui import people
from webui.people_pages import PeoplePages
from webui.system_tab.people_panel import PeoplePanel
from webui.words import Words

PASSWORD = "correct horse"


class Place:
    """A studio's folders, with three users of whom ada has a run and a data set, and the page as it answers them."""

    def __init__(self, folder: Path):
        self.file, self.work = folder / "users.txt", Workplace((), folder / "data", folder / "saves")
        for path in (self.work.data, self.work.saves):
            path.mkdir()
        for name, role in {"root": "operator", "ada": "user", "eve": "viewer"}.items():
            users.add_user(self.file, name, PASSWORD if name != "eve" else None, role)
        run = run_maker(self.work.saves)("hers")
        write_json(run.dir.request, {"by": "ada", "submitted": 1e9, "attempt": 1})
        (run.path / "weights").write_bytes(bytes(2_000_000))
        (self.work.data / "hers.json").write_text("[]")
        owners.claim(self.work.data, ["file:hers.json"], "ada")
        self.inner = Starlette(routes=PeoplePages(self.work, self.file, "/studio").routes())

    def visit(self, name: str, **fields: str) -> tuple[int, str]:
        role = users.read_users(self.file)[name].role

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self.inner({**scope, "state": {"user": name, "role": role}}, receive, send)

        client = TestClient(app, headers={"accept-language": "en"})
        answer = client.post("/people", data=fields) if fields else client.get("/people")
        return answer.status_code, answer.text


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(users, "SCRYPT_COST", (16, 8, 1))
    return Place(tmp_path)


def test_an_operator_adds_changes_and_removes_users_and_quotas(place: Place) -> None:
    status, text = place.visit("root")
    assert status == 200
    assert "Disk (GB) 0.002" in text  # ada's
    assert 'action="/studio/people"' in text
    assert place.visit("root", do="add", user="bob", password=PASSWORD, role="user")[0] == 200
    assert users.check_password(place.file, "bob", PASSWORD)
    tokens.add_token(place.file, "bob", "laptop")
    assert "still work: laptop" in place.visit("root", do="password", user="bob", password="another horse")[1]
    assert users.check_password(place.file, "bob", "another horse")
    assert "still work" not in place.visit("root", do="password", user="bob", password=PASSWORD, revoke="1")[1]
    assert place.visit("root", do="role", user="bob", role="viewer")[0] == 200
    assert users.read_users(place.file)["bob"].role == "viewer"
    assert place.visit("root", do="limits", user="", gpu_hours="200", runs_at_once="2")[0] == 200
    limits = {"user": "bob", "do": "limits", "gpu_hours": "No Limit", "runs_at_once": "", "disk_gb": "0.5"}
    status, text = place.visit("root", **limits)
    assert (status, read_quotas(place.work.saves).of("bob")) == (200, Limits(2, None, 0.5))
    assert re.search(r'name="gpu_hours" value="no limit" placeholder="200"', text)
    assert read_quotas(place.work.saves).of("ada") == Limits(2, 200, None)
    assert place.visit("root", do="remove", user="bob")[0] == 200
    assert list(users.read_users(place.file)) == ["root", "ada", "eve"]
    entries = audit.read(place.work.saves, 100)
    assert [(entry.action, entry.what) for entry in entries[::-1]][:3] == [
        ("user-add", "bob user"), ("user-password", "bob"), ("user-password", "bob"),
    ]  # fmt: skip
    assert {entry.action for entry in entries} == {
        "user-add", "user-password", "user-role", "user-quota", "user-remove"
    }  # fmt: skip
    assert "horse" not in str(entries)


def test_who_comes_after_a_removed_user_does_not_get_what_was_theirs(place: Place) -> None:
    """The attack: an operator gives the name again, in good faith, on the page and in a shell."""
    assert place.visit("root", do="remove", user="ada")[0] == 200
    new = {"do": "add", "user": "ada", "password": PASSWORD, "role": "user"}
    status, text = place.visit("root", **new)
    assert (status, "was removed on 20" in text, 'name="take-over"' in text) == (422, True, True)
    assert "ada" not in users.read_users(place.file)
    assert place.visit("root", **new, **{"take-over": "1"})[0] == 200
    assert "ada" in users.read_users(place.file)
    assert 'name="take-over"' not in place.visit("root")[1]


@pytest.mark.parametrize("name", ["ada", "eve"])
def test_nobody_else_sees_or_changes_anything_there(place: Place, name: str) -> None:
    before = place.file.read_text()
    for fields in (
        {},
        {"do": "role", "user": name, "role": "operator"},
        {"do": "limits", "user": name, "disk_gb": "9"},
    ):
        status, text = place.visit(name, **fields)
        assert (status, "root" in text) == (403, False)
    assert place.file.read_text() == before
    assert not (place.work.saves / QUOTAS_FILE).exists()


def test_bad_values_are_sentences_and_change_nothing(place: Place) -> None:
    before = place.file.read_text()
    for fields in (
        {"do": "add"}, {"do": "add", "user": "<script>", "password": PASSWORD}, {"do": "add", "user": "x" * 65},
        {"do": "add", "user": "bob", "password": "short"}, {"do": "add", "user": "bob", "role": "god"},
        {"do": "add", "user": "ada", "password": PASSWORD}, {"do": "nothing", "user": "../x"},
        {"do": "typo", "user": "bob"}, {"user": "bob", "password": PASSWORD}, {"do": "<script>", "user": "bob"},
        {"do": "role", "user": "root", "role": "user"}, {"do": "role", "user": "bob", "role": "user"},
        {"do": "role", "user": "ada", "role": "operator:x"}, {"do": "password", "user": "ada"},
        {"do": "password", "user": "nobody", "password": PASSWORD}, {"do": "remove", "user": "root"},
        {"do": "remove", "user": "<b>"}, {"do": "limits", "user": "ada", "gpu_hours": "-1"},
        {"do": "limits", "user": "ada", "gpu_hours": "nan"}, {"do": "limits", "user": "ada", "disk_gb": "<script>"},
        {"do": "limits", "user": "ada", "runs_at_once": "1e999"}, {"do": "limits", "user": "a: [", "disk_gb": "1"},
    ):  # fmt: skip
        status, text = place.visit("root", **fields)
        assert (status, 'class="error"' in text) == (422, True), fields
        assert "<script>" not in text
    assert place.file.read_text() == before
    assert not (place.work.saves / QUOTAS_FILE).exists()
    (place.work.saves / QUOTAS_FILE).write_text("default: [")
    status, text = place.visit("root")
    assert (status, "cannot be read" in text) == (422, True)


def test_on_the_system_tab_everybody_sees_their_own_use_and_operators_all(place: Place) -> None:
    (place.work.saves / QUOTAS_FILE).write_text("default: {disk_gb: 3}\nusers: {shell: {gpu_hours: 1}}")
    panel = PeoplePanel(Words("zh"), place.work, place.file, "/studio")
    panel.lines = "lines"  # type: ignore[assignment]  # a key of what is returned

    def shown(name: str, role: str) -> str:
        people._asking.set(Person(name, role))
        return str(panel.show()["lines"])

    text = shown("ada", "user")
    assert ("ada" in text, "root" in text, "0.002 / 3" in text, "/studio/people" in text) == (True, False, True, False)
    text = shown("root", "operator")
    assert [name in text for name in ("ada", "root", "eve", "shell", "/studio/people")] == [True] * 5
    assert text.index("eve") < text.index("shell")
    (place.work.saves / QUOTAS_FILE).write_text("default: [")
    assert "无法读取配额文件" in shown("eve", "viewer")
    people._asking.set(people.OUTSIDE_OF_REQUESTS)


def test_removing_somebody_takes_along_what_is_only_theirs(place: Place) -> None:
    tokens.add_token(place.file, "ada", "laptop")
    accounts.remove(place.work, place.file, "ada")
    assert tokens.read_tokens(place.file) == []
    assert [account.name for account in accounts.accounts(place.work, place.file)] == ["root", "eve", "ada"]


def test_what_the_system_refuses_is_a_sentence_and_a_removal_can_be_tried_again(place: Place) -> None:
    tokens.add_token(place.file, "ada", "laptop")
    obstacle = place.work.saves / kept_forms.FOLDER / "ada.json"
    obstacle.mkdir(parents=True)  # no file can be removed there, nor by root
    status, text = place.visit("root", do="remove", user="ada")
    assert (status, f"The system denied access to {obstacle}" in text) == (507, True)
    assert "ada" in users.read_users(place.file)
    assert audit.read(place.work.saves, 1)[0].outcome == "failed"
    obstacle.rmdir()
    assert place.visit("root", do="remove", user="ada")[0] == 200
    assert (list(users.read_users(place.file)), tokens.read_tokens(place.file)) == (["root", "eve"], [])
