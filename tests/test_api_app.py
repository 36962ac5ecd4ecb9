"""The paths of OpenAI's interface, without a server: rights before work, wrong arguments, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from engine.api import files, jobs
from engine.api.app import Api, application
from engine.api.base_models import BaseModel, BaseModels
from engine.api.callers import MAX_TURNS, Caller, Gate, Turns
from engine.api.errors import ApiError
from engine.api.job_requests import JobRequest
from engine.core import audit, tokens, users
from engine.core.problems import Refusal
from engine.core.rights import USER, VIEWER, Person
from engine.data import dataset_info_edits, owners
from engine.data.upload_folder import UPLOADS_FOLDER
from engine.launch.workspace import Workplace
from engine.runs import quotas, runs

ROWS = [{"messages": [{"role": "user", "content": f"Letter {n}?"}], "correct": "é", "hint": "x"} for n in range(4)]
GRADER = {
    "type": "string_check",
    "name": "g",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "{{item.correct}}",
}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    for name in ("data", "saves", "models/base"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "base" / "config.json").write_text("{}")
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    return Workplace(models=(tmp_path / "models",), data=tmp_path / "data", saves=tmp_path / "saves")


@pytest.fixture
def client_of(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], TestClient]:
    """Clients of ada, a user, and vic, a viewer."""
    file = place.saves.parent / "users.txt"
    monkeypatch.setattr(users, "SCRYPT_COST", (16, 8, 1))
    for name, role in {"root": "operator", "ada": "user", "vic": "viewer"}.items():
        users.add_user(file, name, "correct horse", role)
    app = application(Api(place, Gate(file)))
    return lambda name: TestClient(
        app,
        headers={"Authorization": f"Bearer {tokens.add_token(file, name, 'laptop')}"},
        raise_server_exceptions=False,
    )


def uploaded(place: Workplace, caller: Caller, name: str = "letters.jsonl") -> files.File:
    source = place.saves.parent / name
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return files.store(place, source, name, caller)


def caller(name: str, role: str = USER) -> Caller:
    return Caller(Person(name, role))


def test_an_upload_of_a_viewer_is_refused_before_it_is_written(
    place: Workplace, client_of: Callable[[str], TestClient]
) -> None:
    client = client_of("vic")
    response = client.post("/v1/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "fine-tune"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "rights-viewer")
    assert not (place.saves / UPLOADS_FOLDER).exists()
    [entry] = audit.read(place.saves, 5)
    assert (entry.user, entry.action, entry.outcome) == ("vic", "upload", "refused: rights-viewer")


def test_a_wrong_limit_or_order_is_an_error(client_of: Callable[[str], TestClient]) -> None:
    client = client_of("ada")
    for query in ("limit=" + "000010000" + "9" * 5000, "limit=00000010000", "limit=10001", "order=newest"):
        response = client.get(f"/v1/files?{query}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, query.partition("=")[0])
    assert client.request("GET", "/v1/files?limit=10000&order=asc", content=b"no JSON").json()["data"] == []


def test_a_reinforcement_job_that_is_not_submitted_leaves_no_data_set(place: Workplace) -> None:
    file = uploaded(place, caller("ada"))
    before = (place.data / "dataset_info.json").read_text()
    models = BaseModels({"base": BaseModel("base", str(place.models[0] / "base"))})

    def create(grader: dict[str, str], by: Caller) -> None:
        method = {"type": "reinforcement", "reinforcement": {"grader": grader}}
        request = JobRequest.model_validate({"model": "base", "training_file": file.id, "method": method})
        jobs.create(place, models, request, by)

    with pytest.raises(ApiError, match="incorrect"):
        create(GRADER | {"reference": "{{item.incorrect}}"}, caller("ada"))
    with pytest.raises(Refusal):
        create(GRADER, caller("ada", VIEWER))
    (place.saves / quotas.QUOTAS_FILE).write_text("default: {runs_at_once: 1, disk_gb: 0}\n")
    with pytest.raises(Refusal) as refused:
        create(GRADER, caller("ada"))
    assert "quota-disk" in {obstacle.code for obstacle in refused.value.problems}
    assert (place.data / "dataset_info.json").read_text() == before
    assert runs.find(place.saves) == []
    assert [entry.action for entry in audit.read(place.saves, 9)] == ["start", "start", "upload"]


def test_the_data_set_of_a_grader_keeps_how_the_file_is_read(place: Workplace) -> None:
    (place.data / "l.jsonl").write_bytes(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode("latin-1")
    )
    entry = {"file_name": "l.jsonl", "encoding": "latin-1", "num_samples": 2, **files.CHAT_ENTRY}
    dataset_info_edits.add(place.data, "l", entry)
    file = files.find(place, "l", caller("ada"))
    own = jobs._entry_with_reference(place, file.dataset, "correct")
    assert own == {
        "file_name": "l.jsonl",
        "encoding": "latin-1",
        "num_samples": 2,
        "columns": {"prompt": "messages", "response": "correct"},
    }
    for _ in range(2):
        with jobs._added(place, ["l"], [own], "correct", caller("ada")) as names:
            assert names == ["l.correct"]
    assert owners.owner_of(place.data, "set:l.correct") == "ada"


def test_a_file_goes_with_its_data_sets_or_not_at_all(place: Workplace) -> None:
    ada, bob = caller("ada"), caller("bob")
    file = uploaded(place, ada)
    before = dataset_info_edits.entry_of(place.data, file.dataset.name)
    theirs = "a-first"  # bob describes the same file
    (place.data / "dataset_info.json").write_text(json.dumps({theirs: before, file.dataset.name: before}))
    owners.claim(place.data, [owners.set_id(theirs)], "bob")
    with pytest.raises(ApiError):
        files.find(place, file.id, bob)
    with pytest.raises(Refusal):
        files.delete(place, files.find(place, file.id, ada), ada)
    dataset_info_edits.remove(place.data, theirs)
    broken = dataset_info_edits.add(place.data, "unreadable", {"file_name": [1]})
    with pytest.raises(Refusal, match="unreadable"):
        files.delete(place, files.find(place, file.id, ada), ada)
    assert dataset_info_edits.entry_of(place.data, file.dataset.name) == before
    dataset_info_edits.remove(place.data, broken)
    files.delete(place, files.find(place, file.id, ada), ada)
    assert not file.path.exists()
    assert (place.data / "dataset_info.json").read_text().strip() == "{}"


def test_one_caller_leaves_answers_for_the_others() -> None:
    turns = Turns()

    def wait_for(number: int) -> None:
        if number:
            with turns.of(caller("ada")):
                wait_for(number - 1)
        else:
            with turns.of(caller("bob")):
                pass
            with pytest.raises(ApiError) as refused, turns.of(caller("ada")):
                pass
            assert refused.value.status == 429

    wait_for(MAX_TURNS)
    assert not turns.taken
