"""Every method and every setting that changes the training, on a tiny real model: it runs, and it does what it says."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from engine.core.run_warnings import read_warnings
from engine.core.rundir import RunDir, read_json, read_lines, write_json
from engine.runs import runs
from engine.runs.progress import curves
from engine.spec.run_spec import RunSpec
from engine.spec.steps import optimizer_steps
from tests.preloaded import run_python
from tests.train_many import lay_out, train_many

pytestmark = pytest.mark.slow

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"method.use_dora": True},
    "rslora": {"method.use_rslora": True},
    "pissa": {"method.init_lora_weights": "pissa"},
    "slow_lora": {"training.learning_rate": 5e-4},
    "slow_lora_plus": {"training.learning_rate": 5e-4, "method.loraplus_lr_ratio": 16.0},
    "named_targets": {
        "method.target_modules": ["q_proj", "v_proj"],
        "method.modules_to_save": ["embed_tokens"],
    },
    "qlora": {"model.quantization": {"kind": "4bit"}},
    "qlora_measured": {
        "model.quantization": {"kind": "4bit"},
        "data.validation_share": 0.2,
        "logging.eval_steps": 2,
    },
    "eight_bits": {"model.quantization": {"kind": "8bit"}},
    "eight_bits_again": {"model.quantization": {"kind": "8bit"}, "training.gradient_checkpointing": True},
    "freeze": {"method": {"kind": "freeze", "trainable_layers": 1}},
    "freeze_all_but_the_last": {
        "method": {"kind": "freeze", "trainable_layers": -1},
        "logging.save_strategy": "no",
    },
    "by_epoch": {
        "data.validation_rows": 8,
        "logging.eval_strategy": "epoch",
        "logging.save_strategy": "epoch",
        "logging.save_total_limit": None,
        "logging.load_best_model_at_end": True,
        "training.max_steps": None,
        "training.num_train_epochs": 2,
    },
    "full": {"method": {"kind": "full"}},
    "everything": {"stage": {"kind": "sft", "train_on": "everything"}},
    "packed": {"data.packing": True, "data.max_length": 128},
    "pretraining": {"stage": {"kind": "pt"}, "data.datasets": {"text": 1}},
    "pretraining_packed": {"stage": {"kind": "pt"}, "data.datasets": {"text": 1}, "data.packing": True},
    "keep_best": {
        "data.validation_share": 0.2,
        "logging.eval_steps": 2,
        "logging.save_steps": 2,
        "logging.load_best_model_at_end": True,
        "logging.early_stopping_patience": 1,
        "training.learning_rate": 1e-9,
        "logging.save_total_limit": 1,
    },
    "many_settings": {
        "training.lr_scheduler_type": "cosine_with_min_lr",
        "extra": {"lr_scheduler_kwargs": {"min_lr": 1e-4}, "adam_beta2": 0.95},
        "training.warmup_steps": 0.25,
        "training.optim": "adafactor",
        "training.neftune_noise_alpha": 5.0,
        "training.weight_decay": 0.1,
        "training.gradient_checkpointing": True,
        "training.gradient_accumulation_steps": 2,
        "model.rope_scaling": {"kind": "yarn", "factor": 2.0},
        "model.attn_implementation": "eager",
    },
    "weights": {
        "data.datasets": {"chat": 2.5},
        "data.max_samples": 10,
        "training.max_steps": None,
        "training.num_train_epochs": 2,
    },
    "diverging": {
        "method": {"kind": "full"},
        "training.learning_rate": 1.0,
        "training.optim": "sgd",
        "training.max_grad_norm": 0.0,
        "training.max_steps": 100,
    },
    "too_short": {"data.max_length": 8},
    "few_steps": {"training.max_steps": 3, "logging.logging_steps": 5},
}
VARIANTS["watched"] = {
    "method": {"kind": "full"},
    "training.learning_rate": 1.0,
    "training.lr_scheduler_type": "constant",
    "training.max_steps": 16,
}
VARIANTS["watched_and_stopped"] = VARIANTS["watched"] | {"logging.watch": "stop"}
VARIANTS["stopped_early"] = VARIANTS["keep_best"] | {"logging.logging_steps": 100}
VARIANTS["diverging_unseen"] = VARIANTS["diverging"] | {
    "logging.logging_steps": 100,
    "logging.save_steps": 10,
    "logging.save_total_limit": 1,
}


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """Every variant, trained in one child process."""
    root = tmp_path_factory.mktemp("variants")
    data = root / "data"
    data.mkdir()
    rows = [{"instruction": f"What comes after {n}?", "output": f"{n + 1}."} for n in range(40)]
    write_json(data / "chat.json", rows)
    write_json(data / "text.json", [{"text": f"After {n} comes {n + 1}. " * 12} for n in range(40)])
    write_json(
        data / "dataset_info.json",
        {"chat": {"file_name": "chat.json"}, "text": {"file_name": "text.json", "columns": {"prompt": "text"}}},
    )
    folders = {}
    for name, changes in VARIANTS.items():
        spec = RunSpec.read(
            {
                "model": {"model_name_or_path": str(tiny)},
                "data": {"datasets": ["chat"], "dataset_dir": str(data), "max_length": 64},
                "training": {
                    "max_steps": 8,
                    "learning_rate": 5e-3,
                    "per_device_train_batch_size": 4,
                    "gradient_accumulation_steps": 1,
                    "gradient_checkpointing": False,
                },
                "logging": {"logging_steps": 1, "save_steps": 100, "probe": False, "plot_loss": False},
                "hardware": {"device": "cpu"},
            }
        )
        for path, value in changes.items():
            spec = spec.change(path, value)
        folders[name] = lay_out(RunDir(root / "saves" / "tiny" / spec.method.kind / name), spec)
    train_many(*folders.values())
    return folders


def spec_of(run: RunDir) -> RunSpec:
    return RunSpec.from_yaml(run.spec.read_text(encoding="utf-8"))


def losses(run: RunDir) -> list[float]:
    return list(curves(runs.read(run.path, run.path.parents[2]))["loss"].value)


def tensors(file: Path) -> dict[str, list[int]]:
    """Names and shapes in a safetensors file."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


