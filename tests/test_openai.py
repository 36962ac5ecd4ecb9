"""OpenAI's own client against our interface: a whole job and what else its scripts do, with a tiny model."""

from __future__ import annotations

import csv
import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob
from pydantic import BaseModel

from engine.core import audit, tokens, users
from engine.launch.workspace import Workplace
from engine.runs import runs
from engine.serving import servers
from tests.conftest import end_runs, start_studio, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]

SETTINGS = """
    method: {kind: lora, r: 4}
    data: {max_length: 64}
    training:
      learning_rate: 5.0e-3
      num_train_epochs: 2
      per_device_train_batch_size: 4
      gradient_accumulation_steps: 1
      gradient_checkpointing: false
    logging: {probe: false, plot_loss: false}
    hardware: {device: cpu}
"""
TABLE = f"""
gpt-4o-mini-2024-07-18:
  model: tiny
  settings: {SETTINGS}
o4-mini-2025-04-16:
  model: tiny
  settings: {SETTINGS}
    stage: {{kind: grpo, max_new_tokens: 16}}
"""
REASONER = "o4-mini-2025-04-16"
BASE = "gpt-4o-mini-2024-07-18"
ASK = [{"role": "user", "content": "What comes after 3?"}]
CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"What comes after {n}?"},
            {"role": "assistant", "content": "No.", "weight": 0},
            {"role": "user", "content": "Please."},
            {"role": "assistant", "content": f"{n + 1}.", "weight": 1},
        ]
    }
    for n in range(16)
]
PAIRS = [
    {
        "input": {"messages": [{"role": "user", "content": f"What comes after {n}?"}], "tools": []},
        "preferred_output": [{"role": "assistant", "content": f"{n + 1}."}],
        "non_preferred_output": [{"role": "assistant", "content": "I do not know."}],
    }
    for n in range(8)
]
# An untrained model writes an e now and then.
LETTERS = [{"messages": [{"role": "user", "content": f"Letter {n}?"}], "correct": "e", "hint": "x"} for n in range(4)]


def strictly(value: BaseModel) -> BaseModel:
    """The value, read again by its own type: OpenAI's client itself accepts anything."""
    return type(value).model_validate(value.to_dict(mode="python"), strict=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("openai")
    for name in ("data", "saves"):
        (folder / name).mkdir()
    (folder / "data" / "dataset_info.json").write_text("{}")
    (folder / "table.yaml").write_text(TABLE)
    workplace = Workplace(models=(tiny.parent,), data=folder / "data", saves=folder / "saves")
    yield workplace
    end_runs(workplace.saves)
    for server in servers.servers(workplace.saves):
        servers.end(server)


@pytest.fixture(scope="module")
def users_file(place: Workplace) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(users, "SCRYPT_COST", (16, 8, 1))
        for name, role in {"root": "operator", "ada": "user", "bob": "user", "vic": "viewer"}.items():
            users.add_user(place.saves.parent / "users.txt", name, "correct horse", role)
    return place.saves.parent / "users.txt"


@pytest.fixture(scope="module")
def studio(place: Workplace, users_file: Path) -> Iterator[str]:
    """The address of a running studio with two users."""
    table = str(place.saves.parent / "table.yaml")
    process, address = start_studio(place, "--auth", str(users_file), "--api-models", table)
    yield address
    process.terminate()
    process.wait()


def client_of(address: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def ada(studio: str, users_file: Path) -> openai.OpenAI:
    return client_of(studio, tokens.add_token(users_file, "ada", "laptop"))


@pytest.fixture(scope="module")
def bob(studio: str, users_file: Path) -> openai.OpenAI:
    return client_of(studio, tokens.add_token(users_file, "bob", "laptop"))


def upload(client: openai.OpenAI, rows: list[dict[str, Any]], name: str = "train.jsonl") -> FileObject:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return client.files.create(file=(name, text.encode()), purpose="fine-tune")


def ended(client: openai.OpenAI, job: FineTuningJob) -> FineTuningJob:
    def look() -> FineTuningJob | None:
        now = client.fine_tuning.jobs.retrieve(job.id)
        return now if now.status in ("succeeded", "failed", "cancelled", "paused") else None

    return wait_until(look, every=0.2)


@pytest.fixture(scope="module")
def created(ada: openai.OpenAI) -> FineTuningJob:
    """A supervised job of ada's, as it was when it was created."""
    file = strictly(upload(ada, CHAT))
    assert (file.filename, file.purpose, file.status) == ("train.jsonl", "fine-tune", "processed")
    assert [json.loads(line) for line in ada.files.content(file.id).text.splitlines()] == CHAT
    held_out = upload(ada, CHAT[:4], "held out, 验证.jsonl")
    job = strictly(
        ada.fine_tuning.jobs.create(
            model=BASE,
            training_file=file.id,
            validation_file=held_out.id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 8, "n_epochs": "auto"}}},
            suffix="After <b>",
            seed=7,
            metadata={"team": "sums"},
        )
    )
    assert (job.training_file, job.validation_file, job.seed) == (file.id, held_out.id, 7)
    return job


