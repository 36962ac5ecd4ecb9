"""Which cards there are, which may be used, and that a driver in trouble is never taken for a machine without cards.

The machine of the tests has no card: `tests.nvml` reports some. All else is real.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core import hardware
from engine.core.problems import Refusal
from engine.core.rundir import read_object
from engine.launch import command
from engine.launch.workspace import PROJECT, Workplace
from engine.preflight import checks, doctor
from engine.preflight.memory import available_memory
from engine.preflight.suitable_gpus import gpu_without_bf16, needed_capability
from engine.runs import failures, queue, runs, schedule
from engine.serving import servers
from engine.spec.run_spec import RunSpec
from tests.conftest import wait_until
from tests.nvml import Nvml

FOUR = [{"uuid": f"GPU-{number}{number}aa", "memory": 80 << 30, "free": (70 + number) << 30} for number in range(4)]
CARD = hardware.Gpu(0, "GPU-0", "NVIDIA H100", 80 << 30, 80 << 30, 9.0)
Say = Callable[..., None]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Sets what the driver reports from now on."""
    return Nvml(tmp_path / "library", monkeypatch).report


def codes(spec: RunSpec) -> list[str]:
    return [problem.code for problem in checks.device_problems(spec)]


def test_the_cards_are_as_the_driver_says(say: Say) -> None:
    say(gpus=FOUR)
    assert [gpu.index for gpu in hardware.gpus()] == [0, 1, 2, 3]
    assert hardware.gpus()[1] == hardware.Gpu(1, "GPU-11aa", "NVIDIA H100", 80 << 30, 71 << 30, 9.0)
    say(gpus=[{"uuid": "GPU-shared"}])
    assert hardware.gpus() == (hardware.Gpu(0, "GPU-shared", "NVIDIA H100", 0, 0, 9.0),)
    assert hardware.gpu_failure() is None


VISIBLE = [
    (None, [0, 1, 2, 3]), ("", []), ("2,3", [2, 3]), ("3, 1", [3, 1]), ("GPU-22aa", [2]), ("GPU-2,0", [2, 0]),
    ("-1", []), ("1,-1,2", [1]), ("0,7,1", [0]), ("1,1", [1]), ("NoDevFiles", []), ("GPU-", []), ("all", []),
]  # fmt: skip


@pytest.mark.parametrize(("variable", "indices"), VISIBLE)
def test_the_operators_own_choice_of_cards_is_kept(
    say: Say, monkeypatch: pytest.MonkeyPatch, variable: str | None, indices: list[int]
) -> None:
    say(gpus=FOUR)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert [gpu.index for gpu in hardware.gpus()] == indices


def test_a_run_is_given_cards_out_of_the_operators_and_no_other(
    say: Say, monkeypatch: pytest.MonkeyPatch, make_spec: Callable[..., RunSpec]
) -> None:
    say(gpus=FOUR)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    auto = make_spec(hardware__device="auto")

    def cards(spec: RunSpec) -> str:
        return command.environment(spec, "run", hardware.gpus(), 4)["CUDA_VISIBLE_DEVICES"]

    assert cards(auto) == "2"
    assert cards(auto.change("hardware.num_processes", 2)) == "2,3"
    assert cards(auto.change("hardware.devices", [3])) == "3"
    assert cards(auto.change("hardware.device", "cpu")) == ""
    [wrong] = checks.device_problems(auto.change("hardware.devices", [0]))
    assert wrong.text() == "There is no GPU 0 here. Available GPUs: 2, 3."
    assert codes(auto.change("hardware.num_processes", 3)) == ["too-few-cards"]


MIXED = [
    {"uuid": "GPU-old", "name": "V100", "memory": 96 << 30, "free": 96 << 30, "capability": [7, 0]},
    {"uuid": "GPU-large", "name": "A100", "memory": 80 << 30, "free": 79 << 30, "capability": [8, 0]},
    {"uuid": "GPU-small", "name": "A30", "memory": 24 << 30, "free": 24 << 30, "capability": [8, 0]},
]