FAILING = ("diverging", "diverging_unseen", "too_short", "watched_and_stopped")


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in FAILING])
def test_a_variant_trains_to_a_result_that_says_it_is_whole(trained: dict[str, RunDir], name: str) -> None:
    run = trained[name]
    assert read_json(run.error) is None
    assert read_json(run.result() / "result.json")["complete"]
    assert all(math.isfinite(loss) for loss in losses(run))
    assert (run.result() / "tokenizer.json").exists()
    assert (run.result() / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    "name",
    ["lora", "dora", "rslora", "pissa", "qlora", "eight_bits", "freeze", "full", "everything", "pretraining"],
)
def test_the_loss_begins_at_chance_and_falls(trained: dict[str, RunDir], name: str) -> None:
    found = losses(trained[name])
    assert found[0] == pytest.approx(math.log(800), abs=0.4)  # the model's weights are random
    assert sum(found[-2:]) / 2 < found[0] - 0.05


def test_what_is_recomputed_of_eight_bits_learns_the_same(trained: dict[str, RunDir]) -> None:
    again, kept = losses(trained["eight_bits_again"]), losses(trained["eight_bits"])
    assert again == pytest.approx(kept, rel=1e-3)


def test_full_learns_more_than_lora(trained: dict[str, RunDir]) -> None:
    assert losses(trained["full"])[-1] < losses(trained["lora"])[-1] - 1


def test_the_spec_decides_what_is_in_the_result(trained: dict[str, RunDir]) -> None:
    named = tensors(trained["named_targets"].adapter / "adapter_model.safetensors")
    assert {"q_proj", "v_proj"} == {name.split(".")[-3] for name in named if "lora_" in name}
    assert any("embed_tokens" in name for name in named)
    dora = tensors(trained["dora"].adapter / "adapter_model.safetensors")
    assert any("lora_magnitude_vector" in name for name in dora)
    lora = tensors(trained["lora"].adapter / "adapter_model.safetensors")
    assert {min(shape) for shape in lora.values()} == {16}
    assert (trained["full"].model / "model.safetensors").exists()
    assert read_json(trained["rslora"].adapter / "adapter_config.json")["use_rslora"]
    assert [*trained["lora"].path.rglob("README.md")] == []  # of peft, with placeholders


def test_lora_plus_learns_faster_at_the_same_learning_rate(trained: dict[str, RunDir]) -> None:
    assert losses(trained["slow_lora_plus"])[-1] < losses(trained["slow_lora"])[-1] - 0.05


