"""The zoo's models: a dense one, one of experts and one that sees are whole folders, and learn from text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.preloaded import run_python

FAMILIES = ("qwen3", "qwen3_moe", "gemma3")
LARGEST_FILE_BYTES = 3_000_000

# Builds each family, loads the folder by its path alone, and writes what one step of training gives.
BUILD_AND_TRAIN = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from tests import zoo
for family in sys.argv[2:]:
    folder = zoo.build(family, Path(sys.argv[1]) / family)
    auto = AutoModelForImageTextToText if family == "gemma3" else AutoModelForCausalLM
    model = auto.from_pretrained(folder).train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row = tokenizer("Translate this sentence, please.", return_tensors="pt")
    loss = model(**row, labels=row["input_ids"]).loss
    loss.backward()
    norms = {name: weight.grad.norm().item() for name, weight in model.named_parameters() if weight.grad is not None}
    image = tokenizer.convert_tokens_to_ids("<image>")
    print(json.dumps({"loss": loss.item(), "norms": norms, "image": image, "vocabulary": len(tokenizer)}))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("zoo")
    printed = run_python("-c", BUILD_AND_TRAIN, folder, *FAMILIES)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return folder, dict(zip(FAMILIES, lines, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_the_zoo_is_a_small_whole_folder(family: str, built: tuple[Path, dict[str, dict]]) -> None:
    folder, results = built
    files = {path.name: path.stat().st_size for path in (folder / family).iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= files.keys()
    assert 0 < files["model.safetensors"] < LARGEST_FILE_BYTES
    config = json.loads((folder / family / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == family
    assert len(config["architectures"]) == 1
    text = config.get("text_config", config)
    assert results[family]["vocabulary"] <= text["vocab_size"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_the_zoo_guesses_evenly_and_learns(family: str, built: tuple[Path, dict[str, dict]]) -> None:
    """Random weights say nothing about the next token: the loss is that of an even guess, ln(vocabulary)."""
    folder, results = built
    config = json.loads((folder / family / "config.json").read_text(encoding="utf-8"))
    vocabulary = config.get("text_config", config)["vocab_size"]
    assert results[family]["loss"] == pytest.approx(math.log(vocabulary), abs=0.5)
    norms = results[family]["norms"]
    assert all(math.isfinite(norm) for norm in norms.values())
    layers = [name for name in norms if ".layers.1." in name and norms[name] > 0]
    assert any("down_proj" in name for name in layers)
    assert any("q_proj" in name for name in layers)


@pytest.mark.slow
def test_experts_and_towers_are_what_they_are_called(built: tuple[Path, dict[str, dict]]) -> None:
    folder, results = built
    assert any("experts" in name for name in results["qwen3_moe"]["norms"])
    assert not any("experts" in name for name in results["qwen3"]["norms"])
    config = json.loads((folder / "gemma3" / "config.json").read_text(encoding="utf-8"))
    assert config["image_token_id" if "image_token_id" in config else "image_token_index"] == results["gemma3"]["image"]
    assert (folder / "gemma3" / "preprocessor_config.json").exists()
