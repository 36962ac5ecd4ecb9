"""The user comes from LLaMA-Factory: his commands become specs, and nothing of them is lost in silence."""

from __future__ import annotations

from typing import Any

import pytest

from engine.core.problems import Refusal
from engine.importer import Imported, read, read_any
from engine.spec.hardware_settings import Auto, Fsdp2
from engine.spec.run_spec import RunSpec

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
    assert {one.values["name"] for one in imported.left_out} == {
        "config_file",
        "do_train",
        "template",
        "output_dir",
    }


def test_a_yaml_file_of_theirs_is_read_too() -> None:
    spec = read("stage: pt\nfinetuning_type: full\ndataset: c4_demo\nbf16: true\nlora_rank: 8\nwarmup_ratio: 0.1").spec
    assert (spec.stage.kind, spec.method.kind, spec.training.precision) == ("pt", "full", "bf16")
    assert spec.training.warmup_steps == 0.1


def test_a_data_set_may_be_called_train() -> None:
    spec = read("llamafactory-cli train --stage sft --model_name_or_path /m --dataset train --lora_rank 4").spec
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
def test_how_many_processes_is_what_the_launcher_is_told(launcher: str, devices: list[int], processes: int) -> None:
    hardware = read(f"{launcher} src/train.py --stage sft --dataset a --num_train_epochs 1").spec.hardware
    assert (hardware.devices, hardware.num_processes) == (devices, processes)


def test_several_words_behind_a_flag_are_all_read() -> None:
    spec = read("train --stage sft --report_to wandb mlflow --lora_target q_proj v_proj").spec
    assert (spec.logging.report_to, spec.method.target_modules) == (["wandb", "mlflow"], ["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("train --stage sft --fsdp full_shard,auto_wrap", {}),
        ("train --stage sft --fsdp 'full_shard offload'", {"cpu_offload": True}),
        ("stage: sft\nfsdp: shard_grad_op", {"reshard_after_forward": False}),
        ("stage: sft\nfsdp: true\nfsdp_config: {version: 2, cpu_offload: true}", {"cpu_offload": True}),
        ("stage: sft\nfsdp: true\nfsdp_config: {reshard_after_forward: false}", {"reshard_after_forward": False}),
        ("stage: sft\nfsdp: full_shard\nfsdp_config: {fsdp_offload_params: true}", {"cpu_offload": True}),
        ("train --stage sft --deepspeed examples/deepspeed/ds_z3_config.json", {}),
        ("stage: sft\ndeepspeed: ds_z2_offload_config.json", {"reshard_after_forward": False, "cpu_offload": True}),
        ("stage: sft\ndeepspeed: {zero_optimization: {stage: 3, offload_param: {device: cpu}}}", {"cpu_offload": True}),
        ("base_model: m\nfsdp_version: 2\nfsdp_config: {offload_params: true}", {"cpu_offload": True}),
        ("base_model: m\nfsdp: [full_shard, auto_wrap]", {}),
        ("base_model: m\ndeepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json", {"cpu_offload": True}),
        ("base_model: m\ndeepspeed: deepspeed_configs/zero2.json", {"reshard_after_forward": False}),
        ("accelerate launch --use_fsdp --fsdp_offload_params true src/train.py --stage sft", {"cpu_offload": True}),
        ("accelerate launch --zero_stage 3 --use_deepspeed src/train.py --stage sft", {}),
    ],
)  # fmt: skip
def test_how_a_model_is_divided_among_gpus_becomes_the_strategy(text: str, settings: dict[str, bool]) -> None:
    imported = read(text)
    assert imported.spec.hardware.strategy == Fsdp2(**settings)
    assert imported.spec.extra == {}
    assert not [note for note in imported.left_out if note.code == "import-value"]


