"""On an NVIDIA card: every stage and every way to load a model trains there, and whatever ends gives the card back.

Skipped where there is none. `python -m pytest tests/test_card.py`; several at a time with `-n 8`, if the card is free.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.core import hardware
from engine.core.rundir import read_json
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.processes import find_processes
from engine.launch.workspace import PROJECT, Workplace
from engine.runs import runs
from engine.runs.failures import explain
from engine.runs.progress import curves
from engine.runs.results import new_export_spec, next_spec
from engine.serving import servers
from engine.spec.run_spec import RunSpec
from tests.conftest import wait_until
from tests.served import client_of, serving

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hardware.gpus(), reason="there is no NVIDIA card")]


@pytest.fixture
def here(tmp_path: Path) -> Workplace:
    """The bundled model and data, saves of this test's own."""
    saves = tmp_path / "saves"
    saves.mkdir()
    return Workplace(saves=saves)


def at_its_end(workplace: Workplace, spec: Any) -> runs.Run:
    """The run of `spec`, finished, that has been seen on the card and has left it."""
    run = runs.submit(spec, workplace)
    seen: set[int] = set()

    def ended() -> runs.Run | None:
        mine = {process.pid for process in find_processes(run.path)}
        seen.update(mine & on_the_card())
        one = runs.get(workplace.saves, run.id)
        return one if one.final else None

    run = wait_until(ended, seconds=300)
    assert run.state == "finished", run.dir.log.read_text(encoding="utf-8")[-4000:]
    assert seen, "it never was on the card"
    assert not seen & on_the_card(), "it has not given the card back"
    return run


def on_the_card() -> set[int]:
    """The processes that hold memory of a card, whosever they are."""
    command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {int(word) for word in said.split() if word.isdecimal()}


def trained(workplace: Workplace, **changes: Any) -> runs.Run:
    """The demo on the card; keywords are paths with `__` for the dot."""
    return at_its_end(workplace, changed(workplace.preset("demo"), **{"training__max_steps": 40} | changes))


def changed(spec: RunSpec, **changes: Any) -> RunSpec:
    usual = {"logging.logging_steps": 2, "hardware.device": "cuda"}
    for path, value in (usual | {path.replace("__", "."): value for path, value in changes.items()}).items():
        spec = spec.change(path, value)
    return spec


def falls(run: runs.Run, name: str = "loss") -> bool:
    """Whether the curve's last fifth lies below its first."""
    values = curves(run)[name].value
    part = max(len(values) // 5, 1)
    return values[-part:].mean() < values[:part].mean()


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "kto", "orpo", "simpo"])
def test_a_stage_learns(here: Workplace, stage: str) -> None:
    assert falls(at_its_end(here, changed(here.preset("demo" if stage == "sft" else f"demo_{stage}"))))


def test_pretraining_with_packed_documents_learns(here: Workplace) -> None:
    plain = here.preset("demo").model_dump() | {"stage": {"kind": "pt"}}
    plain["data"] |= {"datasets": {"c4_demo": 1}, "packing": True}
    assert falls(at_its_end(here, changed(RunSpec.read(plain), training__max_steps=40)))


def test_grpo_is_rewarded_more(here: Workplace) -> None:
    run = at_its_end(here, changed(here.preset("demo_grpo"), training__max_steps=30))
    reward = list(curves(run)["reward"].value)
    assert sum(reward[-3:]) > sum(reward[:3])


def test_ppo_after_a_reward_model(here: Workplace) -> None:
    judge = at_its_end(here, changed(here.preset("demo_rm")))
    spec = next_spec(judge, "ppo", here)
    run = at_its_end(
        here,
        changed(spec, data__datasets={"alpaca_translate_zh": 1}, training__max_steps=4, stage__max_new_tokens=16),
    )
    assert {"reward", "kl"} <= set(curves(run))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_precision(here: Workplace, precision: str) -> None:
    assert falls(trained(here, training__precision=precision))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_under_an_adapter(here: Workplace, bits: int) -> None:
    assert falls(trained(here, model__quantization={"kind": f"{bits}bit"}))


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_optimizer_of_eight_bits_on_all_weights(here: Workplace, optimizer: str) -> None:
    assert falls(trained(here, method={"kind": "full"}, training__optim=optimizer, training__learning_rate=5e-4))


