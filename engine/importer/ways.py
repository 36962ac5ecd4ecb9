"""Keys of LLaMA-Factory whose value changes its form, or whose meaning depends on others: one function for each such way.

A way is `(draft, name, value) -> None`: it puts what it can into the draft, and tells what it cannot. What it means there
was read in LLaMA-Factory 0.9.5 and its main branch of August 2026 (src/llamafactory/hparams and the trainers).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from engine.importer.draft import Draft, several
from engine.importer.table import NOTHING, reasons
from engine.spec import METHODS, Logging

Way = Callable[[Draft, str, Any], None]
INTERLEAVED = ("interleave_under", "interleave_over")
NUMBERS = {
    "galore": {"galore_rank": ("rank", 16), "galore_update_interval": ("update_proj_gap", 200),
               "galore_scale": ("scale", 2.0), "galore_proj_type": ("proj_type", "std")},
    "apollo": {"apollo_rank": ("rank", 16), "apollo_update_interval": ("update_proj_gap", 200),
               "apollo_scale": ("scale", 32.0), "apollo_proj": ("proj", "random"), "apollo_proj_type": ("proj_type", "std"),
               "apollo_scale_type": ("scale_type", "channel")},
}  # fmt: skip


def purposes(draft: Draft, name: str, value: Any) -> None:
    """Whether it trains or predicts has been read already."""
    if name == "do_predict" and value is True:
        draft.missing(name, value, "also-predicts")
    else:
        draft.needless(name, value, "start")


# ------------------------------------------------------------------------------------------ model


def adapter(draft: Draft, name: str, value: Any) -> None:
    folders = several(value)
    if len(folders) > 1:
        draft.missing(name, value, "several-adapters")
    elif draft.settings.get("create_new_adapter") is True:
        draft.missing(name, value, "new-adapter")
    elif folders:
        draft.put("model.adapter_path", str(folders[0]), name)


def subfolder(draft: Draft, name: str, value: Any) -> None:
    """The folder of the adapter inside of adapter_name_or_path."""
    above = several(draft.settings.get("adapter_name_or_path"))
    if len(above) == 1:
        draft.put("model.adapter_path", f"{above[0]}/{value}", name, beside=True)
    else:
        draft.missing(name, value, "several-adapters")


def spelled(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.needless(name, value, "spelled")
    else:
        draft.differs(name, value, reasons()["spelled"])


def attention(draft: Draft, name: str, value: Any) -> None:
    kinds = {
        "fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager", "auto": "auto", "True": "flash_attention_2",
        "False": "auto", "flash_attention_2": "flash_attention_2", "eager": "eager", "flex_attention": "flex_attention",
    }  # fmt: skip
    if str(value) == "fa3":
        draft.missing(name, value, "flash-3")
    else:
        draft.put("model.attn_implementation", kinds.get(str(value), value), name)


def rope(draft: Draft, name: str, value: Any) -> None:
    """LLaMA-Factory computes the factor itself (model/model_utils/rope.py): the context that the rows need ÷ the model's
    own, rounded up; and does nothing where they fit."""
    if value not in ("linear", "dynamic", "yarn"):
        draft.missing(name, value, "rope-llama3")
        return
    context = draft.settings.get(CONTEXT)
    length = draft.settings.get("cutoff_len", 2048)
    if not context or not isinstance(length, int):
        draft.put("model.rope_scaling", {"kind": value, "factor": 2.0}, name)
        draft.differs(name, value, reasons()["rope-unknown"])
    elif length <= context:
        draft.needless(name, value, "rope-fits")
    else:
        draft.put("model.rope_scaling", {"kind": value, "factor": float(math.ceil(length / context))}, name)


def not_checkpointed(draft: Draft, name: str, value: Any) -> None:
    draft.put("training.gradient_checkpointing", (not value) if isinstance(value, bool) else value, name)


def checkpointed(draft: Draft, name: str, value: Any) -> None:
    draft.put("training.gradient_checkpointing", value, name)


def remote_code(draft: Draft, name: str, value: Any) -> None:
    draft.needless(name, value, "remote-code")


def bits(draft: Draft, name: str, value: Any) -> None:
    if str(value) in ("4", "8"):
        draft.put("model.quantization.kind", f"{value}bit", name)
    else:
        draft.missing(name, value, "bits")


def bits_by(draft: Draft, name: str, value: Any) -> None:
    if value in ("bnb", "bitsandbytes", "BITS_AND_BYTES"):
        draft.needless(name, value, "default-path")
    elif draft.settings.get("quantization_bit") in NOTHING:
        draft.needless(name, value, "switched-off")
    else:
        draft.differs(name, value, reasons()["quantizer"])


# ------------------------------------------------------------------------------------------ data


def datasets(draft: Draft, name: str, value: Any) -> None:
    names = list(value) if isinstance(value, Mapping) else several(value)
    draft.put("data.datasets", {one: float(count) for one, count in Counter(map(str, names)).items()}, name)


def eval_datasets(draft: Draft, name: str, value: Any) -> None:
    draft.put("data.eval_datasets", list(dict.fromkeys(map(str, several(value)))), name)


def dataset_dir(draft: Draft, name: str, value: Any) -> None:
    if str(value) == "ONLINE" or str(value).startswith("REMOTE:"):
        draft.missing(name, value, "hub-data")
    else:
        draft.put("data.dataset_dir", value, name)


def template(draft: Draft, name: str, value: Any) -> None:
    if value == "alpaca":
        draft.put("model.chat_template", "alpaca", name)
        draft.differs(name, value, reasons()["template-builtin"])
    else:
        draft.missing(name, value, "template-own")


def on_prompt(draft: Draft, name: str, value: Any) -> None:
    _train_on(draft, name, value, "everything")


def last_answer(draft: Draft, name: str, value: Any) -> None:
    _train_on(draft, name, value, "last_answer")


def _train_on(draft: Draft, name: str, value: Any, turns: str) -> None:
    if value is True:
        draft.put("stage.train_on", turns, name)
    else:
        draft.needless(name, value, "nothing-asked")


def mixing(draft: Draft, name: str, value: Any) -> None:
    if value in ("concat", "interleave_once"):
        draft.needless(name, value, "default-path")
    elif len(several(draft.settings.get("dataset"))) < 2:
        draft.needless(name, value, "each-once")
    else:
        draft.put("data.mix_strategy", value, name)


def probabilities(draft: Draft, name: str, value: Any) -> None:
    """Chances become weights: of what they are one set each is in data.mix_strategy."""
    names, chances = several(draft.settings.get("dataset")), [float(one) for one in several(value)]
    if draft.settings.get("mix_strategy") not in INTERLEAVED:
        draft.missing(name, value, "probabilities-concat")
    elif len(names) != len(chances) or len(set(names)) != len(names):
        draft.missing(name, value, "probabilities-count")
    else:
        draft.put("data.datasets", dict(zip(map(str, names), chances, strict=True)), name, beside=True)


def validation(draft: Draft, name: str, value: Any) -> None:
    """Below 1 it is a share, from 1 on a number of rows."""
    number = float(value)
    if number >= 1 and number == int(number):
        draft.put("data.validation_rows", int(number), name)
    else:
        draft.put("data.validation_share", number, name)


def packing(draft: Draft, name: str, value: Any) -> None:
    draft.put("data.packing", value, name)
    if value is True and draft.settings.get("neat_packing") is not True:
        draft.differs(name, value, reasons()["packed-apart"])


def neat(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("data.packing", True, name)
    else:
        draft.needless(name, value, "nothing-asked")


# ------------------------------------------------------------------------------------------ method


def method(draft: Draft, name: str, value: Any) -> None:
    if value in METHODS:
        draft.put("method.kind", value, name)
    else:
        draft.missing(name, value, "method-unknown")


def targets(draft: Draft, name: str, value: Any) -> None:
    names = several(value)
    if names == ["all"]:
        draft.put("method.target_modules", ["all-linear"], name)
    elif any(re.search(r"[*+?^$()\[\]|\\]", str(one)) for one in names):
        draft.missing(name, value, "expression")
    else:
        draft.put("method.target_modules", names, name)


def above_zero(draft: Draft, name: str, value: Any) -> None:
    """0 is LLaMA Board's way to say none."""
    if value == 0:
        draft.needless(name, value, "nothing-asked")
    else:
        path = {"loraplus_lr_ratio": "method.loraplus_lr_ratio"}.get(name, "training.neftune_noise_alpha")
        draft.put(path, value, name)


