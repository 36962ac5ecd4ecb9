"""What a model is made of: the part that writes, towers, experts, routers, and what a method trains of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from engine.core.problems import Problem
from engine.models import child
from engine.models.checks import model_problems
from engine.models.facts import inspect_model
from engine.models.structure import Structure, structure_of, structure_problems
from engine.models.trainable_modules import (
    freeze_problems,
    linear_modules,
    lora_problems,
    targeted_modules,
    trainable_parameters,
)
from tests.preloaded import run_python

pytestmark = pytest.mark.usefixtures("forked")

HANDMADE = Structure(
    shapes={
        "model.vision_tower.layers.0.q_proj.weight": (8, 8),
        "model.language_model.embed_tokens.weight": (96, 16),
        "model.language_model.layers.0.q_proj.weight": (16, 16),
        "model.language_model.layers.0.mlp.gate.weight": (4, 16),
        "model.language_model.layers.0.mlp.experts.up_proj": (4, 16, 32),
        "lm_head.weight": (96, 16),
    },
    linear=("model.language_model.layers.0.q_proj",),
    experts=("model.language_model.layers.0.mlp.experts.up_proj",),
    towers=("model.vision_tower",),
)
TOWER, WRITES = "model.vision_tower.layers.0.q_proj", "model.language_model.layers.0.q_proj"


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (["all-linear"], [WRITES]),
        ("all-linear", [WRITES]),
        (["q_proj"], [WRITES]),  # the end of a name means the part that writes
        ([TOWER], [TOWER]),  # a full name means itself
        (r".*q_proj", [TOWER, WRITES]),  # and so does a pattern
        (["all-linear", "lm_head"], [WRITES, "lm_head"]),
        (["gate"], []),  # a router
    ],
)
def test_names_mean_the_language_part_unless_they_are_full(targets: str | list[str], modules: list[str]) -> None:
    assert list(targeted_modules(HANDMADE, targets)) == modules


def test_what_is_trained_in_full_gets_no_adapter() -> None:
    assert list(targeted_modules(HANDMADE, ["all-linear"], saved=["language_model"])) == []


# Builds each family; of each prints what peft trains on what our names say, and what transformers' own functions say of
# the parts: none of it by the code under test but the names.
BUILD_AND_ADAPT = """
import json, sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from engine.models.structure import structure_as_json
from engine.worker.models.structure import structure_of
from tests import zoo

for family in sys.argv[2:]:
    folder = zoo.build(family, Path(sys.argv[1]) / family)
    auto = AutoModelForImageTextToText if "vl" in family or family in ("gemma3", "llama4") else AutoModelForCausalLM
    model = auto.from_pretrained(folder).train()
    structure = structure_of(model)
    ids = torch.arange(20, 40)[None]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    learning = [name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()]
    whole = {name: weight.numel() for name, weight in model.named_parameters()}
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(structure.linear))
    adapted = get_peft_model(model, config)
    ids = torch.arange(20, 40)[None]
    adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    moved = {name for name, weight in adapted.named_parameters() if weight.grad is not None and weight.grad.any()}
    print(json.dumps({
        "structure": structure_as_json(structure), "learning": learning, "whole": whole,
        "lora": adapted.get_nb_trainable_parameters()[0],
        "adapted": sum("lora_A" in name for name, _ in adapted.named_parameters()),
        "moved": sum("lora_B" in name for name in moved),
    }))