def test_more_tokens_are_trained_when_the_questions_are_too(trained: dict[str, RunDir]) -> None:
    few, all_ = (read_json(trained[name].prepared / "summary.json")["train"] for name in ("lora", "everything"))
    assert 0 < few["trained_tokens"] < all_["trained_tokens"] == all_["tokens"]


def test_a_pissa_adapter_is_right_on_the_untouched_base(trained: dict[str, RunDir], tiny: Path) -> None:
    run = trained["pissa"]
    config = read_json(run.adapter / "adapter_config.json")
    assert (config["init_lora_weights"], config["r"]) == (True, 32)
    score = (
        "import sys; from datasets import Dataset; from peft import PeftModel;"
        " from transformers import AutoModelForCausalLM; import torch;"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]);"
        "rows = Dataset.from_file(sys.argv[3]);"
        "print(sum(model(input_ids=torch.tensor([r['input_ids']]), labels=torch.tensor([r['labels']])).loss.item()"
        " for r in rows) / len(rows))"
    )
    loss = float(run_python("-c", score, tiny, run.adapter, run.prepared / "train.arrow"))
    assert loss == pytest.approx(losses(run)[-1], abs=0.15)


def test_an_adapter_that_is_continued_is_left_whole_whatever_a_new_one_would_begin_with(
    tiny: Path, tmp_path: Path
) -> None:
    from engine.worker.models.loading import keep_initial, load_model, save_weights

    ids = torch.arange(10)[None]
    model = {"model_name_or_path": str(tiny)}
    settings = {
        "training": {"precision": "fp32"},
        "method": {"kind": "lora", "r": 4, "init_lora_weights": "pissa"},
    }
    first = RunSpec.read(settings | {"model": model, "method": {"kind": "lora", "r": 4}})
    learned = load_model(first, str(tiny))
    for name, weight in learned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    save_weights(first, learned, tmp_path / "first", tmp_path / "none")

    second = RunSpec.read(settings | {"model": model | {"adapter_path": str(tmp_path / "first")}})
    continued = load_model(second, str(tiny))
    keep_initial(second, continued, tmp_path / "initial")
    save_weights(second, continued, tmp_path / "second", tmp_path / "initial")
    again = load_model(first.change("model.adapter_path", str(tmp_path / "second")), str(tiny))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, learned(ids).logits)


