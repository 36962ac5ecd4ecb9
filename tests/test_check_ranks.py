"""Before a run of several processes trains, they add up numbers on its devices. Real processes (gloo) throughout.

No machine of the tests has GPUs whose connection fails, so the sum itself is replaced where a test says so: by one that
is wrong, or never comes, unless both variables are set that keep NCCL off direct connections.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.problems import LANGUAGES
from engine.core.rundir import RunDir, read_json
from engine.launch.processes import find_processes
from engine.launch.workspace import PROJECT, Workplace
from engine.preflight import doctor
from engine.runs import failures, runs
from engine.spec.run_spec import RunSpec
from engine.worker.check_ranks import LIMIT_VARIABLE
from engine.worker.runtime.all_reduce import INDIRECT
from tests.conftest import wait_until
from tests.forked import start_forking_process
from tests.nvml import Nvml
from tests.ports import reserved_ports
from tests.preloaded import run_python
from tests.train_many import lay_out
from webui.runs_tab import head_html
from webui.words import Words

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]

# What takes the place of the sum: it fails in this way unless both variables are set.
FAULT = """
import os, signal, time
from engine.worker.runtime import all_reduce as module
real = module.all_reduce
def faulty(rank, *rest):
    if {unless} and all(os.environ.get(name) == "1" for name in module.INDIRECT):
        return real(rank, *rest)
    {fault}
module.all_reduce = faulty
"""
WRONG = 'raise ArithmeticError("the sum over all processes is wrong")'
SILENT = "time.sleep(600)"
ENDLESS_PREPARATION = """
from engine.worker.runtime import process_lifecycle
process_lifecycle.ProgressReport = lambda _run: time.sleep(600)
"""
TRIALS = f"""
import json, os
import torch
from engine.worker import check_ranks
from engine.worker.runtime import all_reduce as module, machine
real, failure = module.all_reduce, lambda limit=60: module.all_reduce_failure(2, "gloo", limit, {{}}, fork=True)
answers = {{"real": failure(), "nccl": module.all_reduce_failure(2, "nccl", 60, {{}}, fork=True)}}
def adding(tensor, real=torch.distributed.all_reduce):
    real(tensor)
    tensor[-1] += 1  # of the many; the few are whole
torch.distributed.all_reduce = adding
answers["sum"] = failure()
for text in ("abc", "-1", "nan", "inf", "", "7"):
    os.environ[check_ranks.LIMIT_VARIABLE] = text
    answers[f"limit {{text}}"] = check_ranks._limit()
for name, fault in {{"silent": {SILENT!r}, "killed": "os.kill(os.getpid(), signal.SIGKILL)"}}.items():
    exec({FAULT!r}.format(unless=False, fault=f"{{fault}} if rank else time.sleep(600)"))
    answers[name] = failure(1 if name == "silent" else 60)