def tokens_of(client: openai.OpenAI, model: str) -> list[tuple[str, float]]:
    """The first tokens of greedy answers, with their log-probabilities."""
    answers = [
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"What comes after {number}?"}],
            max_tokens=8,
            temperature=0,
            logprobs=True,
        )
        for number in range(3)
    ]
    assert {answer.model for answer in answers} == {model}
    return [(token.token, token.logprob) for answer in answers for token in answer.choices[0].logprobs.content]


def test_a_whole_job_from_the_file_to_an_answer(ada: openai.OpenAI, created: FineTuningJob, place: Workplace) -> None:
    decided = created.method.supervised.hyperparameters
    assert (decided.n_epochs, decided.batch_size, decided.learning_rate_multiplier) == (2, 8, 1.0)
    job = strictly(ended(ada, created))
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model.startswith(f"ft:{BASE}:athanor:after-b:")
    assert job.user_provided_suffix == "After <b>"
    [request] = [run.request for run in runs.find(place.saves) if run.facts.name == "after-b"]
    assert set(request["api"]) == {"model", "suffix", "metadata", "learning_rate"}  # a contract

    happened = [strictly(event) for event in ada.fine_tuning.jobs.list_events(job.id, limit=3)]
    messages = [event.message for event in happened]
    assert messages[-1] == f"Created fine-tuning job: {job.id}"
    assert f"New fine-tuned model created: {job.fine_tuned_model}" in messages
    steps = [event.data for event in happened if event.type == "metrics"]
    # 16 rows in batches of 8, twice
    assert [step["step"] for step in steps if "train_loss" in step] == [4, 3, 2, 1]
    assert steps[0]["valid_loss"] > 0
    table = list(csv.DictReader(io.StringIO(ada.files.content(job.result_files[0]).text)))
    assert float(table[-1]["train_loss"]) == steps[0]["train_loss"]
    saved = [strictly(checkpoint) for checkpoint in ada.fine_tuning.jobs.checkpoints.list(job.id)]
    assert [checkpoint.step_number for checkpoint in saved] == [4, 2]

    assert {BASE, REASONER, job.fine_tuned_model} <= {strictly(model).id for model in ada.models.list()}
    answer = ada.chat.completions.create(model=job.fine_tuned_model, messages=ASK, max_tokens=8, temperature=0)
    assert answer.model == job.fine_tuned_model
    chunks = list(
        ada.chat.completions.create(model=job.fine_tuned_model, messages=ASK, max_tokens=8, temperature=0, stream=True)
    )
    assert {chunk.model for chunk in chunks} == {job.fine_tuned_model}
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == answer.choices[0].message.content
    # The last checkpoint is the result, and an earlier one is not.
    last, earlier = (tokens_of(ada, checkpoint.fine_tuned_model_checkpoint) for checkpoint in saved)
    assert tokens_of(ada, job.fine_tuned_model) == last != earlier
    with pytest.raises(openai.NotFoundError, match="Those that can: 4, 2"):
        ada.models.retrieve(f"{job.fine_tuned_model}:ckpt-step-3")
    kept = saved[1].fine_tuned_model_checkpoint
    with pytest.raises(openai.PermissionDeniedError):
        ada.models.delete(kept)
    assert ada.models.retrieve(kept).id == kept
    assert ada.chat.completions.create(model=BASE, messages=ASK, max_tokens=2).model == BASE
    requests = [entry for entry in audit.read(place.saves, 9) if entry.action == "ask"]
    assert [(entry.what, entry.outcome) for entry in requests[:2]] == [(BASE, "done"), (kept, "done")]


