"""The doctor sees what is wrong with a machine, says it in both languages with
a fix, and shows it in the shell and on the page."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core import hardware
from engine.core.problems import problem, sentences
from engine.launch.workspace import PROJECT, Workplace
from engine.preflight import machine
from engine.preflight.machine import Finding
from webui.system_tab import ReportPanel, report_html
from webui.words import Words


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what needs PyTorch, which is tried for real in a test of its own."""
    monkeypatch.setattr(
        machine,
        "_in_child",
        lambda hub: iter([Finding("good", "machine-torch", {"version": "2", "build": "CPU"})]),
    )
    monkeypatch.setattr(machine, "_bitsandbytes", lambda: iter(()))


def codes(workplace: Workplace) -> dict[str, Finding]:
    return {finding.code: finding for finding in machine.findings(workplace)}


def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (1024, 4096))


def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_disk", lambda _: 5 << 30)


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_disk", lambda _: 5 << 20)


def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory", lambda: (1 << 30, 4 << 30))


def other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_requirements", lambda: "numpy==0.1  # curves\npsutil==0.2")


def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_requirements", lambda: "no-such-package==0.1\nnumpy==0.1")


def small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LOW_SHARED_MEMORY_BYTES", 1 << 60)


def new_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TESTED_PYTHON", ((2, 6), (2, 7)))


def driver_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = problem("gpu-driver-failed", "hardware.device", what="Driver/library version mismatch")
    monkeypatch.setattr(hardware, "gpu_failure", lambda: failure)


BAD: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = [
    (few_files, "machine-files-few", "doubtful"),
    (small_disk, "machine-disk-low", "doubtful"),
    (full_disk, "machine-disk-low", "broken"),
    (little_memory, "machine-memory-small", "doubtful"),
    (other_package, "machine-packages-differ", "doubtful"),
    (no_package, "machine-packages-missing", "broken"),
    (small_shared_memory, "machine-shm-small", "doubtful"),
    (new_python, "machine-python-untested", "doubtful"),
    (driver_fails, "gpu-driver-failed", "broken"),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("cause", "code", "level"), BAD, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_wrong_is_seen_with_a_fix(
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    cause: Callable[[pytest.MonkeyPatch], None],
    code: str,
    level: str,
) -> None:
    assert code not in codes(workplace)
    cause(monkeypatch)
    finding = codes(workplace)[code]
    assert finding.level == level
    for language in ("en", "zh"):
        assert finding.fix(language) or finding.problem  # a problem has its fix in its sentence
        assert finding.text(language) in report_html([finding], Words(language), done=True)


@pytest.mark.usefixtures("quick")
def test_folders_that_are_closed_or_missing_are_seen(workplace: Workplace, tmp_path: Path) -> None:
    closed = Workplace(models=workplace.models, data=tmp_path / "nothing", saves=Path("/proc/athanor"))
    seen = codes(closed)
    assert seen["machine-saves-closed"].level == seen["machine-data-missing"].level == "broken"
    assert (
        codes(Workplace(models=workplace.models, data=Path("/proc"), saves=workplace.saves))[
            "machine-data-closed"
        ].level
        == "doubtful"
    )
    assert list(workplace.saves.iterdir()) == []  # nothing of the trial is left
    assert {"machine-disk", "machine-data"} <= set(codes(workplace))


@pytest.mark.usefixtures("quick")
def test_the_page_shows_the_report_as_it_grows_and_then_as_text(workplace: Workplace) -> None:
    tab = ReportPanel(Words("en"), workplace)
    tab.report, tab.look = "report", "look"
    answers = list(tab.check(False))
    assert len(answers) == len(codes(workplace)) + 1
    assert answers[0]["report"].count("<li") == 1
    assert "Still checking" in answers[-2]["report"]
    assert answers[-1]["look"]["interactive"] is True
    assert 'data-copy="#system-text"' in answers[-1]["report"]


def test_every_finding_that_is_not_good_has_a_fix() -> None:
    with_fix = {
        code.removesuffix("-fix") for code in sentences() if code.startswith("machine-") and code.endswith("-fix")
    }
    good = {
        "machine-python",
        "machine-standby",
        "machine-packages",
        "machine-memory",
        "machine-cores",
        "machine-shm",
        "machine-files",
        "machine-disk",
        "machine-data",
        "machine-gpu",
        "machine-gpu-works",
        "machine-cpu-works",
        "machine-torch",
        "machine-attention",
        "machine-bitsandbytes",
        "machine-deepspeed",
        "machine-deepspeed-missing",  # it is optional
        "machine-ranks",
        "machine-hub",
    }
    every = {code for code in sentences() if code.startswith("machine-") and not code.endswith("-fix")}
    assert every == with_fix | good


def test_the_requirements_are_installed_as_tested() -> None:
    pins = machine.PIN.findall(machine._requirements())
    assert len(pins) > 20
    assert dict(pins)["numpy"] == importlib.metadata.version("numpy")


BUILT = [
    ((9, 0), ["sm_80", "sm_90"], True),
    ((8, 6), ["sm_80", "sm_90"], True),
    ((12, 0), ["sm_80", "sm_90"], False),
    ((12, 0), ["sm_90", "compute_90"], True),
    ((7, 0), ["sm_75"], False),
    ((7, 5), ["sm_70"], True),
    ((9, 0), ["sm_90a"], True),
    ((9, 4), ["gfx942"], True),
    ((10, 0), ["sm_100"], True),
    ((12, 1), ["sm_120"], True),
    ((8, 0), ["sm_120"], False),
]
CHILD = """
import json, sys
from engine.worker.runtime import machine
cases = json.loads(sys.argv[1])
print(json.dumps([machine._is_built_for(*capability, built) for capability, built, _ in cases]))
print(json.dumps([machine.product_error("cpu", precision) for precision in ("fp32", "bf16")]))
"""


@pytest.mark.slow
def test_kernels_are_there_for_the_capabilities_that_they_were_built_for() -> None:
    import json

    words = [sys.executable, "-c", CHILD, json.dumps(BUILT)]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True)
    answers, errors = map(json.loads, done.stdout.splitlines())
    assert answers == [expected for *_, expected in BUILT]
    assert 0 < errors[0] < 1e-6
    assert errors[0] < errors[1] < 1e-2


@pytest.mark.slow
def test_the_doctor_tells_of_a_bitsandbytes_without_its_library(workplace: Workplace, without_library: Path) -> None:
    """Everything for real, in the shell, beside a copy of the package that lacks its native libraries."""
    words = [
        sys.executable,
        "-m",
        "engine",
        "doctor",
        "--saves",
        str(workplace.saves),
        "--data",
        str(workplace.data),
    ]
    environment = os.environ | {"PYTHONPATH": str(without_library)}
    done = subprocess.run(words, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [line for line in done.stdout.splitlines() if line.startswith("!!")]
    assert broken
    assert all("bitsandbytes" in line for line in broken), broken
    assert "2 processes can communicate (gloo)" in done.stdout
    assert "The CPU works" in done.stdout
