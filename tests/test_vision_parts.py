"""Vision tower, projector and language part are frozen, get an adapter or are trained, each at its own rate."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.models.structure import Structure
from engine.models.vision_parts import name_in_base, vision_plan
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec
from engine.spec.vision_settings import Vision
from tests.image_training import FAMILIES
from tests.preloaded import run_python
from tests.vision_training import PROJECTOR_RATE, RATE, RUNS_OF, TOWER_RATE

pytestmark = pytest.mark.usefixtures("forked")

TOWER, MERGER, LANGUAGE = "model.visual.blocks", "model.visual.merger", "model.language_model.layers.0"
MODEL = Structure(
    shapes={
        "model.visual.class_token": (1, 8),
        "model.visual.patch.weight": (8, 3, 2, 2),
        f"{TOWER}.0.q.weight": (8, 8),
        f"{TOWER}.1.q.weight": (8, 8),
        f"{MERGER}.mlp.0.weight": (16, 8),
        f"{LANGUAGE}.q_proj.weight": (16, 16),
        "model.audio.q.weight": (4, 4),
    },
    linear=(f"{LANGUAGE}.q_proj",),
    towers=("model.visual", "model.audio"),
    vision=("model.visual",),
    projectors=(MERGER,),
    vision_linear=(f"{TOWER}.0.q", f"{TOWER}.1.q", f"{MERGER}.mlp.0"),
)


def test_every_module_belongs_to_a_part_or_to_none() -> None:
    parts = [MODEL.part_of(name) for name in MODEL.shapes]
    assert parts == ["tower", "tower", "tower", "tower", "projector", "language", None]


@pytest.mark.parametrize(
    ("choices", "adapters", "whole"),
    [
        ({}, [], ()),
        ({"tower": "adapter"}, [f"{TOWER}.0.q", f"{TOWER}.1.q"], ()),
        ({"projector": "adapter"}, [f"{MERGER}.mlp.0"], ()),
        ({"tower": "trained", "projector": "trained"}, [], ("model.visual",)),
        # A list of modules has no forward pass that peft could replace, and a bare parameter has none either.
        ({"tower": "trained"}, [], ("model.visual.patch", f"{TOWER}.0", f"{TOWER}.1")),
        ({"tower": "adapter", "projector": "trained"}, [f"{TOWER}.0.q", f"{TOWER}.1.q"], (MERGER,)),
    ],
)
def test_adapters_and_whole_modules_are_those_of_the_chosen_parts(
    choices: dict[str, Any], adapters: list[str], whole: tuple[str, ...]
) -> None:
    plan = vision_plan(MODEL, Vision(**choices))
    assert (list(plan.adapters), plan.whole) == (adapters, whole)


def test_names_of_adapted_parameters_are_traced_to_the_base() -> None:
    assert name_in_base("base_model.model.model.visual.q.lora_A.default.weight").startswith("model.visual.q.")
    assert name_in_base("base_model.model.a.modules_to_save.default.b.weight") == "a.b.weight"
    assert name_in_base("base_model.model.a.original_module.b.weight") == "a.b.weight"


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"vision": {"tower": "adapter"}, "method": "full"}, "vision-adapter-needs-lora", "vision.tower"),
        ({"vision": {"tower": "trained"}, "stage": "dpo"}, "vision-not-here", "vision.tower"),
        ({"vision": {"language_part": "frozen"}}, "vision-all-frozen", "vision.language_part"),
        ({"vision": {"language_part": "frozen", "projector": "trained"}}, "vision-without-adapter", "method"),
        (
            {"vision": {"projector": "trained"}, "model": {"quantization": "4bit", "model_name_or_path": "m"}},
            "vision-quantized",
            "vision.projector",
        ),
        (
            {"vision": {"tower": "adapter"}, "model": {"adapter_path": "a", "model_name_or_path": "m"}},
            "vision-continued",
            "vision.tower",
        ),
        ({"vision": {"tower_learning_rate": 1e-5}}, "vision-rate-unused", "vision.tower_learning_rate"),
        (
            {"vision": {"tower": "adapter", "tower_learning_rate": 1e-5}, "training": {"optim": "lomo"}},
            "vision-rate-optimizer",
            "vision.tower_learning_rate",
        ),
    ],
)
def test_choices_that_contradict_others_are_reported_at_their_field(
    changes: dict[str, Any], code: str, field: str
) -> None:
    plain = {"model": {"model_name_or_path": "m"}, "data": {"datasets": ["d"]}} | changes
    assert (code, field) in {(problem.code, problem.field) for problem in spec_problems(RunSpec.read(plain))}


# --- what a training does ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("vision")
    return json.loads(run_python("-m", "tests.vision_training", root).splitlines()[-1])


PROJECTORS = {"qwen2_5_vl": "model.visual.merger.", "gemma3": "model.multi_modal_projector."}
TOWERS = {"qwen2_5_vl": "model.visual.", "gemma3": "model.vision_tower."}
slow = pytest.mark.slow
OF_RUNS = [(family, run) for family in FAMILIES for run in RUNS_OF[family]]
ADAPTED = {  # parts with an adapter, and those trained in full next to it
    "default": ({"language"}, set()),
    "adapters": ({"language", "tower", "projector"}, set()),
    "mixed": ({"language", "tower"}, {"projector"}),
    "tower alone": ({"tower"}, set()),
    "tower whole": ({"language", "projector"}, {"tower"}),
}
TRAINED = {
    "full": {"language", "tower", "projector"},
    "projector alone": {"projector"},
    "layer and tower": {"language", "tower"},
}


def part_of(family: str, name: str) -> str:
    if f"{name}.".startswith(PROJECTORS[family]):
        return "projector"
    return "tower" if name.startswith(TOWERS[family]) else "language"


def parts(family: str, names: Any) -> set[str]:
    return {part_of(family, name) for name in names}


@slow
@pytest.mark.parametrize(("family", "run"), [each for each in OF_RUNS if each[1] in ADAPTED])
def test_adapters_and_whole_modules_are_trained_and_saved(results: dict[str, Any], family: str, run: str) -> None:
    adapted, whole = ADAPTED[run]
    result, linear = results[family][run], results[family]["linear"]
    assert parts(family, result["adapted"]) == adapted
    # The tower's head makes a single vector of an image, which is not used.
    unused = ("lm_head", "model.vision_tower.head.")
    expected = {name for name in linear if part_of(family, name) in adapted and not name.startswith(unused)}
    assert set(result["adapted"]) == expected
    assert parts(family, result["whole"]) == whole
    assert parts(family, result["moved"]) == adapted | whole
    assert sum(result["modules"].values()) == len(expected)


@slow
@pytest.mark.parametrize(("family", "run"), [each for each in OF_RUNS if each[1] in TRAINED])
def test_only_the_chosen_parts_are_trained_in_full(results: dict[str, Any], family: str, run: str) -> None:
    trained = TRAINED[run]
    result, names = results[family][run], results[family]["names"]
    assert parts(family, result["moved"]) == trained
    if run != "layer and tower":
        assert result["planned"] == sum(size for name, size in names.items() if part_of(family, name) in trained)


@slow
@pytest.mark.parametrize(("family", "run"), [each for each in OF_RUNS if each[1] in ("mixed", "tower whole", "full")])
def test_each_part_learns_at_its_own_rate(results: dict[str, Any], family: str, run: str) -> None:
    moved = results[family][run]["moved"]
    for part, rate in (("language", RATE), ("tower", TOWER_RATE), ("projector", PROJECTOR_RATE)):
        distances = [distance for name, distance in moved.items() if part_of(family, name) == part]
        assert max(distances) == pytest.approx(rate, rel=0.02), part
    assert results[family][run]["rate"] == RATE


@slow
def test_the_exported_model_answers_like_base_and_adapter(results: dict[str, Any]) -> None:
    adapted, merged, base = results["merged"]
    assert merged == pytest.approx(adapted, abs=1e-5)
    assert base != pytest.approx(adapted, abs=1e-4)


@slow
def test_a_resumed_run_ends_with_the_same_weights(results: dict[str, Any]) -> None:
    assert results["resumed"] == 0


@slow
@pytest.mark.parametrize(
    ("family", "vision", "projectors"),
    [
        (
            "llava_next",
            ["vision_tower", "multi_modal_projector", "image_newline"],
            ["multi_modal_projector", "image_newline"],
        ),
        ("idefics3", ["vision_model", "connector"], ["connector"]),
        (
            "llama4",
            ["vision_model", "multi_modal_projector"],
            ["multi_modal_projector", "vision_model.vision_adapter"],
        ),
        ("gemma4", ["vision_tower", "embed_vision"], ["embed_vision"]),  # it also has an audio tower
        ("minicpmv4_6", ["vision_tower", "merger"], ["merger", "vision_tower.vit_merger"]),
        ("video_llava", ["image_tower", "multi_modal_projector"], ["multi_modal_projector"]),
        ("janus", ["vision_model", "aligner"], ["aligner"]),  # what makes images is trained by nothing
        ("llama", [], []),
    ],
)
def test_towers_and_projectors_are_recognized_in_other_families(
    results: dict[str, Any], family: str, vision: list[str], projectors: list[str]
) -> None:
    names = {part: [name.removeprefix("model.") for name in names] for part, names in results["parts"][family].items()}
    assert names == {"vision": vision, "projectors": projectors}
