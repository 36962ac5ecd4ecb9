"""OpenAI's own client against our interface: a whole job and what else its scripts do, with a tiny model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob
from pydantic import BaseModel

from engine.core import tokens, users
from engine.launch.workspace import Workplace
from engine.runs import runs
from tests.conftest import end_runs, start_studio, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]

TABLE = """
gpt-4o-mini-2024-07-18:
  model: tiny
  settings:
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
SUMS = [{"messages": [{"role": "user", "content": f"{n} + 1"}], "correct": f"{n + 1}", "hint": "x"} for n in range(4)]


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


def test_a_whole_job_from_the_file_to_an_answer(ada: openai.OpenAI, bob: openai.OpenAI, place: Workplace) -> None:
    file = strictly(upload(ada, CHAT))
    assert (file.filename, file.purpose, file.status) == ("train.jsonl", "fine-tune", "processed")
    assert [json.loads(line) for line in ada.files.content(file.id).text.splitlines()] == CHAT
    held_out = upload(ada, CHAT[:4], "held out, 验证.jsonl")
    created = strictly(
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
    assert (created.training_file, created.validation_file, created.seed) == (file.id, held_out.id, 7)
    decided = created.method.supervised.hyperparameters
    assert (decided.n_epochs, decided.batch_size, decided.learning_rate_multiplier) == (2, 8, 1.0)
    job = strictly(ended(ada, created))
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model.startswith(f"ft:{BASE}:athanor:after-b:")

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

    assert {BASE, job.fine_tuned_model} == {strictly(model).id for model in ada.models.list()}
    answer = ada.chat.completions.create(model=job.fine_tuned_model, messages=ASK, max_tokens=8, temperature=0)
    assert answer.model == job.fine_tuned_model
    chunks = list(
        ada.chat.completions.create(model=job.fine_tuned_model, messages=ASK, max_tokens=8, temperature=0, stream=True)
    )
    assert {chunk.model for chunk in chunks} == {job.fine_tuned_model}
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == answer.choices[0].message.content
    assert ada.chat.completions.create(model=BASE, messages=ASK, max_tokens=2).model == BASE


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
    ada: openai.OpenAI, bob: openai.OpenAI, studio: str, users_file: Path, place: Workplace
) -> None:
    file = upload(ada, CHAT)
    own = [job.id for job in ada.fine_tuning.jobs.list()]
    assert not list(bob.fine_tuning.jobs.list())
    assert not list(bob.files.list())
    names = {model.id for model in ada.models.list()} - {BASE}
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


def test_lists_come_in_pages(ada: openai.OpenAI) -> None:
    everything = [job.id for job in ada.fine_tuning.jobs.list()]
    first = ada.fine_tuning.jobs.list(limit=2)
    assert ([job.id for job in first.data], first.has_more) == (everything[:2], True)
    assert [job.id for job in ada.fine_tuning.jobs.list(limit=2)] == everything  # the client turns the pages
    ids = [file.id for file in ada.files.list(order="asc")]
    assert [file.id for file in ada.files.list(order="asc", after=ids[2], limit=1).data] == ids[3:4]
    results = ada.files.list(purpose="fine-tune-results").data
    assert results
    assert {file.purpose for file in results} == {"fine-tune-results"}