def test_a_division_that_is_not_here_or_not_known_is_told() -> None:
    imported = read("train --stage sft --deepspeed ds.json --fsdp hybrid_shard")
    assert imported.spec.extra == {}
    assert {note.values["name"] for note in imported.left_out} == {"deepspeed", "fsdp"}
    unused = read("stage: sft\nfsdp_config: {cpu_offload: true}\ndeepspeed: ds_z0_config.json")
    assert unused.spec.hardware.strategy == Auto()
    assert {note.code for note in unused.left_out} == {"import-needless"}


@pytest.mark.parametrize(
    "text",
    [
        "dataset: [a, b]",
        "dataset: 1",
        "datasets: [[1]]",
        "lora_target: {a: 1}",
        "quantization: x\nquantization_bit: y",
        "cutoff_len: *a",
        "report_to: null",
    ],
)
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
        (
            "--stage dpo --pref_beta 0.3 --pref_loss ipo --pref_ftx 0.5",
            {"kind": "dpo", "beta": 0.3, "loss_type": "ipo", "sft_weight": 0.5},
        ),
        ("--stage dpo --dpo_beta 0.2 --dpo_loss hinge", {"kind": "dpo", "beta": 0.2, "loss_type": "hinge"}),
        ("--pref_loss orpo --pref_beta 0.2 --stage dpo", {"kind": "orpo", "orpo_lambda": 0.2}),
        ("--stage orpo --orpo_beta 0.05", {"kind": "orpo", "orpo_lambda": 0.05}),
        (
            "--stage dpo --pref_loss simpo --pref_beta 2 --simpo_gamma 1.5",
            {"kind": "simpo", "simpo_beta": 2, "simpo_gamma": 1.5},
        ),
        # Where nothing is said, theirs are 0.1 and 0.5, and ours are not.
        ("--stage dpo --pref_loss simpo", {"kind": "simpo", "simpo_beta": 0.1, "simpo_gamma": 0.5}),
        (
            "--stage kto --pref_beta 0.4 --kto_chosen_weight 2 --kto_rejected_weight 0.5",
            {"kind": "kto", "beta": 0.4, "desirable_weight": 2, "undesirable_weight": 0.5},
        ),
        (
            "--stage ppo --reward_model /r --ppo_epochs 2 --ppo_target 6 --ppo_whiten_rewards true",
            {"kind": "ppo", "reward_model": "/r", "num_ppo_epochs": 2, "kl_target": 6, "whiten_rewards": True},
        ),
    ],
)
def test_stages_that_learn_from_preferences_keep_their_settings(flags: str, stage: dict[str, Any]) -> None:
    imported = read(f"llamafactory-cli train {flags} --dataset pairs --finetuning_type lora")
    assert stage.items() <= imported.spec.stage.model_dump().items()
    assert not imported.left_out


def test_what_a_stage_does_not_have_is_left_out_and_told() -> None:
    imported = read("train --stage dpo --pref_loss kto_pair --mask_history true --kto_chosen_weight 2 --ref_model /m")
    assert imported.spec.stage.loss_type == "sigmoid"
    left_out = {one.values["name"] for one in imported.left_out}
    assert left_out == {"pref_loss", "mask_history", "kto_chosen_weight", "ref_model"}


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


# ------------------------------------------------------------------------------------------
# what is YAML, what a command

MINIMAL = "model_name_or_path: /models/x\nstage: sft\nfinetuning_type: lora\ndataset: names\n"


def told(imported: Imported) -> dict[str, str]:
    """Key → the code of what is said of it."""
    return {one.values.get("name", one.code): one.code for one in imported.left_out}