def test_of_gpus_of_different_kinds_those_are_checked_that_the_schedule_takes(
    say: Say, monkeypatch: pytest.MonkeyPatch, make_spec: Callable[..., RunSpec], workplace: Workplace
) -> None:
    say(gpus=MIXED)
    monkeypatch.setattr(doctor, "torch_cuda", lambda: "13.0")
    monkeypatch.setattr(queue, "advance", lambda *_: None)
    auto = make_spec(hardware__device="auto")
    bf16 = auto.change("training.precision", "bf16")

    def devices(spec: RunSpec) -> list[str]:
        """On which it would start now."""
        run = runs.submit(spec, workplace)
        machine = schedule.Machine(hardware.all_gpus(), {})
        [decision] = schedule.decide([queue.demand(run)], machine)
        runs.delete(run)
        return [gpu.name for gpu in decision.gpus]

    # The first and emptiest GPU has no bf16: a run that needs it is not refused, and gets another.
    assert devices(auto) == ["V100"]
    assert devices(bf16) == ["A100"]
    assert doctor.device_of(bf16).name == "A100"
    two, three = (bf16.change("hardware.num_processes", count) for count in (2, 3))
    assert devices(two) == ["A100", "A30"]
    for refused in (three, bf16.change("hardware.devices", [0])):
        [wrong] = checks.device_problems(refused)
        assert (wrong.code, wrong.values["name"]) == ("bf16-not-there", "V100")
    # With "auto", FSDP2 would train in fp16 there: the same holds for it.
    divided = two.change("training.precision", "auto").change("hardware.strategy", "fsdp2")
    assert devices(divided) == ["A100", "A30"]
    [wrong] = checks.device_problems(divided.change("hardware.num_processes", 3))
    assert (wrong.code, wrong.values["given"]) == ("strategy-not-with", "auto (fp16)")
    assert codes(divided.change("hardware.devices", [0, 1])) == ["strategy-not-with"]


def test_a_run_fits_if_the_schedule_finds_gpus_into_which_it_fits(say: Say, make_spec: Callable[..., RunSpec]) -> None:
    say(gpus=MIXED)
    drawn = random.Random(0)
    spec = make_spec(hardware__device="auto")
    for _ in range(300):
        gpus = tuple(
            hardware.Gpu(number, f"GPU-{number}", "", memory, memory, drawn.choice([0.0, 7.5, 9.0]))
            for number, memory in enumerate(drawn.choices([16 << 30, 24 << 30, 80 << 30], k=5))
        )
        precision, count = drawn.choice(["auto", "bf16"]), drawn.randint(1, 5)
        changed = spec.change("training.precision", precision).change("hardware.num_processes", count)
        needed = drawn.randint(1, 100) << 30
        demand = schedule.Demand("", count, memory=needed, capability=needed_capability(changed))
        with hardware.limited_to(gpus):
            room, too_few = available_memory(changed), gpu_without_bf16(changed)
        [decision] = schedule.decide([demand], schedule.Machine(gpus, {}))
        if precision == "bf16" and too_few:
            assert not decision.starts
        else:
            assert (needed <= room.bytes) == all(gpu.memory >= needed for gpu in decision.gpus)
            assert len(decision.gpus) == count