def test_preference_rows_train_dpo_and_top_level_hyperparameters_are_read(ada: openai.OpenAI) -> None:
    file = upload(ada, PAIRS, "pairs.jsonl")
    created = ada.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.25, "n_epochs": 1, "batch_size": 4}}},
    )
    job = strictly(ended(ada, created))
    assert job.status == "succeeded", job.error
    decided = job.method.dpo.hyperparameters
    assert (decided.beta, decided.n_epochs, decided.batch_size, decided.learning_rate_multiplier) == (0.25, 1, 4, 1.0)


def test_a_job_is_paused_resumed_and_cancelled(ada: openai.OpenAI, place: Workplace) -> None:
    file = upload(ada, CHAT)
    jobs = ada.fine_tuning.jobs
    job = jobs.create(model=BASE, training_file=file.id, hyperparameters={"n_epochs": 1000, "batch_size": 1})
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (1000, 1)
    second = jobs.create(model=BASE, training_file=file.id, metadata={"turn": "second"})
    assert jobs.pause(second.id).status == "paused"  # it waits: nothing to save
    wait_until(lambda: jobs.retrieve(job.id).status == "running", every=0.2)
    with pytest.raises(openai.ConflictError):
        ada.files.delete(file.id)
    jobs.pause(job.id)
    assert ended(ada, job).status == "paused"
    [last, *_] = jobs.checkpoints.list(job.id)
    assert jobs.resume(job.id).status in ("queued", "validating_files", "running")
    wait_until(lambda: jobs.retrieve(job.id).status == "running", every=0.2)
    assert jobs.cancel(job.id).status == "cancelled"
    wait_until(lambda: jobs.retrieve(job.id).finished_at, every=0.2)
    assert [event.message for event in jobs.list_events(job.id, limit=1).data] == ["Fine-tuning job cancelled"]
    for refused in (jobs.resume, jobs.cancel, jobs.pause):
        with pytest.raises(openai.BadRequestError):
            refused(job.id)
    assert jobs.cancel(second.id).status == "cancelled"
    assert last.step_number > 0
    assert [known.id for known in jobs.list(metadata={"turn": "second"})] == [second.id]
    assert ada.files.delete(file.id).deleted


def test_rows_that_cannot_be_used_fail_the_job_and_are_named_by_line(ada: openai.OpenAI) -> None:
    rows = [CHAT[0], {"messages": [{"role": "user", "content": "?"}]}, CHAT[1], {"text": "no conversation"}]
    job = ended(ada, ada.fine_tuning.jobs.create(model=BASE, training_file=upload(ada, rows, "bad.jsonl").id))
    assert (job.status, job.error.param, job.error.code) == ("failed", "training_file", "invalid_training_file")
    assert "bad.jsonl:2" in job.error.message
    assert "bad.jsonl:4" in job.error.message
    assert "/" not in job.error.message
    assert ada.fine_tuning.jobs.list_events(job.id, limit=1).data[0].level == "error"
    wrong_kind = ended(
        ada,
        ada.fine_tuning.jobs.create(model=BASE, training_file=upload(ada, CHAT).id, method={"type": "dpo", "dpo": {}}),
    )
    assert (wrong_kind.status, wrong_kind.error.param) == ("failed", "training_file")