@pytest.mark.parametrize(
    "text",
    [
        "---\n" + MINIMAL,
        "# accelerate launch --config_file a.yaml\n" + MINIMAL,
        MINIMAL.replace("/models/x", "/models/my--model"),
        MINIMAL + "run_name: --stage pt --model_name_or_path nothing\n",
        MINIMAL + "# torchrun --nproc_per_node 8 src/train.py --stage pt\n",
        "\ufeff" + MINIMAL.replace("\n", "\r\n"),
        MINIMAL.replace("\n", "\r"),
        "```yaml\n" + MINIMAL + "```\n",
        MINIMAL + "...\n",
    ],
    ids=[
        "mark",
        "comment",
        "value",
        "a value like a command",
        "a command in a comment",
        "windows",
        "mac",
        "fence",
        "end mark",
    ],
)
def test_yaml_is_yaml_whatever_dashes_are_in_it(text: str) -> None:
    spec = read_any(text).spec
    assert spec.model.model_name_or_path.startswith("/models/")
    assert (spec.stage.kind, spec.data.datasets, spec.hardware.num_processes) == ("sft", {"names": 1}, 1)


def test_tabs_at_the_beginning_of_lines_are_read_as_blanks_and_told() -> None:
    imported = read(
        "stage: sft\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs:\n\tmin_lr: 1e-6\ndataset: a"
    )
    assert imported.spec.extra == {"lr_scheduler_kwargs": {"min_lr": 1e-6}}
    assert [one.text() for one in imported.left_out] == [
        "Line 4 begins with a tab, which YAML does not allow; it was read as spaces."
    ]


def test_yaml_that_is_broken_is_refused_at_its_line() -> None:
    with pytest.raises(Refusal, match="Line 4, column 14"):
        read("stage: sft\ndataset: a\nlora_target: [q_proj\nlearning_rate: 1e-4\ncutoff_len: 9\n")


def test_a_key_that_stands_twice_counts_once_and_is_told() -> None:
    imported = read("stage: sft\ndataset: a\nlearning_rate: 1e-4\nlearning_rate: 2e-4")
    assert imported.spec.training.learning_rate == 2e-4
    assert told(imported) == {"learning_rate": "import-twice"}
    imported = read("train --stage sft --dataset a --lora_rank 4 --lora_rank 16")
    assert (imported.spec.method.r, told(imported)) == (16, {"lora_rank": "import-twice"})


def test_several_documents_are_put_together_and_told() -> None:
    imported = read("stage: sft\ndataset: a\n---\nlora_rank: 4\n---\n# nothing\n")
    assert (imported.spec.method.r, told(imported)) == (4, {"import-documents": "import-documents"})


# ------------------------------------------------------------------------------------------ shells

FILE = "model_name_or_path: /m\nstage: sft\ndo_train: true\ndataset: a\nlearning_rate: 1.0e-5\nlora_rank: 8\n"


def of_shell(text: str) -> RunSpec:
    imported = read(text, {"x.yaml": FILE, "conf/x.yaml": FILE}.get)
    assert "import-twice" not in {one.code for one in imported.left_out}
    return imported.spec


@pytest.mark.parametrize(
    "text",
    [
        "llamafactory-cli train x.yaml learning_rate=3e-4 lora_rank=32",
        "\ufeffllamafactory-cli train x.yaml learning_rate=3e-4 lora_rank=32",
        "llamafactory-cli train conf/x.yaml learning_rate=3e-4 lora_rank=32 > log.txt 2>&1 &",
        "nohup llamafactory-cli train x.yaml learning_rate=3e-4 lora_rank=32 2>&1 | tee log.txt &",
        "cd /somewhere && FORCE_TORCHRUN=1 lmf train x.yaml learning_rate=3e-4 lora_rank=32; echo done",
        "docker exec -it box bash -c 'cd /app && llamafactory-cli train x.yaml learning_rate=3e-4 lora_rank=32'",
        "conda run -n factory llamafactory-cli train x.yaml learning_rate=3e-4 lora_rank=32",
        "torchrun --standalone src/train.py x.yaml learning_rate=3e-4 lora_rank=32",
        "python -m llamafactory.cli train x.yaml learning_rate=3e-4 lora_rank=32",
        "llamafactory-cli train x.yaml learning_rate=3e-4 lora_rank=32\n\n" + FILE,
        "llamafactory-cli train other.yaml learning_rate=3e-4 lora_rank=32\n---\n" + FILE,
        "cat > y.yaml <<'EOF'\n" + FILE + "EOF\nllamafactory-cli train y.yaml learning_rate=3e-4 lora_rank=32\n",
        "LR=3e-4; R=32\nllamafactory-cli train x.yaml learning_rate=$LR lora_rank=${R}",
        "llamafactory-cli train x.yaml learning_rate=${LR:-3e-4} lora_rank=${R-32}",
    ],
)
def test_a_file_is_read_and_what_stands_behind_it_goes_before_it(text: str) -> None:
    spec = of_shell(text)
    assert (spec.training.learning_rate, spec.method.r) == (3e-4, 32)
    assert (spec.model.model_name_or_path, spec.data.datasets) == ("/m", {"a": 1})


