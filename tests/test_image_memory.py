"""The memory of images is part of the estimate, beside what a training on the CPU keeps for the backward pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from engine.core.rundir import write_json
from engine.launch.workspace import Workplace
from engine.models.facts import ModelFacts
from engine.models.structure import Structure
from engine.preflight import image_memory
from engine.preflight.data_checks import images_per_row
from engine.preflight.image_memory import Tower, image_bytes
from engine.spec.run_spec import RunSpec
from tests.preloaded import run_python

pytestmark = pytest.mark.usefixtures("forked")

TOWER = Tower(layers=2, width=1000, hidden=64, patch=8, frames=2)
SIZES = ((80, 64), (16, 16))


@pytest.fixture
def pictured(workplace: Workplace, make_spec: Callable[..., RunSpec]) -> RunSpec:
    for number, size in enumerate(SIZES):
        Image.new("RGB", size).save(workplace.data / f"{number}.png")
    rows = [
        {"instruction": "<image>Which?", "output": "This.", "images": ["1.png"]},
        {"instruction": "<image><image>Which?", "output": "That.", "images": ["0.png", "1.png"]},
        {"instruction": "Which?", "output": "None."},
    ]
    write_json(workplace.data / "seen.json", rows)
    write_json(workplace.data / "dataset_info.json", {"seen": {"file_name": "seen.json"}})
    return make_spec(data__datasets=["seen"], training__per_device_train_batch_size=3)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModelFacts:
    monkeypatch.setattr(image_memory, "structure_of", lambda model: Structure({}, vision=("visual",)))
    monkeypatch.setattr(image_memory, "tower_of", lambda model: TOWER)
    monkeypatch.setattr(image_memory, "image_values", lambda spec, sizes: sum(w * h for w, h in sizes) * 2 * 3)
    return ModelFacts("", tmp_path)


def test_the_row_with_the_most_pixels_is_counted(
    pictured: RunSpec, model: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert images_per_row(pictured) == SIZES
    assert images_per_row(pictured.change("stage", {"kind": "pt"})) == ()
    patches = 3 * (80 + 4)
    values = 2 * 3 * 8 * 8  # of a patch: two frames of three colours
    assert image_bytes(pictured, model, half=True) == patches * values * (4 + 2)
    monkeypatch.setattr(image_memory, "images_per_row", lambda spec: SIZES)
    assert image_bytes(pictured.change("stage", {"kind": "dpo"}), model, half=False) == 2 * patches * values * 4


def test_a_trained_tower_keeps_its_layers_and_with_recomputation_their_inputs(
    pictured: RunSpec, model: ModelFacts
) -> None:
    def kept(recomputes: bool) -> float:
        spec = pictured.change("training.gradient_checkpointing", recomputes)
        frozen = image_bytes(spec, model, half=True)
        trained = image_bytes(spec.change("vision.tower", "trained"), model, half=True)
        assert frozen is not None
        assert trained is not None
        return trained - frozen

    patches = 3 * (80 + 4)
    assert kept(recomputes=False) == pytest.approx(patches * 1000 * image_memory.ACTIVATION_BYTES)
    assert kept(recomputes=True) == pytest.approx(patches * (2 * 64 * 2 + 500 * image_memory.ACTIVATION_BYTES))


@pytest.mark.parametrize(("module", "kept"), [("visual.blocks.0.attn.qkv", True), ("layers.0.mlp.up_proj", False)])
def test_a_continued_adapter_on_the_tower_keeps_its_layers_too(
    pictured: RunSpec, model: ModelFacts, tmp_path: Path, module: str, kept: bool
) -> None:
    save_file({f"base_model.model.{module}.lora_A.weight": np.zeros((4, 8))}, tmp_path / "adapter_model.safetensors")
    frozen = image_bytes(pictured, model, half=True)
    continued = image_bytes(pictured.change("model.adapter_path", str(tmp_path)), model, half=True)
    trained = image_bytes(pictured.change("vision.tower", "adapter"), model, half=True)
    assert frozen != trained
    assert continued == (trained if kept else frozen)


def test_memory_is_unknown_if_tower_or_processor_do_not_show_it(
    pictured: RunSpec, model: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_memory, "image_values", lambda spec, sizes: None)
    assert image_bytes(pictured, model, half=True) is None
    monkeypatch.setattr(image_memory, "image_values", lambda spec, sizes: 3)
    monkeypatch.setattr(image_memory, "tower_of", lambda model: None)
    assert image_bytes(pictured, model, half=True) is None


# ------------------------------------------------------------------------------------------ real steps


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    return json.loads(run_python("-m", "tests.image_memory", tmp_path_factory.mktemp("images")).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "low", "high"), [("qwen2_5_vl", 0.9, 1.1), ("gemma3", 0.9, 2.0)])
def test_an_adapted_tower_keeps_what_is_estimated(
    steps: dict[str, dict[str, float]], family: str, low: float, high: float
) -> None:
    """SigLIP's MLP has two matrices and not three, of which less is kept than of those that the constant is from."""
    frozen, adapted = (steps[f"{family} {tower} False"] for tower in ("frozen", "adapter"))
    kept, estimated = (adapted[key] - frozen[key] for key in ("kept", "estimated"))
    assert low < estimated / kept < high


@pytest.mark.slow
def test_recomputation_keeps_the_inputs_of_an_adapted_tower_and_nothing_of_a_frozen_one(
    steps: dict[str, dict[str, float]],
) -> None:
    """2 images of 28 × 28 patches, each with 64 numbers in fp32 before each of 2 layers, and what is around them."""
    frozen, adapted = (steps[f"qwen2_5_vl {tower} True"]["kept"] for tower in ("frozen", "adapter"))
    inputs = 2 * 28 * 28 * 64 * 4 * 2
    assert inputs < adapted - frozen < 3 * inputs


@pytest.mark.slow
def test_the_processor_itself_is_asked_for_scaled_images_and_tiles(steps: dict[str, dict[str, float]]) -> None:
    """Qwen scales to whole patches within its limits. SmolVLM, set to 256 pixels in tiles of 64, makes 4 × 4 of them of
    a square, 4 × 2 of half of that, and adds the whole image."""
    scaled, tiles = steps["values"]["scaled"], steps["values"]["tiles"]
    assert scaled == 2 * 3 * (224 * 224)
    assert tiles == ((16 + 1) + (8 + 1)) * 3 * 64 * 64
