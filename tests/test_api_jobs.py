"""Any training run as a job of OpenAI's interface: what its folder says in OpenAI's words, and types."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from engine.api import events, jobs
from engine.api.base_models import BaseModel, BaseModels
from engine.api.callers import Caller
from engine.api.errors import ApiError
from engine.api.graders import Rewards, rewards
from engine.api.job_requests import JobRequest
from engine.api.jobs import Job
from engine.core.problems import Refusal, problem
from engine.core.rights import OPERATOR, USER, Person
from engine.core.run_warnings import write_warning
from engine.core.rundir import append_lines, read_json, write_json
from engine.launch.workspace import Workplace
from engine.runs import runs
from tests.past_runs import falling, run_maker

MODELS = BaseModels({"gpt": BaseModel("gpt", "org/base")})


def job_of(run: runs.Run, saves: Path) -> Job:
    return Job(runs.read(run.path, saves), MODELS)


def strictly(job: Job) -> FineTuningJob:
    """The job as its client's own type reads it."""
    return FineTuningJob.model_validate(job.as_object({"names": "file-1"}), strict=True)


def test_every_state_of_a_run_is_one_of_a_job(tmp_path: Path) -> None:
    make = run_maker(tmp_path)
    finished, failed, interrupted = make("a"), make("b", outcome="failed"), make("c", outcome=None)
    assert [job_of(run, tmp_path).status for run in (finished, failed, interrupted)] == [
        "succeeded",
        "failed",
        "failed",
    ]
    assert strictly(job_of(finished, tmp_path)).fine_tuned_model.startswith("ft:gpt:athanor::")
    write_json(failed.dir.exit, read_json(failed.dir.exit) | {"reason": "exit", "code": 1})
    for run in (failed, interrupted):
        job = strictly(job_of(run, tmp_path))
        assert (job.fine_tuned_model, job.result_files) == (None, [])
        assert job.error.message
    stopped = make("d", outcome="stopped")
    for how, status in {"save": "paused", "kill": "cancelled"}.items():
        write_json(stopped.dir.request, read_json(stopped.dir.request) | {"stop": {"how": how, "by": "", "at": 1e9}})
        assert job_of(stopped, tmp_path).status == status
    waiting = make("e", outcome=None)
    waiting.dir.keeper.unlink()
    assert strictly(job_of(waiting, tmp_path)).status == "queued"
    write_json(waiting.dir.request, read_json(waiting.dir.request) | {"held": True})
    assert job_of(waiting, tmp_path).status == "paused"


@pytest.mark.parametrize(
    "stage", [{"kind": "sft"}, {"kind": "dpo", "beta": 0.2}, {"kind": "grpo", "rewards": ["exact"]}]
)
def test_a_run_that_was_started_on_the_page_is_a_job(tmp_path: Path, stage: dict[str, Any]) -> None:
    run = run_maker(tmp_path)("page", stage=stage, training__learning_rate=2e-4, data__eval_datasets=["held-out"])
    job = strictly(job_of(run, tmp_path))
    assert (job.model, job.training_file, job.validation_file, job.metadata) == ("gpt", "file-1", "held-out", None)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (3, 16 if stage["kind"] != "grpo" else 2)
    # The usual rate is 1e-4, and a tenth of it for the others.
    assert job.hyperparameters.learning_rate_multiplier == (2 if stage["kind"] == "sft" else 20)
    place = Workplace(saves=tmp_path)
    for name, role, count in (("", OPERATOR, 1), ("root", OPERATOR, 1), ("ada", USER, 0), ("", USER, 0)):
        assert len(list(jobs.jobs(place, MODELS, Caller(Person(name, role))))) == count
    other = run_maker(tmp_path / "kto")("kto", stage={"kind": "kto"})
    assert list(jobs.jobs(Workplace(saves=other.path.parents[2]), MODELS, Caller(Person("", OPERATOR)))) == []