def test_a_file_that_cannot_be_reached_is_told() -> None:
    imported = read("llamafactory-cli train lost.yaml learning_rate=3e-4")
    assert imported.spec.training.learning_rate == 3e-4
    assert [one.code for one in imported.left_out] == ["import-file"]
    with pytest.raises(Refusal, match=r"lost\.yaml cannot be read from here"):
        read("llamafactory-cli train lost.yaml")


FLAGS = ("--stage sft", "--model_name_or_path '/models/a b'", "--dataset a,b", "--lora_rank 4", "--bf16")


@pytest.mark.parametrize(
    "text",
    [
        " \\\n  ".join(("llamafactory-cli train", *FLAGS)),
        " \\  \n  ".join(("llamafactory-cli train", *FLAGS)),  # blanks behind the backslash
        "\u00a0\\\n  ".join(("llamafactory-cli train", *FLAGS)),  # a blank that is none, as web pages have it
        " ^\r\n  ".join(("llamafactory-cli train", *FLAGS)).replace("'", '"'),
        " `\n  ".join(("llamafactory-cli train", *FLAGS)),
        "\n".join(("llamafactory-cli train", *FLAGS)),  # none at all
        "llamafactory-cli train --stage sft \\\n  # a comment in between\n " + " ".join(FLAGS[1:]),
        'ARGS=(\n  --stage sft # the stage\n  --dataset a,b\n)\npython src/train.py "${ARGS[@]}" '
        + " ".join((FLAGS[1], *FLAGS[3:])),
        'ARGS="--stage sft --dataset a,b"\npython src/train_bash.py $ARGS ' + " ".join((FLAGS[1], *FLAGS[3:])),
        (
            "export M='/models/a b'\npython src/train.py --stage sft "
            '--model_name_or_path "$M" --dataset a,b --lora_rank 4 --bf16'
        ),
        (
            'set "M=/models/a b"\npython src\\train.py --stage sft '
            '--model_name_or_path "%M%" --dataset a,b --lora_rank 4 --bf16 ^\n'
        ),
        (
            '$env:M = "/models/a b"\npython src/train.py --stage sft '
            "--model_name_or_path $env:M --dataset a,b --lora_rank 4 --bf16"
        ),
    ],
    ids=[
        "bash",
        "blanks",
        "no-break",
        "cmd",
        "PowerShell",
        "no marks",
        "comment",
        "array",
        "variable of flags",
        "export",
        "set",
        "env:",
    ],
)
def test_every_shell_means_the_same_command(text: str) -> None:
    spec = read(text).spec
    assert (spec.stage.kind, spec.data.datasets, spec.method.r) == ("sft", {"a": 1, "b": 1}, 4)
    assert spec.training.precision == "bf16"
    assert spec.model.model_name_or_path == "/models/a b"


def test_a_windows_path_keeps_its_backslashes() -> None:
    spec = read("llamafactory-cli train --stage sft --model_name_or_path D:\\models\\qwen --dataset a").spec
    assert spec.model.model_name_or_path == "D:\\models\\qwen"


