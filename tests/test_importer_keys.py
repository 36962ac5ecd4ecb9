"""Each key that LLaMA-Factory, transformers or axolotl has is taken with the same meaning, or named with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from docs import llamafactory as page
from engine.core.problems import Refusal
from engine.data.mixing import held_out, repeats
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.export.export_spec import ExportSpec
from engine.importer import Imported, decoded, read, read_any
from engine.importer.axolotl import CONVERTERS as AXOLOTL_CONVERTERS
from engine.importer.converters import CONVERTERS
from engine.importer.table import entries, reasons, sections
from engine.spec.run_spec import RunSpec, fields
from engine.spec.trainer_arguments import trainer_arguments
from tests import foreign_keys

BASE = "model_name_or_path: /models/x\nfinetuning_type: lora\ndataset: a,b\n"
PROGRAMS = ("llamafactory", "launchers", "axolotl")


def told(imported: Imported) -> dict[str, str]:
    return {one.values.get("name", one.code): one.code for one in imported.left_out}


def sft(text: str) -> Imported:
    return read(BASE + "stage: sft\n" + text)


# ------------------------------------------------------------------------------------------ the tables


@pytest.mark.parametrize(
    "names",
    [
        foreign_keys.LLAMAFACTORY,
        foreign_keys.LLAMAFACTORY_BEFORE,
        foreign_keys.LLAMAFACTORY_EXAMPLES,
        foreign_keys.TRANSFORMERS,
        foreign_keys.TRANSFORMERS_4,
    ],
    ids=["LLaMA-Factory", "older", "examples", "transformers 5", "transformers 4"],
)
def test_every_key_is_in_the_table(names: list[str]) -> None:
    assert len(names) > 3
    assert set(names) - set(entries("llamafactory")) == set()


def test_every_key_of_axolotl_is_in_its_table() -> None:
    assert set(foreign_keys.AXOLOTL) - set(entries("axolotl")) == set()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_key_goes_where_there_is_a_setting_or_has_a_reason_in_both_languages(program: str) -> None:
    known = {
        "training": set(fields()),
        "evaluation": set(fields(EvaluationSpec)),
        "export": set(fields(ExportSpec)),
    }
    arguments = {name for stage in trainer_arguments().values() for name in stage}
    converters = AXOLOTL_CONVERTERS if program == "axolotl" else CONVERTERS
    for name, entry in entries(program).items():
        assert entry.paths or entry.same or entry.none or entry.part, name
        for kind, path in entry.paths.items():
            whole = kind if kind in ("evaluation", "export") else "training"
            inside = path.removeprefix("extra.") in arguments if path.startswith("extra.") else path in known[whole]
            assert inside or path in ("", "kind", "stage.kind", "method.kind"), (name, path)
        assert not entry.converter or entry.converter in converters, name
        for reason in (entry.same, entry.none):
            assert not reason or set(reasons()[reason]) == {"en", "zh"}, (name, reason)
        assert not entry.remark or set(entry.remark) == {"en", "zh"}, name
        assert not entry.part or entries(program)[entry.part].converter, name


def test_no_key_stands_twice_and_no_reason_is_unused() -> None:
    for program in PROGRAMS:
        names = [name for section in sections(program) for name in section.keys]
        assert len(names) == len(set(names)), program
    used = {
        reason for program in PROGRAMS for entry in entries(program).values() for reason in (entry.same, entry.none)
    }
    source = "\n".join(
        file.read_text(encoding="utf-8") for file in (Path(page.__file__).parents[1] / "engine/importer").glob("*.py")
    )
    assert {name for name in reasons() if name not in used and f'"{name}"' not in source} == set()


@pytest.mark.parametrize("file", page.FILES.values())
def test_the_page_of_keys_is_up_to_date(file: str) -> None:
    assert (Path(page.__file__).parent / file).read_text(encoding="utf-8") == page.pages()[file]


# Values of a kind that a key does not expect, and one that it may.
VALUES = [
    "2",
    "0.3",
    "true",
    "false",
    "null",
    "some text",
    "a,b",
    "[1, 2]",
    "{a: {b: 1}}",
    "-1",
    "'1e400'",
    "''",
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_no_key_ever_refuses_the_whole_and_none_is_passed_over_in_silence(value: str, stage: str) -> None:
    """Each key of the table with a value of each type, alone beside a sound file: a spec comes of it that is valid."""
    without = read(BASE + f"stage: {stage}\n")
    for name, entry in entries("llamafactory").items():
        if name in ("stage", "model_name_or_path", "finetuning_type", "dataset"):
            continue
        imported = read(BASE + f"stage: {stage}\n{name}: {value}\n")
        names = {str(one.values.get("name")) for one in imported.left_out}
        assert name in names or imported.spec != without.spec or entry.paths, f"{name}: {value}"
        assert all(one.text("zh") and one.text("en") for one in imported.left_out)


@pytest.mark.parametrize("value", VALUES)
def test_no_key_of_axolotl_refuses_the_whole_either(value: str) -> None:
    for name in entries("axolotl"):
        if name != "base_model":
            assert isinstance(read(f"base_model: m\nadapter: lora\n{name}: {value}\n").spec, RunSpec), name


# ------------------------------------------------------------------------------------------ one key, one meaning


def test_a_validation_size_below_one_is_a_share_and_from_one_on_rows() -> None:
    rows = {"a": 60, "b": 40}
    for value, expected in (("0.1", 10), ("50", 50), ("1", 1), ("1.0", 1), ("0.6", 60), ("0", 0)):
        assert sum(held_out(sft(f"val_size: {value}").spec.data, rows).values()) == expected, value


def test_probabilities_show_as_many_rows_as_theirs() -> None:
    """Expected counts are worked out by hand: of 100 and 300 rows by 0.5 and
    0.5, under ends after 200, over after 600."""
    rows = {"a": 100, "b": 300}
    for how, expected in (
        ("interleave_under", {"a": 100, "b": 100}),
        ("interleave_over", {"a": 300, "b": 300}),
    ):
        data = sft(f"mix_strategy: {how}\ninterleave_probs: 0.5,0.5").spec.data
        often = repeats(data, rows)
        assert {name: often[name] * count for name, count in rows.items()} == pytest.approx(expected)
    once = sft("mix_strategy: interleave_once").spec.data
    assert repeats(once, rows) == {"a": 1, "b": 1}
    assert told(sft("interleave_probs: 0.5,0.5")) == {"interleave_probs": "import-none"}
    assert told(sft("mix_strategy: interleave_over\ninterleave_probs: 0.7")) == {"interleave_probs": "import-none"}


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("max_steps: -1", "training.max_steps", None),
        ("max_steps: 30", "training.max_steps", 30),
        ("save_strategy: epoch", "logging.save_strategy", "epoch"),
        ("save_strategy: no", "logging.save_strategy", "no"),
        ("evaluation_strategy: epoch", "logging.eval_strategy", "epoch"),
        ("save_total_limit: 3", "logging.save_total_limit", 3),
        ("eval_strategy: steps\nlogging_steps: 10", "logging.eval_steps", 10),
        ("eval_strategy: steps", "logging.eval_steps", 500),
        ("early_stopping_steps: 5", "logging.early_stopping_patience", 5),
        ("flash_attn: fa2", "model.attn_implementation", "flash_attention_2"),
        ("flash_attn: sdpa", "model.attn_implementation", "sdpa"),
        ("flash_attn: disabled", "model.attn_implementation", "eager"),
        ("flash_attn: auto", "model.attn_implementation", "auto"),
        ("flash_attn: true", "model.attn_implementation", "flash_attention_2"),
        ("flash_attn: fa3", "model.attn_implementation", "auto"),
        ("quantization_bit: 4\nquantization_method: bnb", "model.quantization.kind", "4bit"),
        ("quantization_bit: 8\ndouble_quantization: true", "model.quantization.kind", "8bit"),
        ("quantization_bit: 4\nquantization_type: fp4", "model.quantization.bnb_4bit_quant_type", "fp4"),
        ("quantization_bit: 3\nquantization_method: hqq", "model.quantization.kind", "none"),
        ("neat_packing: true", "data.packing", True),
        ("packing: true", "data.packing", True),
        ("packing: false", "data.packing", False),
        ("pissa_init: true", "method.init_lora_weights", "pissa"),
        ("use_dora: true", "method.use_dora", True),
        ("use_rslora: true", "method.use_rslora", True),
        ("loraplus_lr_ratio: 16", "method.loraplus_lr_ratio", 16),
        ("loraplus_lr_ratio: 0", "method.loraplus_lr_ratio", None),
        ("additional_target: embed_tokens,lm_head", "method.modules_to_save", ["embed_tokens", "lm_head"]),
        ("lora_target: all", "method.target_modules", ["all-linear"]),
        ("lora_target: q_proj, v_proj", "method.target_modules", ["q_proj", "v_proj"]),
        ("lora_target: .*(q|v)_proj", "method.target_modules", ["all-linear"]),
        ("train_on_prompt: true", "stage.train_on", "everything"),
        ("mask_history: true", "stage.train_on", "last_answer"),
        ("warmup_ratio: 0.1", "training.warmup_steps", 0.1),
        ("warmup_ratio: 0.1\nwarmup_steps: 20", "training.warmup_steps", 20),
        ("warmup_steps: 0\nwarmup_ratio: 0.1", "training.warmup_steps", 0.1),
        ("warmup_ratio: 1.0", "training.warmup_steps", 0),
        ("bf16: true\nfp16: false", "training.precision", "bf16"),
        ("pure_bf16: true", "training.precision", "bf16"),
        ("optim: adamw_hf", "training.optim", "adamw_torch"),
        ("neftune_noise_alpha: 0", "training.neftune_noise_alpha", None),
        ("disable_gradient_checkpointing: true", "training.gradient_checkpointing", False),
        ("adapter_name_or_path: saves/a", "model.adapter_path", "saves/a"),
        ("adapter_name_or_path: a,b", "model.adapter_path", None),
        ("adapter_name_or_path: a\ncreate_new_adapter: true", "model.adapter_path", None),
        ("dataset_dir: ONLINE", "data.dataset_dir", "data"),
        ("use_swanlab: true\nreport_to: wandb", "logging.report_to", ["swanlab", "wandb"]),
        ("report_to: all", "logging.report_to", []),
        ("run_name: first try", "name", "first try"),
        ("disable_shuffling: true", "extra", {"train_sampling_strategy": "sequential"}),
        ("disable_shuffling: true", "data.group_by_length", False),
        ("use_dft_loss: true", "extra", {"loss_type": "dft"}),
        ("adam_beta2: 0.95", "extra", {"adam_beta2": 0.95}),
        ("template: alpaca", "model.chat_template", "alpaca"),
        ("template: qwen3_nothink", "model.chat_template", None),
        ("enable_thinking: false", "data.train_empty_thoughts", False),
        ("enable_thinking: true", "data.train_empty_thoughts", True),
        ("no_cuda: true", "hardware.device", "cpu"),
        ("ray_num_workers: 4", "hardware.num_processes", 4),
    ],
)
def test_a_key_has_one_meaning(text: str, path: str, value: Any) -> None:
    found: Any = sft(text).spec
    for step in path.split("."):
        found = getattr(found, step)
    assert found == value


@pytest.mark.parametrize(
    "text",
    [
        "resume_from_checkpoint: saves/x/checkpoint-500",
        "adapter_name_or_path: a,b",
        "flash_attn: fa3",
        "lora_target: .*proj",
        "preserve_thinking: true",
        "template: qwen",
        "quantization_bit: 3",
        "use_unsloth: true",
        "use_badam: true",
        "reward_model_type: api",
        "freeze_extra_modules: lm_head",
        "default_system: You are.",
        "num_beams: 4",
        "metric_for_best_model: rouge-l",
        "save_steps: 0.1",
        "tokenized_path: cached",
        "use_llama_pro: true",
        "deepspeed: ds.json",
        "do_predict: true\ndo_train: true",
    ],
)
def test_what_changes_the_run_and_is_not_here_is_never_called_needless(text: str) -> None:
    name = text.partition(":")[0]
    imported = sft(text)
    assert told(imported)[name] == "import-none"
    assert name in {one.values["name"] for one in imported.lost}


@pytest.mark.parametrize(
    "text",
    [
        "use_unsloth: false",
        "overwrite_cache: true",
        "output_dir: saves/x",
        "ddp_timeout: 180000000",
        "preserve_thinking: false",
        "save_only_model: false",
        "max_steps: -1",
        "preprocessing_batch_size: 1000",
        "freeze_vision_tower: true",
        "pissa_convert: true",
        "infer_backend: vllm",
        "resume_from_checkpoint: null",
        "galore_rank: 16",
    ],
)
def test_what_leaves_the_run_as_it_is_is_needless_and_changes_nothing(text: str) -> None:
    imported = sft(text)
    assert set(told(imported).values()) == {"import-needless"}
    assert imported.spec == sft("").spec


def test_the_stretch_is_the_context_that_the_rows_need_by_the_models_own() -> None:
    def stretched(length: int, context: int | None) -> tuple[str, float | None, dict[str, str]]:
        imported = read(BASE + f"rope_scaling: yarn\ncutoff_len: {length}", context_of=lambda _: context)
        rope = imported.spec.model.rope_scaling
        return rope.kind, getattr(rope, "factor", None), told(imported)

    assert stretched(20_000, 8192) == ("yarn", 3.0, {})
    assert stretched(4096, 8192) == ("none", None, {"rope_scaling": "import-needless"})
    assert stretched(20_000, None) == ("yarn", 2.0, {"rope_scaling": "import-differs"})


def test_low_rank_gradients_keep_their_numbers() -> None:
    spec = read(
        "finetuning_type: full\ndataset: a\nuse_galore: true\ngalore_layerwise: "
        "true\ngalore_target: mlp,self_attn\ngalore_rank: 128"
    ).spec
    assert spec.training.optim == "galore_adamw_layerwise"
    assert spec.extra["optim_target_modules"] == ["mlp", "self_attn"]
    assert spec.extra["optim_args"] == "rank=128,update_proj_gap=200,scale=2.0,proj_type=std"
    spec = read("finetuning_type: full\ndataset: a\nuse_apollo: true").spec
    assert (spec.training.optim, spec.extra["optim_target_modules"]) == ("apollo_adamw", "all-linear")
    assert (
        spec.extra["optim_args"]
        == "rank=16,update_proj_gap=200,scale=32.0,proj=random,proj_type=std,scale_type=channel"
    )


def test_ppo_is_theirs_where_nothing_is_said_and_a_buffer_is_so_many_mini_batches() -> None:
    stage = read(BASE + "stage: ppo\nreward_model: /r").spec.stage
    assert (stage.kl_target, stage.init_kl_coef, stage.temperature, stage.top_p, stage.max_new_tokens) == (
        6,
        0.2,
        0.95,
        0.7,
        1024,
    )
    assert (stage.missing_eos_penalty, stage.num_ppo_epochs) == (None, 4)
    spec = read(BASE + "stage: ppo\nreward_model: /r\nppo_buffer_size: 3\ngradient_accumulation_steps: 2").spec
    assert (spec.stage.num_mini_batches, spec.training.gradient_accumulation_steps) == (3, 6)


def test_pre_training_packs_by_itself_as_theirs_does() -> None:
    assert read(BASE + "stage: pt").spec.data.packing
    assert not read(BASE + "stage: pt\npacking: false").spec.data.packing
    assert not sft("").spec.data.packing


def test_layers_are_frozen_from_the_end_or_from_the_beginning() -> None:
    for count in (3, -3):
        spec = read(f"finetuning_type: freeze\nstage: sft\ndataset: a\nfreeze_trainable_layers: {count}").spec
        assert (spec.method.kind, spec.method.trainable_layers) == ("freeze", count)
    imported = read("finetuning_type: full\nstage: sft\ndataset: a\nlora_rank: 8\nuse_dora: true")
    assert (imported.spec.method.kind, told(imported)) == (
        "full",
        {"lora_rank": "import-needless", "use_dora": "import-needless"},
    )


def test_a_data_set_named_twice_counts_twice() -> None:
    assert read(BASE + "dataset: a, b,a").spec.data.datasets == {"a": 2, "b": 1}


def test_a_slip_of_the_pen_is_told_with_what_was_meant() -> None:
    imported = sft("learning_rat: 1e-4\nquux: 1")
    assert [one.values["hint"] for one in imported.left_out] == ["learning_rate", "—"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("learning_rate: fast", "learning_rate"),
        ("cutoff_len: -5", "cutoff_len"),
        ("num_train_epochs: 1e400", "num_train_epochs"),
        ("lora_rank: [8]", "lora_rank"),
        ("val_size: many", "val_size"),
        ("interleave_probs: x,y\nmix_strategy: interleave_under", "interleave_probs"),
        ("per_device_train_batch_size: 1000000", "per_device_train_batch_size"),
        ("lr_scheduler_type: sideways", "lr_scheduler_type"),
        ("optim: adamw_mini", "optim"),
        ("adam_beta2: [1]", "adam_beta2"),
        ("lora_dropout: 2", "lora_dropout"),
    ],
)
def test_an_absurd_value_is_left_out_alone(text: str, name: str) -> None:
    imported = sft(text + "\nlora_alpha: 5")
    assert told(imported)[name] == "import-value"
    assert imported.spec.method.lora_alpha == 5


def test_where_a_value_is_left_out_theirs_stands_as_if_nothing_had_been_said() -> None:
    spec = sft("learning_rate: fast\nnum_train_epochs: -1\nlora_rank: x\ncutoff_len: {}").spec
    assert spec == sft("").spec
    assert (spec.training.learning_rate, spec.method.r, spec.method.lora_alpha) == (5e-5, 8, 16)


def test_a_mapping_may_be_json_text() -> None:
    assert sft("lr_scheduler_kwargs: '{\"num_cycles\": 2}'").spec.extra == {"lr_scheduler_kwargs": {"num_cycles": 2}}


@pytest.mark.parametrize("text", ["stage: rlhf", "finetuning_type: oft", "stage: {kind: x}", "stage: [sft]"])
def test_a_stage_or_method_that_is_not_here_is_told_and_the_rest_stands(text: str) -> None:
    imported = read(f"model_name_or_path: m\ndataset: a\nlora_rank: 4\n{text}")
    assert told(imported)[text.partition(":")[0]] == "import-none"
    assert (imported.spec.stage.kind, imported.spec.method.kind, imported.spec.method.r) == ("sft", "lora", 4)


def test_of_two_keys_for_one_setting_the_later_counts_and_the_other_is_told() -> None:
    imported = sft("fp16: true\nbf16: true")
    assert (imported.spec.training.precision, told(imported)) == ("bf16", {"fp16": "import-overruled"})


def test_a_secret_is_never_repeated() -> None:
    imported = sft("hf_hub_token: hf_abcdef\nhub_token: hf_abcdef\nswanlab_api_key: hf_abcdef\nmy_api_key: hf_abcdef")
    shown = imported.spec.to_yaml() + "".join(
        one.text(language) for one in imported.left_out for language in ("en", "zh")
    )
    assert "abcdef" not in shown


# ------------------------------------------------------------------------------------------ evaluation, export

PREDICT = """model_name_or_path: /models/x
adapter_name_or_path: saves/a
stage: sft
do_predict: true
finetuning_type: lora
eval_dataset: identity,demo
template: llama3
max_samples: 50
per_device_eval_batch_size: 2
predict_with_generate: true
output_dir: saves/predict
"""


def test_a_file_that_predicts_becomes_an_evaluation() -> None:
    spec = read(PREDICT).spec
    assert isinstance(spec, EvaluationSpec)
    assert (spec.model.model_name_or_path, spec.results, spec.with_base) == ("/models/x", ["saves/a"], False)
    assert (spec.data.datasets, spec.data.max_samples, spec.generation.batch_size) == (
        ["identity", "demo"],
        50,
        2,
    )
    assert (spec.generation.temperature, spec.generation.top_p, spec.generation.max_new_tokens) == (
        0.95,
        0.7,
        1024,
    )
    assert read(PREDICT + "do_sample: false").spec.generation.temperature == 0
    assert read(PREDICT.replace("max_samples: 50", "")).spec.data.max_samples is None
    assert isinstance(read(PREDICT + "do_train: true").spec, RunSpec)


def test_the_old_verb_eval_becomes_tasks_of_the_harness() -> None:
    spec = read(
        "llamafactory-cli eval --model_name_or_path m --task mmlu_test --n_shot 5 --lang en --batch_size 4"
    ).spec
    assert isinstance(spec, EvaluationSpec)
    assert (spec.harness.tasks, spec.harness.num_fewshot, spec.generation.batch_size) == (["mmlu"], 5, 4)


def test_an_export_file_becomes_an_export() -> None:
    text = (
        "model_name_or_path: /m\nadapter_name_or_path: a,b\ntemplate: "
        "x\nexport_dir: out/merged/\nexport_size: 2\nexport_device: cpu\n"
    )
    spec = read(text + "export_quantization_bit: 4\nexport_legacy_format: true").spec
    assert isinstance(spec, ExportSpec)
    assert (spec.model.model_name_or_path, spec.adapters, spec.combination) == ("/m", {"a": 1, "b": 1}, "cat")
    assert (spec.name, spec.shard_gb, spec.hardware.device, spec.precision, spec.quantize) == (
        "merged",
        2,
        "cpu",
        "auto",
        "none",
    )
    codes = told(read(text + "export_quantization_bit: 4\nexport_legacy_format: true\nlearning_rate: 1"))
    assert codes["export_quantization_bit"] == codes["export_legacy_format"] == "import-none"
    assert codes["learning_rate"] == "import-needless"
    assert isinstance(
        read("llamafactory-cli export --model_name_or_path m --adapter_name_or_path a --export_dir o").spec,
        ExportSpec,
    )


@pytest.mark.parametrize("value", VALUES)
def test_no_key_refuses_an_evaluation_or_an_export(value: str) -> None:
    for name in entries("llamafactory"):
        if name not in ("do_predict", "do_train", "export_dir", "task"):
            assert isinstance(read(f"do_predict: true\neval_dataset: a\n{name}: {value}").spec, EvaluationSpec), name
            assert isinstance(read(f"export_dir: o\n{name}: {value}").spec, ExportSpec), name


# ------------------------------------------------------------------------------------------ LLaMA Board, axolotl

BOARD = """top.booster: flashattn2
top.checkpoint_path: []
top.finetuning_type: lora
top.model_name: Qwen2.5-0.5B-Instruct
top.quantization_bit: '4'
top.quantization_method: bnb
top.rope_scaling: none
top.template: qwen
train.additional_target: ''
train.apollo_rank: 16
train.batch_size: 2
train.compute_type: bf16
train.cutoff_len: 1024
train.dataset: [identity, alpaca_zh_demo]
train.dataset_dir: data
train.ds_offload: false
train.ds_stage: none
train.extra_args: '{"optim": "adamw_torch", "adam_beta2": 0.95}'
train.gradient_accumulation_steps: 8
train.learning_rate: 1e-4
train.lora_alpha: 16
train.lora_rank: 8
train.lora_target: ''
train.loraplus_lr_ratio: 0
train.max_samples: '100000'
train.neftune_alpha: 0
train.num_train_epochs: '3.0'
train.pref_beta: 0.1
train.pref_loss: sigmoid
train.report_to: none
train.save_steps: 50
train.training_stage: Supervised Fine-Tuning
train.use_galore: false
train.use_pissa: true
train.val_size: 0.1
train.warmup_steps: 0
"""


def test_a_saved_form_of_llama_board_is_read() -> None:
    imported = read_any(BOARD)
    spec = imported.spec
    assert (spec.stage.kind, spec.model.model_name_or_path, spec.model.attn_implementation) == (
        "sft",
        "Qwen2.5-0.5B-Instruct",
        "flash_attention_2",
    )
    assert (spec.model.quantization.kind, spec.training.precision, spec.extra) == (
        "4bit",
        "bf16",
        {"adam_beta2": 0.95},
    )
    assert (spec.data.datasets, spec.data.max_samples, spec.data.max_length) == (
        {"identity": 1, "alpaca_zh_demo": 1},
        100_000,
        1024,
    )
    assert (
        spec.training.learning_rate,
        spec.training.num_train_epochs,
        spec.training.per_device_train_batch_size,
    ) == (1e-4, 3, 2)
    assert (spec.method.init_lora_weights, spec.method.lora_alpha, spec.method.target_modules) == (
        "pissa",
        16,
        ["all-linear"],
    )
    assert (spec.data.validation_share, spec.logging.eval_steps, spec.logging.save_steps) == (0.1, 50, 50)
    assert told(imported)["Qwen2.5-0.5B-Instruct"] == "import-board-model"
    dpo = read(BOARD.replace("Supervised Fine-Tuning", "DPO").replace("pref_beta: 0.1", "pref_beta: 0.3")).spec
    assert (dpo.stage.kind, dpo.stage.beta) == ("dpo", 0.3)


def test_a_form_with_data_to_evaluate_alone_is_an_evaluation() -> None:
    spec = read(
        "top.model_path: /m\ntop.finetuning_type: lora\ntrain.dataset: []\neval.dataset: "
        "[a]\neval.predict: true\neval.max_new_tokens: 64\neval.batch_size: 4"
    ).spec
    assert isinstance(spec, EvaluationSpec)
    assert (spec.data.datasets, spec.generation.max_new_tokens, spec.generation.batch_size) == (["a"], 64, 4)


AXOLOTL = """base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: data/teknium.jsonl
    type: alpaca
    ds_type: json
