"""Tokens that a spec adds: told and counted before the start, learned, resumed, merged, measured and gone on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_json, write_json
from engine.evaluation.evaluation_spec import EvaluationSpec, frozen
from engine.export.export_spec import ExportSpec
from engine.export.vllm_command import adapter_problems
from engine.importer import read
from engine.launch.workspace import Workplace
from engine.models.adapters import adapter_config, adapter_token_rows
from engine.models.facts import inspect_model
from engine.preflight.checks import preflight_problems
from engine.preflight.model_checks import trained_parameters
from engine.runs.plan import summary
from engine.spec.run_spec import RunSpec
from tests.conftest import short_training
from tests.preloaded import run_python
from tests.train_many import lay_out, train_many

pytestmark = pytest.mark.usefixtures("forked")

TOKENS = ["<rise>", "<fall>", "two words, and a comma"]
SPECIAL = ["<calm>"]
ROWS = 800  # of the tiny model's embeddings, all of which its tokenizer uses
SPARE = """
import sys, torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
tiny, folder = sys.argv[1:]
torch.manual_seed(0)
config = Qwen2Config.from_pretrained(tiny, vocab_size=832, tie_word_embeddings=False)
Qwen2ForCausalLM(config).save_pretrained(folder)
AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
"""


@pytest.fixture(scope="module")
def spare(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head of its own, and rows to spare, as many a model has."""
    folder = tmp_path_factory.mktemp("spare") / "spare"
    run_python("-c", SPARE, tiny, folder)
    return folder


def adding(spec: RunSpec, **changes: Any) -> RunSpec:
    spec = spec.change("model.add_tokens", TOKENS).change("model.add_special_tokens", SPECIAL)
    for path, value in changes.items():
        spec = spec.change(path.replace("__", "."), value)
    return spec


# ------------------------------------------------------------------------------------------ told before the start


@pytest.mark.parametrize("tokens", [[""], [" "], ["<a>", "<a>"], ["x" * 201]])
def test_what_cannot_be_a_token_is_refused_at_its_field(tokens: list[str]) -> None:
    with pytest.raises(Refusal) as refused:
        RunSpec.read({"model": {"add_tokens": tokens}})
    assert [issue.field for issue in refused.value.problems] == ["model.add_tokens"]


def test_each_new_row_is_counted_once_where_embedding_and_head_are_one_and_twice_where_not(
    make_spec: Callable[..., RunSpec], spare: Path
) -> None:
    tied, untied = make_spec(), make_spec(model__model_name_or_path=str(spare))
    for spec, copies in ((tied, 1), (untied, 2)):
        rows = trained_parameters(adding(spec)) - trained_parameters(spec)
        assert rows == copies * 4 * 64
    assert trained_parameters(adding(untied, method="full")) == trained_parameters(untied.change("method", "full"))


