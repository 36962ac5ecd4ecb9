"""Who may do what: the table itself, and the lines of the users file that name roles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.core import users
from engine.core.problems import Refusal
from engine.core.rights import RIGHTS, Person, may
from engine.data import owners

ROOT, ADA, EVE = Person("root", "operator"), Person("ada", "user"), Person("eve", "viewer")
OWNED = [action for action, right in RIGHTS.items() if right == "owner"]


@pytest.mark.parametrize("action", RIGHTS)
def test_operators_may_do_everything_and_viewers_nothing_of_the_table(action: str) -> None:
    for owner in ("ada", "eve", "", None):
        assert may(ROOT, action, owner) is None
        refused = may(EVE, action, owner)
        assert refused
        assert refused.code in ("rights-viewer", "rights-operator")
        assert may(Person("eve", "king"), action, owner)  # an unknown role is none


@pytest.mark.parametrize("action", OWNED)
def test_a_user_changes_only_what_is_their_own(action: str) -> None:
    assert may(ADA, action, "ada") is None
    for owner, code in {
        "bob": "rights-owner",
        "": "rights-no-owner",
        "Ada": "rights-owner",
        "ada ": "rights-owner",
    }.items():
        refused = may(ADA, action, owner)
        assert refused
        assert refused.code == code
    assert may(Person("", "user"), action, "")  # nobody's things do not belong to someone without a name
    assert may(ADA, action)  # a handler that forgets the owner


def test_a_user_may_start_and_ask_but_not_read_the_audit() -> None:
    assert [action for action, right in RIGHTS.items() if right == "user" and may(ADA, action)] == []
    assert may(ADA, "read-audit")
    with pytest.raises(KeyError):
        may(ADA, "start-a-war")


def test_a_line_from_a_version_without_roles_is_an_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "SCRYPT_COST", (16, 8, 1))
    file = tmp_path / "users"
    for name in ("root", "ada", "eve"):
        users.add_user(file, name, "correct horse")
    assert [user.role for user in users.read_users(file).values()] == ["operator", "user", "user"]
    assert users.remark_without_role(file) is None
    without_ids = re.sub(":[0-9a-f]{16}$", "", file.read_text(), flags=re.MULTILINE)
    old = "# ours\n" + without_ids.replace(":operator", "").replace("ada", "bob").replace(":user\n", "\n", 1)
    file.write_text(old)
    known = users.read_users(file)
    assert {name: user.role for name, user in known.items()} == {"root": "operator", "bob": "operator", "eve": "user"}
    remark = users.remark_without_role(file)
    assert remark
    assert "root, bob" in remark.text()
    users.set_role(file, "bob", "viewer")
    users.add_user(file, "eve", "another horse", "operator")
    users.add_user(file, "root", "another horse")  # a new password leaves the role as it was
    assert [user.written_role for user in users.read_users(file).values()] == ["", "viewer", "operator"]
    assert users.check_password(file, "bob", "correct horse")
    assert file.read_text().startswith("# ours\n")


def test_a_role_that_does_not_exist_locks_out_and_cannot_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users, "SCRYPT_COST", (16, 8, 1))
    file = tmp_path / "users"
    users.add_user(file, "ada", "correct horse")
    for role in ("king", "", "OPERATOR", "viewer:operator", "viewer:0123456789abcdef", "user\nroot:scrypt"):
        with pytest.raises(Refusal):
            users.set_role(file, "ada", role)
    with pytest.raises(Refusal) as refused:
        users.add_user(file, "b b", "x", "king")
    assert [problem.code for problem in refused.value.problems] == ["user-name", "user-password", "user-role"]
    file.write_text(file.read_text().replace(":operator", ":operater"))
    assert not users.check_password(file, "ada", "correct horse")
    users.add_user(file, "bob", "correct horse")
    assert "operater" in file.read_text()  # the operator can still correct it


def test_owners_that_cannot_be_read_are_not_replaced(tmp_path: Path) -> None:
    owners.claim(tmp_path, ["set:hers"], "ada")
    file = tmp_path / owners.OWNERS_FILE
    for content in ('{"set:hers": "ada"', "[]", ""):
        file.write_text(content)
        with pytest.raises(Refusal, match="left as it is"):
            owners.claim(tmp_path, ["set:his"], "bob")
        assert file.read_text() == content
    file.unlink()
    owners.claim(tmp_path, ["set:his"], "bob")
    assert owners.owned_by(tmp_path, "bob") == ["set:his"]