def test_two_users_do_not_see_each_others_jobs_and_files(
    ada: openai.OpenAI, bob: openai.OpenAI, created: FineTuningJob, studio: str, users_file: Path, place: Workplace
) -> None:
    assert ended(ada, created).status == "succeeded"
    file = upload(ada, CHAT)
    own = [job.id for job in ada.fine_tuning.jobs.list()]
    assert not list(bob.fine_tuning.jobs.list())
    assert not list(bob.files.list())
    names = {model.id for model in ada.models.list()} - {BASE, REASONER}
    assert not names & {model.id for model in bob.models.list()}
    theirs = [
        lambda: bob.files.retrieve(file.id),
        lambda: bob.files.content(file.id),
        lambda: bob.files.delete(file.id),
        lambda: bob.files.retrieve(runs.find(place.saves)[-1].facts.data[0]),
        lambda: bob.fine_tuning.jobs.create(model=BASE, training_file=file.id),
        lambda: bob.fine_tuning.jobs.retrieve(own[0]),
        lambda: bob.fine_tuning.jobs.cancel(own[0]),
        lambda: bob.fine_tuning.jobs.list_events(own[0]),
        lambda: bob.models.delete(next(iter(names))),
        lambda: bob.chat.completions.create(model=next(iter(names)), messages=ASK),
    ]
    for act in theirs:
        with pytest.raises(openai.NotFoundError):
            act()
    root = client_of(studio, tokens.add_token(users_file, "root", "laptop"))
    assert root.files.retrieve(file.id) == file
    assert [job.id for job in root.fine_tuning.jobs.list()] == own
    viewer = client_of(studio, tokens.add_token(users_file, "vic", "laptop"))
    with pytest.raises(openai.PermissionDeniedError, match="viewer"):
        upload(viewer, CHAT)
    reader = client_of(studio, tokens.add_token(users_file, "ada", "reader", ["read"]))
    assert [job.id for job in reader.fine_tuning.jobs.list()] == own
    for act in (lambda: upload(reader, CHAT), lambda: reader.chat.completions.create(model=BASE, messages=ASK)):
        with pytest.raises(openai.PermissionDeniedError):
            act()
    tokens.revoke_token(users_file, "ada", "reader")
    with pytest.raises(openai.AuthenticationError):
        reader.models.list()


def test_lists_come_in_pages(ada: openai.OpenAI, created: FineTuningJob) -> None:
    assert ended(ada, created).status == "succeeded"
    for _ in range(2):
        file = upload(ada, CHAT)
        ada.fine_tuning.jobs.cancel(ada.fine_tuning.jobs.create(model=BASE, training_file=file.id).id)
    everything = [job.id for job in ada.fine_tuning.jobs.list()]
    first = ada.fine_tuning.jobs.list(limit=2)
    assert ([job.id for job in first.data], first.has_more) == (everything[:2], True)
    assert [job.id for job in ada.fine_tuning.jobs.list(limit=2)] == everything  # the client turns the pages
    ids = [file.id for file in ada.files.list(order="asc")]
    assert [file.id for file in ada.files.list(order="asc", after=ids[2], limit=1).data] == ids[3:4]
    results = ada.files.list(purpose="fine-tune-results").data
    assert results
    assert {file.purpose for file in results} == {"fine-tune-results"}