def pissa(draft: Draft, name: str, value: Any) -> None:
    if value is not True:
        draft.needless(name, value, "nothing-asked")
        return
    draft.put("method.init_lora_weights", "pissa", name)
    iterations = draft.settings.get("pissa_iter")
    if iterations == -1:
        draft.needless("pissa_iter", iterations, "default-path")
    elif iterations is not None:
        draft.differs("pissa_iter", iterations, reasons()["exact-svd"])


def pure_bf16(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("training.precision", "bf16", name)
        draft.differs(name, value, reasons()["bf16-weights"])
    else:
        draft.needless(name, value, "nothing-asked")


def bf16(draft: Draft, name: str, value: Any) -> None:
    _precision(draft, name, value, "bf16")


def fp16(draft: Draft, name: str, value: Any) -> None:
    _precision(draft, name, value, "fp16")


def _precision(draft: Draft, name: str, value: Any, kind: str) -> None:
    if value is True:
        draft.put("training.precision", kind, name)
    elif isinstance(value, bool) or value == "auto":
        draft.needless(name, value, "nothing-asked")
    else:
        draft.put("training.precision", value, name)


def in_order(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("data.group_by_length", False)
        draft.put("extra.train_sampling_strategy", "sequential", name)
    else:
        draft.needless(name, value, "nothing-asked")


# ------------------------------------------------------------------------------------------ preferences, PPO


def preference_loss(draft: Draft, name: str, value: Any) -> None:
    if str(value).startswith("kto"):
        draft.missing(name, value, "kto-pair")
    else:
        draft.put("stage.loss_type", value, name)


def smoothing(draft: Draft, name: str, value: Any) -> None:
    loss = draft.settings.get("pref_loss", draft.settings.get("dpo_loss", "sigmoid"))
    if value == 0:
        draft.needless(name, value, "nothing-asked")
    elif loss == "sigmoid":
        draft.missing(name, value, "smoothing")
    else:
        draft.put("stage.label_smoothing", value, name)


def reference(draft: Draft, name: str, value: Any) -> None:
    same = value == draft.settings.get("model_name_or_path")
    if same and draft.settings.get("adapter_name_or_path") in NOTHING:
        draft.needless(name, value, "reference-same")
    else:
        draft.missing(name, value, "reference")


def buffer(draft: Draft, name: str, value: Any) -> None:
    """So many mini-batches are filled with answers before they are learned from, one after the other (PPOConfig's
    batch_size = per_device_train_batch_size × gradient_accumulation_steps × ppo_buffer_size)."""
    draft.put("stage.num_mini_batches", int(value), name)
    if draft.settings.get("gradient_accumulation_steps") is None:
        accumulation(draft, "", 1)


def accumulation(draft: Draft, name: str, value: Any) -> None:
    """Forward passes of a step; in PPO those of all its mini-batches together."""
    buffers = draft.settings.get("ppo_buffer_size") if draft.kind == "ppo" else 1
    several_buffers = isinstance(buffers, int) and isinstance(value, int) and buffers > 1
    draft.put("training.gradient_accumulation_steps", value * buffers if several_buffers else value, name)


# ------------------------------------------------------------------------------------------ optimizers


def optimizer(draft: Draft, name: str, value: Any) -> None:
    if draft.settings.get("use_galore") is True or draft.settings.get("use_apollo") is True:
        return  # told by these
    if value in ("adamw_hf", "adamw_torch_npu_fused", "adamw_apex_fused"):
        draft.put("training.optim", "adamw_torch", name)
        draft.differs(name, value, reasons()["adamw-hf"])
    else:
        draft.put("training.optim", value, name)


def adafactor(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("training.optim", "adafactor", name)
    else:
        draft.needless(name, value, "nothing-asked")


def galore(draft: Draft, name: str, value: Any) -> None:
    base = str(draft.settings.get("optim", "adamw"))
    kind = (
        "galore_adafactor"
        if "adafactor" in base
        else "galore_adamw_8bit"
        if "8bit" in base
        else "galore_adamw"
    )
    _projected(draft, name, value, "galore", kind)


def apollo(draft: Draft, name: str, value: Any) -> None:
    _projected(draft, name, value, "apollo", "apollo_adamw")


def _projected(draft: Draft, name: str, value: Any, family: str, kind: str) -> None:
    """An optimizer of low-rank gradients: transformers has both, with their numbers in `optim_args`."""
    if value is not True:
        draft.needless(name, value, "nothing-asked")
        return
    layerwise = draft.settings.get(f"{family}_layerwise") is True
    draft.put("training.optim", kind + "_layerwise" * layerwise, name)
    targets = several(draft.settings.get(f"{family}_target", "all"))
    draft.put(
        "extra.optim_target_modules", "all-linear" if targets == ["all"] else targets, f"{family}_target"
    )
    numbers = {ours: draft.settings.get(theirs, usual) for theirs, (ours, usual) in NUMBERS[family].items()}
    draft.put(
        "extra.optim_args", ",".join(f"{key}={number}" for key, number in numbers.items()), f"{family}_rank"
    )


def dft(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("extra.loss_type", "dft", name)
    else:
        draft.needless(name, value, "nothing-asked")


# ------------------------------------------------------------------------------------------ training, logging


def steps(draft: Draft, name: str, value: Any) -> None:
    """-1, as 0, is transformers' way to say none."""
    if isinstance(value, (int, float)) and value <= 0:
        draft.needless(name, value, "nothing-asked")
    else:
        draft.put("training.max_steps", value, name)


def warmup(draft: Draft, name: str, value: Any) -> None:
    if value == 0 and draft.settings.get("warmup_ratio"):
        draft.needless(name, value, "nothing-asked")
    else:
        draft.put("training.warmup_steps", value, name)


def warmup_share(draft: Draft, name: str, value: Any) -> None:
    before = draft.settings.get("warmup_steps") or 0
    if isinstance(before, (int, float)) and before > 0:
        draft.needless(name, value, "warmed")
    elif not 0 <= float(value) < 1:
        raise ValueError(f"0 ≤ {name} < 1")
    else:
        draft.put("training.warmup_steps", float(value), name)


def data_seed(draft: Draft, name: str, value: Any) -> None:
    if value == draft.settings.get("seed", 42):
        draft.needless(name, value, "data-seed")
    else:
        draft.missing(name, value, "data-seed")


def on_cpu(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("hardware.device", "cpu", name)
    else:
        draft.needless(name, value, "nothing-asked")


def every(draft: Draft, name: str, value: Any) -> None:
    """A number of steps. transformers takes a share of all steps, too, which is known only when the rows are counted."""
    if isinstance(value, float) and 0 < value < 1:
        draft.missing(name, value, "whole-number")
    else:
        draft.put(f"logging.{name}", value, name)


def kept(draft: Draft, name: str, value: Any) -> None:
    draft.put("logging.save_total_limit", None if value == 0 else value, name)


def logged(draft: Draft, name: str, value: Any) -> None:
    draft.needless(name, value, "by-steps")


def eval_strategy(draft: Draft, name: str, value: Any) -> None:
    if value in ("no", False):  # YAML reads a bare no as false
        draft.needless(name, "no", "measured-anyway")
        return
    draft.put("logging.eval_strategy", value, name)
    if value == "steps" and draft.settings.get("eval_steps") in NOTHING:  # transformers' rule
        draft.put("logging.eval_steps", draft.settings.get("logging_steps", 500))


def save_strategy(draft: Draft, name: str, value: Any) -> None:
    draft.put("logging.save_strategy", "no" if value is False else value, name)


def trackers(draft: Draft, name: str, value: Any) -> None:
    known = Logging.model_fields["report_to"].annotation.__args__[0].__args__
    names = [str(one) for one in several(value) if str(one) != "none"]
    for one in names:
        if one not in known:
            draft.missing(name, one, "tracker-unknown")
    before = draft.get("logging.report_to") or []
    draft.put(
        "logging.report_to", list(dict.fromkeys([*before, *(one for one in names if one in known)])), name
    )


def swanlab(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        trackers(draft, name, "swanlab")
    else:
        draft.needless(name, value, "nothing-asked")


def title(draft: Draft, name: str, value: Any) -> None:
    draft.put("name", str(value), name)


def best_by(draft: Draft, name: str, value: Any) -> None:
    if value in ("loss", "eval_loss"):
        draft.needless(name, value, "default-path")
    else:
        draft.missing(name, value, "measure")


def best_is(draft: Draft, name: str, value: Any) -> None:
    if value is False:
        draft.needless(name, value, "default-path")
    else:
        draft.missing(name, value, "measure")


# ------------------------------------------------------------------------------------------ evaluation, export


def sampled(draft: Draft, name: str, value: Any) -> None:
    if draft.kind == "evaluation" and value is False:
        draft.put("generation.temperature", 0.0, name)
    else:
        draft.needless(name, value, "nothing-asked" if draft.kind == "evaluation" else "answering")


def task(draft: Draft, name: str, value: Any) -> None:
    known = {"mmlu_test": "mmlu", "ceval_validation": "ceval-valid", "cmmlu_test": "cmmlu"}
    draft.put("harness.tasks", [known.get(str(value), str(value))], name)


def export_name(draft: Draft, name: str, value: Any) -> None:
    if draft.kind == "export":
        draft.put("name", str(value).rstrip("/\\").replace("\\", "/").rpartition("/")[2], name)


CONTEXT = " context"  # no key of theirs: tokens that the model takes, where that is known
WAYS: dict[str, Way] = {
    way.__name__: way
    for way in (
        purposes, adapter, subfolder, spelled, attention, rope, not_checkpointed, checkpointed, remote_code, bits, bits_by,
        datasets, eval_datasets, dataset_dir, template, on_prompt, last_answer, mixing, probabilities, validation, packing,
        neat, method, targets, above_zero, pissa, pure_bf16, bf16, fp16, in_order, preference_loss, smoothing, reference,
        buffer, accumulation, optimizer, adafactor, galore, apollo, dft, steps, warmup, warmup_share, data_seed, on_cpu, every, kept,
        logged, eval_strategy, save_strategy, trackers, swanlab, title, best_by, best_is, sampled, task, export_name,
    )
}  # fmt: skip
