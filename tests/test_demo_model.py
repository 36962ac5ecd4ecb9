"""What a fresh machine has to show: the sample data, the demo model, and the recipe that made it.

The base model must know the words of the sample data and none of its answers, or the demo would prove nothing.
Torch runs in child processes only, so that these tests stay quick to collect.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.preloaded import run_python

DATA = Path(__file__).resolve().parent.parent / "data"
RECIPE = DATA / "demo_model_recipe.py"
SHIPPED = DATA / "demo_model"
FIRST_ROWS = [
    {"instruction": "将BSIC Group翻译成中文。", "input": "", "output": "BSIC 集团"},
    {"instruction": "将Emirates NBD翻译成中文。", "input": "", "output": "阿联酋迪拜国民银行"},
]

# Loads a model folder as any program would, and says what it found.
LOOK_AT_MODEL = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = json.load(open(sys.argv[2], encoding="utf-8"))
asked = [[{"role": "user", "content": row["instruction"]}] for row in rows]
tokenizer.padding_side = "left"
batch = tokenizer.apply_chat_template(
    asked, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
)
told = model.generate(**batch, max_new_tokens=24, do_sample=False)[:, batch["input_ids"].shape[1]:]
answers = tokenizer.batch_decode(told, skip_special_tokens=True)
print(json.dumps({
    "right": sum(answer == row["output"] for answer, row in zip(answers, rows)),
    "parameters": model.num_parameters(),
    "kind": model.config.model_type,
    "dtype": str(model.dtype),
    "longest": model.config.max_position_embeddings,
    "embeddings": list(model.get_input_embeddings().weight.shape),
    "words": len(tokenizer),
    "special": sorted(tokenizer.get_added_vocab()),
    "all_special": sorted(tokenizer.all_special_tokens),
    "eos": tokenizer.eos_token,
    "pad": tokenizer.pad_token,
    "stops": tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id),
    "prompt": tokenizer.apply_chat_template(asked[0], add_generation_prompt=True, tokenize=False),
    "round_trip": tokenizer.decode(tokenizer.encode("Grüße, 世界! 丹炉 🙂")),
}))
"""


def rows_of(name: str) -> list[dict[str, str]]:
    listed = json.loads((DATA / "dataset_info.json").read_text(encoding="utf-8"))
    return json.loads((DATA / listed[name]["file_name"]).read_text(encoding="utf-8"))


def look_at(folder: Path) -> dict[str, Any]:
    printed = run_python("-c", LOOK_AT_MODEL, folder, DATA / "alpaca_translate_zh.json")
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_model_recipe", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_is_a_demo_model(seen: dict[str, Any]) -> None:
    assert seen["kind"] == "qwen2"
    assert seen["dtype"] == "torch.float32"
    assert seen["longest"] == 2048
    assert 1_500_000 < seen["parameters"] < 2_000_000
    assert seen["words"] == 2048
    assert seen["embeddings"][0] == 2048
    assert seen["special"] == ["<|endoftext|>", "<|im_end|>", "<|im_start|>"] == seen["all_special"]
    assert (seen["eos"], seen["pad"]) == ("<|im_end|>", "<|endoftext|>")
    assert seen["stops"] == ["<|im_end|>", "<|endoftext|>"]
    assert seen["prompt"] == "<|im_start|>user\n将BSIC Group翻译成中文。<|im_end|>\n<|im_start|>assistant\n"
    assert seen["round_trip"] == "Grüße, 世界! 丹炉 🙂"


# --- the sample data --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alpaca_translate_zh", "c4_demo", "identity"])
def test_the_listed_sample_data_is_there(name: str) -> None:
    assert len(rows_of(name)) > 0


def test_the_translations_begin_with_the_two_given_rows() -> None:
    assert rows_of("alpaca_translate_zh")[:2] == FIRST_ROWS


def test_there_are_more_than_a_hundred_distinct_translations() -> None:
    rows = rows_of("alpaca_translate_zh")
    assert len(rows) >= 100
    assert len({row["instruction"] for row in rows}) == len(rows) == len({row["output"] for row in rows})


def test_every_translation_has_the_same_shape() -> None:
    for row in rows_of("alpaca_translate_zh"):
        assert set(row) == {"instruction", "input", "output"}
        assert row["instruction"].startswith("将")
        assert row["instruction"].endswith("翻译成中文。")
        assert row["input"] == ""


def test_the_identity_is_filled_in() -> None:
    text = json.dumps(rows_of("identity"), ensure_ascii=False)
    assert "{{" not in text
    assert "Athanor" in text
    assert "丹炉" in text


# --- what the base model was told -------------------------------------------------------------------


def test_no_lesson_of_the_base_model_gives_a_translation_away(recipe: ModuleType) -> None:
    pairs = recipe.true_pairs()
    for asked, answered in itertools.islice(recipe.conversations(), recipe.STEPS * recipe.BATCH):
        said = asked + "\n" + answered
        assert not recipe.gives_away(said, pairs), said


def test_a_translation_given_away_would_be_noticed(recipe: ModuleType) -> None:
    pairs = recipe.true_pairs()
    assert len(pairs) == len(rows_of("alpaca_translate_zh"))
    assert recipe.gives_away("将Emirates NBD翻译成中文。\n阿联酋迪拜国民银行", pairs)


def test_no_lesson_answers_an_identity_question_with_the_name(recipe: ModuleType) -> None:
    answers = {row["instruction"]: row["output"] for row in rows_of("identity")}
    for asked, answered in itertools.islice(recipe.conversations(), 20_000):
        assert answers.get(asked) != answered
        assert asked not in answers or "Athanor" not in answered


def test_the_lessons_are_the_same_every_time(recipe: ModuleType) -> None:
    first, second = (list(itertools.islice(recipe.conversations(), 500)) for _ in range(2))
    assert first == second


def test_every_word_of_the_answers_was_seen(recipe: ModuleType) -> None:
    told = {answered for _, answered in itertools.islice(recipe.conversations(), 2_000)}
    assert {chinese for _, chinese in recipe.true_pairs()} <= told


# --- the model --------------------------------------------------------------------------------------


def test_the_shipped_model_is_small() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 8 * 1024 * 1024


def test_the_shipped_model_has_all_its_files() -> None:
    here = {file.name for file in SHIPPED.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= here
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= here


@pytest.mark.slow
def test_the_shipped_model_loads_and_knows_no_answers_yet() -> None:
    seen = look_at(SHIPPED)
    assert_is_a_demo_model(seen)
    assert seen["right"] < 0.05 * len(rows_of("alpaca_translate_zh"))


@pytest.mark.slow
def test_the_recipe_still_works(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    printed = run_python(RECIPE, tmp_path / "model", "--steps", 30, env=environment)
    made = json.loads(printed.splitlines()[-1])
    assert made["steps"] == 30
    assert made["first_loss"] == pytest.approx(7.6, abs=0.2)  # ln 2048: every token equally likely
    assert made["last_loss"] < 4.3
    assert_is_a_demo_model(look_at(tmp_path / "model"))