"""
FAMILIES = ("llama", "gemma3", "qwen3_vl", "llama4", "qwen3_moe", "qwen2_moe", "deepseek_v3", "bamba")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("zoo")
    printed = run_python("-c", BUILD_AND_ADAPT, folder, *FAMILIES)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return folder, dict(zip(FAMILIES, lines, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_counts_what_peft_trains(family: str, built: tuple[Path, dict[str, dict]]) -> None:
    """The skeleton without weights, or the headers, beside the real model."""
    folder, results = built
    model, result = inspect_model(folder / family), results[family]
    structure = structure_of(model)
    assert model_problems(model.path, [folder]) == []
    assert trainable_parameters(model, "lora", r=4) == result["lora"] > 0
    assert {name: len(shape) > 0 for name, shape in structure.shapes.items()}.keys() == result["whole"].keys()
    assert sorted(structure.linear) == sorted(json.loads(result["structure"])["linear"])
    assert lora_problems(model, ["all-linear"]) == []
    assert freeze_problems(model, list(structure.linear)) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_learns(family: str, built: tuple[Path, dict[str, dict]]) -> None:
    result = built[1][family]
    assert result["adapted"] == result["moved"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "llama4"])
def test_towers_are_what_a_text_does_not_reach(family: str, built: tuple[Path, dict[str, dict]]) -> None:
    folder, results = built
    structure, result = structure_of(inspect_model(folder / family)), results[family]
    outside = {name for name in result["whole"] if structure.is_in_tower(name)}
    assert outside
    assert outside.isdisjoint(result["learning"])
    full = sum(size for name, size in result["whole"].items() if name not in outside)
    assert trainable_parameters(inspect_model(folder / family), "full") == full


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama4", "qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_experts_are_a_choice_of_their_own_and_routers_none(family: str, built: tuple[Path, dict[str, dict]]) -> None:
    model = inspect_model(built[0] / family)
    structure = structure_of(model)
    assert structure.experts
    assert all(len(structure.shapes[name]) == 3 for name in structure.experts)
    assert {"gate", "router", "shared_expert_gate"}.isdisjoint(linear_modules(model))
    # r × (in + out) for each expert of each tensor (Hu et al. 2021).
    added = sum(2 * size * (rows + columns) for size, rows, columns in map(structure.shapes.get, structure.experts))
    assert trainable_parameters(model, "lora", r=4, expert_r=2) == trainable_parameters(model, "lora", r=4) + added


def codes(problems: list[Problem]) -> list[str]:
    return [problem.code for problem in problems]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"),
    # A shared expert's matrix, whose name peft takes for that of the experts; one used by a kernel past its module.
    [("deepseek_v3", "down_proj"), ("bamba", "out_proj")],
)
def test_a_target_on_which_an_adapter_would_not_work_is_refused(
    family: str, name: str, built: tuple[Path, dict[str, dict]]
) -> None:
    model = inspect_model(built[0] / family)
    assert name not in linear_modules(model)
    assert codes(lora_problems(model, [name])) == ["lora-target-refused"]
    assert codes(lora_problems(model, ["o_proj"])) == []


@pytest.mark.slow
def test_a_machine_too_busy_to_build_a_model_is_not_the_last_word(
    built: tuple[Path, dict[str, dict]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = inspect_model(Path(shutil.copytree(built[0] / "gemma3", tmp_path / "gemma3")))

    def wrong() -> list[str]:
        return codes(structure_problems(model, "model.model_name_or_path"))

    monkeypatch.setattr(child, "MAX_SECONDS", 0.01)
    assert wrong() == ["model-built-too-slowly"]
    monkeypatch.setattr(child, "ask", lambda *_: pytest.fail("asked again at once"))
    assert wrong() == ["model-built-too-slowly"]
    monkeypatch.undo()
    monkeypatch.setattr(child, "RETRY_SECONDS", 0)
    assert wrong() == []


@pytest.mark.slow
def test_a_model_that_reads_no_text_alone_and_one_that_cannot_be_built_are_told(tmp_path: Path) -> None:
    build = "import sys; from pathlib import Path; from tests import zoo; zoo.build('blip', Path(sys.argv[1]))"
    run_python("-c", build, tmp_path / "blip")
    needs = structure_problems(inspect_model(tmp_path / "blip"), "model.model_name_or_path")
    assert codes(needs) == ["model-needs-inputs"]
    assert "pixel_values" in str(needs[0])
    config = json.loads((tmp_path / "blip" / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["hidden_size"] = 63  # no multiple of the heads
    (tmp_path / "blip" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert codes(structure_problems(inspect_model(tmp_path / "blip"), "model.model_name_or_path")) == [
        "model-not-built"
    ]


@pytest.mark.slow
def test_weights_that_no_file_has_are_told_before_the_start(
    built: tuple[Path, dict[str, dict]], tmp_path: Path
) -> None:
    folder = shutil.copytree(built[0] / "gemma3", tmp_path / "gemma3")
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    lost = next(name for name in weights if "language_model" in name and "layers.1.mlp.up_proj" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (issue,) = structure_problems(inspect_model(folder), "model.model_name_or_path")
    assert (issue.code, issue.values["count"]) == ("weights-missing", 1)
    assert "layers.1.mlp.up_proj" in issue.values["name"]
