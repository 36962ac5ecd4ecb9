"""What a training needs of a card, told before it starts, beside what a card was seen to hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import CASES, SHAPES, Case, spec_of
from docs import memory_table
from docs.memory_table import write_headers
from engine.core import hardware
from engine.launch.workspace import Workplace
from engine.models.facts import inspect_model
from engine.preflight import memory, memory_savers
from engine.preflight.model_checks import trained_parameters
from engine.runs.plan import Summary, summary
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec
from engine.spec.steps import examples_per_step
from webui.train_tab import plan_html
from webui.words import Words

pytestmark = pytest.mark.usefixtures("forked")

GIB = 2**30
# bench/RESULTS.md: held by torch, and in use on the card, in GiB. Quantized
# models were seen there with embeddings in fp32 only, which they no longer have.
SEEN = {
    "7B lora 2 × 2048 recomputed": (17.10, 18.74),
    "7B lora 1 × 2048 kept": (27.67, 29.72),
    "1.5B lora 4 × 1024 kept": (15.21, 16.68),
    "1.5B lora 8 × 1024 recomputed": (5.17, 6.59),
    "1.5B freeze 4 × 1024 recomputed": (8.02, 9.39),
}


def make_model(folder: Path, shape: Mapping[str, Any], dtype: str = "BF16") -> Path:
    """A model of this shape of which only the header is written."""
    return write_headers(folder, {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **shape}, dtype)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shapes")
    return {name: make_model(folder / name, shape) for name, shape in SHAPES.items()}


def spec(case: Case, models: Mapping[str, Path]) -> RunSpec:
    return spec_of(case, models[case.shape], Path("data"), "cuda")


@pytest.mark.parametrize("name", SEEN)
def test_it_is_what_a_card_was_seen_to_hold(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    case = next(one for one in CASES if one.name == name)
    if "freeze" in name:  # was seen with frozen weights in fp32, in which they now are only if the files have them so
        models = {case.shape: make_model(tmp_path / "fp32", SHAPES[case.shape], "F32")}
    need = memory.memory_needed(spec(case, models), inspect_model(models[case.shape]), gpu_count=1)
    held, used = SEEN[name]
    assert (need.total - need.libraries) / GIB == pytest.approx(held, rel=0.05)
    assert need.total / GIB == pytest.approx(used, rel=0.06)


@pytest.mark.parametrize(
    ("room", "changed"),
    [
        (80, set()),
        (24, {"training.gradient_checkpointing"}),
        (20, {"training.gradient_checkpointing"}),
        (14, {"training.gradient_checkpointing", "model.quantization"}),
        (9, {"training.gradient_checkpointing", "training.per_device_train_batch_size", "model.quantization"}),
        (4, None),
    ],
)
def test_the_first_changes_that_make_it_fit_are_named(
    models: dict[str, Path], room: int, changed: set[str] | None
) -> None:
    before = spec(Case("7B", "lora", 2, 2048, False), models)
    after = memory_savers.fit_to_memory(before, inspect_model(models["7B"]), 1, room * GIB)
    if changed is None:
        assert after is None
        return
    plain, other = before.model_dump(), after.model_dump()
    paths = {
        path
        for path in ("training.gradient_checkpointing", "training.per_device_train_batch_size", "model.quantization")
        if plain[path.split(".")[0]][path.split(".")[1]] != other[path.split(".")[0]][path.split(".")[1]]
    }
    assert paths == changed
    assert examples_per_step(after) == examples_per_step(before)
    assert memory.memory_needed(after, inspect_model(models["7B"]), 1).total <= room * GIB


def test_more_than_the_card_has_is_said_with_what_helps(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # No card is here: what the driver would say of one is put in its place.
    card = hardware.Gpu(0, "GPU-0", "NVIDIA L4", 24 * GIB, 24 * GIB, 8.9)
    monkeypatch.setattr(hardware, "gpus", lambda: (card,))
    asked = spec(Case("7B", "lora", 1, 2048, False), models)
    model = inspect_model(models["7B"])
    room = memory.available_memory(asked)
    fits = memory_savers.fit_to_memory(asked, model, 1, room.bytes)
    plan = Summary(
        8, 8, True, 1, 1, [], "", "", [], needed=memory.memory_needed(asked, model, 1), room=room, fits=fits
    )  # fmt: skip
    said = plan_html.memory(plan, asked, Words("en"))
    assert "NVIDIA L4" in said
    assert "Activation checkpointing: on" in said
    assert "NVIDIA L4" in plan_html.memory(plan, asked, Words("zh"))


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        # A step of as many examples would need more accumulation than there may be.
        ({"training.per_device_train_batch_size": 32768, "training.gradient_accumulation_steps": 8}, 10),
        ({"method.init_lora_weights": "pissa"}, 12),  # which 4 bits exclude
    ],
)
def test_what_may_not_be_is_not_proposed(models: dict[str, Path], changes: dict[str, Any], there: int) -> None:
    asked = spec(Case("7B", "lora", 2, 2048, True, changes), models)
    found = memory_savers.fit_to_memory(asked, inspect_model(models["7B"]), 1, there * GIB)
    assert found is None or spec_problems(found) == spec_problems(asked)


def test_a_reward_model_and_a_critic_need_memory_too(models: dict[str, Path]) -> None:
    model, sizes = inspect_model(models["7B"]), []
    plain = spec(Case("7B", "lora", 2, 512, True), models).model_dump() | {"stage": {"kind": "ppo"}}
    for judge in ("", str(models["1.5B"]), str(models["7B"])):
        plain["stage"] = {"kind": "ppo", "reward_model": judge}
        sizes.append(memory.memory_needed(RunSpec.read(plain), model, 1).weights)
    assert sizes[1] - sizes[0] == pytest.approx(2 * inspect_model(models["1.5B"]).parameters)
    assert sizes[2] - sizes[0] == pytest.approx(2 * model.parameters)


def test_a_reward_model_elsewhere_is_not_looked_into(models: dict[str, Path], tmp_path: Path) -> None:
    here = Workplace(saves=tmp_path)
    plain = here.preset("demo").model_dump() | {"stage": {"kind": "ppo", "reward_model": ""}}
    assert summary(RunSpec.read(plain), here).needed
    plain["stage"] |= {"reward_model": str(models["7B"])}
    plan = summary(RunSpec.read(plain), here)
    assert "path-outside" in {one.code for one in plan.problems if one.field == "stage.reward_model"}
    assert plan.needed is None


def test_a_card_that_tells_no_memory_is_not_judged_by_it(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: (hardware.Gpu(0, "GPU-0", "NVIDIA GB10", 0, 0, 12.1),))
    assert memory.available_memory(spec(Case("7B", "lora", 1, 64, True), models)) is None


def test_processes_on_a_cpu_share_its_memory(models: dict[str, Path]) -> None:
    one = spec(Case("7B", "lora", 1, 64, True), models).change("hardware.device", "cpu")
    two = one.change("hardware.num_processes", 2)
    assert memory.available_memory(two).bytes == memory.available_memory(one).bytes // 2


def test_on_a_cpu_it_is_the_machines_memory(models: dict[str, Path]) -> None:
    asked = spec(Case("1.5B", "lora", 1, 64, False), models)
    here = memory.memory_needed(
        asked.change("hardware.device", "cpu").change("training.precision", "auto"),
        inspect_model(models["1.5B"]),
        0,
    )
    assert here.weights > 4 * 1.5e9  # fp32
    assert memory.available_memory(asked.change("hardware.device", "cpu")).card == ""


@pytest.fixture(scope="module")
def qwen3_30b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of Qwen3-30B-A3B, with its experts one by one as they are published."""
    return write_headers(tmp_path_factory.mktemp("moe") / "qwen3-30b", memory_table.SHAPES["Qwen3-30B-A3B"])


