"""Vision tower, projector and language part are frozen, get an adapter or are trained, each at its own rate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from engine.core.problems import Refusal
from engine.core.rundir import RunDir, write_text
from engine.launch.workspace import Workplace
from engine.models import trainable_modules, vision_parts
from engine.models.facts import ModelFacts
from engine.models.structure import Structure
from engine.models.trainable_modules import saved_part_problems
from engine.models.vision_parts import name_in_base, vision_plan, vision_problems
from engine.preflight.data_checks import dataset_problems, vision_rows_problem
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec
from engine.spec.vision_settings import Vision
from engine.worker.data.images_column import IMAGES_COLUMN
from engine.worker.prepare import prepare, refuse_rows_without_images
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
        (
            {
                "vision": {"projector": "trained", "language_part": "frozen"},
                "method": "full",
                "model": {"model_name_or_path": "m", "add_tokens": ["<new>"]},
            },
            "vision-new-rows",
            "vision.language_part",
        ),
        (
            {"vision": {"tower": "adapter"}, "model": {"quantization": "8bit", "model_name_or_path": "m"}},
            "vision-8bit",
            "vision.tower",
        ),
        (
            {
                "vision": {"tower": "adapter", "language_part": "frozen"},
                "method": {"kind": "lora", "modules_to_save": ["lm_head"]},
            },
            "vision-saved-frozen",
            "method.modules_to_save",
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


def test_eight_bits_without_recomputation_may_have_adapters_in_the_tower() -> None:
    plain = {"vision": {"tower": "adapter"}, "model": {"quantization": "8bit", "model_name_or_path": "m"}}
    spec = RunSpec.read(plain | {"data": {"datasets": ["d"]}, "training": {"gradient_checkpointing": False}})
    assert "vision-8bit" not in {problem.code for problem in spec_problems(spec)}


FACTS = ModelFacts("", "m", architecture="SomeModel")


@pytest.mark.parametrize(
    ("vision", "structure", "codes"),
    [
        ({"tower": "adapter"}, MODEL, []),
        ({"projector": "trained"}, MODEL, []),
        ({"tower": "adapter"}, replace(MODEL, vision=(), projectors=()), ["no-vision"]),
        ({"projector": "adapter"}, replace(MODEL, projectors=()), ["no-projector"]),
        ({"tower": "adapter"}, replace(MODEL, vision_linear=()), ["vision-nothing-adapted"]),
        # LoRA can only save modules, and this projector is a parameter among those of another.
        (
            {"projector": "trained"},
            replace(MODEL, projectors=("model.visual.class_token",)),
            ["vision-nothing-trained"],
        ),
    ],
)
def test_choices_that_the_model_does_not_have_are_reported(
    monkeypatch: pytest.MonkeyPatch, vision: dict[str, Any], structure: Structure, codes: list[str]
) -> None:
    monkeypatch.setattr(vision_parts, "structure_of", lambda model: structure)
    assert [problem.code for problem in vision_problems(FACTS, Vision(**vision), "lora")] == codes


@pytest.mark.parametrize(
    ("vision", "saved", "codes"),
    [
        ({"projector": "trained"}, ["merger"], ["vision-saved-twice"]),
        ({"projector": "adapter"}, ["visual"], ["vision-saved-twice"]),
        ({"tower": "trained"}, ["merger", "q_proj"], []),
        ({}, ["merger"], []),
    ],
)
def test_a_vision_part_with_a_setting_of_its_own_is_not_saved_once_more(
    monkeypatch: pytest.MonkeyPatch, vision: dict[str, Any], saved: list[str], codes: list[str]
) -> None:
    monkeypatch.setattr(trainable_modules, "structure_of", lambda model: MODEL)
    assert [problem.code for problem in saved_part_problems(FACTS, Vision(**vision), saved)] == codes


@pytest.mark.parametrize(
    ("vision", "pictured", "code"),
    [
        ({}, 0, None),
        ({"tower": "trained"}, 0, "vision-without-images"),
        ({"tower": "trained"}, 1, None),
        ({"tower": "trained", "language_part": "frozen"}, 2, "vision-rows-without-images"),
        ({"tower": "trained", "language_part": "frozen"}, 3, None),
    ],
)
def test_trained_vision_parts_need_images(vision: dict[str, Any], pictured: int, code: str | None) -> None:
    problem = vision_rows_problem(Vision(**vision), 3, pictured)
    assert (problem and problem.code) == code


def test_trained_vision_parts_need_images_before_the_start_and_when_rows_are_prepared(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(vision__projector="trained", vision__language_part="frozen", method="full")
    assert "vision-without-images" in {problem.code for problem in dataset_problems(spec)}
    run = RunDir(workplace.saves / "tiny" / "full" / "run")
    run.path.mkdir(parents=True)
    write_text(run.spec, spec.to_yaml())
    with pytest.raises(Refusal) as refusal:
        prepare(run)
    assert [problem.code for problem in refusal.value.problems] == ["vision-without-images"]
    assert not (run.prepared / "summary.json").exists()
    columns = pa.record_batch({"input_ids": [[1]] * 3, IMAGES_COLUMN: pa.array([[], [{}], []])})
    with pa.OSFile(str(run.path / "rows"), "wb") as sink, pa.ipc.new_stream(sink, columns.schema) as stream:
        stream.write_batch(columns)
    with pytest.raises(Refusal, match="2 of 3 rows have none"):
        refuse_rows_without_images(spec, run.path / "rows")


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
def test_an_adapter_of_which_a_part_has_learned_nothing_is_not_saved(results: dict[str, Any]) -> None:
    assert results["empty"] == {"tower": ["vision.tower"], "projector": ["vision.projector"], "nothing": []}


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