def test_a_token_that_is_there_already_is_told_and_not_counted(
    workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    spec = make_spec(model__add_tokens=["<|im_end|>", "a", "<new>"])
    plan = summary(spec, workplace)
    assert plan.problems == []
    (doubt,) = [doubt for doubt in plan.doubts if doubt.code == "tokens-known"]
    assert doubt.values["tokens"] == "<|im_end|>, a"
    assert plan.trainable == trained_parameters(make_spec()) + 64


def test_keys_of_other_programs_that_add_tokens_are_taken() -> None:
    base = "model_name_or_path: x\nstage: sft\nfinetuning_type: lora\ndataset: a\n"
    imported = read(base + "add_tokens: <a>,<b>\nadd_special_tokens: <c>\nresize_vocab: true\n")
    model = imported.spec.model
    assert (model.add_tokens, model.add_special_tokens, model.resize_embeddings) == (["<a>", "<b>"], ["<c>"], True)
    axolotl = "base_model: x\nadapter: lora\ndatasets: [{path: a, type: alpaca}]\ntokens: ['<a>', 'b, c']\n"
    assert read(axolotl).spec.model.add_tokens == ["<a>", "b, c"]


# ------------------------------------------------------------------------------------------ trained, and used


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: Path, spare: Path) -> Workplace:
    root = tmp_path_factory.mktemp("added")
    (root / "data").mkdir()
    rows = [{"instruction": f"How is day {number}?", "output": "".join(TOKENS)} for number in range(8)]
    (root / "data" / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    (root / "data" / "dataset_info.json").write_text('{"chat": {"file_name": "chat.json"}}', encoding="utf-8")
    return Workplace(models=(tiny.parent, spare.parent), data=root / "data", saves=root / "saves")


def spec_of(place: Workplace, model: Path, **changes: Any) -> RunSpec:
    numbers = {"training__max_steps": 60, "training__per_device_train_batch_size": 8, "logging__save_steps": 30}
    changes = {"training__lr_scheduler_type": "constant"} | numbers | changes
    return adding(short_training(model, place.data), **changes)


@pytest.fixture(scope="module")
def trained(place: Workplace, tiny: Path, spare: Path) -> dict[str, RunDir]:
    specs = {
        "tied": spec_of(place, tiny),
        "untied": spec_of(place, spare),
        "full": spec_of(place, spare, method="full"),
        "pissa": spec_of(place, tiny, method__init_lora_weights="pissa", training__max_steps=30),
    }
    runs = {name: lay_out(RunDir(place.saves / "added" / "lora" / name), spec) for name, spec in specs.items()}
    train_many(*runs.values())
    for name, run in runs.items():
        assert run.result(), (name, read_json(run.error))
        write_json(run.exit, {"outcome": "finished", "reason": "finished", "ended": 1.0})
    return runs


ANSWER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter or base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
if adapter:
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model = PeftModel.from_pretrained(model, adapter)
chat = [{"role": "user", "content": "How is day 3?"}]
asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.generate(**asked, max_new_tokens=3, do_sample=False)[0, asked["input_ids"].shape[1] :]
control = tokenizer("<calm>", add_special_tokens=False)["input_ids"]
print(tokenizer.decode(ids), tokenizer.decode([*control, *ids], skip_special_tokens=True), len(control), sep="\\n")
"""


def answer(base: Path, adapter: Path | str) -> list[str]:
    """With transformers and peft alone: the answer; what is left of it behind a special token, where these are left
    out; and as how many tokens that is read."""
    return run_python("-c", ANSWER, base, adapter).splitlines()[-3:]


@pytest.mark.slow
def test_added_tokens_are_learned_and_special_ones_left_out_of_the_text(
    trained: dict[str, RunDir], tiny: Path, spare: Path
) -> None:
    expected = ["".join(TOKENS), "".join(TOKENS), "1"]
    assert answer(tiny, trained["tied"].adapter) == expected
    assert answer(spare, trained["untied"].adapter) == expected
    assert answer(trained["full"].model, "") == expected
    assert answer(tiny, trained["pissa"].adapter) == expected
    assert inspect_model(trained["full"].model).vocab_size == 832  # which had rows to spare


@pytest.mark.slow
def test_the_adapter_has_the_rows_of_the_new_tokens_and_no_others(trained: dict[str, RunDir]) -> None:
    for name, modules in (("tied", 1), ("pissa", 1), ("untied", 2)):
        weights = load_file(trained[name].adapter / "adapter_model.safetensors")
        rows = {key: tuple(weight.shape) for key, weight in weights.items() if "lora_" not in key}
        assert list(rows.values()) == [(4, 64)] * modules, rows
        assert adapter_token_rows(trained[name].adapter) == ROWS + 4
        spec = RunSpec.from_yaml(trained[name].spec.read_text(encoding="utf-8"))
        assert name == "pissa" or trained_parameters(spec) == sum(weight.numel() for weight in weights.values())
    (issue,) = adapter_problems(adapter_config(trained["tied"].adapter))
    assert issue.code == "vllm-whole-modules"  # vLLM takes no rows of an adapter; a merged model it does


def cut_off(run: RunDir, folder: Path) -> RunDir:
    """A copy of a run that has its checkpoints, but neither a result nor an end."""
    shutil.copytree(run.path, folder)
    copy = RunDir(folder)
    shutil.rmtree(copy.adapter)
    copy.exit.unlink()
    return copy


@pytest.mark.slow
def test_a_run_with_added_tokens_goes_on_from_a_checkpoint_as_if_never_interrupted(
    trained: dict[str, RunDir], place: Workplace
) -> None:
    resumed = cut_off(trained["untied"], place.saves / "added" / "lora" / "resumed")
    shutil.rmtree(resumed.path / "checkpoint-60")
    train_many(resumed)
    assert resumed.result(), read_json(resumed.error)
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (resumed, trained["untied"]))
    assert all(weight.equal(theirs[name]) for name, weight in ours.items())


@pytest.mark.slow
def test_a_checkpoint_of_an_older_version_that_has_no_rows_is_refused(
    trained: dict[str, RunDir], place: Workplace
) -> None:
    resumed = cut_off(trained["tied"], place.saves / "added" / "lora" / "older")
    for checkpoint in resumed.checkpoints():
        config = read_json(checkpoint / "adapter_config.json")
        whole = {"trainable_token_indices": None, "modules_to_save": ["embed_tokens", "lm_head"]}
        write_json(checkpoint / "adapter_config.json", config | whole)
    train_many(resumed)
    assert [issue["code"] for issue in read_json(resumed.error)["problems"]] == ["resume-other-rows"]


@pytest.mark.slow
def test_the_result_is_merged_measured_beside_its_base_and_gone_on_from(
    trained: dict[str, RunDir], place: Workplace, tiny: Path
) -> None:
    adapter, base = trained["tied"].adapter, {"model_name_or_path": str(tiny)}
    export = {"model": base, "adapters": {str(adapter): 1.0}, "precision": "fp32", "check_prompts": 2}
    evaluation = EvaluationSpec.read(
        {
            "results": [str(adapter)], "with_base": True, "data": {"datasets": ["chat"], "max_samples": 2},
            "generation": {"max_new_tokens": 4}, "hardware": {"device": "cpu"},
        }
    )  # fmt: skip
    more = spec_of(place, tiny, model__adapter_path=str(adapter), training__max_steps=2)
    specs = {"export": ExportSpec.read(export), "evaluation": frozen(evaluation, place), "more": more}
    runs = {name: lay_out(RunDir(place.saves / "added" / name / name), spec) for name, spec in specs.items()}
    train_many(*runs.values())
    assert {name: read_json(run.error) for name, run in runs.items()} == dict.fromkeys(runs)
    assert answer(runs["export"].model, "")[0] == answer(tiny, runs["more"].adapter)[0] == "".join(TOKENS)
    voices = read_json(runs["evaluation"].report / "summary.json")["voices"]
    assert {voice["id"] for voice in voices} == {"base", "added/lora/tied"}
    assert json.loads((runs["export"].model / "comparison.json").read_text(encoding="utf-8"))["equal"] == 2


@pytest.mark.slow
def test_adapters_with_tokens_of_their_own_answer_beside_each_other_as_alone(tiny: Path, tmp_path: Path) -> None:
    far = json.loads(run_python("-m", "tests.added_rows", tiny, tmp_path).splitlines()[-1])
    assert len(far) == 18
    assert max(far.values()) < 1e-5, far


@pytest.mark.slow
def test_an_adapter_is_gone_on_from_with_the_tokens_that_it_has_and_no_others(
    trained: dict[str, RunDir], place: Workplace, tiny: Path
) -> None:
    spec = spec_of(place, tiny, model__adapter_path=str(trained["tied"].adapter))
    place = replace(place, models=(*place.models, place.saves))

    def codes(spec: RunSpec) -> list[str]:
        return [issue.code for issue in preflight_problems(place.frozen(spec), place)]

    assert codes(spec) == []
    assert codes(spec.change("model.add_tokens", [])) == ["adapter-other-tokens"]
    assert codes(spec.change("model.add_tokens", [*reversed(TOKENS)])) == ["adapter-other-tokens"]
    assert codes(spec.change("model.add_tokens", [*TOKENS, "<more>"])) == ["adapter-other-tokens"]