@pytest.fixture(scope="module")
def needs() -> dict[str, dict[str, memory.MemoryNeed]]:
    return memory_table.needs()


@pytest.mark.slow
def test_the_page_of_the_documentation_shows_the_estimates(needs: dict[str, dict[str, memory.MemoryNeed]]) -> None:
    assert memory_table.PAGE.read_text(encoding="utf-8") == memory_table.page(needs)


@pytest.mark.slow
@pytest.mark.parametrize("method", memory_table.PEER)
def test_weights_gradients_and_optimizer_need_what_others_publish(
    needs: dict[str, dict[str, memory.MemoryNeed]], method: str
) -> None:
    for name, published in zip(memory_table.PEER_SHAPES, memory_table.PEER[method], strict=True):
        need = needs[name][method]
        assert (need.weights + need.learning) / 1e9 == pytest.approx(published, rel=0.15), name


@pytest.mark.slow
def test_the_experts_of_a_quantized_model_are_counted_as_they_are_loaded(qwen3_30b: Path) -> None:
    """4-bit Qwen3-30B-A3B has 15.5 GiB of weights: 29.9 billion in 4.127 bits, 0.62 billion of embeddings and head in
    16. With adapters on its experts, 28.99 billion of them also stay in 16 bits, and it has 55.6. An adapter of rank 16
    on attention has 13 million."""
    changes = {"quantization": {"kind": "4bit"}, "model_name_or_path": str(qwen3_30b)}
    run = RunSpec.read({"model": changes, "method": {"kind": "lora", "r": 16}, "data": {"datasets": ["chat"]}})
    model = inspect_model(qwen3_30b)
    need = memory.memory_needed(run, model, gpu_count=1)
    adapter = 4 * 48 * 16 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    assert need is not None
    assert (need.weights - adapter) / GIB == pytest.approx(15.5, abs=0.1)
    on_experts = run.change("method.expert_r", 1)
    whole = memory.memory_needed(on_experts, model, gpu_count=1)
    assert whole is not None
    added = 4 * 48 * 128 * ((1536 + 2048) + (768 + 2048))
    assert (whole.weights - adapter - added) / GIB == pytest.approx(55.6, abs=0.1)
    assert adapter / 4 == pytest.approx(13.4e6, rel=0.01)
    plain = memory.memory_needed(run.change("model.quantization", {"kind": "none"}), model, gpu_count=1)
    assert plain is not None
    assert plain.weights / GIB == pytest.approx(2 * 30.5e9 / GIB, rel=0.01)