def test_gradient_checkpointing(here: Workplace) -> None:
    assert falls(trained(here, training__gradient_checkpointing=True))


def test_a_run_that_was_stopped_goes_on(here: Workplace) -> None:
    spec = changed(here.preset("demo"), training__max_steps=2000, logging__logging_steps=1)
    run = runs.submit(spec, here)
    wait_until(lambda: "loss" in curves(runs.get(here.saves, run.id)), seconds=120)
    runs.stop(run)
    run = wait_until(lambda: (one := runs.get(here.saves, run.id)).final and one)
    assert run.state == "stopped"
    reached = len(curves(run)["loss"].value)
    runs.resume(run)
    wait_until(lambda: len(curves(runs.get(here.saves, run.id))["loss"].value) > reached, seconds=120)
    runs.stop(runs.get(here.saves, run.id))
    assert wait_until(lambda: (one := runs.get(here.saves, run.id)).final and one).state == "stopped"


def test_answers_measures_and_exports(here: Workplace) -> None:
    run = trained(here, training__max_steps=200)
    measured = at_its_end(
        here,
        EvaluationSpec.read(
            {
                "model": {"model_name_or_path": run.spec.model.model_name_or_path},
                "results": [str(run.path / "adapter")],
                "data": {"datasets": ["alpaca_translate_zh"], "dataset_dir": str(here.data), "max_samples": 64},
                "generation": {"max_new_tokens": 24},
                "hardware": {"device": "cuda"},
            }
        ),
    )
    with (measured.dir.report / "rows.jsonl").open(encoding="utf-8") as rows:
        assert sum(1 for _ in rows) == 64

    for form in ({"precision": "bf16"}, {"precision": "fp16"}, {"quantize": "8bit"}, {"quantize": "4bit"}):
        exported = at_its_end(here, new_export_spec(here, {run.id: 1.0}, **form).change("hardware.device", "cuda"))
        told = read_json(exported.path / "model" / "comparison.json")
        assert told["prompts"] == 8
        assert told["equal"] >= (0 if "quantize" in form else 6)  # of what was rounded a few may differ


@pytest.fixture
def server(here: Workplace) -> Iterator[tuple[servers.Server, str]]:
    run = trained(here)
    with serving(here, servers.choose(here, "", [run.id])) as server:
        yield server, run.id


def test_a_server_answers_on_the_card_and_gives_it_back(server: tuple[servers.Server, str]) -> None:
    server, adapter = server
    mine = {process.pid for process in find_processes(server.path)}
    assert mine & on_the_card()
    said = [
        client_of(server).chat.completions.create(
            model=voice, messages=[{"role": "user", "content": "BSIC Group"}], max_tokens=16, temperature=0
        )
        for voice in (server.name, adapter)
    ]
    assert all(one.usage.completion_tokens for one in said)
    servers.end(server)
    assert not mine & on_the_card()


HOG = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]) * 2**20, dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("left", [1000])
def test_a_card_that_is_full_is_told_in_a_sentence(here: Workplace, left: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOG, str(left)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as hog:
        try:
            assert hog.stdout.readline() == "held\n"
            spec = changed(here.preset("demo"), training__per_device_train_batch_size=4096, data__max_length=512)
            run = runs.submit(spec, here)
            run = wait_until(lambda: (one := runs.get(here.saves, run.id)).final and one, seconds=120)
        finally:
            hog.kill()
    assert run.state == "failed"
    assert explain(run).code == "device-memory", json.dumps(read_json(run.dir.error))


def test_the_shell_trains_on_the_card(here: Workplace) -> None:
    spec = changed(here.preset("demo"), training__max_steps=2)
    done = subprocess.run(
        [sys.executable, "-m", "engine", "submit", "-", "--saves", str(here.saves)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        input=spec.to_yaml(),
    )
    assert done.returncode == 0, done.stderr
    wait_until(lambda: runs.get(here.saves, done.stdout.strip()).state == "finished", seconds=120)
