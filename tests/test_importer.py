"""The user comes from LLaMA-Factory: his commands become specs, and nothing of them is lost in silence."""

from __future__ import annotations

from typing import Any

import pytest

from engine.importer import read, read_any
from engine.problems import Refusal
from engine.spec import RunSpec

# In the form of the user's own commands: every flag they have.
COMMAND = """CUDA_VISIBLE_DEVICES=0,1,2,3 accelerate launch \\
    --config_file examples/accelerate/single_config.yaml \\
    src/train_bash.py \\
    --stage sft --do_train True --model_name_or_path /models/Qwen1.5-7B-Chat \\
    --finetuning_type lora --template qwen --dataset_dir data --dataset one,two \\
    --cutoff_len 1024 --learning_rate 5e-05 --num_train_epochs 100.0 --max_samples 100000 \\
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --lr_scheduler_type cosine \\
    --max_grad_norm 1.0 --logging_steps 5 --save_steps 100 --warmup_steps 0 --optim adamw_torch \\
    --report_to none --output_dir saves/x --fp16 True --lora_rank 8 --lora_alpha 16 \\
    --lora_dropout 0.1 --lora_target q_proj,v_proj --plot_loss True
"""


def test_every_flag_of_the_users_commands_is_in_the_spec() -> None:
    imported = read(COMMAND)
    spec = imported.spec
    assert spec.stage.kind == "sft"
    assert spec.model.model_name_or_path == "/models/Qwen1.5-7B-Chat"
    assert spec.data.datasets == {"one": 1, "two": 1}
    assert (spec.data.dataset_dir, spec.data.max_length, spec.data.max_samples) == ("data", 1024, 100_000)
    method = spec.method
    assert (method.kind, method.r, method.lora_alpha, method.lora_dropout) == ("lora", 8, 16, 0.1)
    assert method.target_modules == ["q_proj", "v_proj"]
    training = spec.training
    assert (training.learning_rate, training.num_train_epochs, training.precision) == (5e-5, 100, "fp16")
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 8)
    assert (training.lr_scheduler_type, training.warmup_steps, training.optim) == ("cosine", 0, "adamw_torch")
    assert (training.max_grad_norm, spec.logging.logging_steps, spec.logging.save_steps) == (1, 5, 100)
    assert spec.logging.plot_loss
    assert spec.logging.report_to == []
    assert (spec.hardware.devices, spec.hardware.num_processes) == ([0, 1, 2, 3], 4)
    assert {one.values["name"] for one in imported.left_out} == {"do_train", "template", "output_dir"}


def test_a_yaml_file_of_theirs_is_read_too() -> None:
    spec = read(
        "stage: pt\nfinetuning_type: full\ndataset: c4_demo\nbf16: true\nlora_rank: 8\nwarmup_ratio: 0.1"
    ).spec
    assert (spec.stage.kind, spec.method.kind, spec.training.precision) == ("pt", "full", "bf16")
    assert spec.training.warmup_steps == 0.1


def test_a_data_set_may_be_called_train() -> None:
    spec = read(
        "llamafactory-cli train --stage sft --model_name_or_path /m --dataset train --lora_rank 4"
    ).spec
    assert (spec.model.model_name_or_path, spec.data.datasets) == ("/m", {"train": 1})
    assert spec.method.r == 4
    assert read("--stage sft --model_name_or_path /m --dataset train").spec.data.datasets == {"train": 1}


@pytest.mark.parametrize(
    ("launcher", "devices", "processes"),
    [
        ("accelerate launch --num_processes 4 --mixed_precision bf16", [], 4),
        ("accelerate launch --num-processes=4", [], 4),
        ("CUDA_VISIBLE_DEVICES=2,3 accelerate launch --num_processes 2", [2, 3], 2),
        ("CUDA_VISIBLE_DEVICES=2,3 accelerate launch --num_processes 1", [2], 1),
        ("torchrun --standalone --nproc_per_node 8", [], 8),
        ("CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node=gpu", [0, 1], 2),
        ("python", [], 1),
    ],
)
def test_how_many_processes_is_what_the_launcher_is_told(
    launcher: str, devices: list[int], processes: int
) -> None:
    hardware = read(f"{launcher} src/train.py --stage sft --dataset a --num_train_epochs 1").spec.hardware
    assert (hardware.devices, hardware.num_processes) == (devices, processes)


def test_several_words_behind_a_flag_are_all_read() -> None:
    spec = read("train --stage sft --report_to wandb mlflow --lora_target q_proj v_proj").spec
    assert (spec.logging.report_to, spec.method.target_modules) == (["wandb", "mlflow"], ["q_proj", "v_proj"])


def test_how_a_model_is_spread_over_cards_is_left_out_and_told() -> None:
    imported = read("train --stage sft --deepspeed ds.json --fsdp full_shard")
    assert imported.spec.extra == {}
    assert {one.values["name"] for one in imported.left_out} == {"deepspeed", "fsdp"}


