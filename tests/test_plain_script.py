"""A training as a plain script: it computes the same losses and the same weights, and contains nothing of Athanor."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.applications import Starlette
from starlette.testclient import TestClient

from engine.core.problems import Refusal
from engine.core.rundir import RunDir
from engine.data.upload_folder import UPLOADS_FOLDER
from engine.export.plain_script import script_problems, write_script
from engine.launch.workspace import Workplace
from engine.spec.run_spec import RunSpec
from tests.conftest import short_training
from tests.forked import run_forking
from tests.train_many import lay_out
from webui.downloads import routes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]

WORKPLACE = Workplace()
LORA = {"method": {"kind": "lora", "lora_dropout": 0.1}}
RUNS: Mapping[str, Mapping[str, Any]] = {
    "sft": {**LORA, "data__validation_rows": 8, "logging__eval_steps": 2},
    "packed": {"method": {"kind": "full"}, "data__packing": True, "training__neftune_noise_alpha": 5.0},
    "text": {
        "stage": {"kind": "pt"},
        "data__datasets": ["text"],
        "method": {"kind": "freeze", "trainable_layers": 1},
        "training__gradient_checkpointing": True,
    },
    "half": {"method": {"kind": "freeze", "trainable_layers": 1}, "training__precision": "bf16"},
    "weighted": {"data__datasets": ["weighted"], "method": {"kind": "lora", "loraplus_lr_ratio": 8.0}},
    "long": {**LORA, "model__rope_scaling": {"kind": "linear", "factor": 2.0}, "training__precision": "bf16"},
    "dpo": {"stage": {"kind": "dpo", "sft_weight": 0.5}, "method": {"kind": "lora", "init_lora_weights": "gaussian"}},
    "dpo_again": {"stage": {"kind": "dpo"}, "method": {"kind": "lora", "lora_dropout": 0.1}},
    "best": {
        **LORA,
        "data__validation_rows": 8,
        "logging__eval_steps": 1,
        "logging__save_steps": 2,
        "logging__load_best_model_at_end": True,
        "training__max_steps": 2,
        "training__learning_rate": 0.3,
        "training__lr_scheduler_type": "constant",
    },
    "epochs": {
        **LORA,
        "data__validation_rows": 8,
        "data__max_samples": 20,
        "logging__eval_strategy": "epoch",
        "logging__logging_steps": 2,
        "training__max_steps": 5,
    },
    "dpo_full": {"stage": {"kind": "dpo"}, "method": {"kind": "full"}},
    "kto": {"stage": {"kind": "kto"}, "data__datasets": ["thumbs"], **LORA},
    "orpo": {"stage": {"kind": "orpo"}, **LORA},
    "simpo": {"stage": {"kind": "simpo"}, "method": {"kind": "full"}, "training__optim": "adafactor"},
    "rm": {"stage": {"kind": "rm"}, **LORA},
}
PAIRS = ("dpo", "dpo_again", "dpo_full", "orpo", "simpo", "rm")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, RunDir]:
    """The runs of RUNS by name, submitted and nothing more."""
    root = tmp_path_factory.mktemp("scripts")
    data = root / "data"
    data.mkdir()
    write_rows(data)
    laid_out = {}
    for name, changes in RUNS.items():
        usual = {"training__max_steps": 3, "data__datasets": ["pairs"] if name in PAIRS else ["chat"]}
        if name == "dpo_again":
            usual["model__adapter_path"] = str(laid_out["dpo"].adapter)  # made by then
        spec = short_training(tiny, data, **usual | changes)
        laid_out[name] = lay_out(RunDir(root / "saves" / "tiny" / spec.method.kind / name), spec)
    return laid_out


def write_rows(data: Path) -> None:
    """Data sets of the kinds that the stages need."""

    def turns(n: int, answer: str) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": f"What comes after {n}?"},
            {"role": "assistant", "content": answer, "weight": 1 + n % 3},
        ]

    question = [{"from": "human", "value": f"What comes after {n}?"} for n in range(24)]
    rows = {
        "chat": [{"instruction": turn["value"], "input": "", "output": f"{n + 1}."} for n, turn in enumerate(question)],
        "text": [{"text": f"After {n} comes {n + 1}. " * 5} for n in range(20)],
        "weighted": [{"messages": [*turns(n, f"{n + 1}."), *turns(n + 1, "More.")]} for n in range(24)],
        "pairs": [
            {
                "conversations": [turn],
                "chosen": {"from": "gpt", "value": f"{n + 1}, of course."},
                "rejected": {"from": "gpt", "value": "No idea."},
            }
            for n, turn in enumerate(question)
        ],
        "thumbs": [
            {"conversations": [turn, {"from": "gpt", "value": f"{n + 1}." if n % 2 else "No."}], "label": bool(n % 2)}
            for n, turn in enumerate(question)
        ],
    }
    shapes = {
        "text": {"columns": {"prompt": "text"}},
        "weighted": {"formatting": "openai"},
        "pairs": {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        "thumbs": {"formatting": "sharegpt", "columns": {"messages": "conversations", "kto_tag": "label"}},
    }
    info = {name: {"file_name": f"{name}.json", **shapes.get(name, {})} for name in rows}
    for name, content in rows.items():
        (data / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


@pytest.fixture(scope="module")
def compared(runs: dict[str, RunDir]) -> dict[str, Any]:
    printed = run_forking("-m", "tests.plain_scripts", *(run.path for run in runs.values()))
    return dict(zip(runs, json.loads(printed.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_a_script_computes_the_losses_and_weights_of_its_run(compared: dict[str, Any], name: str) -> None:
    result = compared[name]
    assert [point[:2] for point in result["script"]] == [point[:2] for point in result["run"]]
    assert len(result["run"]) >= 3
    assert result["script"] == result["run"]
    assert result["furthest"] == 0.0


def test_the_best_of_these_runs_is_not_its_last_checkpoint(compared: dict[str, Any]) -> None:
    losses = [value for _, curve, value in compared["best"]["run"] if curve == "eval_loss"]
    assert min(losses) < losses[-1]


def test_scripts_are_readable_python_without_anything_of_ours(
    runs: dict[str, RunDir], compared: dict[str, Any]
) -> None:
    files = [run.path / "script" / "train.py" for run in runs.values()]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"\bengine\b|\bwebui\b", text)
        assert max(map(len, text.splitlines())) <= 120
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "120", "--select", "E,F,I,B"]
    checked = subprocess.run([*ruff, *files], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    layout = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "120", "--diff", *files]
    formatted = subprocess.run(layout, capture_output=True, text=True, check=False)
    assert formatted.returncode == 0, formatted.stdout


def test_the_command_in_a_script_starts_it_in_a_folder_of_its_own(
    runs: dict[str, RunDir], compared: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    (runs["sft"].path / "script").rename(folder)
    command = re.search(r"^    python (.*)$", (folder / "train.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert command
    words = [sys.executable, *command[1].split()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    history = json.loads((folder / "result" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    assert losses == [value for _, curve, value in compared["sft"]["run"] if curve == "loss"]


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "8bit"},
        {"kind": "4bit"},
        {"kind": "4bit", "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    ],
)
def test_quantization_is_written_as_the_run_has_it(runs: dict[str, RunDir], settings: dict[str, Any]) -> None:
    from transformers import BitsAndBytesConfig

    from engine.worker.exporting.script_parts import quantization_code
    from engine.worker.models.quantization import quantization_config

    spec = RunSpec.from_yaml(runs["sft"].spec.read_text(encoding="utf-8")).change("model.quantization", settings)
    configuration = quantization_config(spec, torch.bfloat16)
    written = eval(quantization_code(configuration), {"BitsAndBytesConfig": BitsAndBytesConfig, "torch": torch})
    assert written.to_dict() == configuration.to_dict()


def test_a_browser_gets_a_script_as_a_zip_file_or_the_reason_why_not(
    runs: dict[str, RunDir], compared: dict[str, Any]
) -> None:
    saves = runs["dpo"].path.parents[2]
    client = TestClient(Starlette(routes=routes(Workplace(saves=saves))))
    answer = client.get("/script/tiny/lora/dpo.zip")
    assert answer.status_code == 200
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        text = archive.read("dpo-script/train.py").decode()
        assert {name.split("/")[1] for name in archive.namelist()} >= {"rows", "tokenizer", "requirements.txt"}
    assert text == (runs["dpo"].path / "script" / "train.py").read_text(encoding="utf-8")
    shutil.rmtree(runs["dpo"].prepared)
    refused = client.get("/script/tiny/lora/dpo.zip")
    assert (refused.status_code, "prepared rows" in refused.text) == (409, True)
    assert client.get("/script/tiny/lora/none.zip").status_code == 409
    assert not list((saves / UPLOADS_FOLDER).iterdir())


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"stage": {"kind": "grpo"}}, "stage"),
        ({"stage": {"kind": "dpo", "loss_type": "bco_pair"}}, "stage.loss_type"),
        ({"method": {"kind": "lora", "init_lora_weights": "pissa"}}, "method.init_lora_weights"),
        ({"model__add_tokens": ["<x>"]}, "model.add_tokens"),
        ({"model__trust_remote_code": True}, "model.model_name_or_path"),
        ({"hardware__device": "cuda"}, "training.precision"),  # no keeper.json says what "auto" was
    ],
)
def test_what_a_script_cannot_have_is_named_before(
    runs: dict[str, RunDir], compared: dict[str, Any], tmp_path: Path, changes: dict[str, Any], path: str
) -> None:
    spec = RunSpec.from_yaml(runs["sft"].spec.read_text(encoding="utf-8"))
    for name, value in changes.items():
        spec = spec.change(name.replace("__", "."), value)
    assert [problem.field for problem in script_problems(runs["sft"], spec, WORKPLACE)] == [path]
    with pytest.raises(Refusal):
        write_script(runs["sft"], spec, WORKPLACE, tmp_path / "script")
    assert not list(tmp_path.iterdir())


def test_a_script_needs_the_rows_of_its_run_and_an_empty_folder(
    runs: dict[str, RunDir], compared: dict[str, Any], tmp_path: Path
) -> None:
    spec = RunSpec.from_yaml(runs["sft"].spec.read_text(encoding="utf-8"))
    (tmp_path / "mine.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(Refusal, match="not an empty folder"):
        write_script(runs["sft"], spec, WORKPLACE, tmp_path)
    assert script_problems(RunDir(tmp_path), spec, WORKPLACE)[0].code == "script-no-rows"