def test_weights_that_stay_frozen_take_half_if_the_files_have_them_in_bf16(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Of 28 layers, the last two are trained."""
    case = next(case for case in CASES if "freeze" in case.name)
    wide = make_model(tmp_path / "fp32", SHAPES[case.shape], "F32")
    run = spec(case, models)

    def need(model: Path, **changes: Any) -> memory.MemoryNeed:
        changed = run.change("model.model_name_or_path", str(model))
        for path, value in changes.items():
            changed = changed.change(path.replace("__", "."), value)
        answer = memory.memory_needed(changed, inspect_model(model), gpu_count=1)
        assert answer is not None
        return answer

    narrow = models[case.shape]
    total, trained = inspect_model(narrow).parameters, trained_parameters(run)
    assert total
    assert trained
    assert need(narrow).weights == 2 * (total - trained) + 4 * trained
    assert need(wide).weights == 4 * total
    assert need(narrow, training__precision="fp32").weights == 4 * total
    assert need(narrow, method={"kind": "full"}).weights == 4 * total
    assert need(narrow).learning == need(wide).learning
    dpo = need(narrow, stage={"kind": "dpo"})
    assert dpo.weights == need(narrow).weights + 4 * trained  # the reference has its own copy of these


def test_answers_that_are_written_at_once_keep_their_keys_and_values(models: dict[str, Path], tmp_path: Path) -> None:
    """32 answers of 2,048 tokens of a model like Llama 2 7B, whose 32 heads each have their own: 32 GiB."""
    shape = dict(SHAPES["7B"]) | {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000,
    }  # fmt: skip
    folder = make_model(tmp_path / "llama", shape)
    run = RunSpec.read({
        "stage": {"kind": "grpo", "max_new_tokens": 1024, "num_generations": 8},
        "model": {"model_name_or_path": str(folder)},
        "data": {"datasets": ["chat"], "max_length": 1024},
        "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 32},
    })  # fmt: skip
    need = memory.memory_needed(run, inspect_model(folder), gpu_count=1)
    assert need is not None
    assert need.activations / GIB == pytest.approx(32, rel=0.01)


def test_scales_that_are_not_quantized_and_attention_written_out_need_more(models: dict[str, Path]) -> None:
    case = next(iter(CASES))
    run = spec(case, models).change("model.quantization", {"kind": "4bit"}).change("method", {"kind": "lora"})
    model = inspect_model(run.model.model_name_or_path)

    def need(**changes: Any) -> memory.MemoryNeed:
        changed = run
        for path, value in changes.items():
            changed = changed.change(path.replace("__", "."), value)
        answer = memory.memory_needed(changed, model, gpu_count=1)
        assert answer is not None
        return answer

    base = need()
    plain_scales = need(model__quantization__bnb_4bit_use_double_quant=False)
    quantized = model.parameters - memory.unquantized_parameters(run, model)
    # 32 bits for 64 weights, instead of 8 bits for 64 and 32 bits for 64 × 256 (Dettmers et al. 2023).
    assert plain_scales.weights - base.weights == pytest.approx(quantized * (32 - 8 - 32 / 256) / 64 / 8)
    assert need(model__attn_implementation="eager").activations > base.activations
