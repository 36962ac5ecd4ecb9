"""A LLaMA-Factory command line or YAML → a spec of ours, and what could not be carried over, each with the reason."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.problems import Problem, Refusal, problem
from engine.spec import DECIDED, STAGES, RunSpec, fields, read_yaml, trainer_arguments

# Their name → our path. Names that are equal in both need no row: they are found among the spec's fields.
NAMES = {
    "cutoff_len": "data.max_length", "max_samples": "data.max_samples", "dataset_dir": "data.dataset_dir",
    "val_size": "data.validation_share", "packing": "data.packing", "lora_rank": "method.r",
    "lora_alpha": "method.lora_alpha", "lora_dropout": "method.lora_dropout",
    "additional_target": "method.modules_to_save", "freeze_trainable_layers": "method.trainable_layers",
    "num_layer_trainable": "method.trainable_layers", "warmup_ratio": "training.warmup_steps",
    "quantization_type": "model.quantization.bnb_4bit_quant_type", "adapter_name_or_path": "model.adapter_path",
    "double_quantization": "model.quantization.bnb_4bit_use_double_quant",
}  # fmt: skip
# The same, of one stage: several of their names, of older versions and newer ones, stand for one of ours.
OF_STAGE: dict[str, dict[str, str]] = {
    "dpo": {
        "pref_beta": "beta", "dpo_beta": "beta", "pref_loss": "loss_type", "dpo_loss": "loss_type",
        "pref_ftx": "sft_weight", "dpo_ftx": "sft_weight", "dpo_label_smoothing": "label_smoothing",
    },
    "kto": {
        "pref_beta": "beta", "kto_beta": "beta", "kto_chosen_weight": "desirable_weight",
        "kto_rejected_weight": "undesirable_weight",
    },
    "orpo": {"pref_beta": "orpo_lambda", "orpo_beta": "orpo_lambda"},
    "simpo": {"pref_beta": "simpo_beta", "simpo_gamma": "simpo_gamma"},
    "ppo": {"ppo_epochs": "num_ppo_epochs", "ppo_target": "kl_target", "ppo_whiten_rewards": "whiten_rewards"},
}  # fmt: skip
NOT_HERE = (
    ("pref_loss", "kto_pair"),
    ("dpo_loss", "kto_pair"),
    ("dpo_loss", "kto"),
)  # no loss of TRL's any more
# What is theirs where nothing is said, changes what is learned, and is other than ours (LLaMA-Factory 0.9.5).
THEIR_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear", "num_train_epochs": 3.0, "cutoff_len": 2048, "lora_rank": 8,
}  # fmt: skip
THEIR_DEFAULTS_OF: dict[str, dict[str, Any]] = {"simpo": {"pref_beta": 0.1, "simpo_gamma": 0.5}}
# Named for what Athanor decides by itself, or does always.
NEEDLESS = {
    "do_train", "do_eval", "do_predict", "output_dir", "overwrite_output_dir", "overwrite_cache", "template",
    "dataloader_num_workers", "ddp_timeout", "trust_remote_code", "config_file",
    "save_only_model", "eval_strategy", "evaluation_strategy", "include_num_input_tokens_seen", "flash_attn",
    "resume_from_checkpoint", "deepspeed",
}  # fmt: skip


@dataclass(frozen=True)
class Imported:
    """A spec, and what of the original it leaves out."""

    spec: RunSpec
    left_out: tuple[Problem, ...]


def read_any(text: str) -> Imported:
    """A spec of ours as it is, or theirs translated: for a box into which either may be pasted. Raises Refusal."""
    try:
        return Imported(RunSpec.from_yaml(text), ())
    except Refusal:
        theirs = re.search(
            r"--(stage|model_name_or_path|finetuning_type)\b|^(finetuning_type|cutoff_len):", text, re.M
        )
        if theirs and not re.search(r"^(model|training|data):", text, re.M):
            return read(text)
        raise


def read(text: str) -> Imported:
    """A pasted command (`… train_bash.py --stage sft …`, `llamafactory-cli train file.yaml` content) as a spec.

    Raises Refusal if it is neither, or if the settings it has do not make a spec.
    """
    launcher, given = _command(text) if "--" in text else ({}, _yaml(text))
    if not given:
        raise Refusal(problem("import-nothing"))
    kind, given = _stage(given)
    known = trainer_arguments().get(kind, {})
    plain: dict[str, Any] = {
        "stage": {"kind": kind},
        "method": {"kind": "lora"},
        "model": {},
        "data": {},
        "training": {},
        "logging": {},
    }
    plain |= {"hardware": _hardware(text, launcher)}
    left_out = []
    for name, value in given.items():
        if (name, value) in NOT_HERE:
            left_out.append(problem("import-unknown", name=name, value=value))
        elif name in OF_STAGE.get(kind, {}):
            plain["stage"][OF_STAGE[kind][name]] = value
        elif name in WAYS:
            WAYS[name](plain, value)
        elif path := NAMES.get(name) or OWN.get(name):
            _put(plain, path, value)
        elif name in NEEDLESS or name in DECIDED:
            left_out.append(problem("import-needless", name=name, value=value))
        elif name in known:
            plain.setdefault("extra", {})[name] = value
        else:
            left_out.append(problem("import-unknown", name=name, value=value))
    if plain["method"]["kind"] != "lora":
        lora_only = [
            key for key in plain["method"] if key not in ("kind", "trainable_layers", "trainable_modules")
        ]
        for key in lora_only:
            del plain["method"][key]
    for key in sorted(set(plain["stage"]) - {*STAGES[kind].model_fields}) if kind in STAGES else ():
        left_out.append(problem("import-unknown", name=key, value=plain["stage"].pop(key)))
    return Imported(RunSpec.read({part: value for part, value in plain.items() if value}), tuple(left_out))


OWN = {path.rsplit(".", 1)[-1]: path for path in fields() if "." in path}


def _put(plain: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    plain = _part(plain, *parents)
    listed = str(fields()[path].annotation).startswith("list")
    plain[last] = _several(value) if listed else value


def _part(plain: dict[str, Any], *steps: str) -> dict[str, Any]:
    """The part at these steps, made if it is not there; a value that stands in its place gives way."""
    for step in steps:
        if not isinstance(plain.get(step), dict):
            plain[step] = {}
        plain = plain[step]
    return plain


def _several(value: Any) -> list[Any]:
    """`a,b` is what a list is on their command line; in YAML it may be one."""
    return value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]


def _stage(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of stage, and the settings without it. To them ORPO and SimPO are losses of DPO."""
    rest = dict(given)
    kind = str(rest.pop("stage", "sft"))
    loss = next((name for name in ("pref_loss", "dpo_loss") if rest.get(name) in ("orpo", "simpo")), None)
    if kind == "dpo" and loss:
        kind = rest.pop(loss)
    given = THEIR_DEFAULTS | THEIR_DEFAULTS_OF.get(kind, {}) | rest
    if isinstance(rank := given["lora_rank"], int):
        given = {"lora_alpha": 2 * rank} | given
    return kind, given