@pytest.mark.parametrize(
    "text",
    ["dataset: [a, b]", "dataset: 1", "datasets: [[1]]", "lora_target: {a: 1}",
     "quantization: x\nquantization_bit: y", "cutoff_len: *a", "report_to: null"],
)  # fmt: skip
def test_values_of_another_type_are_read_or_refused_and_never_an_error(text: str) -> None:
    try:
        outcome: RunSpec | Refusal = read(text).spec
    except Refusal as refusal:
        outcome = refusal
    assert isinstance(outcome, RunSpec) or outcome.text("zh")


def test_qlora_and_other_switches_change_their_form() -> None:
    spec = read(
        "train --finetuning_type lora --quantization_bit 4 --lora_target all --mask_history true --adam_beta2 0.95"
    ).spec
    assert spec.model.quantization.kind == "4bit"
    assert spec.method.target_modules == ["all-linear"]
    assert spec.stage.train_on == "last_answer"
    assert spec.extra == {"adam_beta2": 0.95}


@pytest.mark.parametrize(
    ("flags", "stage"),
    [
        ("--stage rm", {"kind": "rm"}),
        ("--stage dpo --pref_beta 0.3 --pref_loss ipo --pref_ftx 0.5", {"kind": "dpo", "beta": 0.3, "loss_type": "ipo", "sft_weight": 0.5}),
        ("--stage dpo --dpo_beta 0.2 --dpo_loss hinge", {"kind": "dpo", "beta": 0.2, "loss_type": "hinge"}),
        ("--pref_loss orpo --pref_beta 0.2 --stage dpo", {"kind": "orpo", "orpo_lambda": 0.2}),
        ("--stage orpo --orpo_beta 0.05", {"kind": "orpo", "orpo_lambda": 0.05}),
        ("--stage dpo --pref_loss simpo --pref_beta 2 --simpo_gamma 1.5", {"kind": "simpo", "simpo_beta": 2, "simpo_gamma": 1.5}),
        # Where nothing is said, theirs are 0.1 and 0.5, and ours are not.
        ("--stage dpo --pref_loss simpo", {"kind": "simpo", "simpo_beta": 0.1, "simpo_gamma": 0.5}),
        ("--stage kto --pref_beta 0.4 --kto_chosen_weight 2 --kto_rejected_weight 0.5",
         {"kind": "kto", "beta": 0.4, "desirable_weight": 2, "undesirable_weight": 0.5}),
        ("--stage ppo --reward_model /r --ppo_epochs 2 --ppo_target 6 --ppo_whiten_rewards true",
         {"kind": "ppo", "reward_model": "/r", "num_ppo_epochs": 2, "kl_target": 6, "whiten_rewards": True}),
    ],
)  # fmt: skip
def test_stages_that_learn_from_preferences_keep_their_settings(flags: str, stage: dict[str, Any]) -> None:
    imported = read(f"llamafactory-cli train {flags} --dataset pairs --finetuning_type lora")
    assert stage.items() <= imported.spec.stage.model_dump().items()
    assert not imported.left_out


def test_what_a_stage_does_not_have_is_left_out_and_told() -> None:
    imported = read(
        "train --stage dpo --pref_loss kto_pair --mask_history true --kto_chosen_weight 2 --ref_model /m"
    )
    assert imported.spec.stage.loss_type == "sigmoid"
    left_out = {one.values["name"] for one in imported.left_out}
    assert left_out == {"pref_loss", "train_on", "kto_chosen_weight", "ref_model"}


@pytest.mark.parametrize("text", ["", "hello", "[1, 2]", "--a 'b", "{", "x: y: z"])
def test_what_is_no_command_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(Refusal):
        read(text)


def test_the_box_takes_a_spec_of_ours_or_a_command_of_theirs() -> None:
    assert read_any("method: {kind: lora, r: 7}").spec.method.r == 7
    assert read_any(COMMAND).spec.method.r == 8
    with pytest.raises(Refusal, match="no setting 'methd'"):
        read_any("methd: lora\nstage: sft")


def test_what_a_command_leaves_out_is_as_it_was_there() -> None:
    spec = read("llamafactory-cli train --stage sft --model_name_or_path m --dataset a").spec
    training = spec.training
    assert (training.learning_rate, training.lr_scheduler_type, training.num_train_epochs) == (
        5e-5,
        "linear",
        3,
    )
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (8, 1)
    assert (spec.method.r, spec.method.lora_alpha, spec.data.max_length) == (8, 16, 2048)
    assert read("--stage sft --model_name_or_path m --lora_rank 4").spec.method.lora_alpha == 8
    assert read("--stage sft --model_name_or_path m --lora_rank 4 --lora_alpha 4").spec.method.lora_alpha == 4
