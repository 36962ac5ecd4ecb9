"""The users file, and the key beside it."""

import stat

import pytest

from engine.core import users
from engine.core.problems import Refusal


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A users file with one user in it, hashed cheaply: the cost is part of each line, so nothing else differs."""
    monkeypatch.setattr(users, "SCRYPT_COST", (16, 8, 1))
    path = tmp_path / "private" / "users.txt"
    users.add_user(path, "李雷", "correct horse")
    return path


def test_a_user_gets_in_with_the_password_and_with_nothing_else(file):
    assert users.check_password(file, "李雷", "correct horse")
    assert not users.check_password(file, "李雷", "correct horse ")
    assert not users.check_password(file, "李雷", "")
    assert not users.check_password(file, "han", "correct horse")
    assert not users.check_password(file.with_name("nothing"), "李雷", "correct horse")


def test_the_file_is_private_and_holds_no_password(file):
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "correct" not in file.read_text("utf-8")
    assert [path.name for path in file.parent.iterdir()] == ["users.txt"]  # no half-written leftovers


def test_equal_passwords_have_different_hashes(file):
    users.add_user(file, "han", "correct horse")
    assert len(set(users.read_users(file).values())) == 2


def test_the_usual_cost_is_one_that_owasp_advises(tmp_path):
    users.add_user(tmp_path / "users", "han", "correct horse")
    assert users.read_users(tmp_path / "users")["han"].hash.startswith("scrypt:16384:8:5:")
    assert users.check_password(tmp_path / "users", "han", "correct horse")


def test_a_wide_letter_is_the_same_letter(file):
    users.add_user(file, "han", "ｐａｓｓｗｏｒｄ１")  # typed with a Chinese input method in full-width mode
    assert users.check_password(file, "han", "password1")


@pytest.mark.parametrize("name", ["", "a:b", "a\nroot", "-x", "a b", "x" * 65, "../x"])
def test_names_that_would_break_the_file_are_refused(file, name):
    with pytest.raises(Refusal):
        users.add_user(file, name, "correct horse")
    assert list(users.read_users(file)) == ["李雷"]


def test_a_bad_name_and_a_short_password_are_told_together(file):
    with pytest.raises(Refusal) as refusal:
        users.add_user(file, "a b", "short")
    assert [problem.code for problem in refusal.value.problems] == ["user-name", "user-password"]
    assert "short" not in refusal.value.text("en").replace("shortest", "")  # the password is not repeated


def test_a_removed_user_is_out(file):
    users.remove_user(file, "李雷")
    assert users.read_users(file) == {}
    with pytest.raises(Refusal):
        users.remove_user(file, "李雷")


def test_the_name_of_a_removed_user_is_given_to_nobody_by_mistake(file):
    """What is theirs belongs to the name: runs, data sets, quota."""
    before = users.read_users(file)["李雷"]
    users.remove_user(file, "李雷")
    assert list(users.removed_users(file)) == ["李雷"]
    assert not users.check_password(file, "李雷", "removed")
    for password in ("correct horse", None):
        with pytest.raises(Refusal, match="was removed on 20"):
            users.add_user(file, "李雷", password)
    with pytest.raises(Refusal, match="no user"):
        users.set_password(file, "李雷", "correct horse")
    with pytest.raises(Refusal, match="no user"):
        users.set_role(file, "李雷", "operator")
    assert users.read_users(file) == {}
    users.add_user(file, "李雷", "correct horse", take_over=True)
    assert users.read_users(file)["李雷"].id not in ("", before.id)
    assert users.removed_users(file) == {}


def test_the_last_operator_stays_where_that_is_asked_for(file):
    users.add_user(file, "han", "correct horse")
    for act in (users.remove_user, lambda *who, **how: users.set_role(*who, "user", **how)):
        with pytest.raises(Refusal, match="only operator"):
            act(file, "李雷", keep_operator=True)
    users.set_role(file, "han", "operator")
    users.remove_user(file, "李雷", keep_operator=True)
    assert list(users.read_users(file)) == ["han"]


def test_a_line_that_somebody_broke_locks_out_only_that_user(file):
    text = file.read_text("utf-8")
    file.write_text(f"# our team\nhan:scrypt:nonsense\n\n{text}", "utf-8")
    assert users.check_password(file, "李雷", "correct horse")
    assert not users.check_password(file, "han", "nonsense")


def test_the_secret_is_made_once_and_kept_private(tmp_path):
    path = tmp_path / "private" / "secret"
    key = users.signing_key(path)
    assert len(key) >= 32
    assert users.signing_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["secret"]


def test_an_empty_secret_is_refused_rather_than_used(tmp_path):
    (tmp_path / "secret").write_text("")
    with pytest.raises(Refusal):
        users.signing_key(tmp_path / "secret")