def test_graders_are_rewards_with_a_weight_each() -> None:
    compares = {"name": "g", "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
    differs = {"type": "string_check", "operation": "ne", **compares}
    similar = {"type": "text_similarity", "evaluation_metric": "bleu", **compares}
    assert rewards(differs) == Rewards({"exact": -1.0}, "answer")
    assert rewards(similar) == Rewards({"bleu": 1.0}, "answer")
    for formula, weights in {
        "a": {"exact": -1, "bleu": 0},
        "-a + b * 2 - 1": {"exact": 1, "bleu": 2},
        "(a - b) / 4": {"exact": -0.25, "bleu": -0.25},
    }.items():
        multi = {"type": "multi", "name": "m", "graders": {"a": differs, "b": similar}, "calculate_output": formula}
        assert rewards(multi).weights == pytest.approx(weights)


def test_events_and_checkpoints_are_read_from_the_folder(tmp_path: Path) -> None:
    run = run_maker(tmp_path)("run", falling(20))
    append_lines(run.dir.metrics, [{"step": 20, "epoch": 1.0, "time": 11.0, "loss": 0.25}])  # of a resumed run
    append_lines(run.dir.metrics, [{"step": "x", "loss": 1}, {"step": 21, "time": 12.0, "loss": float("nan")}])
    write_warning(run.dir, problem("loss-zero", count=3, step=7), 7)
    checkpoint = run.path / "checkpoint-10"
    checkpoint.mkdir()
    (run.path / "checkpoint-20").mkdir()  # interrupted while it was written
    write_json(checkpoint / "complete.json", {})
    job = job_of(run, tmp_path)
    listed = [FineTuningJobEvent.model_validate(event.as_object(job), strict=True) for event in events.events(job)]
    assert len({event.id for event in listed}) == len(listed)
    assert [event.created_at for event in listed] == sorted((event.created_at for event in listed), reverse=True)
    assert [event.level for event in listed if event.type == "message"].count("warn") == 1
    data = {event.data["step"]: event.data for event in listed if event.type == "metrics"}
    assert (data[20]["train_loss"], "train_loss" in data[21], len(data)) == (0.25, False, 21)
    assert data[10]["valid_loss"] == data[10]["full_valid_loss"] == pytest.approx(data[10]["train_loss"] + 0.2)
    [checkpoint] = events.checkpoints(job)
    saved = FineTuningJobCheckpoint.model_validate(checkpoint.as_object(job), strict=True)
    assert (saved.step_number, saved.metrics.train_loss) == (10, data[10]["train_loss"])
    table = events.results_csv(job).splitlines()
    assert (len(table), table[0].split(",")[:2]) == (22, ["step", "train_loss"])
    assert events.results_size(job) == len(events.results_csv(job).encode())
    empty = job_of(run_maker(tmp_path / "empty")("none"), tmp_path / "empty")
    head = "step,train_loss,train_mean_token_accuracy,valid_loss,valid_mean_token_accuracy"
    assert (events.results_csv(empty).splitlines(), events.checkpoints(empty)) == ([head], [])
    assert [event for event in events.events(empty) if event.data] == []


LONG = 100_000
COMPARES = {"name": "g", "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}


def bytes_read() -> int:
    """How much this thread has read so far."""
    return int(Path("/proc/thread-self/io").read_text().split("rchar: ")[1].split()[0])


def test_a_page_of_the_events_of_a_long_job_reads_no_more_than_it_shows(tmp_path: Path) -> None:
    run = run_maker(tmp_path)("run")
    lines = [
        f'{{"step": {step}, "epoch": 1, "time": {step / 4}, "loss": {1 / step:.6g}}}' for step in range(1, LONG + 1)
    ]
    # Validated at every tenth step; and resumed at step 99,990, of which the later lines count.
    lines = [
        line if step % 10 else f'{line}\n{{"step": {step}, "epoch": 1, "time": {step / 4 + 0.1}, "eval_loss": 2.0}}'
        for step, line in enumerate(lines, 1)
    ]
    again = [f'{{"step": {step}, "epoch": 1, "time": {step / 4}, "loss": 7.0}}' for step in range(LONG - 9, LONG + 3)]
    run.dir.metrics.write_text("\n".join([*lines, '{"step": 100001, "ti', *again, ""]))
    ended = run.dir.metrics.stat().st_mtime
    write_json(run.dir.exit, read_json(run.dir.exit) | {"ended": ended + 5})
    write_json(run.dir.request, read_json(run.dir.request) | {"submitted": ended - LONG})
    middle = ended - LONG / 8 - 0.5  # half-way, between two steps
    marker = run.path / "checkpoint-50" / "complete.json"
    marker.parent.mkdir()
    write_json(marker, {})
    os.utime(marker, (middle, middle))
    job = job_of(run, tmp_path)

    def page(after: str, most: int) -> list[events.Event]:
        before = bytes_read()
        shown = list(islice(events.events(job, after), most))
        assert bytes_read() - before < 1 << 18
        return shown

    newest = page("", 20)
    steps = [event.data["step"] for event in newest if event.data]
    assert steps == list(range(LONG + 2, LONG + 2 - len(steps), -1))
    assert [event.data["train_loss"] for event in newest if event.data] == [
        7.0 if step >= LONG - 9 else pytest.approx(1 / step, rel=1e-5) for step in steps
    ]
    assert newest[0].key[0] == "succeeded"
    second = page(newest[-1].id(job), 3)
    assert [event.data["step"] for event in second] == [steps[-1] - 1, steps[-1] - 2, steps[-1] - 3]
    everything = list(events.events(job))
    assert [event.data["step"] for event in everything if event.data] == list(range(LONG + 2, 0, -1))
    assert sum("valid_loss" in event.data for event in everything) == LONG // 10 - 1  # the last was repeated without
    places = [event.place for event in everything]
    assert places == sorted(places, reverse=True)
    saved = next(at for at, event in enumerate(everything) if event.key == ("checkpoint", 50))
    for at in (0, saved - 1, saved, saved + 1, len(everything) - 30, len(everything) - 2, len(everything) - 1):
        assert page(everything[at].id(job), 7) == everything[at + 1 : at + 8], at
    for wrong in (everything[-9].id(job)[:-1] + "f", "ftevent-" + "0" * 24 + "-1", "ftevent-x", "a" * 10**5):
        with pytest.raises(ApiError) as refused:
            events.events(job, wrong)
        assert refused.value.param == "after"


def test_the_grader_of_a_run_that_was_started_on_the_page_says_what_its_rewards_are(tmp_path: Path) -> None:
    write_json(tmp_path / "dataset_info.json", {"names": {"file_name": "n.json", "columns": {"response": "reply"}}})
    (tmp_path / "n.json").write_text('[{"instruction": "a", "reply": "b"}]')
    make = run_maker(tmp_path / "saves")

    def grader(name: str, rewards_: dict[str, float], **more: Any) -> dict[str, Any]:
        stage = {"kind": "grpo", "rewards": rewards_, **more}
        run = make(name, stage=stage, data__dataset_dir=str(tmp_path))
        return job_of(run, tmp_path / "saves").as_object({})["method"]["reinforcement"]["grader"]

    single = grader("a", {"contains": 1.0})
    assert single == {"type": "string_check", "operation": "like", **COMPARES, "name": "contains"} | {
        "reference": "{{item.reply}}"
    }
    several = grader("b", {"rouge_l": 2.0, "exact": -0.5, "length": 1.0}, reward_length=9)
    assert several["calculate_output"] == "2 * rouge_l - 0.5 * exact + 1 * length"
    assert (several["graders"]["rouge_l"]["type"], several["graders"]["length"]["type"]) == (
        "text_similarity",
        "python",
    )
    assert all(line.startswith("#") for line in several["graders"]["length"]["source"].splitlines())
    # What can be said in OpenAI's words is read back as the same.
    del several["graders"]["length"]
    weights = rewards(several | {"calculate_output": "2 * rouge_l - 0.5 * exact"})
    assert weights == Rewards({"rouge_l": 2.0, "exact": -0.5}, "reply")


def test_what_a_damaged_spec_said_is_not_invented(tmp_path: Path) -> None:
    run = run_maker(tmp_path)("run", training__num_train_epochs=7.0)
    run.dir.spec.write_text(run.dir.spec.read_text() + "no_such_setting: 1\n")
    job = job_of(run, tmp_path).as_object({"names": "file-1"})
    assert (job["method"], job["seed"]) == ({"type": "supervised", "supervised": {"hyperparameters": {}}}, None)
    assert (job["training_file"], job["validation_file"]) == ("file-1", None)
    assert set(job["hyperparameters"].values()) == {None}


def test_a_suffix_is_kept_as_it_was_sent(tmp_path: Path) -> None:
    run = run_maker(tmp_path)("run")
    write_json(run.dir.request, read_json(run.dir.request) | {"api": {"model": "gpt", "suffix": "After <b>"}})
    job = strictly(job_of(run, tmp_path))
    assert job.user_provided_suffix == "After <b>"
    assert job.fine_tuned_model.startswith("ft:gpt:athanor:after-b:")
    assert JobRequest(model="gpt", training_file="x", suffix="After <b>").suffix == "After <b>"


def test_a_job_that_has_been_resumed_since_it_was_read_is_cancelled_as_it_is_now(tmp_path: Path) -> None:
    run = run_maker(tmp_path)("run", outcome="stopped")
    paused = read_json(run.dir.request) | {"stop": {"how": "save", "by": "", "at": 1e9}}
    write_json(run.dir.request, paused)
    job = job_of(run, tmp_path)
    assert job.status == "paused"
    write_json(run.dir.request, paused | {"stop": None, "attempt": 2})  # resumed: it waits again
    for ended in (run.dir.keeper, run.dir.exit):
        ended.unlink()
    jobs.cancel(job, Caller(Person("", OPERATOR)))
    assert job_of(run, tmp_path).status == "cancelled"
    with pytest.raises(Refusal):
        jobs.cancel(job, Caller(Person("", OPERATOR)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": []},
        {"type": "python", "source": "x" * 10**6},
        {"type": "string_check", "operation": {}, **COMPARES},
        {"type": "text_similarity", "evaluation_metric": [], **COMPARES},
        {"type": "string_check", "operation": "eq", **COMPARES, "name": "g" * 101},
        {"type": "string_check", "operation": "eq", **COMPARES, "name": 1},
        {"type": "string_check", "operation": "eq", **COMPARES, "reference": "{{item." + "c" * 101 + "}}"},
        {"type": "string_check", "operation": "eq", **COMPARES, "input": " " * 10**6 + "{{sample.output_text}}"},
        {"type": "multi", "graders": [COMPARES], "calculate_output": "g"},
    ],
)
def test_a_grader_of_other_types_or_without_end_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        rewards(wrong)
    assert (refused.value.status, refused.value.code) == (400, "invalid_grader")