val_set_size: 0.05
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_ratio: 0.1
saves_per_epoch: 1
evals_per_epoch: 4
special_tokens: {pad_token: <|end_of_text|>}
"""


def test_an_axolotl_file_is_read() -> None:
    imported = read_any(AXOLOTL)
    spec = imported.spec
    assert (spec.stage.kind, spec.method.kind, spec.model.quantization.kind, spec.method.r) == (
        "sft",
        "lora",
        "4bit",
        32,
    )
    assert (spec.data.datasets, spec.data.max_length, spec.data.packing, spec.data.too_long) == (
        {"teknium": 1},
        2048,
        True,
        "drop",
    )
    assert (spec.training.optim, spec.training.num_train_epochs, spec.training.warmup_steps) == (
        "adamw_bnb_8bit",
        2,
        0.1,
    )
    assert (spec.model.attn_implementation, spec.logging.save_strategy) == ("flash_attention_2", "epoch")
    codes = told(imported)
    assert (codes["datasets"], codes["evals_per_epoch"], codes["special_tokens"]) == (
        "import-differs",
        "import-none",
        "import-none",
    )
    assert "under the name teknium" in "".join(one.text() for one in imported.left_out)
    assert read("axolotl train x.yml", lambda _: AXOLOTL).spec == spec


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("rl: dpo\nrl_beta: 0.3", {"kind": "dpo", "beta": 0.3}),
        ("rl: ipo", {"kind": "dpo", "loss_type": "ipo"}),
        ("rl: kto\nkto_desirable_weight: 2", {"kind": "kto", "desirable_weight": 2}),
        ("rl: orpo\norpo_alpha: 0.2", {"kind": "orpo", "orpo_lambda": 0.2}),
        ("rl: simpo\nsimpo_gamma: 0.7", {"kind": "simpo", "simpo_gamma": 0.7}),
        ("reward_model: true", {"kind": "rm"}),
        (
            "rl: grpo\ntrl: {num_generations: 4, max_completion_length: 99, beta: 0.01}",
            {"kind": "grpo", "num_generations": 4, "max_new_tokens": 99, "grpo_beta": 0.01},
        ),
        ("train_on_inputs: true", {"kind": "sft", "train_on": "everything"}),
    ],
)
def test_what_axolotl_learns_from_keeps_its_settings(text: str, stage: dict[str, Any]) -> None:
    assert stage.items() <= read(f"base_model: m\nadapter: lora\n{text}").spec.stage.model_dump().items()


# ------------------------------------------------------------------------------------------ files, and hostile ones


def test_a_file_is_read_in_the_encoding_of_its_user() -> None:
    text = "stage: sft\nrun_name: 第一次\ndataset: 数据\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "gb18030"):
        assert decoded(text.encode(encoding)).removeprefix("\ufeff") == text, encoding
    with pytest.raises(Refusal):
        decoded(b"\x00\x01\x02")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "stage: sft\nx: &a {}\ny: *a",
        "{" * 5000,
        "[" * 50_000,
        "- " * 9000,
        "stage: sft\n" + "x: {" * 200,
        "'" * 99,
        "\0",
        "$(" * 999,
        "llamafactory-cli train " + "--a " * 9000,
        "export A=${A}\nllamafactory-cli train --dataset $A",
        "cat <<EOF\n",
        'llamafactory-cli train --x "',
        "A=(1 2",
        "? [a, b]\n: 1",
        "stage: sft\n1: 2\ntrue: 3\nnull: 4",
        "!!python/object/apply:os.system [id]",
    ],
)
def test_hostile_text_is_refused_or_read_and_never_an_error(text: str) -> None:
    try:
        outcome: Imported | Refusal = read_any(text)
    except Refusal as refusal:
        outcome = refusal
    assert isinstance(outcome, Imported) or outcome.text("zh")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("freeze_vision_tower: false", ("adapter", "frozen", "method")),
        ("freeze_vision_tower: false\nfinetuning_type: full", ("trained", "frozen", "method")),
        ("freeze_multi_modal_projector: false\nfreeze_vision_tower: true", ("frozen", "adapter", "method")),
        ("finetuning_type: full\ntrain_mm_proj_only: true", ("frozen", "trained", "frozen")),
        (
            "finetuning_type: full\nfreeze_language_model: true\nfreeze_vision_tower: false",
            ("trained", "frozen", "frozen"),
        ),
    ],
)
def test_parts_of_a_vision_model_that_are_not_frozen_are_imported(text: str, chosen: tuple[str, str, str]) -> None:
    imported = sft(text)
    vision = imported.spec.vision
    assert (vision.tower, vision.projector, vision.language_part) == chosen
    assert "import-missing" not in set(told(imported).values())