machine.all_reduce_failure = lambda *words: "" if words[-1] else "no answer"
machine.try_ranks(2)
print(json.dumps(answers))
"""


def test_real_processes_add_up_and_each_failure_is_noticed() -> None:
    *finding, answers = map(json.loads, run_python("-c", TRIALS).splitlines()[-2:])
    assert answers.pop("nccl")  # there is no GPU
    assert answers == {
        "real": "",
        "sum": "ArithmeticError: the sum over all processes is wrong",
        "silent": "no answer within 1 s",
        "killed": "exit code -9",
        **{f"limit {text}": 60.0 for text in ("abc", "-1", "nan", "inf", "")},
        "limit 7": 7.0,
    }
    assert [(each["level"], each["code"]) for each in finding] == [("doubtful", "machine-ranks-indirect")]


@pytest.fixture(scope="module", autouse=True)
def unchanged() -> None:
    """What processes are forked from has started before a test replaces the sum in those that start."""
    start_forking_process()


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """Two GPUs, on which trainings compute on the CPU."""
    nvml = Nvml(tmp_path / "library", monkeypatch)
    nvml.report(gpus=[{"uuid": f"GPU-{number}", "memory": 80 << 30, "free": 79 << 30} for number in range(2)])
    monkeypatch.setenv("PYTHONPATH", f"{PROJECT}:{nvml.folder}")  # what takes the place of the sum imports ours
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "13.0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return nvml


def replace_sum(nvml: Nvml, unless: bool, fault: str) -> None:
    """In the processes of runs that start from now on."""
    start = nvml.folder / "sitecustomize.py"
    start.write_text(start.read_text(encoding="utf-8") + FAULT.format(unless=unless, fault=fault), encoding="utf-8")


def test_gpus_that_communicate_only_indirectly_train_in_this_way_and_the_run_says_so(
    two_gpus: Nvml, workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_sum(two_gpus, unless=True, fault=WRONG)
    spec = make_spec(hardware__device="auto", hardware__num_processes=2, training__max_steps=100_000)
    run = runs.submit(spec, workplace)
    wait_until(lambda: runs.state(run.dir) == "running")
    assert read_json(run.dir.connection) == {
        "attempt": 1,
        "variables": INDIRECT,
        "why": "ArithmeticError: the sum over all processes is wrong",
    }
    ranks = [process.environ() for process in find_processes(run.path) if "RANK" in process.environ()]
    assert {environment["RANK"] for environment in ranks} == {"0", "1"}
    assert all(environment.items() >= INDIRECT.items() for environment in ranks)
    assert "Trying again with NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1" in run.dir.log.read_text(encoding="utf-8")
    for language, sentence in (
        ("en", "The GPUs 0, 1 cannot communicate directly"),
        ("zh", "显卡 0, 1 之间无法直接通信"),
    ):
        assert sentence in head_html.cautions(runs.get(workplace.saves, run.id), Words(language))
    runs.stop(run, "kill")
    wait_until(run.dir.exit.exists)

    # On GPUs that do not communicate at all, nothing is trained, and the run names what was tried.
    replace_sum(two_gpus, unless=False, fault=SILENT)
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    runs.resume(runs.get(workplace.saves, run.id))
    wait_until(run.dir.exit.exists)
    why = failures.explain(runs.get(workplace.saves, run.id))
    assert why
    for language in LANGUAGES:
        text = why.what(language)
        assert "0, 1" in text
        assert text.count("no answer within 1 s") == 2
        assert "NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1" in text
    assert not run.dir.connection.exists()
    assert find_processes(run.path) == []


def test_on_the_cpu_a_run_whose_processes_cannot_communicate_ends_with_the_reason_before_its_rows_are_prepared(
    tmp_path: Path, workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FAULT.format(unless=False, fault=WRONG) + ENDLESS_PREPARATION
    (tmp_path / "sitecustomize.py").write_text(fault, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{PROJECT}:{tmp_path}")
    run = runs.submit(make_spec(hardware__num_processes=2), workplace)
    wait_until(run.dir.exit.exists)
    why = failures.explain(runs.get(workplace.saves, run.id))
    assert why
    assert why.what() == (
        "2 processes cannot communicate on this machine (ArithmeticError: the sum over all processes is wrong). "
        "Check that its host name can be resolved, or use one process."
    )
    assert not run.dir.prepared.exists()


def test_the_processes_of_several_machines_try_it_together_and_agree(
    tmp_path: Path, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines with two processes each; on one of them, a sum is wrong."""
    spec = make_spec(hardware__num_processes=4).change("hardware.num_machines", 2)

    def tried(name: str, gpus: str, fault: str) -> RunDir:
        run = lay_out(RunDir(tmp_path / "m" / "lora" / name), spec)
        start = tmp_path / "start" / name
        start.mkdir(parents=True)
        (start / "sitecustomize.py").write_text(fault, encoding="utf-8")
        variables = {"PYTHONPATH": f"{PROJECT}:{start}", "CUDA_VISIBLE_DEVICES": gpus, "ACCELERATE_USE_CPU": "true"}
        words = [sys.executable, "-m", "engine.worker.check_ranks"]
        with reserved_ports(1) as [port]:
            machines = [
                subprocess.Popen(
                    [*words, f"--machine_rank={rank}", f"--main_process_port={port}", str(run.path)],
                    cwd=PROJECT, env=os.environ | variables,
                )
                for rank in range(2)
            ]  # fmt: skip
            codes = [machine.wait(300) for machine in machines]
        assert codes == [int(run.error.exists()), 0]  # the first speaks for all
        return run

    wrong = FAULT.replace("if {unless} and", "if rank != 3 or {unless} and")
    sound = tried("sound", "", "")
    assert not sound.connection.exists()
    indirect = tried("indirect", "0,1", wrong.format(unless=True, fault=WRONG))
    why = "machine 2: ArithmeticError: the sum over all processes is wrong"
    assert read_json(indirect.connection) == {"attempt": 1, "variables": INDIRECT, "why": why}
    apart = tried("apart", "", wrong.format(unless=False, fault=WRONG))
    [reported] = read_json(apart.error)["problems"]
    assert (reported["code"], reported["values"]) == ("machines-apart", {"machines": "2", "why": why})
