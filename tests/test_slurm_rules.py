"""Slurm without a cluster: what is asked, submitted, claimed and refused. The runs on a real one: `test_slurm`."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import following
from engine.core import hardware
from engine.core.locks import try_lock
from engine.core.problems import Refusal
from engine.core.run_warnings import read_warnings
from engine.core.rundir import RunDir, read_object, write_json
from engine.launch import command
from engine.launch.engine_choice import EngineChoice, read_choice, settle_choice
from engine.launch.machine import machine_command
from engine.launch.workspace import Workplace
from engine.preflight import checks
from engine.runs import (
    attempts,
    engines,
    failures,
    kinds,
    queue,
    queue_order,
    resumption,
    runs,
    slurm,
    slurm_batch,
    slurm_queue,
    supervisor,
)
from engine.runs.plan import summary
from engine.runs.run import Run
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec
from tests.conftest import wait_until
from tests.preloaded import run_python
from tests.slurm_commands import stand_in_commands
from webui.train_tab import plan_html
from webui.words import Words


@pytest.fixture
def answering(tmp_path: Path, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A workplace of Slurm; the fixture writes what its commands are, as shell scripts by their names."""
    (workplace.saves / "engine.yaml").write_text("engine: slurm\n", encoding="utf-8")
    yield stand_in_commands(tmp_path, monkeypatch)
    slurm.forget()


