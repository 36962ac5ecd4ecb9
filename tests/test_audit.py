"""The audit: what is written of each action, by whom it can be read, and what happens when it is large or full."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine.core import audit
from engine.core.problems import Refusal, problem
from engine.core.rights import RIGHTS, Person
from engine.launch.workspace import PROJECT
from webui.system_tab import audit_panel
from webui.words import Words

ADA = Person("ada", "user", "10.0.0.7")


def test_an_action_leaves_a_line_with_its_outcome(tmp_path: Path) -> None:
    with audit.recorded(tmp_path, ADA, "stop", "m/lora/a"):
        pass
    with pytest.raises(Refusal), audit.recorded(tmp_path, ADA, "kill", "m/lora/a"):
        raise Refusal([problem("rights-operator"), problem("rights-operator"), problem("rights-viewer")])
    with pytest.raises(ZeroDivisionError), audit.recorded(tmp_path, ADA, "delete", "x" * 1000):
        _ = 1 / 0
    last, second, first = audit.read(tmp_path, 10)
    assert (first.user, first.address, first.action, first.what, first.outcome) == (
        "ada", "10.0.0.7", "stop", "m/lora/a", "done",
    )  # fmt: skip
    assert (second.outcome, last.outcome, len(last.what)) == (
        "refused: rights-operator, rights-viewer", "failed", audit.MAX_WHAT,
    )  # fmt: skip
    assert [entry.action for entry in audit.read(tmp_path, 10, "ADA refused")] == ["kill"]
    assert audit.read(tmp_path, 10, "bob") == []
    assert audit.read(tmp_path, 1) == [last]
    file = tmp_path / audit.AUDIT_FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_bytes(file.read_bytes() + b'{"at": 1, "us\n[]\n\xff\n')  # cut off by a full disk
    assert len(audit.read(tmp_path, 10)) == 3
    audit.record(tmp_path / "nowhere", ADA, "stop", "", "done")
    assert not (tmp_path / "nowhere").exists()


def test_it_is_rotated_by_size_and_the_oldest_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_BYTES", 1000)
    monkeypatch.setattr(audit, "MAX_FILES", 3)
    for number in range(60):
        audit.record(tmp_path, ADA, "stop", f"run {number}", "done")
    files = sorted(file for file in tmp_path.iterdir() if not file.name.endswith(".lock"))
    assert [file.name for file in files] == [".audit.jsonl", ".audit.jsonl.1", ".audit.jsonl.2"]
    assert all(file.stat().st_size < 1200 and stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    numbers = [int(entry.what.removeprefix("run ")) for entry in audit.read(tmp_path, 100)]
    assert numbers == list(range(59, 59 - len(numbers), -1))
    assert len(numbers) > 20


def test_what_cannot_be_written_is_printed_and_does_not_stop_the_action(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / audit.AUDIT_FILE).mkdir()
    with audit.recorded(tmp_path, ADA, "free-space", "m/lora/a"):
        pass
    assert '"action": "free-space"' in capsys.readouterr().err


def test_questions_cannot_wash_out_other_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr("engine.core.audit.time.time", lambda: now)
    for what in ("m/a", "m/b", "m/a") * 20:
        audit.record(tmp_path, ADA, "ask", what, "done")
    audit.record(tmp_path, Person("eve", "viewer"), "ask", "m/a", "refused: rights-viewer")
    now += 3600
    audit.record(tmp_path, ADA, "ask", "m/a", "done")
    assert [(entry.user, entry.what) for entry in audit.read(tmp_path, 99)] == [
        ("ada", "m/a"), ("eve", "m/a"), ("ada", "m/b"), ("ada", "m/a"),
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create files for others")
def test_files_that_root_has_made_belong_to_the_owner_of_the_folder(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12346)
    audit.record(tmp_path, ADA, "stop", "x", "done")
    owners = {file.name: (file.stat().st_uid, file.stat().st_gid) for file in tmp_path.iterdir()}
    assert owners == dict.fromkeys([audit.AUDIT_FILE, f"{audit.AUDIT_FILE}.lock"], (12345, 12346))


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("")
    (tmp_path / audit.AUDIT_FILE).symlink_to(tmp_path / "target")
    audit.record(tmp_path, ADA, "stop", "x", "done")
    assert (tmp_path / "target").read_text() == ""


def test_the_page_shows_it_to_operators_without_running_what_is_in_it(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    audit.record(tmp_path, Person(evil, "user", evil), "stop", evil, "done")
    audit.record(tmp_path, ADA, evil, evil, f"refused: {evil}")
    for language in ("en", "zh"):
        html = audit_panel.lines_html(audit.read(tmp_path, 10), Words(language))
        assert "<script" not in html
        assert html.count("&lt;script&gt;") == 6
    for action in (*RIGHTS, *audit_panel.ACTIONS):
        assert Words("en")(f"action-{action}") != Words("zh")(f"action-{action}")


def test_the_shell_records_and_prints_it(tmp_path: Path) -> None:
    saves, file = tmp_path / "saves", tmp_path / "users"
    saves.mkdir()

    def shell(*words: str, text: str = "") -> str:
        command = [sys.executable, "-m", "engine", *words, "--saves", str(saves)]
        done = subprocess.run(
            command,
            cwd=PROJECT,
            input=text,
            capture_output=True,
            text=True,
            check=False,
            env={"USER": "root", "LANG": "C"},
        )
        return done.stdout + done.stderr

    shell("user", "add", "ada", "--auth", str(file), text="correct horse\n")
    shell("user", "role", "ada", "king", "--auth", str(file))
    lines = [line.split("\t")[1:] for line in shell("audit", "user").splitlines()]
    assert lines == [
        ["root", "shell", "user-add", "ada", "done"],
        ["root", "shell", "user-role", "ada king", "refused: user-role"],
    ]
    assert "horse" not in (saves / audit.AUDIT_FILE).read_text()
    assert [json.loads(line)["user"] for line in (saves / audit.AUDIT_FILE).read_text().splitlines()] == ["root"] * 2