def test_what_a_pissa_adapter_began_with_is_kept_whole_or_not_at_all(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.worker.models import loading as models

    spec = RunSpec.read(
        {"model": {"model_name_or_path": str(tiny)}, "method": {"kind": "lora", "init_lora_weights": "pissa"}}
    )
    made = models.load_model(spec, str(tiny))
    with monkeypatch.context() as patched:
        patched.setattr("peft.peft_model.safe_save_file", Mock(side_effect=OSError("full")))
        with pytest.raises(OSError, match="full"):
            models.keep_initial(spec, made, tmp_path / "initial")
    models.keep_initial(spec, made, tmp_path / "initial")
    assert (tmp_path / "initial" / "adapter_model.safetensors").is_file()


def test_only_the_last_layer_moves_when_the_others_are_frozen(trained: dict[str, RunDir], tiny: Path) -> None:
    from safetensors.numpy import load_file

    before, after = (
        load_file(tiny / "model.safetensors"),
        load_file(trained["freeze"].model / "model.safetensors"),
    )
    moved = {name for name in after if (before[name] != after[name]).any()}
    assert moved
    assert all(".layers.1." in name for name in moved)


def test_a_negative_number_of_layers_trains_the_first_and_no_checkpoint_is_left_where_none_is_wanted(
    trained: dict[str, RunDir], tiny: Path
) -> None:
    run = trained["freeze_all_but_the_last"]
    before, after = load_file(tiny / "model.safetensors"), load_file(run.model / "model.safetensors")
    moved = {name for name in after if (before[name] != after[name]).any()}
    assert moved
    assert all(".layers.0." in name for name in moved)
    assert run.checkpoints() == []


def test_an_epoch_is_where_a_run_by_epochs_measures_and_saves(trained: dict[str, RunDir]) -> None:
    run = trained["by_epoch"]
    summary = read_json(run.prepared / "summary.json")
    assert (summary["train"]["rows"], summary["validation"]["rows"]) == (32, 8)
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-8", "checkpoint-16"]  # 32 rows by 4
    measured = {line["step"]: line["eval_loss"] for line in read_lines(run.metrics) if "eval_loss" in line}
    assert list(measured) == [0, 8, 16]
    assert measured[0] == pytest.approx(math.log(800), abs=0.4)  # as it was, with random weights


def test_packing_makes_fewer_longer_examples_of_the_same_tokens(trained: dict[str, RunDir]) -> None:
    plain, packed = (read_json(trained[name].prepared / "summary.json")["train"] for name in ("lora", "packed"))
    assert packed["tokens"] == plain["tokens"]
    assert packed["examples"] < plain["examples"] / 2


def test_packed_examples_do_not_see_each_other(tiny: Path) -> None:
    told = json.loads(run_python("-m", "tests.packed_alike", tiny))
    assert told["packed"] == pytest.approx(told["plain"], rel=1e-5)
    assert told["one_text"] != pytest.approx(told["plain"], rel=1e-4)  # as it would be if they saw each other


def test_the_best_checkpoint_is_kept_and_training_stops_early(trained: dict[str, RunDir]) -> None:
    run = trained["keep_best"]  # a learning rate so small that nothing gets better
    assert read_json(run.result() / "result.json")["step"] < 8
    assert len(run.checkpoints()) <= 2


def test_the_curve_ends_with_the_last_step_however_seldom_it_has_a_point(trained: dict[str, RunDir]) -> None:
    for name, last in (("few_steps", 3), ("stopped_early", None)):
        run = trained[name]
        steps = [line["step"] for line in read_lines(run.metrics) if "loss" in line]
        assert steps == [1, last or read_json(run.result() / "result.json")["step"]]
    assert steps[-1] < 8  # it did end before the plan


def test_weights_and_limits_decide_how_often_rows_are_seen(trained: dict[str, RunDir]) -> None:
    run = trained["weights"]
    assert read_json(run.prepared / "summary.json")["train"]["rows"] == 25  # 2.5 × 10
    assert read_json(run.result() / "result.json")["step"] == optimizer_steps(spec_of(run), 25) == 14


def test_a_loss_that_is_not_finite_stops_the_run_and_says_so(trained: dict[str, RunDir]) -> None:
    error = read_json(trained["diverging"].error)
    assert error["problems"][0]["code"] == "loss-not-finite"
    assert trained["diverging"].result() is None


def test_no_checkpoint_is_kept_of_weights_that_are_no_numbers_before_the_loss_is_looked_at(
    trained: dict[str, RunDir],
) -> None:
    run = trained["diverging_unseen"]
    assert read_json(run.error)["problems"][0]["code"] == "loss-not-finite"
    assert list(run.path.glob("checkpoint-*"))
    for folder in run.checkpoints():
        weights = load_file(folder / "model.safetensors").values()
        assert all(weight.isfinite().all() for weight in weights)


def test_a_training_that_diverges_goes_on_with_a_warning(trained: dict[str, RunDir]) -> None:
    run = trained["watched"]
    (warning,) = read_warnings(run)
    assert warning.problem.code == "loss-diverged"
    assert losses(run)[warning.step - 1] > 3 * min(losses(run)[: warning.step])
    assert read_json(run.result() / "result.json")["step"] == 16


def test_a_training_that_diverges_stops_with_a_whole_checkpoint_where_it_is_told_to(
    trained: dict[str, RunDir],
) -> None:
    run = trained["watched_and_stopped"]
    (problem,) = read_json(run.error)["problems"]
    assert problem["code"] == "loss-diverged"
    assert [folder.name for folder in run.checkpoints()] == [f"checkpoint-{problem['values']['step']}"]
    assert read_lines(run.metrics)[-1]["step"] == int(problem["values"]["step"]) < 16
    assert run.result() is None


def test_rows_that_are_all_too_long_are_refused_with_the_count(trained: dict[str, RunDir]) -> None:
    error = read_json(trained["too_short"].error)
    assert error["problems"][0]["code"] == "all-too-long"
    assert "40" in error["message"]


def test_resuming_a_finished_run_is_not_offered(trained: dict[str, RunDir]) -> None:
    run = trained["lora"]
    write_json(run.exit, {"outcome": "finished", "ended": 0})
    assert "resume" not in runs.read(run.path, run.path.parents[2]).can