def test_a_squeue_that_hangs_is_waited_for_once(
    answering: Callable[..., None],
    workplace: Workplace,
    make_spec: Callable[..., RunSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answering(squeue="exec sleep 60")
    for name, seconds in (("FRESH", 0.1), ("OLD", 0.6), ("SQUEUE_LIMIT", 0.6), ("WAIT_LIMIT", 0.2)):
        monkeypatch.setattr(slurm, f"{name}_SECONDS", seconds)
    run = runs.submit(make_spec(), workplace)
    assert read_object(run.dir.slurm) | {"submitted": 0} == {"job": "7", "user": str(os.getuid()), "submitted": 0}
    run.dir.keeper.write_text("{}", encoding="utf-8")  # as if it had been started
    run.dir.heartbeat.touch()
    slurm.forget()
    waits: list[tuple[threading.Thread, float]] = []  # calls, and for how long a look was ready to wait for them
    join = threading.Thread.join

    def note_and_join(call: threading.Thread, timeout: float) -> None:
        waits.append((call, timeout))
        join(call, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", note_and_join)
        for _ in range(30):
            assert runs.read(run.path, workplace.saves).state == "preparing"  # and not dead
            time.sleep(0.05)
    assert waits[0][1] == pytest.approx(0.2)
    waited_for = [call for call, wait in waits if wait > 0.01]
    assert len(waited_for) == len({*waited_for}), waits  # each once, though one call after the other hangs
    assert "no answer" in engines.doubt(run).text()
    os.utime(run.dir.heartbeat, (0, 0))
    assert runs.read(run.path, workplace.saves).state == "preparing"  # only Slurm can say that it has ended
    assert slurm_queue.left(run.dir).code == "slurm-still-unknown"


def test_an_attempt_that_saved_nothing_before_its_time_was_over_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(slurm, "requeue", lambda job: started.append(job) or "")
    monkeypatch.setattr(slurm_batch, "REQUEUE_SECONDS", 0)
    run = RunDir(tmp_path / "saves" / "m" / "lora" / "run")
    run.path.mkdir(parents=True)
    run.request.write_text('{"submitted": 1, "attempt": 1, "kind": "training"}', encoding="utf-8")
    run.pause.write_text("{}", encoding="utf-8")
    left = [3600.0, 100.0, None, 3600.0]
    monkeypatch.setattr(slurm, "seconds_left", lambda _job: left.pop(0))
    slurm_batch._conclude(run, "7", 0, 0, 120)  # preempted: the next attempt has the whole time again
    assert (run.exit.exists(), started) == (False, ["7"])
    started.clear()
    slurm_batch._conclude(run, "7", 0, 0, 120)
    ended_run = runs.read(run.path, tmp_path / "saves")
    assert (ended_run.state, started) == ("failed", [])
    why = failures.explain(ended_run)
    assert "before a checkpoint could be saved" in why.what()
    assert "--time" in why.advice("zh")
    run.exit.unlink()
    slurm_batch._conclude(run, "7", 0, 0, 120)  # squeue does not tell: it may be preempted
    assert (run.exit.exists(), started) == (False, ["7"])
    started.clear()
    (run.path / "checkpoint-4").mkdir()
    (run.path / "checkpoint-4" / "complete.json").write_text("{}", encoding="utf-8")
    run.error.write_text('{"type": "ValueError", "message": "m"}', encoding="utf-8")
    slurm_batch._conclude(run, "7", 1, 0, 120)
    assert (read_object(run.exit)["outcome"], started) == ("failed", [])  # the next attempt would fail, too
    run.exit.unlink()
    run.error.unlink()
    slurm_batch._conclude(run, "7", 0, 0, 120)
    assert (run.exit.exists(), started) == (False, ["7"])
    run.request.write_text('{"submitted": 1, "attempt": 1, "stop": {"how": "save"}}', encoding="utf-8")
    slurm_batch._conclude(run, "7", 0, 0, 120)  # somebody has stopped it in the meantime
    assert (read_object(run.exit)["outcome"], started) == ("stopped", ["7"])
    run.exit.unlink()
    run.request.write_text('{"submitted": 1, "attempt": 1}', encoding="utf-8")
    monkeypatch.setattr(slurm, "requeue", lambda _job: "slurmctld is gone")
    slurm_batch._conclude(run, "7", 0, 4, 120)
    assert read_object(run.exit)["reason"] == "slurm-not-again"  # nothing was saved, and it cannot start again
    assert left == []
    run.log.write_text("Slurm does not start the job again: slurmctld is gone\n", encoding="utf-8")  # as printed there
    assert failures.explain(runs.read(run.path, tmp_path / "saves")).what().endswith("slurmctld is gone")


def test_only_a_training_is_told_that_its_time_is_nearly_over(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    requests = {"evaluation": {"kind": "evaluation"}, "export": {"kind": "export"}, "training": {"kind": "training"}}
    for kind, request in [*requests.items(), ("training", {})]:  # the last as versions without kinds have written it
        write_json(run.request, {"submitted": 1, "attempt": 1, **request})
        run.pause.unlink(missing_ok=True)
        slurm_batch._pause(run)
        assert run.pause.exists() == (kind == "training")


def test_an_attempt_that_slurm_has_ended_is_put_aside_under_its_own_number(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_json(run.request, {"submitted": 1, "attempt": 1, "kind": "training"})
    write_json(run.keeper, {"attempt": 1})
    (run.attempts / "1").mkdir(parents=True)  # the machine has failed while its files were put there
    write_json(RunDir(run.attempts / "1").pause, {})
    slurm_batch.put_last_aside(run)
    assert (run.attempt(), RunDir(run.attempts / "1").keeper.exists()) == (2, True)
    write_json(run.pause, {})  # before the next had begun
    slurm_batch.put_last_aside(run)
    assert (run.attempt(), run.pause.exists()) == (2, False)


def test_one_of_two_submissions_wins(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert slurm_queue.claim(run, "3")
    assert not slurm_queue.claim(run, "4")
    assert slurm_queue.claim(run, "3")
    assert read_object(run.slurm)["job"] == "3"


def test_the_answers_of_the_commands_are_parsed() -> None:
    lines = "12|PENDING|QOSMaxJobsPerUserLimit|a|b", "13|RUNNING|None|c", "slurm_load_jobs error|x"
    jobs = slurm.parse_jobs("\n".join([*lines, "1_2|RUNNING|None|d", ""]))
    assert set(jobs) == {"12", "13"}
    assert (jobs["12"].waits, jobs["12"].reason, jobs["12"].name) == (True, "QOSMaxJobsPerUserLimit", "a|b")
    assert (jobs["13"].waits, jobs["13"].alive) == (False, True)
    assert [slurm.parse_submitted(text) for text in ("4\n", "warning\n5;cluster\n", "", "x")] == ["4", "5", None, None]
    assert slurm.complaint("sbatch: error: A\nsbatch: error: B\n") == "A; B"
    times = [slurm.parse_time_left(text) for text in ("1-02:00:05\n", "2:00:00", "4:05", "UNLIMITED", "INVALID", "")]
    assert times == [93605, 7200, 245, math.inf, None, None]
    assert slurm.parse_address("NodeName=n1 NodeAddr=10.0.0.7 NodeHostName=x") == "10.0.0.7"
    kept = slurm.environment({"SLURM_CONF": "f", "SLURM_JOB_ID": "1", "SBATCH_PARTITION": "p", "HOME": "h"})
    assert kept == {"SLURM_CONF": "f", "HOME": "h"}
    launch = [sys.executable, "-m", "engine.worker.launch", "--machine_rank", "0", "--module", "m", "folder"]
    assert machine_command(launch, 1, "10.0.0.7")[3:] == [
        "--machine_rank", "0", "--machine_rank", "1", "--main_process_ip", "10.0.0.7", "--module", "m", "folder",
    ]  # fmt: skip
    check = [sys.executable, "-m", "engine.worker.check_ranks", "--machine_rank=0", "folder"]
    assert machine_command(check, 1, "10.0.0.7")[3:] == [
        "--machine_rank=0", "--machine_rank", "1", "--main_process_ip", "10.0.0.7", "folder",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("engine: slrum\n", "engine-file-wrong", "slrum"),
        ("engine: slurm\npartitoin: gpu\n", "engine-file-wrong", "partition"),
        ("engine: slurm\ngpus_per_machine: -1\n", "engine-file-wrong", "≥ 0"),
        ("engine: slurm\nsbatch: [-p gpu]\n", "engine-sbatch-option", "-p gpu"),
        ("engine: slurm\nsbatch: ['--wrap=rm -r x']\n", "engine-sbatch-option", "wrap"),
        ("engine: slurm\nsbatch: [--wait]\n", "engine-sbatch-option", "wait"),
        ("engine: slurm\nsbatch: [--clust=other]\n", "engine-sbatch-option", "clust"),
        ("engine: slurm\nsbatch: [--no-requeue]\n", "engine-sbatch-option", "no-requeue"),
        ('engine: slurm\nsbatch: ["--qos=a\\nb"]\n', "engine-sbatch-option", "qos"),
        ("engine: slurm\nchat_sbatch: [--export=NONE]\n", "engine-sbatch-option", "export"),
        ("chats: mars\n", "engine-file-wrong", "mars"),
        ("warning_seconds: 70000\n", "engine-file-wrong", "≤ 65535"),
        ("chat_servers: 0\n", "engine-file-wrong", "≥ 1"),
        ("[", "engine-file-wrong", "Line 1, column 2"),
    ],
)
def test_a_wrong_engine_file_says_what_is_wrong(tmp_path: Path, text: str, code: str, words: str) -> None:
    (tmp_path / "engine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(Refusal) as refused:
        read_choice(tmp_path)
    assert refused.value.problems[0].code == code
    assert words in refused.value.text()
    assert refused.value.text("zh") != refused.value.text()


def test_the_engine_is_chosen_once_for_a_saves_folder(tmp_path: Path) -> None:
    assert settle_choice(tmp_path, None) is None
    assert not (tmp_path / "engine.yaml").exists()
    with pytest.raises(Refusal, match="kubernetes"):
        settle_choice(tmp_path, "kubernetes")
    try:
        assert settle_choice(tmp_path, "slurm").code == "engine-chosen"
        assert settle_choice(tmp_path, "slurm") is None
        with pytest.raises(Refusal, match="slurm"):
            settle_choice(tmp_path, "local")
    finally:
        hardware.plan_for(None)


def test_machines_and_gpus_are_checked_against_the_engine(
    workplace: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    def codes(**changes: Any) -> set[str]:
        spec = make_spec(**{"hardware__device": "auto", **changes})
        return {problem.code for problem in checks.preflight_problems(spec, workplace) + spec_problems(spec)}

    two = {"hardware__num_machines": 2, "hardware__num_processes": 2}
    assert "machines-on-local" in codes(**two)
    assert "machines-uneven" in codes(hardware__num_machines=2)
    assert "devices-on-slurm" not in codes(**two, hardware__devices=[0, 1])
    choice = EngineChoice(engine="slurm", partition="gpu", sbatch=["--qos=high"], gpus_per_machine=8, gpu_memory_gb=80)
    (workplace.saves / "engine.yaml").write_text(choice.model_dump_json(), encoding="utf-8")
    try:
        settle_choice(workplace.saves, None)
        assert codes(**two) <= {"torch-without-cuda"}  # which is true here
        assert "devices-on-slurm" in codes(hardware__devices=[3])
        assert "too-few-cards" in codes(hardware__num_machines=2, hardware__num_processes=32)
        run = Run("a/b/c", tmp_path / "50%", "queued", {}, None)
        words = slurm_queue.options(run, make_spec(**two, hardware__device="auto"), choice)
        assert {"--nodes=2", "--gres=gpu:1", "--partition=gpu", f"--output={tmp_path}/50%%/log.txt"} <= {*words}
        assert words[-1] == "--qos=high"
        assert "--signal=B:USR1@120" in words
        assert not [word for word in words if "cpus" in word]  # nobody knows how many cores there are
        choice = choice.model_copy(update={"cores": 100, "warning_seconds": 600})
        words = slurm_queue.options(run, make_spec(**two, hardware__device="auto"), choice)
        assert {"--cpus-per-gpu=12", "--signal=B:USR1@600"} <= {*words}
        assert slurm_queue.script(run.path, choice).split()[-1] == "600"
        choice = choice.model_copy(update={"sbatch": ["--cpus-per-task=3"]})
        words = slurm_queue.options(run, make_spec(**two, hardware__device="auto"), choice)
        assert [word for word in words if "cpus" in word] == ["--cpus-per-task=3"]
        assert "--cpus-per-task=2" in slurm_queue.options(run, make_spec(hardware__num_processes=2), choice)
    finally:
        hardware.plan_for(None)


def test_what_the_file_says_of_the_machines_is_followed_and_what_it_does_not_say_is_not_guessed(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = workplace.saves / "engine.yaml"
    monkeypatch.setattr(hardware, "memory", lambda: (1 << 30, 1 << 30))  # of the studio, which does not compute
    monkeypatch.setattr(hardware, "threads", lambda: 1)

    def lines(text: str, machines: int = 2) -> dict[str, Any]:
        file.write_text(f"engine: slurm\n{text}", encoding="utf-8")
        spec = make_spec(hardware__num_processes=8, data__preprocessing_num_workers=64)
        spec = spec.change("hardware.num_machines", machines)
        wrong = kinds.KINDS["training"].problems(spec, workplace)
        return {each.code: each.values for each in [*wrong, *kinds.KINDS["training"].doubts(spec, wrong)]}

    try:
        settle_choice(workplace.saves, None)
        assert not hardware.plans_elsewhere()
        assert lines("")["nodes-unknown"]["lines"] == "memory_gb, cores"
        assert (hardware.plans_elsewhere(), hardware.planned_gpus(), hardware.planned_memory()) == (True, (), None)
        shown = plan_html.plan(make_spec(), summary(make_spec(), workplace), (), Words("en"), known=True)
        assert "Estimated memory" in shown
        assert "(memory_gb), so whether this run fits there was not checked" in shown
        small = lines("memory_gb: 2.5\ncores: 4\n")
        assert small["processes-beyond-memory"] | {"each": 0} == {
            "given": 8, "machines": 2, "each": 0, "whole": "2.5 GB", "largest": 6,
        }  # fmt: skip
        assert small["workers-beyond-memory"]["largest"] == 4
        large = lines("memory_gb: 256\ncores: 4\n")
        assert large.keys() == {"more-workers-than-cores"}  # four processes on each
        assert lines("memory_gb: 256\ncores: 4\n", machines=1)["more-processes-than-cores"]["given"] == 8
        file.write_text("engine: slurm\ngpus_per_machine: 3\ngpu_memory_gb: 80\n", encoding="utf-8")
        assert [gpu.memory for gpu in hardware.planned_gpus()] == [80e9] * 3
        file.write_text("engine: slrum\n", encoding="utf-8")
        assert (hardware.plans_elsewhere(), hardware.planned_gpus()) == (True, ())
        file.unlink()
        assert (hardware.plans_elsewhere(), hardware.planned_memory()) == (False, 1 << 30)
    finally:
        hardware.plan_for(None)


def test_a_job_keeps_to_the_devices_that_its_run_was_submitted_for(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gpus(count: int, submitted_for: int, **changes: Any) -> int | str:
        spec = make_spec(**{"hardware__device": "auto", **changes})
        run = RunDir(workplace.saves / "m" / "lora" / "run")
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.request, {"devices": {"count": submitted_for, "indices": [], "memory": 0}})
        there = [hardware.Gpu(number, f"GPU-{number}", "H100", 1 << 30, 1 << 30, 9.0) for number in range(count)]
        monkeypatch.setattr(hardware, "gpus", lambda: tuple(there))
        try:
            return len(slurm_batch.Allocation(run).gpus(spec))
        except Refusal as refusal:
            return refusal.text() + refusal.text("zh")

    assert gpus(2, submitted_for=0) == 0
    assert gpus(2, submitted_for=1) == 2
    for there, changes in ((0, {}), (1, {"hardware__num_processes": 2})):
        text = gpus(there, 2, **changes)
        assert f"but sees {there} on" in text
        assert "不会擅自改用 CPU" in text


def test_processes_are_divided_among_the_machines_and_slurm_chooses_the_gpus(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(hardware__num_processes=4, hardware__device="auto", training__gradient_accumulation_steps=3)
    run = RunDir(workplace.saves / "m" / "lora" / "run")
    run.path.mkdir(parents=True)
    write_json(run.request, {"submitted": 1, "attempt": 1, "kind": "training"})
    write_json(run.exit, {"outcome": "stopped", "ended": 2.0, "attempt": 1})
    gpu = hardware.Gpu(0, "GPU-0", "H100", 1 << 30, 1 << 30, 9.0)
    monkeypatch.setattr(hardware, "gpus", lambda: (gpu, replace(gpu, index=1)))
    run.spec.write_text(spec.to_yaml(), encoding="utf-8")
    alone = runs.read(run.path, workplace.saves)
    assert resumption.possible_processes(alone) == [1, 2, 3, 4, 6, 12]
    assert len(resumption.selectable_gpus(alone)) == 2
    run.spec.write_text(spec.change("hardware.num_machines", 2).to_yaml(), encoding="utf-8")
    settle_choice(workplace.saves, "slurm")
    try:
        together = runs.read(run.path, workplace.saves)
        assert resumption.possible_processes(together) == [2, 4, 6, 12]
        assert resumption.selectable_gpus(together) == ()
        with pytest.raises(Refusal, match=r"3 processes on 2 machines\. Possible numbers of processes: 2, 4, 6, 12"):
            resumption.moved(together, 3, [])
    finally:
        hardware.plan_for(None)


def test_the_precision_of_a_run_is_decided_once(
    tmp_path: Path, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(hardware__device="auto", hardware__num_processes=2)
    for capabilities, precision in (((9.0, 9.0), "bf16"), ((9, 7.5), "fp16"), ((9, 9, 7.5), "bf16"), ((9, 0), None)):
        numbered = [hardware.Gpu(index, "GPU", "x", 1, 1, number) for index, number in enumerate(capabilities)]
        assert command.environment(spec, "run", numbered, 1).get(command.PRECISION_VARIABLE) == precision
    run = RunDir(tmp_path)
    for number, known in enumerate(("fp16", "bf16", ""), start=1):
        (run.attempts / str(number)).mkdir(parents=True)
        write_json(RunDir(run.attempts / str(number)).keeper, {"precision": known})
    assert attempts.decided_precision(run) == ""  # it begins again
    (tmp_path / "checkpoint-4").mkdir()
    write_json(tmp_path / "checkpoint-4" / "complete.json", {"step": 4, "done": False})
    assert attempts.decided_precision(run) == "bf16"
    for chosen, needed in (("auto", 8.0), ("fp32", 0.0), ("fp16", 0.0)):
        (tmp_path / "spec.yaml").unlink(missing_ok=True)
        (tmp_path / "spec.yaml").write_text(spec.change("training.precision", chosen).to_yaml(), encoding="utf-8")
        stopped = Run(f"a/b/{chosen}", tmp_path, "stopped", {}, {})
        resumed = resumption.with_precision(stopped, {"devices": {"capability": 0.0}})
        assert resumed == {"devices": {"capability": needed}}
    # On another machine of the run.
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setenv(hardware.GPUS_VARIABLE, "2")
    answers = json.loads(run_python("-c", DEVICES))
    assert answers["bf16 on 9 and 9"] == "bf16"
    assert answers["fp16 on 9 and 9"] == answers["None on 9 and 7"] == "fp16"
    assert "trains in bf16" in answers["bf16 on 9 and 7"]
    assert "Tesla 1 on n7 cannot" in answers["bf16 on 9 and 7"]
    assert "only 1 of the 2 GPUs of this run on n7" in answers["bf16 on 9"]


DEVICES = """
import json, os
import torch
from engine.core.problems import Refusal
from engine.launch.command import PRECISION_VARIABLE
from engine.worker.runtime.devices import auto_precision
answers = {}
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda gpu: f"Tesla {gpu}"
for majors in ((9, 9), (9, 7), (9,)):
    torch.cuda.device_count = lambda: len(majors)
    torch.cuda.get_device_capability = lambda gpu: (majors[gpu], 0)
    for decided in ("bf16", "fp16", None):
        os.environ[PRECISION_VARIABLE] = decided or ""
        try:
            answer = auto_precision()
        except Refusal as refusal:
            answer = str(refusal)
        answers[f"{decided} on {' and '.join(map(str, majors))}"] = answer
print(json.dumps(answers))
"""


def calls(tmp_path: Path) -> list[str]:
    """The commands of Slurm that were called, other than squeue, each with its first argument."""
    lines = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    words = [line.split() for line in lines]
    return [f"{Path(name).name} {first}" for name, first, *_ in words if not name.endswith("squeue")]


def test_a_job_that_cannot_be_noted_is_cancelled_and_the_others_go_on(
    answering: Callable[..., None], workplace: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    gone, other = (runs.submit(make_spec(), workplace, start=False) for _ in range(2))
    answering(sbatch=f"mv {gone.path} {tmp_path}/away 2>/dev/null && echo 7 || echo 8")  # deleted in the meantime
    engines.advance(workplace.saves)
    assert calls(tmp_path) == ["sbatch --parsable", "scancel 7", "sbatch --parsable"]
    assert read_object(other.dir.slurm)["job"] == "8"
    assert not gone.path.exists()
    assert not list(other.path.glob(".slurm-*"))


def test_an_sbatch_that_failed_but_submitted_is_not_repeated(
    answering: Callable[..., None],
    workplace: Workplace,
    make_spec: Callable[..., RunSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answering(sbatch="echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1", squeue="exit 1")
    run = runs.submit(make_spec(), workplace)
    assert "Socket timed out" in engines.place(run).decision.text()
    monkeypatch.setattr(slurm_queue, "RETRY_SECONDS", 0.0)
    engines.advance(workplace.saves)
    assert calls(tmp_path) == ["sbatch --parsable"]  # while squeue does not answer, nobody knows
    answering(squeue=f"echo '9|PENDING|None|{slurm_queue.job_name(run)}'")
    engines.advance(workplace.saves)
    assert (read_object(run.dir.slurm)["job"], run.dir.slurm_refused.exists()) == ("9", False)
    assert calls(tmp_path) == ["sbatch --parsable"]


def test_quotas_and_holds_keep_runs_back_from_slurm(
    answering: Callable[..., None], workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    (workplace.saves / "quotas.yaml").write_text("users: {ada: {runs_at_once: 1}}", encoding="utf-8")
    first, second, held = (runs.submit(make_spec(), workplace, by=by, start=False) for by in ("ada", "ada", "bob"))
    write_json(held.dir.request, read_object(held.dir.request) | {"held": True})
    answering(squeue="echo '7|PENDING|Resources|x'")
    engines.advance(workplace.saves)
    now = [runs.read(run.path, workplace.saves) for run in (first, second, held)]
    assert [run.dir.on_slurm() for run in now] == [True, False, False]
    assert [engines.place(run).decision.reason.code for run in now] == ["slurm-waits", "waits-quota", "waits-held"]
    assert queue_order.possible(now[2]) == queue_order.CHANGES
    queue_order.release(now[2])
    assert held.dir.on_slurm()
    runs.stop(now[0], "kill")
    engines.advance(workplace.saves)
    assert second.dir.on_slurm()


def test_the_turn_of_a_run_that_slurm_has_is_changed_there_or_not_at_all(
    answering: Callable[..., None], workplace: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    answering(squeue="echo '7|PENDING|Resources|x'", scontrol="")
    low = runs.submit(make_spec(), workplace, start=False)
    queue_order.set_priority(low, "low")  # also submits it
    assert calls(tmp_path) == ["sbatch --parsable", "scontrol update"]
    assert (tmp_path / "calls").read_text(encoding="utf-8").endswith("scontrol update JobId=7 Nice=10000\n")
    held = runs.submit(make_spec(), workplace, start=False)
    # Somebody holds it while it is being submitted.
    answering(sbatch=f'sed -i \'s/"attempt"/"held": true, "attempt"/\' {held.dir.request}; echo 7')
    engines.advance(workplace.saves)
    assert calls(tmp_path)[2:] == ["sbatch --parsable", "scontrol uhold"]
    queue_order.set_priority(runs.read(held.path, workplace.saves), "low")
    assert calls(tmp_path)[4:] == ["scontrol update", "scontrol uhold"]  # or Slurm would release it
    answering(squeue="echo '7|PENDING|Resources|x'", scontrol="echo 'Access/permission denied' >&2; exit 1")
    before = read_object(low.dir.request)
    with pytest.raises(Refusal, match="job 7: Access/permission denied"):
        queue_order.set_priority(low, "high")
    assert read_object(low.dir.request) == before
    with pytest.raises(Refusal, match="in Slurm's queue"):
        queue_order.move(low, "up")


def test_what_slurm_refuses_when_a_run_is_handed_over_is_said_and_taken_back(
    answering: Callable[..., None], workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    refusing = {"squeue": "echo '7|PENDING|Resources|x'", "scontrol": "echo 'Access denied' >&2; exit 1"}
    answering(**refusing)
    high, held = (runs.submit(make_spec(), workplace, start=False) for _ in range(2))
    answering(sbatch=f'sed -i \'s/"attempt"/"held": true, "attempt"/\' {held.dir.request}; echo 7', **refusing)
    queue_order.set_priority(high, "high")  # also submits both
    for run, field in ((high, "priority"), (held, "held")):
        assert run.dir.on_slurm()
        assert not read_object(run.dir.request)[field]
        assert [warning.problem.text() for warning in read_warnings(run.dir)] == [
            "Slurm does not change the turn of job 7: Access denied."
        ]


def test_a_run_that_is_handed_over_during_a_change_that_slurm_does_not_know_keeps_its_request(
    answering: Callable[..., None],
    workplace: Workplace,
    make_spec: Callable[..., RunSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, run = (runs.submit(make_spec(), workplace, start=False) for _ in range(2))
    waiting, before = queue.waiting, read_object(run.dir.request)

    def wait_and_hand_over(saves: Path) -> list[Run]:
        order = waiting(saves)
        assert slurm_queue.claim(run.dir, "7")
        return order

    monkeypatch.setattr(queue, "waiting", wait_and_hand_over)
    with pytest.raises(Refusal, match="in Slurm's queue"):
        queue_order.move(run, "up")
    assert read_object(run.dir.request) == before


def test_while_scontrol_takes_its_time_runs_can_be_stopped(
    answering: Callable[..., None],
    workplace: Workplace,
    make_spec: Callable[..., RunSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slurm, "COMMAND_LIMIT_SECONDS", 600.0)
    answering(squeue="echo '7|PENDING|Resources|x'")
    run = runs.submit(make_spec(), workplace)
    before, called, go_on = read_object(run.dir.request), tmp_path / "called", tmp_path / "go on"
    answering(
        squeue="echo '7|PENDING|Resources|x'",
        scontrol=f"touch '{called}'; until [ -e '{go_on}' ]; do sleep 0.05; done; echo 'Access denied' >&2; exit 1",
    )
    with ThreadPoolExecutor(1) as pool:
        try:
            change = pool.submit(queue_order.set_priority, run, "high")
            wait_until(called.exists)
            lock = try_lock(workplace.saves / ".queue.lock", 0, shared=False)
            assert lock is not None
            os.close(lock)
            runs.stop(run, "kill", "ada")
        finally:
            go_on.touch()
        assert isinstance(change.exception(), Refusal)
    after = read_object(run.dir.request)
    assert (after["stop"]["by"], after | {"stop": None}) == ("ada", before)  # only the change is taken back


def test_gpus_by_index_and_a_broken_engine_file_are_refused_before_anything_is_written(
    workplace: Workplace, tiny: Path, make_spec: Callable[..., RunSpec]
) -> None:
    spec = make_spec(hardware__device="auto", hardware__devices=[5])
    folder = workplace.saves / "m" / "lora" / "run"
    folder.mkdir(parents=True)
    run = RunDir(folder)
    run.spec.write_text(spec.to_yaml(), encoding="utf-8")
    write_json(run.request, {"submitted": 1, "attempt": 1, "kind": "training", "queued": 1, "by": ""})
    write_json(run.exit, {"outcome": "stopped", "reason": "stopped", "ended": 2.0, "attempt": 1})
    ended = runs.read(folder, workplace.saves)

    def refused(action: Callable[[], Any]) -> str:
        with pytest.raises(Refusal) as refusal:
            action()
        return refusal.value.problems[0].code

    for text, code in (("engine: slurm\n", "devices-on-slurm"), ("engine: slrum\n", "engine-file-wrong")):
        (workplace.saves / "engine.yaml").write_text(text, encoding="utf-8")
        assert refused(lambda: runs.resume(ended)) == code
        assert refused(lambda: resumption.moved(ended, None, [5])) == code
        assert {problem.code for problem in checks.engine_problems(spec.hardware, workplace.saves)} == {code}
    assert refused(lambda: runs.submit(make_spec(), workplace)) == "engine-file-wrong"
    for kind in (kinds.KINDS["evaluation"], kinds.KINDS["export"]):
        settings = kind.spec.read({"model": {"model_name_or_path": str(tiny)}})
        assert "engine-file-wrong" in {problem.code for problem in kind.problems(settings, workplace)}
    assert runs.find(workplace.saves) == [ended]
    assert (run.exit.exists(), run.attempts.exists()) == (True, False)
    # One that was submitted before the engine was changed ends with the reason.
    (workplace.saves / "engine.yaml").write_text("engine: slurm\n", encoding="utf-8")
    run.exit.unlink()
    engines.advance(workplace.saves)
    assert runs.read(folder, workplace.saves).state == "failed"
    assert read_object(run.error)["problems"][0]["code"] == "devices-on-slurm"
    leased = hardware.Gpu(2, "GPU-2", "name", 1 << 30, 1 << 30, 9.0)
    variables = command.environment(spec, folder, [leased], 1)
    assert (variables["CUDA_VISIBLE_DEVICES"], variables[hardware.UUIDS_VARIABLE]) == (leased.cuda_name, "GPU-2")


def test_each_attempt_counts_with_its_own_devices_and_not_while_it_waits_again(
    tmp_path: Path, make_spec: Callable[..., RunSpec]
) -> None:
    run = RunDir(tmp_path / "saves" / "m" / "lora" / "run")
    for number, started, at in ((1, 0, 3600), (2, 7200, 10800), (3, 14400, 18000)):
        folder = RunDir(run.attempts / str(number))
        folder.path.mkdir(parents=True)
        write_json(folder.keeper, {"started": started + 1e9, "leases": []})
        write_json(folder.progress, {"at": at + 1e9})
    RunDir(run.attempts / "2").spec.write_text(make_spec(hardware__num_processes=4).to_yaml(), encoding="utf-8")
    run.spec.write_text(make_spec(hardware__num_processes=2).to_yaml(), encoding="utf-8")
    write_json(run.keeper, {"started": 1e9 + 21600, "leases": []})
    write_json(run.progress, {"at": 1e9 + 25200})
    waiting = Run("m/lora/run", run.path, "queued", {"by": "ada"}, None)
    hours = [attempts.gpu_hours(replace(waiting, state=state), 1e9 + 28800) for state in ("queued", "running")]
    assert hours == [4 + 4 + 2 + 2, 4 + 4 + 2 + 4]
    assert attempts.gpu_hours(waiting, 1e9 + 28800, since=1e9 + 23400) == 1


def test_a_later_attempt_that_is_stopped_before_its_first_step_is_stopped(
    tmp_path: Path, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "saves" / "m" / "lora" / "run")
    run.adapter.mkdir(parents=True)
    write_json(run.adapter / "result.json", {"attempt": 1, "complete": False})
    run.spec.write_text(make_spec().to_yaml(), encoding="utf-8")
    run.log.touch()
    write_json(run.request, {"submitted": 1, "attempt": 2, "stop": {"how": "save"}})
    monkeypatch.setattr(supervisor, "_start", lambda *_: None)  # its children have nothing to do
    supervisor.write_exit(run, supervisor.supervise(run))
    assert read_object(run.exit)["outcome"] == "stopped"


def test_runs_that_slurm_has_take_nothing_of_this_machine(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in_commands(tmp_path, monkeypatch)(squeue="echo '7|RUNNING|None|x'")
    gpu = hardware.Gpu(0, "GPU-0", "H100", 1 << 40, 1 << 40, 9.0)
    monkeypatch.setattr(hardware, "all_gpus", lambda: (gpu,))
    monkeypatch.setattr(hardware, "cpu_runs", lambda: 1)
    elsewhere = [runs.submit(make_spec(), workplace, start=False) for _ in range(2)]
    for run, count in zip(elsewhere, (0, 1), strict=True):
        devices = {"count": count, "indices": [], "memory": 0}
        write_json(run.dir.request, read_object(run.dir.request) | {"devices": devices})
        write_json(run.dir.keeper, {"devices": "0"})
        run.dir.heartbeat.touch()
        slurm_queue.claim(run.dir, "7")
        assert run.dir.alive()
    machine = queue._machine([runs.read(run.path, workplace.saves) for run in elsewhere])
    assert (machine.taken, machine.on_cpu) == ({}, [])
    waiting = runs.submit(make_spec(), workplace, start=False)
    [(first, decision)] = queue.decisions(workplace.saves)
    assert (first.path, decision.starts) == (waiting.path, True)


def test_how_an_earlier_attempt_communicated_says_nothing_of_this_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_json(run.request, {"attempt": 2})
    write_json(run.connection, {"attempt": 1, "variables": {"NCCL_P2P_DISABLE": "1"}})
    assert command.connection_variables(run) == {}
    write_json(run.connection, {"attempt": 2, "variables": {"NCCL_P2P_DISABLE": "1"}})
    assert command.connection_variables(run) == {"NCCL_P2P_DISABLE": "1"}


def test_a_shell_shows_the_output_of_every_machine(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run, shown = RunDir(tmp_path), dict[Path, int]()
    run.log.write_bytes(b"step 1\r")
    run.log_of(1).write_bytes(b"loading\nhal")
    following._print_new(run.logs(), shown, is_final=False)
    assert capfdbinary.readouterr().out == b"step 1\r\n[machine 2] loading\n"
    run.log.write_bytes(b"step 1\rstep 2\n")
    run.log_of(1).write_bytes(b"loading\nhalf\n\nends")
    following._print_new(run.logs(), shown, is_final=False)
    assert capfdbinary.readouterr().out == b"step 2\n[machine 2] half\n"
    following._print_new(run.logs(), shown, is_final=True)
    assert capfdbinary.readouterr().out == b"[machine 2] ends\n"