def _method(plain: dict[str, Any], value: str) -> None:
    plain["method"]["kind"] = value


def _datasets(plain: dict[str, Any], value: str) -> None:
    plain["data"]["datasets"] = dict.fromkeys(map(str, _several(value)), 1)


def _eval_datasets(plain: dict[str, Any], value: str) -> None:
    plain["data"]["eval_datasets"] = _several(value)


def _targets(plain: dict[str, Any], value: str) -> None:
    names = _several(value)
    plain["method"]["target_modules"] = ["all-linear"] if names == ["all"] else names


def _precision(name: str) -> Callable[[dict[str, Any], Any], None]:
    def put(plain: dict[str, Any], value: Any) -> None:
        if value is True:
            plain["training"]["precision"] = name

    return put


def _quantization(plain: dict[str, Any], value: int) -> None:
    _part(plain, "model", "quantization")["kind"] = f"{value}bit"


def _report_to(plain: dict[str, Any], value: Any) -> None:
    plain["logging"]["report_to"] = [name for name in _several(value) if name != "none"]


def _disable_checkpointing(plain: dict[str, Any], value: bool) -> None:
    plain["training"]["gradient_checkpointing"] = not value


def _train_on(kind: str) -> Callable[[dict[str, Any], Any], None]:
    def put(plain: dict[str, Any], value: Any) -> None:
        if value is True:
            plain["stage"]["train_on"] = kind

    return put


# Settings whose value changes its form on the way.
WAYS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "finetuning_type": _method, "dataset": _datasets, "eval_dataset": _eval_datasets,
    "lora_target": _targets, "fp16": _precision("fp16"), "bf16": _precision("bf16"),
    "quantization_bit": _quantization, "report_to": _report_to, "disable_gradient_checkpointing": _disable_checkpointing,
    "train_on_prompt": _train_on("everything"), "mask_history": _train_on("last_answer"),
}  # fmt: skip


def _hardware(text: str, launcher: Mapping[str, Any]) -> Mapping[str, Any]:
    """`CUDA_VISIBLE_DEVICES=0,1,2,3 accelerate launch --num_processes 4` is four processes on four cards."""
    found = re.search(r"CUDA_VISIBLE_DEVICES=([\d,]+)", text)
    cards = [int(card) for card in found[1].split(",") if card] if found else []
    said = launcher.get("num_processes", launcher.get("nproc_per_node"))  # of accelerate, of torchrun
    processes = said if isinstance(said, int) else len(cards)  # torchrun takes words, too: auto, gpu
    return {"devices": cards[:processes], "num_processes": processes} if processes else {}


def _command(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags of the launcher, which stand before the script, and those of the training behind it."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise Refusal(problem("import-unreadable", why=error)) from None
    script = next(
        (
            index
            for index, (before, word) in enumerate(zip(["", *words], words, strict=False))
            # A data set may be called train.
            if word.endswith(".py") or (word == "train" and not before.startswith("--"))
        ),
        None,
    )
    if script is None:
        return {}, _flags(words)
    return _flags(words[:script]), _flags(words[script + 1 :])


def _flags(words: Sequence[str]) -> dict[str, Any]:
    """`--a 1 --b=2 --c --d x y` is {a: 1, b: 2, c: True, d: "x,y"}; words before the first flag are no flag's."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if re.match(r"--?[a-zA-Z]", word):  # and not -1, which is a value
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif name:
            found[name].append(word)
    return {name: _value(",".join(values)) if values else True for name, values in found.items()}


def _value(word: str) -> Any:
    """As YAML reads it; what it cannot read is text."""
    try:
        return read_yaml(word)
    except Refusal:
        return word


def _yaml(text: str) -> dict[str, Any]:
    given = read_yaml(text)
    if not isinstance(given, dict):
        raise Refusal(problem("import-nothing"))
    return given