def test_reinforcement_is_grpo_with_rewards_like_the_grader(ada: openai.OpenAI, place: Workplace) -> None:
    file = upload(ada, LETTERS, "letters.jsonl")
    compares = {"input": "{{sample.output_text}}", "reference": "{{ item.correct }}"}
    grader = {
        "type": "multi",
        "name": "sum",
        "graders": {
            "right": {"type": "string_check", "name": "right", "operation": "eq", **compares},
            "near": {"type": "string_check", "name": "near", "operation": "ilike", **compares},
        },
        "calculate_output": "(2 * right + near) / 3 - 1",
    }
    settings = {"n_epochs": 1, "batch_size": 2, "compute_multiplier": 0.5}
    method = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": settings}}
    created = ada.fine_tuning.jobs.create(model=REASONER, training_file=file.id, method=method)
    assert created.training_file == file.id
    job = ended(ada, created)
    assert job.status == "succeeded", job.error
    [spec] = [run.spec for run in runs.find(place.saves) if run.spec.stage.kind == "grpo"]
    assert spec.stage.rewards == pytest.approx({"exact": 2 / 3, "contains_ignore_case": 1 / 3})
    assert (spec.stage.num_generations, job.method.reinforcement.hyperparameters.batch_size) == (4, 2)
    steps = [event.data for event in ada.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"]
    assert [step["step"] for step in steps] == [2, 1]
    assert "train_reward_mean" in steps[0]
    refusals = {
        "python": ({"source": "def grade(sample, item): return 1.0", "image_tag": "2025-05-08"}, "is not run"),
        "score_model": ({"model": "gpt-4o", "input": [], "range": [0, 1]}, "another model judge each answer"),
    }
    for kind, (fields, reason) in refusals.items():
        method = {"type": "reinforcement", "reinforcement": {"grader": {"type": kind, "name": "g", **fields}}}
        with pytest.raises(openai.BadRequestError, match=reason) as refused:
            ada.fine_tuning.jobs.create(model=REASONER, training_file=file.id, method=method)
        assert (refused.value.param, refused.value.code) == ("method.reinforcement.grader", "invalid_grader")
    string_check = grader["graders"]["right"]
    for wrong in (
        string_check | {"operation": "regex"},
        string_check | {"reference": "{{item.correct}} exactly"},
        string_check | {"strict": True},
        grader | {"calculate_output": "right ** near"},
        grader | {"calculate_output": "(" * 900 + "right" + ")" * 900},
        grader | {"calculate_output": "__import__('os')"},
        grader | {"graders": {"a": grader}},
        string_check | {"reference": "{{item.incorrect}}"},
        {},
    ):
        method = {"type": "reinforcement", "reinforcement": {"grader": wrong}}
        with pytest.raises(openai.BadRequestError) as refused:
            ada.fine_tuning.jobs.create(model=REASONER, training_file=file.id, method=method)
        assert refused.value.param == "method.reinforcement.grader", wrong
        assert refused.value.code == "invalid_grader"


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, which has OpenAI's form."""
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"]
    assert str(Path.home()) not in error["message"]
    return error


WRONG_JOBS: list[tuple[dict[str, Any], str | None]] = [
    ({"model": None}, "model"),
    ({"model": "/etc"}, "model"),
    ({"model": ["x"]}, "model"),
    ({"training_file": "../../users.txt"}, "training_file"),
    ({"training_file": "/etc/passwd"}, "training_file"),
    ({"training_file": "file-" + "0" * 24}, "training_file"),
    ({"validation_file": "dataset_info.json"}, "validation_file"),
    ({"hyperparameters": {"n_epochs": 10**9}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"batch_size": True}}, "hyperparameters.batch_size"),
    ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
    ({"hyperparameters": {"learning_rate_multiplier": 1e308}}, "hyperparameters.learning_rate_multiplier"),
    ({"hyperparameters": {"learning_rate_multiplier": 1e4}}, "training.learning_rate"),
    ({"hyperparameters": {"epochs": 1}}, "hyperparameters.epochs"),
    ({"method": {"type": "ppo"}}, "method.type"),
    ({"method": {"type": "dpo", "supervised": {}}}, "method"),
    ({"method": {"type": "reinforcement"}}, "method"),
    ({"method": {"type": "dpo"}, "hyperparameters": {"n_epochs": 1}}, None),
    ({"suffix": "<>"}, "suffix"),
    ({"suffix": "x" * 65}, "suffix"),
    ({"suffix": "half \ud800"}, None),
    ({"seed": -1}, "seed"),
    ({"seed": 10**400}, "seed"),
    ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
    ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
    ({"shell": "rm -rf /"}, "shell"),
]


def test_whatever_a_job_asks_for_wrongly_is_an_error_with_its_argument(ada: openai.OpenAI, place: Workplace) -> None:
    file, before = upload(ada, CHAT).id, len(runs.find(place.saves))
    with http_of(ada) as client:
        for change, param in WRONG_JOBS:
            body = {"model": BASE, "training_file": file} | change
            response = client.post("/fine_tuning/jobs", content=json.dumps(body))
            status = 404 if (param in change and "file" in str(param)) or "/etc" in str(change) else 400
            assert response.status_code == status, (change, response.text)
            assert error_of(response)["param"] == param, (change, response.text)
    assert len(runs.find(place.saves)) == before


def http_of(client: openai.OpenAI) -> httpx.Client:
    """The same user without OpenAI's client, which sends nothing that is too wrong."""
    headers = {"Authorization": f"Bearer {client.api_key}"}
    return httpx.Client(base_url=str(client.base_url), headers=headers, timeout=60)