def test_threads_on_a_cpu_wait_without_keeping_a_core_busy(
    monkeypatch: pytest.MonkeyPatch, make_spec: Callable[..., RunSpec]
) -> None:
    def variables(device: str) -> dict[str, str]:
        return command.environment(make_spec(hardware__device=device), "run", [CARD], 4)

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert variables("cpu")["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in variables("cuda")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # by the operator, who has the machine alone
    assert variables("cpu")["OMP_WAIT_POLICY"] == "ACTIVE"


FAILING = [
    ({"gpus": [{"lost": True}]}, "gpu-driver-failed"),
    ({"error": "Driver/library version mismatch"}, "gpu-driver-failed"),
    ({"seconds": 30, "gpus": FOUR}, "gpu-driver-silent"),
    ({}, "gpu-driver-failed"),  # the program itself breaks
]


@pytest.mark.parametrize(("answer", "code"), FAILING)
def test_a_driver_in_trouble_is_told_and_nothing_goes_to_the_cpu_unasked(
    say: Say,
    monkeypatch: pytest.MonkeyPatch,
    workplace: Workplace,
    tiny: Path,
    make_spec: Callable[..., RunSpec],
    answer: dict[str, Any],
    code: str,
) -> None:
    if "seconds" in answer:
        monkeypatch.setattr(hardware, "QUERY_LIMIT_SECONDS", 1.0)
    say(**answer)
    assert hardware.gpus() == ()
    for device in ("auto", "cuda"):
        assert codes(make_spec(hardware__device=device)) == [code]
    assert codes(make_spec(hardware__device="cpu")) == []
    with pytest.raises(Refusal) as caught:
        servers.serve_settings(workplace, servers.choose(workplace, str(tiny)), "")
    assert caught.value.problems[0].code == code
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert codes(make_spec(hardware__device="auto")) == []


def test_slices_are_devices_of_their_own(
    say: Say, monkeypatch: pytest.MonkeyPatch, make_spec: Callable[..., RunSpec]
) -> None:
    slices = [
        {"uuid": f"MIG-{number}", "name": "H100 MIG 1g.10gb", "memory": 10 << 30, "free": 9 << 30} for number in "ab"
    ]
    say(gpus=[FOUR[0], FOUR[1] | {"slices": slices}])
    assert [(gpu.index, gpu.cuda_name) for gpu in hardware.gpus()] == [(0, "0"), (110, "MIG-a"), (111, "MIG-b")]
    spec = make_spec(hardware__device="auto", hardware__devices=[111])
    assert codes(spec) == codes(make_spec(hardware__device="auto")) == ["torch-without-cuda"]
    assert command.environment(spec, "run", hardware.gpus(), 4)["CUDA_VISIBLE_DEVICES"] == "MIG-b"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-b,0")
    assert [gpu.index for gpu in hardware.gpus()] == [111, 0]


def test_what_a_card_is_doing(say: Say) -> None:
    busy = {"processes": [(17, 3 << 30), (18, None)], "utilization": 97, "temperature": 71}
    say(gpus=[FOUR[0] | busy | {"milliwatts": 312_500, "limit_milliwatts": 700_000}])
    [gpu] = hardware.gpus()
    assert gpu.processes == (hardware.GpuProcess(17, 3 << 30), hardware.GpuProcess(18))
    assert (gpu.utilization, gpu.temperature, gpu.power, gpu.power_limit) == (97, 71, 312.5, 700.0)


def test_a_lost_card_leaves_the_others(say: Say) -> None:
    say(gpus=[FOUR[0], {"lost": True}, FOUR[2]])
    assert [gpu.index for gpu in hardware.gpus()] == [0, 2]
    assert hardware.gpu_failure() is None


@pytest.mark.parametrize("variable", ["MIG-1234", "7", "GPU-99"])
def test_a_variable_that_names_no_card_sends_nothing_to_the_cpu(
    say: Say, monkeypatch: pytest.MonkeyPatch, make_spec: Callable[..., RunSpec], variable: str
) -> None:
    say(gpus=FOUR)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert codes(make_spec(hardware__device="auto")) == ["gpu-none-visible"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert codes(make_spec(hardware__device="auto")) == []


def test_another_makers_card_under_wsl_is_no_driver_in_trouble(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    say(trace=False, missing=True)
    monkeypatch.setattr(hardware, "WSL_TRACE", str(tmp_path))
    assert (hardware.gpus(), hardware.gpu_failure()) == ((), None)
    say(trace=True, missing=True)
    assert hardware.gpu_failure().code == "gpu-driver-failed"


def test_a_machine_without_a_driver_trains_on_its_cpu_unless_cards_are_named(
    say: Say, make_spec: Callable[..., RunSpec]
) -> None:
    say(trace=False)
    auto = make_spec(hardware__device="auto")
    assert codes(auto) == []
    assert command.on_cpu(auto, 0)
    named = auto.change("hardware.devices", [0, 1, 2, 3]).change("hardware.num_processes", 4)
    assert not command.on_cpu(named, 0)
    assert codes(named) == ["no-cards"]
    assert codes(auto.change("hardware.device", "cuda")) == ["no-cards"]
    assert codes(named.change("hardware.device", "cpu")) == []


@pytest.mark.slow
def test_a_driver_that_fails_after_submitting_fails_the_run_with_its_reason(
    say: Say, workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(trace=False)
    monkeypatch.setattr(runs.queue, "advance", lambda *_: None)
    run = runs.submit(make_spec(hardware__device="auto"), workplace)
    say(error="GPU is lost")
    subprocess.run(runs.queue.supervisor_command(run.path), check=True, env=os.environ)
    run = wait_until(lambda: (now := runs.read(run.path, workplace.saves)).final and now)
    assert run.state == "failed"
    assert read_object(run.dir.error)["problems"][0]["code"] == "gpu-driver-failed"
    assert "GPU is lost" in failures.explain(run).what("en")
    assert not run.dir.prepared.exists()


SAMPLES = """
import threading, time
from engine.worker.runtime import gpu_sampler
from engine.worker.runtime.gpu_sampler import GpuSampler
gpu_sampler.EVERY_SECONDS = 3600  # it asks once
sampler = GpuSampler()
sampler.start()
while not (values := sampler.take()) and threading.active_count() > 1: time.sleep(0.01)
sampler.stop()
print(values, sampler.take())
"""


def test_what_the_gpus_of_a_run_do_is_among_its_curves(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler alone, in a process that finds the stand-in."""
    busy = [gpu | {"utilization": load} for gpu, load in zip(FOUR, (10, 90, 50, 100), strict=True)]
    say(gpus=busy)

    def sampled(uuids: str) -> str:
        monkeypatch.setenv("ATHANOR_GPU_UUIDS", uuids)
        words = [sys.executable, "-c", SAMPLES]
        return subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()

    # 80 GiB of which 71 and 72 are free: 9 GiB are 9.66 GB.
    assert sampled("GPU-11aa,GPU-22aa") == "{'gpu_load': 70.0, 'gpu_memory': 9.66} {}"
    assert sampled("") == "{} {}"
    say(gpus=[FOUR[0]])
    assert sampled("GPU-00aa") == "{'gpu_memory': 10.74} {}"
    say(error="GPU is lost")
    assert sampled("GPU-00aa") == "{} {}"
