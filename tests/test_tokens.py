"""Tokens of programs: made once, stored as hashes, ended with their user; and the table of base models."""

from __future__ import annotations

import getpass
import io
import itertools
import json
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from engine.__main__ import main
from engine.api.base_models import base_models
from engine.api.callers import Gate
from engine.api.errors import ApiError
from engine.core import audit, tokens, users
from engine.core.attempts import FREE_TRIES
from engine.core.problems import Refusal
from engine.launch.workspace import PROJECT, Workplace
from tests.conftest import engine, flags_of
from webui import token_pages
from webui.login import LoginRequired

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A users file with an operator and a user."""
    monkeypatch.setattr(users, "SCRYPT_COST", (16, 8, 1))
    for name, role in {"root": "operator", "ada": "user"}.items():
        users.add_user(tmp_path / "users.txt", name, "correct horse", role)
    return tmp_path / "users.txt"


def test_a_token_is_shown_once_and_only_its_hash_is_kept(file: Path) -> None:
    text = tokens.add_token(file, "ada", "laptop", ["read", "chat"])
    stored = tokens.tokens_file(file)
    secret = text[-43:]  # the rest is its ID; the secret may contain a hyphen itself
    assert secret not in stored.read_text()
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    token = tokens.find_token(file, text)
    assert (token.user, token.name, token.scopes, token.used) == ("ada", "laptop", ("chat", "read"), None)
    tokens.note_use(file, token)
    used = tokens.find_token(file, text).used
    assert time.time() - used < 60
    tokens.note_use(file, tokens.find_token(file, text))
    assert tokens.find_token(file, text).used == used  # not again within a minute
    for wrong in ("", text[:-1], text + "x", text.replace("athanor", "other"), text.upper(), "sk-" + "x" * 10**6):
        assert tokens.find_token(file, wrong) is None


def test_a_token_ends_when_it_is_revoked_or_its_user_removed(file: Path) -> None:
    first, second = (tokens.add_token(file, "ada", name) for name in ("a", "b"))
    tokens.revoke_token(file, "ada", "a")
    assert tokens.find_token(file, first) is None
    with pytest.raises(Refusal, match="Existing tokens: b"):
        tokens.revoke_token(file, "ada", "a")
    with pytest.raises(Refusal, match="no token"):
        tokens.revoke_token(file, "root", "b")  # another user's
    users.remove_user(file, "ada")
    assert tokens.find_token(file, second) is None
    users.add_user(file, "ada", "correct horse", take_over=True)
    assert tokens.find_token(file, second) is None
    third = tokens.add_token(file, "ada", "b")
    users.set_password(file, "ada", "another horse")
    users.set_role(file, "ada", "viewer")
    assert tokens.find_token(file, third).user == "ada"


def test_tokens_and_users_from_before_there_were_ids_still_work(file: Path) -> None:
    text, stored = tokens.add_token(file, "ada", "old"), tokens.tokens_file(file)
    file.write_text(re.sub(":[0-9a-f]{16}$", "", file.read_text(), flags=re.MULTILINE))
    assert users.read_users(file)["ada"] == users.User(users.read_users(file)["ada"].hash, "user", "")
    stored.write_text(json.dumps([{k: v for k, v in json.loads(stored.read_text())[0].items() if k != "user_id"}]))
    assert tokens.find_token(file, text).name == "old"
    users.add_user(file, "ada", "another horse")
    assert tokens.find_token(file, text).name == "old"
    users.remove_user(file, "ada")
    users.add_user(file, "ada", "another horse", take_over=True)
    assert tokens.find_token(file, text) is None


def test_a_file_that_cannot_be_read_is_left_as_it_is(file: Path) -> None:
    tokens.add_token(file, "ada", "laptop")
    stored = tokens.tokens_file(file)
    for content in ('[{"id": 1', "{}", ""):
        stored.write_text(content)
        for act in (lambda: tokens.add_token(file, "ada", "b"), lambda: tokens.revoke_tokens(file, "ada")):
            with pytest.raises(Refusal, match="left as it is"):
                act()
        assert stored.read_text() == content
    later = {"id": "0" * 12, "user": "ada", "what a later version knows": 1}
    stored.write_text(json.dumps([later]))
    tokens.add_token(file, "ada", "b")
    assert json.loads(stored.read_text())[0] == later
    assert [token.name for token in tokens.read_tokens(file)] == ["b"]


def test_an_operator_who_sets_a_password_is_told_of_the_tokens(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = ["--auth", str(file), "--saves", str(file.parent)]

    def user(*words: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("another horse\n"))
        monkeypatch.setattr(sys, "argv", ["engine", "user", *words, *saves])
        assert main() == 0
        return capsys.readouterr().err

    text = tokens.add_token(file, "ada", "laptop")
    assert "1 token of ada still works: laptop" in user("add", "ada")
    assert tokens.find_token(file, text)
    assert user("add", "ada", "--revoke-tokens") == ""
    assert not tokens.find_token(file, text)
    tokens.add_token(file, "ada", "laptop")
    user("remove", "ada")
    assert json.loads(tokens.tokens_file(file).read_text()) == []


def test_names_and_scopes_that_are_none_are_refused(file: Path) -> None:
    tokens.add_token(file, "ada", "laptop")
    for user, name, scopes in (
        ("ada", "", ["read"]),
        ("ada", "laptop", ["read"]),
        ("ada", "x" * 65, ["read"]),
        ("ada", "a\nb", ["read"]),
        ("ada", "b", []),
        ("ada", "b", ["everything"]),
        ("eve", "b", ["read"]),
    ):
        with pytest.raises(Refusal):
            tokens.add_token(file, user, name, scopes)
    tokens.tokens_file(file).write_text(json.dumps([{"id": 1}, "x", {"user": "ada"}]))
    assert tokens.read_tokens(file) == []


def test_a_role_counts_from_the_next_request_on_and_a_guess_is_slowed_down(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, text = Gate(file), tokens.add_token(file, "ada", "laptop")
    assert gate.caller(f"Bearer {text}", "10.0.0.1").person.role == "user"
    users.set_role(file, "ada", "viewer")
    assert gate.caller(f"bearer  {text}", "10.0.0.1").person.role == "viewer"
    monkeypatch.setattr("engine.api.callers.time", SimpleNamespace(monotonic=lambda: 1000.0))  # however slow it is
    statuses = []
    for _ in range(7):
        with pytest.raises(ApiError) as refused:
            gate.caller("Basic eDp5", "10.0.0.1")
        statuses.append(refused.value.status)
    assert statuses == [401] * 5 + [429] * 2
    assert gate.caller(f"Bearer {text}", "10.0.0.1").name == "ada"
    assert Gate(None).caller("", "").sees("anybody")


def test_a_table_of_models_is_read_with_its_settings_or_refused(tiny: Path, tmp_path: Path) -> None:
    place, table = Workplace(models=(tiny.parent,)), tmp_path / "table.yaml"
    assert tiny.name in base_models(place, None)
    table.write_text("gpt: tiny\nother: {model: tiny, preset: qlora_7b, settings: {training: {learning_rate: 0.5}}}\n")
    models = base_models(place, table)
    spec = models["other"].spec(place, "dpo")
    assert (spec.stage.kind, spec.model.quantization.kind, spec.training.learning_rate) == ("dpo", "4bit", 0.5)
    assert (spec.training.gradient_accumulation_steps, spec.logging.logging_steps) == (16, 1)
    for text, why in {
        "[gpt]": "not a table",
        "gpt: 7": "not an entry",
        "'a:b': tiny": "not an entry",
        "gpt: nowhere": "does not exist",
        "gpt: {model: tiny, presets: x}": "has the key 'presets'",
        "gpt: {model: tiny, preset: x}": "preset",
        "gpt: {model: tiny, settings: {training: {lr: 1}}}": "table.yaml, gpt: .*lr",
        "gpt: [": "table.yaml: Line 1, column 7 is",
    }.items():
        table.write_text(text)
        with pytest.raises(Refusal, match=why):
            base_models(place, table)


def test_tokens_are_listed_in_the_shell_and_need_a_users_file(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tokens.add_token(file, "ada", "laptop")
    monkeypatch.setattr(sys, "argv", ["engine", "token", "list", "--auth", str(file)])
    assert main() == 0
    listed = capsys.readouterr().out
    assert "ada  laptop  fine-tune,chat,read" in listed
    assert text not in listed

    def has_no_name() -> str:
        raise KeyError

    monkeypatch.setattr(getpass, "getuser", has_no_name)
    for user in ("", "zoe"):
        monkeypatch.setenv("USER", user)
        monkeypatch.setenv("LOGNAME", user)
        monkeypatch.setattr(sys, "argv", ["engine", "token", "add", "other", "--auth", str(file)])
        assert main() == 2
        refused = capsys.readouterr().err
        assert "Name the user with --user NAME. Existing users: root, ada." in refused
        assert ("There is no user 'zoe'" in refused, "''" in refused) == (user == "zoe", False)
    monkeypatch.setattr(sys, "argv", ["engine", "api", "--auth", str(file.parent / "nobody.txt")])
    assert main() == 2
    assert "no users file" in capsys.readouterr().err


def test_everybody_makes_and_revokes_their_own_tokens_on_a_page(file: Path) -> None:
    inner = Starlette(routes=token_pages.routes(file, file.parent, ""))
    app = LoginRequired(inner, file, file.with_suffix(".secret"), file.with_suffix(".ended"))
    client = TestClient(app, headers={"Accept-Language": "en"})
    assert client.get("/tokens").status_code == 401
    client.post("/login", data={"name": "ada", "password": "correct horse"}, follow_redirects=False)
    page = client.post("/tokens", data={"name": "<b>laptop", "scope": ["chat", "read"]})
    [text] = re.findall(r"sk-athanor-[\w-]+", page.text)
    token = tokens.find_token(file, text)
    assert (token.user, token.name, token.scopes) == ("ada", "<b>laptop", ("chat", "read"))
    listed = client.get("/tokens")
    assert "&lt;b&gt;laptop" in listed.text
    assert "<b>laptop" not in listed.text
    assert text not in listed.text
    assert "Chat with models, View files and jobs" in listed.text
    users.set_role(file, "ada", "viewer")
    assert [scope in client.get("/tokens").text for scope in ('value="read"', 'value="chat"')] == [True, False]
    users.set_role(file, "ada", "user")
    other = tokens.add_token(file, "root", "other")
    wrong: list[dict[str, Any]] = [
        {"name": "", "scope": "read"},
        {"name": "x"},
        {"name": "x", "scope": "everything"},
        {"name": "<b>laptop", "scope": "read"},
        {"revoke": tokens.find_token(file, other).id},
        {"revoke": "../users"},
    ]
    for form in wrong:
        assert client.post("/tokens", data=form).status_code == 422, form
    assert client.post("/tokens", data={"name": "x" * 10**5, "scope": "read"}).status_code in (400, 422)
    assert [known.name for known in tokens.read_tokens(file)] == ["<b>laptop", "other"]
    assert client.post("/tokens", data={"revoke": token.id}).status_code == 200
    assert tokens.find_token(file, text) is None
    actions = [(entry.user, entry.action, entry.outcome) for entry in audit.read(file.parent, 20)]
    assert actions[0] == ("ada", "token-revoke", "done")
    assert {("ada", "token-add", "done"), ("ada", "token-add", "refused: token-scope")} <= set(actions)


@pytest.mark.slow
def test_the_interface_stands_alone_with_tokens_made_in_the_shell(file: Path, workplace: Workplace) -> None:
    auth = ["--auth", str(file)]
    made = engine(workplace, "token", "add", "laptop", "--user", "ada", *auth)
    server = subprocess.Popen(
        [sys.executable, "-m", "engine", "api", "--port", "0", *auth, *flags_of(workplace)],
        cwd=PROJECT,
        text=True,
        stdout=subprocess.PIPE,
    )
    try:
        address = server.stdout.readline().split()[-1]
        client = openai.OpenAI(base_url=address, api_key=made.stdout.strip(), max_retries=0)
        assert "tiny" in {model.id for model in client.models.list()}
        assert client.files.retrieve("chat").filename == "chat.json"  # a data set of the page
        tokens.revoke_token(file, "ada", "laptop")
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        # No proxy is trusted. On a busy machine, the first waits of a second or two may be over before the next guess.
        guesses = [{"Authorization": "Bearer x", "X-Forwarded-For": f"10.0.0.{number}"} for number in range(12)]
        answers = (httpx.get(f"{address}/models", headers=guess, timeout=60) for guess in guesses)
        free = list(itertools.takewhile(lambda answer: answer.status_code != 429, answers))
        assert FREE_TRIES - 1 <= len(free) < len(guesses)  # the revoked token was one, too
        actions = [(entry.address, entry.action, entry.what) for entry in audit.read(workplace.saves, 9)]
        assert ("shell", "token-add", "ada laptop") in actions
    finally:
        server.terminate()
        server.wait()
