"""The doctor computes only on GPUs that nobody uses, and holds their leases meanwhile.

The machine of the tests has no GPU: `tests.nvml` reports some, and a package in the place of PyTorch records what each
child process is given. The processes, their environment and the leases are real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.core import leases
from engine.core.leases import Holder
from engine.launch.workspace import PROJECT, Workplace
from engine.preflight import doctor, idle_gpus, machine
from engine.preflight.package_checks import package_doubts
from engine.runs.kinds import training_doubts
from engine.runs.plan import summary
from engine.spec.run_spec import RunSpec
from tests.conftest import wait_until
from tests.nvml import Nvml

GB = 1 << 30
TORCH = """
import json, os, time
from types import SimpleNamespace
from engine.core import leases

visible = os.environ["CUDA_VISIBLE_DEVICES"]
held = {uuid: holder.kind for uuid, holder in leases.holders().items()}
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([visible, held]) + "\\n")
if "STAYS" in os.environ:
    with open(os.environ["STAYS"] + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.replace(os.environ["STAYS"] + ".part", os.environ["STAYS"])
    time.sleep(6000)

def capability(place):
    seen = visible.split(",")
    raise RuntimeError("tried " + (seen[:1] if seen[0].startswith("MIG") else seen)[place])

__version__, version = "2", SimpleNamespace(cuda="13.0", hip=None)
cuda = SimpleNamespace(is_available=lambda: bool(visible), get_device_capability=capability)
"""
DISTRIBUTED = """
class TCPStore(dict):
    port = 1
    def __init__(self, *_, **__): ...
    def set(self, key, value): self[key] = value.encode()
    def wait(self, *_): ...
    def check(self, keys): return False
"""


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where each child says which GPUs it sees, and which are leased. There are four GPUs and two slices: GPU 1 and
    the second slice are leased, and on GPU 2 somebody else computes."""
    nvml = Nvml(tmp_path / "library", monkeypatch)
    gpus: list[dict[str, Any]] = [{"uuid": f"GPU-{number}", "memory": 80 * GB, "free": 79 * GB} for number in range(5)]
    gpus[2] |= {"free": 40 * GB, "processes": [[812, 39 * GB]]}
    gpus[4]["slices"] = [{"uuid": f"MIG-{name}", "memory": 10 * GB, "free": 9 * GB} for name in "ab"]
    nvml.report(gpus=gpus)
    package = nvml.folder / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(TORCH)
    (package / "distributed.py").write_text(DISTRIBUTED)
    monkeypatch.setenv(leases.FOLDER_VARIABLE, str(tmp_path / "leases"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_uncertain", {})
    doctor._folder.cache_clear()
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    return tmp_path / "record"


def test_the_doctor_leaves_gpus_alone_that_somebody_uses(record: Path, workplace: Workplace) -> None:
    held = [
        *leases.take(["GPU-1"], Holder("x", "training", by="ada")),
        *leases.take(["MIG-b"], Holder("m", "chat", by="bob")),
    ]
    others = {"GPU-1": "training", "MIG-b": "chat"}
    report = list(machine.findings(workplace))
    seen = {(finding.code, finding.values.get("index")): finding for finding in report}
    assert seen["machine-gpu-leased", 1].text() == "GPU 1 is in use by x (ada), so it was not tested"
    assert seen["machine-gpu-leased", 141].values["who"] == "m (bob)"
    assert seen["machine-gpu-others", 2].text("zh") == "显卡 2 正被其他程序使用（占用 41.9 GB，进程 812），未做测试"
    # Each GPU that is free was tried, and each slice by a process that sees nothing else.
    tried = {index: finding.values["why"] for (code, index), finding in seen.items() if code == "machine-gpu-fails"}
    assert tried == {index: f"RuntimeError: tried {name}" for index, name in ((0, "0"), (3, "3"), (140, "MIG-a"))}
    [ranks] = [finding for finding in report if finding.code.startswith("machine-ranks")]
    assert (ranks.values["count"], ranks.values["backend"]) == (2, "nccl")
    assert not [finding for finding in report if finding.code == "machine-child-silent"]
    untested = [finding.text() for finding in report if finding.code == "machine-bitsandbytes-busy"]
    assert [text.partition("): ")[2] for text in untested] == [
        "the GPU is in use by x (ada)", "the GPU is in use", "the GPU is in use by m (bob)",
    ]  # fmt: skip
    # All of them held the leases of what they were given, and nothing is left of that.
    lines = record.read_text().splitlines()
    during = {visible: leased for visible, leased in map(json.loads, lines) if len(leased) > 3}
    every = dict.fromkeys(("GPU-0", "GPU-3", "MIG-a"), "check") | others
    assert during == {"0,3": every, "MIG-a": every}
    package = {visible: leased for visible, leased in map(json.loads, lines) if len(leased) == 3}
    assert package == {
        name: {uuid: "check"} | others for name, uuid in (("0", "GPU-0"), ("3", "GPU-3"), ("MIG-a", "MIG-a"))
    }
    # Each trial once. Of the processes that communicate, all on "0,3", some are ended before they have written a line.
    assert sorted(visible for visible, _ in map(json.loads, lines) if visible != "0,3") == ["0", "3", "MIG-a", "MIG-a"]
    assert {uuid: holder.kind for uuid, holder in leases.holders().items()} == others
    for descriptor in held:
        os.close(descriptor)


def test_a_trial_waits_for_its_gpu_and_not_its_caller(
    record: Path, workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    device = doctor.Device("1", "NVIDIA H100", "GPU-1")
    [held] = leases.take(["GPU-1"], Holder("x", "training"))
    for wait in (False, True):
        left_alone = doctor.trial_result("bitsandbytes", device, wait=wait)
        assert left_alone == doctor.TrialResult("bitsandbytes", {"busy": leases.holders()["GPU-1"].text}, certain=False)
    assert not record.exists()
    spec = make_spec(hardware__device="auto", hardware__devices=[1], model__quantization="4bit")
    for doubts in (summary(spec, workplace).doubts, training_doubts(spec, [])):
        [doubt] = [doubt for doubt in doubts if doubt.code == "package-untested"]
        assert (doubt.field, "the GPU is in use by x (" in doubt.text()) == ("model.quantization", True)
    os.close(held)
    seen = doctor.trial_result("bitsandbytes", device, wait=True)  # its answer was not kept
    assert (seen.certain, bool(seen.failed)) == (True, True)
    assert json.loads(record.read_text()) == ["1", {"GPU-1": idle_gpus.CHECK}]
    assert package_doubts(spec) == []
    foreign = doctor.Device("2", "NVIDIA H100", "GPU-2")
    assert not doctor.trial_result("bitsandbytes", foreign, wait=True).certain
    assert len(record.read_text().splitlines()) == 1


def test_without_leases_no_gpu_is_touched(record: Path, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    file = workplace.saves.parent / "no folder"
    file.touch()
    monkeypatch.setenv(leases.FOLDER_VARIABLE, str(file))
    assert "leases-not-writable" in [finding.code for finding in machine._in_child(hub=False)]
    assert not doctor.trial_result("bitsandbytes", doctor.Device("0", "NVIDIA H100", "GPU-0"), wait=True).certain
    assert {visible for visible, _ in map(json.loads, record.read_text().splitlines())} == {""}


def test_what_the_doctor_has_started_holds_its_gpus_though_the_doctor_was_killed(
    record: Path, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays = record.with_name("stays")
    monkeypatch.setenv("STAYS", str(stays))
    arguments = ["--saves", str(workplace.saves), "--data", str(workplace.data)]
    doctor = subprocess.Popen([sys.executable, "-m", "engine", "doctor", *arguments], cwd=PROJECT, stdout=-3)
    wait_until(stays.exists)
    child = psutil.Process(int(stays.read_text()))
    try:
        doctor.kill()
        doctor.wait()
        assert leases.holders()["GPU-0"].text == f"engine doctor ({leases.holders()['GPU-0'].user})"
    finally:
        child.kill()
    wait_until(lambda: leases.holders() == {})
