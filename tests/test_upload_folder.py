"""What browsers have sent is removed when it is old, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.locks import try_lock
from engine.core.rundir import ALIVE_BYTE, write_json
from engine.data.data_jobs import JOBS_FOLDER
from engine.data.upload_folder import remove_old_uploads
from engine.launch.workspace import Workplace
from tests.conftest import start_studio, wait_until

pytestmark = pytest.mark.usefixtures("forked")

Put = Callable[..., Path]
HOUR = 3600  # seconds
DAY = 24 * HOUR


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes a file below the folder of the test, which is the data folder with
    saves in it; `old`: an hour more than a day, otherwise an hour less."""

    def write(name: str, *, old: bool) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"text": "a"}\n')
        age(file, old)
        return file

    return write


def age(path: Path, old: bool = True) -> None:
    then = time.time() - DAY + (-HOUR if old else HOUR)
    os.utime(path, (then, then))


def test_what_is_old_is_removed_and_all_else_stays(tmp_path: Path, put: Put) -> None:
    saves = tmp_path / "saves"
    stale = [put(f"saves/.tmp/{name}", old=True) for name in ("hash1/a.jsonl", "tmpxyz", "hash1/deep/b.csv")]
    stale.append(put(".arriving-x1/half.jsonl", old=True))
    kept = [
        put("saves/.tmp/hash2/c.jsonl", old=False),
        put("saves/base/sft/run/log.txt", old=True),
        put("rows.jsonl", old=True),
        put(".rows.jsonl.xlsx", old=True),
        put(".arriving-x2/new.jsonl", old=False),
    ]
    assert set(remove_old_uploads(saves, tmp_path)) == set(stale)
    assert [file for file in stale if file.exists()] == []
    assert all(file.exists() for file in kept)
    for folder in (stale[0].parent, stale[2].parent, stale[3].parent):
        age(folder)
    remove_old_uploads(saves, tmp_path)
    remove_old_uploads(saves, tmp_path)  # a folder is as new as what was last removed from it
    assert not stale[2].parent.exists()
    assert not stale[3].parent.exists()
    assert (saves / ".tmp").is_dir()


def test_a_file_of_a_data_set_stays(tmp_path: Path, put: Put) -> None:
    file = put("saves/.tmp/hash/rows.jsonl", old=True)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "saves/.tmp/hash/rows.jsonl"}}))
    assert remove_old_uploads(tmp_path / "saves", tmp_path) == []
    (tmp_path / "dataset_info.json").write_text("{}")
    assert remove_old_uploads(tmp_path / "saves", tmp_path) == [file]


def test_a_file_that_a_process_has_open_stays(tmp_path: Path, put: Put) -> None:
    file = put("saves/.tmp/hash/rows.jsonl", old=True)
    hold = "import sys; file = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "open\n"
        assert remove_old_uploads(tmp_path / "saves", tmp_path) == []
        holder.communicate("")
    assert remove_old_uploads(tmp_path / "saves", tmp_path) == [file]


def test_a_file_that_a_job_is_about_to_read_stays(tmp_path: Path, put: Put) -> None:
    file = put("saves/.tmp/hash/rows.jsonl", old=True)
    job = tmp_path / "saves" / JOBS_FOLDER / "receive-1"
    job.mkdir(parents=True)
    write_json(job / "request.json", {"what": "receive", "given": {"source": str(file)}})
    lock = try_lock(job / "lock", ALIVE_BYTE, shared=False)
    assert remove_old_uploads(tmp_path / "saves", tmp_path) == []
    os.close(lock)
    assert remove_old_uploads(tmp_path / "saves", tmp_path) == [file]


@pytest.mark.slow
def test_a_studio_removes_what_is_old_when_it_starts(tmp_path: Path, put: Put) -> None:
    old, new = put("saves/.tmp/a/old.csv", old=True), put("saves/.tmp/a/new.csv", old=False)
    studio, _ = start_studio(Workplace(models=(tmp_path / "models",), data=tmp_path / "data", saves=tmp_path / "saves"))
    try:
        wait_until(lambda: not old.exists())
    finally:
        studio.terminate()
        studio.wait()
    assert new.exists()