def test_a_hostile_client_gets_errors_and_nothing_else(ada: openai.OpenAI) -> None:
    with http_of(ada) as client:
        bodies: list[tuple[Any, int]] = [
            (b"[" * 200_000, 400),
            (b'{"a":' * 200_000, 400),
            (b'{"seed": ' + b"9" * 10_000 + b"}", 400),
            (b"\xff\xfe", 400),
            (b"[]", 400),
        ]
        for body, status in bodies:
            response = client.post("/fine_tuning/jobs", content=body)
            assert response.status_code == status, response.text
            error_of(response)
        with client.stream("POST", "/fine_tuning/jobs", content=(b" " * (1 << 20) for _ in range(17))) as response:
            assert response.status_code == 413
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ada.api_key}\r\n"
            form = "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000000000\r\n\r\n"
            connection.sendall((head + form).encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 413")
        for path in (
            "/files/..%2F..%2Fusers.txt",
            "/files/%2Fetc%2Fpasswd/content",
            "/files/dataset_info.json/content",
            "/files/.api",
            "/files/" + "x" * 5000,
            "/fine_tuning/jobs/..%2f..",
            "/models/..%2f..%2fetc",
            "/nothing",
        ):
            response = client.get(path)
            assert response.status_code == 404, path
            error_of(response)
        for limit in ("0", "-1", "1000000000", "1e3", "\u0661", "", "9" * 5000):
            response = client.get("/fine_tuning/jobs", params={"limit": limit})
            assert (response.status_code, error_of(response)["param"]) == (400, "limit"), limit
        assert client.get("/files", params={"after": "file-x"}).status_code == 400
        assert client.put("/files").status_code == 405


def test_an_upload_that_is_none_is_refused_and_leaves_nothing(
    ada: openai.OpenAI, place: Workplace, studio: str
) -> None:
    with http_of(ada) as client:
        uploads: list[tuple[str, bytes, dict[str, str]]] = [
            ("train.json", b"{}", {"purpose": "fine-tune"}),
            ("train.jsonl", b"{}", {"purpose": "assistants"}),
            ("train.jsonl", b"{}", {}),
            ("train.jsonl", b"", {"purpose": "fine-tune"}),
            (".jsonl", b"{}", {"purpose": "fine-tune"}),
            ("train.jsonl", b"{}", {"purpose": "fine-tune", "expires_after[seconds]": "3600"}),
            ("train.jsonl", b"{}", {"purpose": "x" * 100_000}),
            ("train.jsonl", b"{}", {"purpose": "fine-tune"} | {f"f{number}": "" for number in range(20)}),
        ]
        for name, content, form in uploads:
            response = client.post("/files", files={"file": (name, content)}, data=form)
            assert response.status_code == 400, (name, form, response.text)
            error_of(response)
        assert client.post("/files", content=b"{}").status_code == 400
        answer = client.post("/files", files={"file": ("../../evil.jsonl", b"{}")}, data={"purpose": "fine-tune"})
        assert answer.status_code == 200
        assert list(place.data.parent.rglob("evil*")) == [place.data / "evil.jsonl"]
        assert not list((place.saves / ".tmp").glob("api-*"))
        for wrong in ({}, {"model": 1}, {"model": BASE, "messages": "hello"}, {"model": BASE, "messages": []}):
            response = client.post("/chat/completions", json=wrong)
            assert response.status_code == 400, response.text
            error_of(response)
        [refused] = audit.read(place.saves, 1)
        assert (refused.action, refused.what, refused.outcome) == ("ask", BASE, "failed")
    with httpx.Client(base_url=f"{studio}/v1", timeout=60) as stranger:
        codes: list[str] = []
        while "rate_limit_exceeded" not in codes and len(codes) < 12:  # the first waits are short
            guess = f"Bearer {tokens.PREFIX}{len(codes):012x}-{'x' * 43}"
            answer = stranger.post("/files", content=b"--x", headers={"Authorization": guess})
            codes.append(error_of(answer)["code"])
        assert (codes[0], codes[-1], answer.status_code) == ("invalid_api_key", "rate_limit_exceeded", 429)
    assert ada.models.retrieve(BASE).id == BASE  # who has a token does not wait for those who guess