def test_what_only_a_shell_could_know_is_told_where_it_is_used() -> None:
    imported = read("echo $HOME; llamafactory-cli train --stage sft --dataset $1 --output_dir out/$(date +%F)")
    assert [one.values["name"] for one in imported.left_out if one.code == "import-variable"] == [
        "$1",
        "$(date +%F)",
    ]


@pytest.mark.parametrize(
    ("text", "devices", "processes"),
    [
        ("deepspeed --num_gpus 4 --master_port=9901 src/train.py", [], 4),
        ("deepspeed --include localhost:1,3 src/train.py", [1, 3], 2),
        ("CUDA_VISIBLE_DEVICES=0,1 FORCE_TORCHRUN=1 llamafactory-cli train", [0, 1], 2),
        ("FORCE_TORCHRUN=1 NPROC_PER_NODE=8 llamafactory-cli train", [], 8),
        ("export CUDA_VISIBLE_DEVICES=4,5,6\nllamafactory-cli train", [4, 5, 6], 3),
        ("accelerate launch --num_processes=2 --gpu_ids 2,3 --mixed_precision no src/train.py", [2, 3], 2),
        ("python -m torch.distributed.run --nproc-per-node 2 src/train.py", [], 2),
    ],
)
def test_launchers_say_how_many_processes_and_on_which_cards(text: str, devices: list[int], processes: int) -> None:
    imported = read(f"{text} --stage sft --dataset a")
    assert (imported.spec.hardware.devices, imported.spec.hardware.num_processes) == (devices, processes)
    assert all(one.code == "import-needless" for one in imported.left_out)


def test_several_machines_sharding_and_unknown_flags_of_a_launcher_are_told() -> None:
    imported = read(
        "NNODES=2 NODE_RANK=1 WANDB_API_KEY=sk-verysecret torchrun --nnodes 2 --rdzv_id 7 --wibble "
        "3 --nproc_per_node 2 src/train.py --stage sft --dataset a --deepspeed ds_z3_config.json"
    )
    names = {one.values["name"]: one.code for one in imported.left_out}
    assert {name for name, code in names.items() if code == "import-none"} == {
        "NNODES",
        "NODE_RANK",
        "nnodes",
        "WANDB_API_KEY",
    }
    assert (names["rdzv_id"], names["wibble"]) == ("import-needless", "import-unknown")
    assert "verysecret" not in " ".join(one.text(language) for one in imported.left_out for language in ("en", "zh"))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("llamafactory-cli chat x.yaml", "import-chat"),
        ("llamafactory-cli webchat x.yaml", "import-chat"),
        ("API_PORT=8000 llamafactory-cli api x.yaml infer_backend=vllm", "import-api"),
        ("CUDA_VISIBLE_DEVICES=0 llamafactory-cli webui", "import-webui"),
        ("llamafactory-cli version", "import-verb"),
        ("python scripts/llama_pro.py --model_name_or_path m --num_expand 8", "import-verb"),
        ("model_name_or_path: m\ntemplate: qwen\ninfer_backend: vllm", "import-chat"),
        ("ls -l && cd x", "import-nothing"),
    ],
)
def test_what_trains_nothing_is_refused_with_what_to_do_instead(text: str, code: str) -> None:
    with pytest.raises(Refusal) as refusal:
        read(text)
    assert [one.code for one in refusal.value.problems] == [code]


def test_of_several_commands_the_first_that_trains_is_taken_and_the_others_are_told() -> None:
    imported = read(
        "pip install -e .\nllamafactory-cli train --stage sft --dataset a --lora_rank 4 && "
        "llamafactory-cli export --model_name_or_path m --export_dir out"
    )
    assert imported.spec.method.r == 4
    assert [one.code for one in imported.left_out] == ["import-second"]
