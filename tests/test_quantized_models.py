"""Models with quantized weights: trained on as the plain ones that they stand for, or refused with what to choose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.launch.workspace import Workplace
from engine.models.checks import model_problems
from engine.models.facts import inspect_model
from engine.preflight.checks import preflight_problems
from engine.runs.plan import summary
from engine.spec.run_spec import RunSpec
from tests.conftest import made_once
from tests.preloaded import run_python

pytestmark = pytest.mark.usefixtures("forked")

KINDS = ("fp8", "fp8-experts", "mxfp4", "int4", "float8")
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "quantized", "tests.quantized_models")


def declared(folder: Path, **how: Any) -> None:
    """Let config.json say this of its weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}), encoding="utf-8")


def groups(*schemes: dict[str, Any]) -> dict[str, Any]:
    return {f"group_{number}": {"targets": ["Linear"], "weights": scheme} for number, scheme in enumerate(schemes)}


# ------------------------------------------------------------------------------------------ told before the start


@pytest.mark.parametrize(
    "how",
    [
        {"quant_method": "gptq", "bits": 3, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},  # transformers skips it: weights without their scales
        {"quant_method": "fbgemm_fp8"},
        {"bits": 4},
        COMPRESSED,
        COMPRESSED | {"format": "marlin-24", "config_groups": groups(INT4)},
        COMPRESSED | {"config_groups": groups(INT4, INT4 | {"num_bits": 8})},  # one scheme would be taken for both
        COMPRESSED | {"config_groups": groups(INT4 | {"actorder": "group"})},  # the order would be left out of account
        COMPRESSED | {"config_groups": groups(INT4), "sparsity_config": {"format": "sparse-24-bitmask"}},
    ],
)
def test_weights_that_cannot_be_dequantized_are_refused_with_the_plain_release(
    copied: Callable[..., Path], how: dict[str, Any]
) -> None:
    folder = copied("Tiny-7B-Instruct-GPTQ-Int4")
    declared(folder, **how)
    (issue,) = model_problems(folder, [folder.parent])
    assert (issue.code, issue.values["plain"]) == ("model-quantized-of", "Tiny-7B-Instruct")
    assert all("Tiny-7B-Instruct" in issue.text(language) for language in ("en", "zh"))


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model under another name."""
    return lambda name: shutil.copytree(tiny, tmp_path / "models" / name)


def test_the_card_of_a_model_says_what_it_was_made_from(copied: Callable[..., Path]) -> None:
    folder = copied("packed")
    declared(folder, quant_method="awq", version="marlin")
    (issue,) = model_problems(folder, [folder.parent])
    assert issue.code == "model-quantized"
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model:\n- org/Plain-8B\n---\n# base_model: other\n")
    (issue,) = model_problems(folder, [folder.parent])
    assert (issue.code, issue.values["plain"]) == ("model-quantized-of", "org/Plain-8B")


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_that_nothing_tells_how_to_read_are_refused(
    quantized: Path, tmp_path: Path, kind: str
) -> None:
    folder = shutil.copytree(quantized / kind, tmp_path / kind)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert [issue.code for issue in model_problems(folder, [tmp_path])] == ["model-quantized-undeclared"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_counts_as_the_plain_one_whatever_its_weights_are_packed_in(quantized: Path, kind: str) -> None:
    packed, plain = (inspect_model(quantized / name) for name in (kind, f"{kind}-plain"))
    assert packed.parameters == plain.parameters
    assert model_problems(quantized / kind, [quantized]) == []


def test_the_plan_says_that_weights_are_dequantized_and_what_they_take(
    workplace: Workplace, quantized: Path, make_spec: Callable[..., RunSpec]
) -> None:
    place = replace(workplace, models=(quantized,))
    spec = make_spec(model__model_name_or_path=str(quantized / "fp8"))
    plan = summary(spec, place)
    assert plan.problems == []
    (doubt,) = [doubt for doubt in plan.doubts if doubt.code == "weights-dequantized"]
    assert "fp8" in doubt.text("en")
    plain = summary(spec.change("model.model_name_or_path", str(quantized / "fp8-plain")), place)
    assert plan.needed == plain.needed
    assert plan.trainable == plain.trainable


def test_dequantized_weights_are_not_quantized_again_and_those_of_bitsandbytes_only_as_they_are(
    workplace: Workplace, quantized: Path, make_spec: Callable[..., RunSpec], copied: Callable[..., Path]
) -> None:
    place = replace(workplace, models=(quantized, *workplace.models))
    packed = copied("packed")
    declared(packed, load_in_4bit=True, quant_method="bitsandbytes")
    place = replace(place, models=(*place.models, packed.parent))

    def codes(model: Path, **changes: Any) -> set[str]:
        spec = make_spec(model__model_name_or_path=str(model), **changes)
        return {issue.code for issue in preflight_problems(place.frozen(spec), place)}

    assert codes(quantized / "fp8", model__quantization="4bit") == {"dequantized-not-again"}
    assert codes(quantized / "fp8", method="full") == set()
    assert codes(packed, model__quantization="4bit") == codes(packed) == set()
    assert codes(packed, model__quantization="8bit") == {"quantized-otherwise"}
    assert codes(packed, method="full") == {"quantized-needs-lora"}
    assert codes(packed, method__init_lora_weights="pissa") == {"quantized-svd-init"}


# --------------------------------------------------------------------------------------- loaded, trained and exported


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory, quantized: Path) -> tuple[Path, dict[str, Any]]:
    """The saves folder, and what `tests.quantized_runs` says."""
    root = tmp_path_factory.mktemp("used")
    (root / "data").mkdir()
    rows = [{"instruction": f"What comes after {n}?", "output": f"{n + 1}."} for n in range(16)]
    (root / "data" / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    (root / "data" / "dataset_info.json").write_text('{"chat": {"file_name": "chat.json"}}', encoding="utf-8")
    printed = run_python("-m", "tests.quantized_runs", quantized, root / "saves")
    return root / "saves", json.loads(printed.rpartition("\n{")[2].join(("{", "")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_dequantized_to_what_they_mean_and_saved_as_plain_ones(
    used: tuple[Path, dict[str, Any]], kind: str
) -> None:
    report = used[1][kind]
    assert report["far"] == 0.0, report
    assert report["names"], report
    assert report["quantization_config"] is None
    assert report["trained"] == report["planned"] == report["parameters"]


COMPARE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
plain, adapter, merged = sys.argv[1:]
ids = torch.arange(3, 35)[None]
with torch.inference_mode():
    base = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, adapter)(ids).logits
    together = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
print(json.dumps([float((adapted - before).abs().max()), float((adapted - together).abs().max())]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "int4"])
def test_what_was_trained_on_them_belongs_to_the_plain_model_and_is_merged_into_it(
    used: tuple[Path, dict[str, Any]], quantized: Path, kind: str
) -> None:
    adapter, merged = used[0] / kind / "lora" / kind / "adapter", used[0] / kind / "export" / kind / "model"
    assert "quantization_config" not in json.loads((merged / "config.json").read_text(encoding="utf-8"))
    printed = run_python("-c", COMPARE, quantized / f"{kind}-plain", adapter, merged)
    learned, far = json.loads(printed.splitlines()[-1])
    assert learned > 0.01
    assert far < 1e-4
    assert model_problems(merged, [used[0]]) == []


REFUSED = """
import json, sys, torch
from engine.core.problems import Refusal
from engine.spec.run_spec import RunSpec
from engine.worker.models.loading import load_base
told = []
for folder in sys.argv[1:]:
    try:
        load_base(RunSpec.read({"model": {"model_name_or_path": folder}}), folder, torch.float32)
        told.append("")
    except Refusal as refusal:
        told.append([refusal.problems[0].code, refusal.problems[0].values["name"]])
print(json.dumps(told))
"""
CHANGE = """
import sys
from safetensors.torch import load_file, save_file
file, drop, add = sys.argv[1:]
tensors = load_file(file)
if drop:
    del tensors[drop]
if add:
    tensors[add] = tensors["model.norm.weight"].clone()
save_file(tensors, file, {"format": "pt"})
"""


@pytest.mark.slow
def test_nothing_is_left_as_it_was_initialized_and_nothing_of_a_quantized_weight_is_left_out(
    quantized: Path, tmp_path: Path
) -> None:
    norm, order = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight_g_idx"
    changed = {"fp8-plain": (norm, ""), "int4": ("", order), "fp8": ("", "model.layers.0.mlp.up_proj.input_scale")}
    for kind, (drop, add) in changed.items():
        folder = shutil.copytree(quantized / kind, tmp_path / kind)
        run_python("-c", CHANGE, folder / "model.safetensors", drop, add)
    printed = run_python("-c", REFUSED, *(tmp_path / kind for kind in changed))
    assert json.loads(printed.splitlines()[-1]) == [["weights-missing", norm], ["weights-unread", order], ""]
