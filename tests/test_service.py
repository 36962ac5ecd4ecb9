"""The studio as a service: its folders and who may read them, and another version of it while a run goes on."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

import app
from engine.core import permissions, regular_files, users
from engine.core.locks import try_lock, wait_for_lock
from engine.core.problems import Refusal
from engine.core.rundir import write_text
from engine.launch.workspace import PROJECT, Workplace, from_arguments, make_data
from engine.runs import progress, runs
from engine.spec.run_spec import RunSpec
from tests.conftest import flags_of, wait_until
from tests.old_saves import CUT_OFF, TRAINED, extract

UPLOAD_BEGUN = (
    b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nCookie: %s\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n\r\n--x\r\n"
)


def others_may(path: Path) -> int:
    """The rights of whoever is neither the owner nor in the group."""
    return path.stat().st_mode & 0o007


@pytest.mark.parametrize(("before", "after"), [(0o022, 0o027), (0o002, 0o007), (0o077, 0o077)])
def test_others_lose_their_rights_and_the_group_keeps_its_own(before: int, after: int) -> None:
    inherited = os.umask(before)
    try:
        permissions.keep_from_other_users()
        assert os.umask(0) == after
    finally:
        os.umask(inherited)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_of_ours_has_the_mode_of_any_other(tmp_path: Path, umask: int, mode: int) -> None:
    inherited = os.umask(umask)
    try:
        write_text(tmp_path / "a", "b")
        (tmp_path / "other").touch()
        os.close(regular_files.open_descriptor(tmp_path / "log", os.O_WRONLY | os.O_CREAT))
        for descriptor in (try_lock(tmp_path / "lock", 0, shared=False), wait_for_lock(tmp_path / "queue")):
            assert descriptor is not None
            os.close(descriptor)
    finally:
        os.umask(inherited)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {mode}


def test_a_data_folder_that_is_not_there_is_made_with_the_samples_and_told(tmp_path: Path) -> None:
    place = Workplace(data=tmp_path / "srv" / "dta", saves=tmp_path)
    made = make_data(place)
    for language in ("en", "zh"):
        assert str(place.data) in made.text(language)
        assert "--data" in made.text(language)
    sets = json.loads((place.data / "dataset_info.json").read_text(encoding="utf-8"))
    assert all((place.data / entry["file_name"]).is_file() for entry in sets.values())
    assert make_data(place) is None


def test_a_data_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal) as refused:
        make_data(Workplace(data=tmp_path / "file" / "data"))
    assert str(tmp_path / "file" / "data") in str(refused.value)


def test_an_error_that_comes_again_and_again_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def fail() -> None:
        calls.append(f"No space left: .partial-{len(calls)}")
        if len(calls) == 20:
            threading.Event().wait()  # for ever
        if len(calls) != 4:
            raise OSError(calls[-1])

    app.repeat(fail, 0.01)
    wait_until(lambda: len(calls) == 20)
    assert capfd.readouterr().err.count("Traceback") == 2  # again, once it had been well in between


def test_the_unit_starts_the_studio_and_leaves_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(PROJECT / "docs" / "athanor.service", encoding="utf-8")
    service = unit["Service"]
    python, script, *flags = service["ExecStart"].split()
    assert (python, script) == (f"{service['WorkingDirectory']}/.venv/bin/python", "app.py")
    for name, value in (word.split("=") for word in service["Environment"].split()):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    options = app.arguments()
    place = from_arguments(options)
    assert {place.saves.parent, place.data.parent} == {Path("/var/lib", service["StateDirectory"])}
    assert Path("/srv/models") in place.models
    assert options.auth == Path("/etc/athanor/users.txt")
    assert service["KillMode"] == "process"
    assert int(service["UMask"], 8) & 0o007 == int(service["StateDirectoryMode"], 8) & 0o007 ^ 0o007 == 0o007


@dataclass
class Studio:
    """A studio of some checkout, and somebody who is logged in."""

    process: subprocess.Popen[str]
    browser: httpx.Client

    def call(self, name: str, *values: str) -> object:
        """What an endpoint answers."""
        event = self.browser.post(f"/gradio_api/call/{name}", json={"data": values}).json()["event_id"]
        answer = self.browser.get(f"/gradio_api/call/{name}/{event}").text
        assert answer.startswith("event: complete"), answer
        return json.loads(answer.split("data: ", 1)[1])[0]

    def stop(self) -> None:
        """As systemd does, while somebody's upload is under way, which nobody ends: it waits for that a short time."""
        address = urlsplit(str(self.browser.base_url))
        cookie = "; ".join(f"{name}={value}" for name, value in self.browser.cookies.items())
        with socket.create_connection((address.hostname, address.port)) as upload:
            upload.sendall(UPLOAD_BEGUN % cookie.encode())
            time.sleep(0.5)
            self.process.terminate()
            self.process.wait(app.SHUTDOWN_SECONDS + 60)


@contextmanager
def studio_of(checkout: Path, workplace: Workplace) -> Iterator[Studio]:
    """With a login, under the umask that most machines have."""
    users_file = workplace.saves.with_name("users.txt")
    users.add_user(users_file, "ada", "correct horse")
    words = [sys.executable, "app.py", "--port", "0", "--auth", str(users_file), *flags_of(workplace)]
    process = subprocess.Popen(words, cwd=checkout, text=True, stdout=subprocess.PIPE, umask=0o022)
    try:
        line = process.stdout.readline()
        assert line.startswith("Athanor is at ")
        with httpx.Client(base_url=line.split()[-1], trust_env=False, timeout=120) as browser:
            browser.post("/login", data={"name": "ada", "password": "correct horse"})
            yield Studio(process, browser)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def other_checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "athanor-other"
    for name in ("engine", "webui"):
        shutil.copytree(PROJECT / name, folder / name)  # with what is compiled, which else takes seconds
    shutil.copyfile(PROJECT / "app.py", folder / "app.py")
    (folder / "data").symlink_to(PROJECT / "data")
    return folder


def steps_done(workplace: Workplace, run: str) -> int:
    return progress.progress(runs.get(workplace.saves, run)).done


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_run_goes_on_while_another_version_takes_over(
    workplace: Workplace, other_checkout: Path, make_spec: Callable[..., RunSpec]
) -> None:
    extract(workplace.saves)
    with studio_of(other_checkout, workplace) as studio:
        run = studio.call("start", make_spec(training__max_steps=100_000, logging__save_steps=50_000).to_yaml())
        wait_until(lambda: steps_done(workplace, run) > 3)
        studio.stop()
    assert [path for path in (workplace.saves / run).rglob("*") if others_may(path)] == []
    with studio_of(PROJECT, workplace) as studio:
        states = {listed["id"]: listed["state"] for listed in studio.call("runs")}
        assert states.pop(run) == "running"
        ended = sorted((id.split("/")[-1][20:], state) for id, state in states.items())
        assert ended == [(TRAINED, "finished")] * 3 + [(CUT_OFF, "interrupted")]
        studio.stop()
    before = steps_done(workplace, run)
    wait_until(lambda: steps_done(workplace, run) > before)
    runs.stop(runs.get(workplace.saves, run), "save")
    wait_until(lambda: runs.get(workplace.saves, run).final)
    assert runs.get(workplace.saves, run).state == "stopped"
    assert runs.get(workplace.saves, run).dir.result()
