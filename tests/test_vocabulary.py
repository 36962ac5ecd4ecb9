"""A tokenizer that knows more than its model: told before the start, and with resized embeddings trained for real."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.core.problems import Problem
from engine.core.rundir import RunDir, read_json, write_json
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import Workplace
from engine.models.facts import inspect_model
from engine.models.vocabulary import missing_rows, special_token_problems, vocabulary
from engine.preflight import checks
from engine.preflight.model_checks import trained_parameters
from engine.runs import runs
from engine.spec.run_spec import RunSpec
from tests.conftest import wait_until
from tests.train_many import lay_out, train_many

pytestmark = pytest.mark.usefixtures("forked")

ADDED = ("<|rise|>", "<|fall|>", "<|calm|>")
ROWS, FIRST = 800, 800  # of the tiny model's embeddings, and the first id beyond them


@pytest.fixture(scope="module")
def grown(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with three tokens added to its tokenizer, as a person does it who forgets the model."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("grown") / "grown")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(list(ADDED), special_tokens=False) == 3
    assert tokenizer.convert_tokens_to_ids(ADDED[0]) == FIRST
    tokenizer.save_pretrained(folder)
    return folder


def place_of(workplace: Workplace, *models: Path) -> Workplace:
    rows = [{"instruction": f"How is day {number}?", "output": "".join(ADDED)} for number in range(8)]
    (workplace.data / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    return replace(workplace, models=tuple(models))


def found_for(workplace: Workplace, spec: RunSpec) -> list[Problem]:
    return checks.preflight_problems(workplace.frozen(spec), workplace)


# ------------------------------------------------------------------------------------------ told before the start


def test_ids_beyond_the_embeddings_are_told_with_their_tokens_and_resizing_is_offered(
    workplace: Workplace, grown: Path, make_spec: Callable[..., RunSpec]
) -> None:
    place = place_of(workplace, grown)
    spec = make_spec(model__model_name_or_path=str(grown))
    (told,) = found_for(place, spec)
    assert (told.code, told.field) == ("tokens-beyond-embeddings", "model.resize_embeddings")
    assert (told.values["highest"], told.values["rows"], told.values["missing"]) == (802, 800, 3)
    assert all(token in told.text(language) for token in ADDED for language in ("en", "zh"))
    assert found_for(place, spec.change("model.resize_embeddings", True)) == []


@pytest.mark.parametrize(
    ("file", "content", "token"),
    [
        ("added_tokens.json", {"<extra>": ROWS}, "<extra>"),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(ROWS): {"content": "<extra>"}}}, "<extra>"),
        # Named and nowhere defined: transformers gives it the next id. So many a fine-tuned Llama has its pad token.
        ("tokenizer_config.json", {"pad_token": "[PAD]"}, "[PAD]"),
        ("special_tokens_map.json", {"unk_token": {"content": "[UNK]"}}, "[UNK]"),
    ],
)
def test_each_place_where_a_token_may_be_added_is_read(
    tiny: Path, tmp_path: Path, file: str, content: dict[str, Any], token: str
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    assert missing_rows(inspect_model(folder)) == 0
    path = folder / file
    path.write_text(json.dumps((read_json(path) or {}) | content), encoding="utf-8")
    assert missing_rows(inspect_model(folder)) == 1
    assert vocabulary(folder).added[-1] == (ROWS, token)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"added_tokens": [1, null]}', '{"model": {"vocab": {"a": "b"}}}', '{"model": 3}']
)
def test_files_that_make_no_sense_are_no_error_here(tmp_path: Path, content: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (tmp_path / name).write_text(content)
    assert vocabulary(tmp_path).rows == 0


def test_a_text_without_an_end_is_told_before_pre_training(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    assert special_token_problems(inspect_model(folder), "pt") == []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings = read_json(folder / name)
            settings.pop("eos_token", None)
            (folder / name).write_text(json.dumps(settings), encoding="utf-8")
    assert [one.code for one in special_token_problems(inspect_model(folder), "pt")] == ["tokenizer-without-eos"]
    assert special_token_problems(inspect_model(folder), "sft") == []


# ------------------------------------------------------------------------------------------ trained, and used


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, grown: Path) -> dict[str, RunDir]:
    """Runs that learn to answer with the added tokens: LoRA, QLoRA, freeze and full."""
    root = tmp_path_factory.mktemp("resized")
    data = root / "data"
    data.mkdir()
    (data / "dataset_info.json").write_text('{"chat": {"file_name": "chat.json"}}')
    place_of(Workplace(data=data), grown)
    spec = RunSpec.read(
        {
            "model": {"model_name_or_path": str(grown), "resize_embeddings": True},
            "data": {"datasets": ["chat"], "dataset_dir": str(data), "max_length": 64},
            "training": {
                "max_steps": 60,
                "learning_rate": 5e-3,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": False,
                "lr_scheduler_type": "constant",
            },
            "logging": {"probe": False, "save_steps": 100, "plot_loss": False},
            "hardware": {"device": "cpu"},
        }
    )
    specs = {
        "lora": spec,
        "qlora": spec.change("model.quantization", "4bit"),
        "freeze": spec.change("method", {"kind": "freeze", "trainable_layers": 1}),
        "full": spec.change("method", "full"),
    }
    made = {name: lay_out(RunDir(root / "saves" / "grown" / one.shelf / name), one) for name, one in specs.items()}
    train_many(*made.values())
    for name, run in made.items():
        assert run.result(), (name, read_json(run.error))
    return made


def greedy(base: Path, adapter: Path | None) -> str:
    """The first tokens of the answer as whoever uses the result with transformers and peft alone gets it: resized as
    peft's documentation says, by the tokenizer of the result. Not its end, for which the frozen, random head of the
    tiny model has too small a row."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = adapter or base
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(model, adapter)
    chat = [{"role": "user", "content": "How is day 3?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    config = GenerationConfig.from_pretrained(folder)
    told = model.generate(**asked, generation_config=config, max_new_tokens=len(ADDED), do_sample=False)
    return tokenizer.decode(told[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_the_added_tokens_are_learned_whatever_the_method(trained: dict[str, RunDir], grown: Path) -> None:
    for name in ("lora", "qlora"):
        assert greedy(grown, trained[name].adapter) == "".join(ADDED), name
    for name in ("freeze", "full"):
        assert greedy(trained[name].model, None) == "".join(ADDED), name


@pytest.mark.slow
def test_the_new_rows_alone_are_saved_with_the_adapter_and_counted_before(
    trained: dict[str, RunDir], grown: Path
) -> None:
    weights = load_file(trained["lora"].adapter / "adapter_model.safetensors")
    shapes = {name: tuple(weight.shape) for name, weight in weights.items() if "lora_" not in name}
    assert list(shapes.values()) == [(3, 64)], shapes
    spec = RunSpec.from_yaml(trained["lora"].spec.read_text(encoding="utf-8"))
    assert trained_parameters(spec) == sum(weight.numel() for weight in weights.values())


@pytest.mark.slow
def test_the_result_is_measured_exported_merged_and_gone_on_from(
    workplace: Workplace, trained: dict[str, RunDir], grown: Path, make_spec: Callable[..., RunSpec]
) -> None:
    place = place_of(workplace, grown)
    copy = RunDir(place.saves / "grown" / "lora" / "lora")
    shutil.copytree(trained["lora"].path, copy.path)
    write_json(copy.exit, {"outcome": "finished", "reason": "finished", "ended": 1.0})  # else it would be trained again
    adapter = copy.adapter
    cpu = {"device": "cpu"}
    base = {"model_name_or_path": str(grown)}
    specs = {
        "export": ExportSpec.read(
            {
                "model": base,
                "adapters": {str(adapter): 1.0},
                "hardware": cpu,
                "precision": "fp32",
                "prompts": ["How is day 3?"],
                "check_prompts": 0,
            }
        ),
        "evaluation": EvaluationSpec.read(
            {
                "model": base,
                "results": ["grown/lora/lora"],
                "hardware": cpu,
                "with_base": True,
                "data": {"datasets": ["chat"]},
                "generation": {"max_new_tokens": 8},
            }
        ),
        "more": make_spec(model=base | {"adapter_path": str(adapter)}, training__max_steps=2),
    }
    started = {name: runs.submit(spec, place) for name, spec in specs.items()}
    ended = {
        name: wait_until(lambda run=run: (now := runs.get(place.saves, run.id)).final and now, 240)
        for name, run in started.items()
    }
    assert {name: run.state for name, run in ended.items()} == dict.fromkeys(specs, "finished"), [
        read_json(run.dir.error) for run in ended.values()
    ]
    assert greedy(ended["export"].dir.model, None) == "".join(ADDED)
    summary = read_json(ended["evaluation"].dir.report / "summary.json")
    exact = {voice["id"]: voice for voice in summary["voices"]}
    assert set(exact) == {"base", "grown/lora/lora"}
    assert greedy(grown, ended["more"].dir.adapter) == "".join(ADDED)
