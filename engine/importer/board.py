"""A saved form of LLaMA Board (`llamaboard_config.yaml`, `config/*.yaml`) → the keys that it would train with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine.core.problems import Problem, problem
from engine.importer.table import EMPTY_VALUES, entries

FORM_PARTS = ("top", "train", "eval", "infer", "export")
STAGE_OF_TITLE = {
    "Supervised Fine-Tuning": "sft",
    "Reward Modeling": "rm",
    "PPO": "ppo",
    "DPO": "dpo",
    "KTO": "kto",
    "Pre-Training": "pt",
}
# Controls whose key has another name (webui/runner.py of LLaMA-Factory 0.9.5); those with the name of their key are not
# listed.
KEY_OF_CONTROL = {
    "training_stage": "stage",
    "train_seed": "seed",
    "eval_seed": "seed",
    "batch_size": "per_device_train_batch_size",
    "neftune_alpha": "neftune_noise_alpha",
    "use_pissa": "pissa_init",
    "checkpoint_path": "adapter_name_or_path",
    "model_path": "model_name_or_path",
}
# Parts of the page that are not settings.
PAGE_CONTROLS = (
    "lang", "hub_name", "current_time", "output_dir", "config_path", "device_count", "ds_offload",
    "resume_btn", "progress_bar", "swanlab_link", "loss_viewer", "output_box", "predict",
)  # fmt: skip
# Controls that belong to a switch or a stage, and are not settings without it.
SWITCH_OF_PREFIX = {"galore_": "use_galore", "apollo_": "use_apollo", "badam_": "use_badam", "swanlab_": "use_swanlab"}


def is_board_key(name: str) -> bool:
    return name.partition(".")[0] in FORM_PARTS and "." in name


def is_board(settings: Mapping[str, Any]) -> bool:
    return any(is_board_key(str(name)) and str(name).startswith(("top.", "train.", "eval.")) for name in settings)


def board_settings(form: Mapping[str, Any], notes: list[Problem]) -> dict[str, Any]:
    """The settings with which the form would start a training; or an evaluation, if only that has a data set."""
    held = {part: _controls_of_part(form, part) for part in FORM_PARTS}
    evaluates = not held["train"].get("dataset") and bool(held["eval"].get("dataset"))
    part = "eval" if evaluates else "train"
    settings: dict[str, Any] = {"do_predict": True} if evaluates else {"do_train": True}
    controls = held["top"] | held[part]
    extra = controls.pop("extra_args", None)
    for name, value in controls.items():
        if name in PAGE_CONTROLS or value in ([], *EMPTY_VALUES):
            continue
        switch = next((switch for begin, switch in SWITCH_OF_PREFIX.items() if name.startswith(begin)), None)
        if switch and controls.get(switch) is not True:
            continue
        _add_control(settings, KEY_OF_CONTROL.get(name, name), value, evaluates)
    if evaluates:
        settings["eval_dataset"] = settings.pop("dataset", None)
    if settings.get("val_size") and not evaluates:  # as the page does
        settings |= {"eval_strategy": "steps", "eval_steps": settings.get("save_steps", 100)}
        settings["per_device_eval_batch_size"] = settings.get("per_device_train_batch_size", 2)
    model = controls.get("model_name")
    if model and "model_name_or_path" not in settings:
        settings["model_name_or_path"] = model
        notes.append(problem("import-board-model", name=model))
    settings |= _extra_arguments(extra, notes)
    return settings


def _controls_of_part(form: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {str(name).partition(".")[2]: value for name, value in form.items() if str(name).startswith(f"{part}.")}


def _extra_arguments(text: Any, notes: list[Problem]) -> dict[str, Any]:
    """The JSON of the box "extra arguments"."""
    try:
        plain = json.loads(text) if isinstance(text, str) and text.strip() else text or {}
    except ValueError as error:
        notes.append(problem("import-value", name="extra_args", value=text, why=str(error)))
        return {}
    return plain if isinstance(plain, dict) else {}


def _add_control(settings: dict[str, Any], name: str, value: Any, evaluates: bool) -> None:
    """A control's value as its key's value, if the page converts it."""
    if name == "stage":
        settings[name] = STAGE_OF_TITLE.get(value, value)
    elif name == "compute_type":
        if value in ("fp16", "bf16", "pure_bf16"):
            settings[value] = True
    elif name == "booster":
        boosters = {
            "flashattn2": ("flash_attn", "fa2"),
            "unsloth": ("use_unsloth", True),
            "liger_kernel": ("enable_liger_kernel", True),
        }
        if value in boosters:
            settings[boosters[value][0]] = boosters[value][1]
    elif name == "ds_stage":
        settings["deepspeed"] = f"ds_z{value}_config.json"
    elif name == "per_device_train_batch_size" and evaluates:
        settings["per_device_eval_batch_size"] = value
    elif name == "quantization_bit":
        settings[name] = int(value) if str(value).isdecimal() else value
    elif name == "adapter_name_or_path":
        settings[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    elif name != "model_name":
        settings[name] = parse_number(value) if name in entries("llamafactory") else value


def parse_number(value: Any) -> Any:
    """A number that the form stores as text."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
