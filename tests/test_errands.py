"""Longer work on data is done by real processes, each with a folder that tells how far it is and what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.core.problems import Refusal
from engine.core.rundir import write_json
from engine.data import data_jobs, dataset_info_edits
from engine.data.datasets import find
from engine.launch.processes import find_processes
from tests.conftest import wait_until
from tests.sleeping import sleep_after

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def given(data: Path) -> dict[str, Any]:
    """What to ask of the data folder's chat set, to which a bad row is added."""
    rows = json.loads((data / "chat.json").read_text())
    (data / "chat.json").write_text(json.dumps([*rows, {"instruction": "?"}]))
    return {"data": str(data), "name": "chat", "against": [], "language": "zh"}


def test_a_check_tells_what_it_found_and_leaves_the_bad_rows_in_a_file(tmp_path, given):
    errand = data_jobs.start(tmp_path, "check", given)
    result = data_jobs.wait(errand)
    assert (result["good"], result["bad"], result["counts"]) == (40, 1, {"row-without-column": 1})
    (bad,) = map(json.loads, (errand.path / data_jobs.BAD_ROWS_FILE).read_text(encoding="utf-8").splitlines())
    assert (bad["row"], bad["content"]) == (41, {"instruction": "?"})
    assert "没有“output”列" in bad["problem"]


def test_the_same_question_about_the_same_data_is_answered_at_once_and_about_changed_data_anew(
    tmp_path, given, monkeypatch
):
    first = data_jobs.start(tmp_path, "check", given)
    data_jobs.wait(first)
    assert data_jobs.find_finished(tmp_path, "check", given) == first
    again = data_jobs.start(tmp_path, "check", given)
    assert (again.id, again.state) == (first.id, "done")
    with monkeypatch.context() as other:
        other.setattr(
            data_jobs, "VALIDATION_VERSION", data_jobs.VALIDATION_VERSION + 1
        )  # rows are judged otherwise since
        assert data_jobs.find_finished(tmp_path, "check", given) is None
    (Path(given["data"]) / "chat.json").write_text("[]")
    assert data_jobs.find_finished(tmp_path, "check", given) is None
    changed = data_jobs.start(tmp_path, "check", given)
    assert changed.id != first.id
    assert data_jobs.wait(changed)["good"] == 0


def test_a_set_that_was_made_and_removed_is_made_again_when_asked_again(tmp_path, given):
    data = Path(given["data"])
    asked = {"data": given["data"], "name": "chat", "share": 0.25, "seed": 1}
    first = data_jobs.start(tmp_path, "split", asked)
    for name in data_jobs.wait(first)["made"]:
        dataset_info_edits.remove(data, name)
    for name in data_jobs.wait(data_jobs.start(tmp_path, "split", asked))["made"]:
        assert find(data, name).problem is None


def test_a_refusal_comes_back_as_the_sentence_it_is_in_either_language(tmp_path, given):
    errand = data_jobs.start(tmp_path, "split", {"data": given["data"], "name": "chat", "share": 2, "seed": 1})
    with pytest.raises(Refusal) as refused:
        data_jobs.wait(errand)
    assert "must be between 0 and 1" in refused.value.text("en")
    assert "应在 0 与 1 之间" in refused.value.text("zh")
    assert errand.state == "failed"
    gone = data_jobs.start(tmp_path, "deduplicate", {"data": given["data"], "name": "'; rm -rf /"})
    with pytest.raises(Refusal, match="no data set"):
        data_jobs.wait(gone)


def test_work_that_is_killed_has_failed_and_can_be_begun_again(tmp_path, given, monkeypatch):
    sleep_after(monkeypatch, tmp_path / "start", "write_json", 'path.name == "progress.json"')
    errand = data_jobs.start(tmp_path, "check", given)
    wait_until(lambda: errand.progress)
    assert errand.state == "working"
    assert len(find_processes(errand.path)) == 1
    assert data_jobs.start(tmp_path, "check", given) == errand  # no second one
    assert len(find_processes(errand.path)) == 1
    data_jobs.stop(errand)
    wait_until(lambda: errand.state == "failed")
    assert "ended without a result" in errand.problems[0].text()
    monkeypatch.undo()
    assert data_jobs.wait(data_jobs.start(tmp_path, "check", given))["good"] == 40


def test_work_that_ends_while_its_state_is_read_is_done_and_has_not_failed(tmp_path, monkeypatch):
    errand = data_jobs.DataJob(tmp_path)

    def ends(*_: Any) -> bool:
        write_json(tmp_path / "result.json", {})
        return False

    monkeypatch.setattr(data_jobs, "is_locked", ends)
    assert errand.state == "done"


@pytest.mark.parametrize("id", ["", ".", "..", "../chat", "check-0/../..", "/etc", "nothing"])
def test_an_id_leads_nowhere_but_to_an_errand(tmp_path, given, id):
    data_jobs.wait(data_jobs.start(tmp_path, "check", given))
    assert data_jobs.get(tmp_path, id) is None


def test_old_errands_are_forgotten(tmp_path, given, monkeypatch):
    monkeypatch.setattr(data_jobs, "MAX_FINISHED_JOBS", 2)
    for language in ("en", "zh", "en-2", "zh"):
        asked = {"data": given["data"], "name": "gone", "share": 0.5, "seed": hash(language)}
        with pytest.raises(Refusal):
            data_jobs.wait(data_jobs.start(tmp_path, "split", asked))
    assert len(list((tmp_path / data_jobs.JOBS_FOLDER).iterdir())) <= 3


def test_a_workbook_is_taken_in(tmp_path, data):
    from tests.test_uploads import HEADER, text, workbook

    file = workbook(tmp_path / "x.xlsx", f"{HEADER}<row>{text('A2', 'Hi')}{text('B2', 'Hello')}</row>")
    asked = {"data": str(data), "source": str(file), "called": "我的 表.xlsx"}
    assert data_jobs.wait(data_jobs.start(tmp_path, "receive", asked)) == {
        "file": "我的 表.jsonl",
        "problems": [],
        "notes": [],
    }
    assert json.loads((data / "我的 表.jsonl").read_text(encoding="utf-8")) == {
        "instruction": "Hi",
        "output": "Hello",
    }
