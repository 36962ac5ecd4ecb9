"""A package that is installed and does not work is told before the start, by
trying it: here bitsandbytes without its library."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core import hardware
from engine.launch import command
from engine.launch.workspace import Workplace
from engine.models.facts import inspect_model
from engine.preflight import checks, doctor, machine, memory, memory_savers, package_checks
from engine.preflight.doctor import Device, TrialResult
from engine.runs import failures, runs
from engine.runs.plan import summary
from engine.spec.run_spec import RunSpec
from tests.conftest import engine, wait_until

BROKEN = TrialResult(
    "bitsandbytes",
    {"library": "RuntimeError: No compatible CUDA binary found at …/libbitsandbytes_cuda128.so"},
    {
        "torch": "2.13.0+cu128",
        "cuda": "12.8",
        "version": "0.50.2",
        "libraries": [
            "libbitsandbytes_cpu.so",
            "libbitsandbytes_cuda118.so",
            "libbitsandbytes_cuda124.so",
            "libbitsandbytes_cuda126.so",
        ],
    },
)
CARD = Device("0", "NVIDIA A100", "GPU-1")


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered on this machine is not looked at, and is not added to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_uncertain", {})
    doctor._folder.cache_clear()


def tried(monkeypatch: pytest.MonkeyPatch, seen: TrialResult, end: threading.Event | None = None) -> list[str]:
    """The trial itself is a stand-in: this machine has no card. It takes until `end` is set, if there is one. Returns
    the list of what is tried."""
    tries: list[str] = []

    def stand_in(module: str, *_: Any) -> TrialResult:
        tries.append(module)
        if end:
            end.wait(600)
        return seen

    monkeypatch.setattr(doctor, "_try_in_child", stand_in)
    return tries


# ------------------------------------------------------------------------------------------ one trial for all


def test_many_who_ask_at_once_share_one_trial_and_nobody_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()
    tries = tried(monkeypatch, BROKEN, end)
    answers: list[TrialResult | None] = []
    callers = [
        threading.Thread(target=lambda: answers.append(doctor.trial_result("bitsandbytes", CARD, wait=True)))
        for _ in range(8)
    ]
    assert doctor.trial_result("bitsandbytes", CARD, wait=False) is None  # being tried: a page does not wait
    for caller in callers:
        caller.start()
    assert answers == []
    end.set()
    for caller in callers:
        caller.join()
    assert answers == [BROKEN] * 8
    assert doctor.trial_result("bitsandbytes", CARD, wait=False) == BROKEN
    assert tries == ["bitsandbytes"]


def test_what_was_seen_holds_until_the_environment_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(doctor, "_package_folder", lambda module: package if module == "bitsandbytes" else None)
    keys = [
        doctor._key("bitsandbytes", CARD),
        doctor._key("bitsandbytes", CARD),
        doctor._key("bitsandbytes", Device()),
    ]
    (package / "libbitsandbytes_cuda128.so").touch()
    keys.append(doctor._key("bitsandbytes", CARD))
    monkeypatch.setenv("BNB_CUDA_VERSION", "126")
    keys.append(doctor._key("bitsandbytes", CARD))
    monkeypatch.setattr(doctor, "_driver_version", lambda: "580.95")
    keys.append(doctor._key("bitsandbytes", CARD))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5


def test_a_trial_without_an_answer_keeps_nobody_from_starting_and_is_not_written_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries = tried(monkeypatch, TrialResult("bitsandbytes", {"4bit": "OutOfMemoryError: a full card"}, certain=False))
    assert package_checks.bitsandbytes_problems(CARD, wait=True) == {}
    assert package_checks.bitsandbytes_problems(CARD, wait=False) == {}  # and not repeated at every key press
    assert len(tries) == 1
    assert not list(doctor._folder().glob("*.json"))


def test_a_trial_that_cannot_be_started_says_why_and_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    seen = TrialResult("bitsandbytes", {"start": "No such file or directory"}, certain=False)
    assert doctor.trial_result("bitsandbytes", Device(), wait=True) == seen
    assert doctor.trial_result("bitsandbytes", Device(), wait=False) == seen
    [finding] = machine._bitsandbytes()
    assert finding.text().endswith(": the test ended without a result (CPU: there is no such file or folder)")


def test_a_trial_has_its_time_and_a_process_that_dies_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\nsleep 600\n")
    (tmp_path / "python").chmod(0o755)
    with monkeypatch.context() as impatient:
        impatient.setattr(doctor, "TRIAL_LIMIT_S", 0.5)
        assert not doctor._try_in_child("flash_attn", Device()).certain
    (tmp_path / "python").write_text("#!/bin/sh\nkill -SEGV $$\n")
    died = doctor._try_in_child("flash_attn", Device())
    assert (died.certain, died.failed) == (True, {"import": "SIGSEGV"})


# ------------------------------------------------------------------------------------------ what is told


def test_the_sentence_names_the_cuda_the_libraries_and_each_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried(monkeypatch, BROKEN)
    broken = package_checks.bitsandbytes_problems(CARD, wait=True)
    assert set(broken) == {"4bit", "8bit", "optimizer"}
    for language in ("en", "zh"):
        text = broken["4bit"].text(language)
        for part in (
            "NVIDIA A100",
            "12.8",
            "libbitsandbytes_cuda118.so",
            "BNB_CUDA_VERSION=126",
            "LD_LIBRARY_PATH",
            "bitsandbytes==0.50.2",
            "-DCOMPUTE_BACKEND=cuda",
        ):
            assert part in text, part


def test_only_what_failed_is_refused(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried(monkeypatch, TrialResult("bitsandbytes", {"8bit": "RuntimeError: no kernel"}, BROKEN.facts))

    def problems(**changes: object) -> set[tuple[str, str]]:
        spec = workplace.frozen(make_spec(**changes))
        return {(one.field, one.code) for one in checks.preflight_problems(spec, workplace)}

    code = "bitsandbytes-broken-cpu"
    assert problems(model__quantization="8bit") == {("model.quantization", code)}
    assert problems(model__quantization="4bit") == set()
    assert problems(training__optim="adamw_8bit") == set()
    assert problems() == set()


def test_what_does_not_work_is_not_proposed_where_memory_is_short(
    tiny: Path, make_spec: Callable[..., RunSpec]
) -> None:
    spec = make_spec(model__model_name_or_path=str(tiny), training__per_device_train_batch_size=1)
    model = inspect_model(tiny)
    full = memory.memory_needed(spec, model, 0).total
    plain = memory.memory_needed(spec.change("training.gradient_checkpointing", True), model, 0).total
    quantized = spec.change("model.quantization", "4bit").change("training.gradient_checkpointing", True)
    there = (plain + memory.memory_needed(quantized, model, 0).total) / 2
    assert there < plain <= full
    assert memory_savers.fit_to_memory(spec, model, 0, there).model.quantization.kind == "4bit"
    assert memory_savers.fit_to_memory(spec, model, 0, there, without=("4bit",)) is None


# ------------------------------------------------------------------------------------------ the thing itself


@pytest.mark.slow
def test_a_copy_without_its_library_is_told_by_check_and_the_installed_one_is_sound(
    workplace: Workplace,
    make_spec: Callable[..., RunSpec],
    without_library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = make_spec(model__quantization="4bit", training__optim="adamw_8bit").to_yaml()
    assert engine(workplace, "check", "-", input=spec).stdout == "ready to start\n"
    package, imports = tmp_path / "path" / "bitsandbytes", tmp_path / "imports"
    shutil.copytree(without_library / package.name, package)
    package = package / "__init__.py"
    noted = f"open({str(imports)!r}, 'a').write('one more')\n" + package.read_text(encoding="utf-8")
    package.write_text(noted, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    checked = engine(workplace, "check", "-", input=spec)
    lines = checked.stdout.splitlines()
    assert checked.returncode == 1
    assert [line.split(":")[0] for line in lines] == ["training.optim", "model.quantization"]
    assert all("libbitsandbytes_cpu" in line and "COMPUTE_BACKEND=cpu" in line for line in lines)
    times = imports.stat().st_size
    assert times
    assert engine(workplace, "check", "-", input=spec).stdout == checked.stdout
    assert imports.stat().st_size == times  # remembered: no child imports it again
    assert engine(workplace, "check", "-", input=make_spec().to_yaml()).stdout == "ready to start\n"


@pytest.mark.slow
def test_a_run_that_fails_all_the_same_says_that_it_was_bitsandbytes(
    workplace: Workplace,
    make_spec: Callable[..., RunSpec],
    without_library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a card quantizing calls the native library; on a CPU PyTorch compiles something in its place, so
    # here the call is put back. The error is bitsandbytes' own, and transformers wraps it as it does.
    shutil.copytree(without_library, tmp_path / "path")
    with (tmp_path / "path" / "bitsandbytes" / "functional.py").open("a") as file:
        file.write("\n\ndef quantize_4bit(*_a, **_k):\n    lib.cquantize_blockwise_fp32_nf4()\n")
    spec = make_spec(model__quantization="4bit")
    tried(monkeypatch, TrialResult("bitsandbytes"))  # it worked when it was tried
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    run = runs.submit(spec, workplace)
    run = wait_until(lambda: (now := runs.get(workplace.saves, run.id)).final and now)
    assert run.state == "failed"
    error = json.loads(run.dir.error.read_text())
    assert "bitsandbytes" not in error["message"]  # transformers speaks of weights
    assert failures.explain(run).code == "bitsandbytes"


def test_the_children_look_for_modules_where_the_studio_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    first, *others = command.python_path().split(os.pathsep)
    assert (first, others) == (str(command.PROJECT), ["/somewhere"])
    monkeypatch.setenv("PYTHONPATH", command.python_path())  # of a child of a child
    assert command.python_path().split(os.pathsep) == [first, *others]


def test_a_plan_does_not_wait_for_a_trial(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = threading.Event()
    tried(monkeypatch, BROKEN, end)
    spec = make_spec(model__quantization="4bit")
    plan = summary(spec, workplace)
    assert (plan.unusable, plan.problems) == (None, [])  # the trial is still going on
    end.set()
    plan = wait_until(lambda: (now := summary(spec, workplace)).unusable and now)
    assert [one.field for one in plan.problems] == ["model.quantization"]


def test_a_pytorch_without_cuda_on_a_machine_with_a_card_is_told_and_the_cpu_still_serves(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = hardware.Gpu(0, "GPU-1", "NVIDIA A100", 80 << 30, 79 << 30, 8.0)
    monkeypatch.setattr(hardware, "gpus", lambda: (card,))
    for built, codes in (("", ["torch-without-cuda"]), ("12.8", []), (None, [])):
        monkeypatch.setattr(doctor, "torch_cuda", lambda built=built: built)
        for device, expected in (("auto", codes), ("cuda", codes), ("cpu", [])):
            spec = workplace.frozen(make_spec(hardware={"device": device}))
            assert [one.code for one in checks.preflight_problems(spec, workplace)] == expected


def test_for_which_cuda_pytorch_was_built_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_package_folder", lambda _: tmp_path)
    lines = "from typing import Optional\n__version__ = '2.13.0'\ncuda: Optional[str] = {}\nhip: Optional[str] = {}\n"
    for cuda, hip, built in (("'12.8'", "None", "12.8"), ("None", "'6.4'", "6.4"), ("None", "None", "")):
        (tmp_path / "version.py").write_text(lines.format(cuda, hip))
        assert doctor.torch_cuda() == built
    (tmp_path / "version.py").write_text("changed = True\n")
    assert doctor.torch_cuda() is None
