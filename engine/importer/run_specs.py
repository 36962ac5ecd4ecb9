"""The spec of a finished training of LLaMA-Factory, and what of its settings is not known or has no counterpart.

LLaMA Board leaves the settings beside the result; the command line leaves none, so that they are put together from the
model card, the logs and the adapter. What the adapter's own configuration says counts more than either.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine import importer
from engine.core.problems import Problem, Refusal, problem
from engine.importer.foreign_runs import SETTINGS_FILES, ForeignRun, score_head
from engine.importer.run_logs import STATE_FILE, Logged
from engine.importer.training import training_draft
from engine.launch.workspace import Workplace, absolute_path, is_inside
from engine.models.adapters import ADAPTER_FILES, adapter_config
from engine.models.discovery import find_models, identity, is_hub_id
from engine.models.facts import inspect_model
from engine.models.safetensors_headers import read_header, tensors_of
from engine.preflight.model_checks import ADAPTER_SETTINGS
from engine.spec.run_spec import RunSpec

MAX_SETTINGS_BYTES = 1 << 20
CARD = "README.md"
CARD_SETTING = re.compile(r"^- (\w+): (\S.*)$", re.MULTILINE)
CARD_BASE = re.compile(r"^base_model: *['\"]?([^'\"\n]+)", re.MULTILINE)
CARD_DATA = re.compile(r"fine-tuned version of .+? on (the .+?) datasets?\.$", re.MULTILINE)
# Settings in the card → LLaMA-Factory's keys.
KEY_OF_CARD = {
    "learning_rate": "learning_rate",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "seed": "seed",
    "lr_scheduler_type": "lr_scheduler_type",
    "lr_scheduler_warmup_steps": "warmup_steps",
    "lr_scheduler_warmup_ratio": "warmup_ratio",
    "num_epochs": "num_train_epochs",
    "training_steps": "max_steps",
}
# Curves by which a stage is recognized, the most particular first.
STAGE_OF_CURVE = {"odds_ratio_loss": "orpo", "rewards/accuracies": "dpo", "rewards/chosen": "kto", "reward": "ppo"}
LORA_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


def spec_of(run: ForeignRun, logged: Logged, workplace: Workplace) -> tuple[RunSpec, list[Problem]]:
    """The spec with absolute paths, and what a reader has to know about it. Raises Refusal if the weights cannot be
    used without something that is missing."""
    spec, notes = _from_settings(run)
    if spec is None:
        spec, guessed = _from_traces(run, logged)
        notes += guessed
    if spec.stage.kind == "rm":
        raise Refusal(problem("import-run-reward-model", folder=run.folder, file=score_head(run) or "—"))
    if run.form == "adapter" and any(_is_about_merged_base(note) for note in notes):
        raise Refusal(problem("import-run-merged-base", folder=run.folder))
    plain: dict[str, Any] = spec.model_dump()
    plain["name"] = run.folder.name
    if run.form == "adapter":
        notes += _put_adapter(plain, run.weights)
    elif plain["method"]["kind"] == "lora":
        plain["method"] = {"kind": "full"}
    base, note = _located_base(plain["model"]["model_name_or_path"], run, workplace)
    plain["model"]["model_name_or_path"] = base
    return workplace.frozen(RunSpec.read(plain)), [*notes, *filter(None, [note])]


def _is_about_merged_base(note: Problem) -> bool:
    """Whether a note says that the adapter was trained on a base with other adapters merged into it."""
    return note.code == "import-none" and note.values.get("name") == "adapter_name_or_path"


# ------------------------------------------------------------------------------------------ where settings come from


def _from_settings(run: ForeignRun) -> tuple[RunSpec | None, list[Problem]]:
    """The spec from a file with the settings; None without a usable one."""
    notes: list[Problem] = []
    for name in SETTINGS_FILES:
        if run.size(name) > MAX_SETTINGS_BYTES:
            notes.append(problem("import-run-settings-long", file=name, limit=MAX_SETTINGS_BYTES >> 20))
        if not (content := run.read(name, MAX_SETTINGS_BYTES)):
            continue
        try:
            imported = importer.read(importer.decoded(content, name), context_of=_context)
        except Refusal as refusal:
            notes += [issue.at(name) for issue in refusal.problems]
            continue
        if isinstance(imported.spec, RunSpec):
            return imported.spec, [*notes, *imported.lost]
        raise Refusal(problem("import-run-not-training", folder=run.folder, file=name))
    return None, notes


def _context(model: str) -> int | None:
    return inspect_model(Path(model)).context_length if Path(model).is_dir() else None


def _from_traces(run: ForeignRun, logged: Logged) -> tuple[RunSpec, list[Problem]]:
    """The spec from what a training leaves besides its settings, with LLaMA-Factory's defaults for the rest."""
    card = run.read(CARD, MAX_SETTINGS_BYTES).decode("utf-8", "replace")
    settings = {key: _number(value) for name, value in CARD_SETTING.findall(card) if (key := KEY_OF_CARD.get(name))}
    if names := CARD_DATA.search(card):
        settings["dataset"] = ",".join(re.findall(r"the ([^\s,]+)", names[1]))
    if base := CARD_BASE.search(card):
        settings["model_name_or_path"] = base[1].strip()
    stage = next((stage for curve, stage in STAGE_OF_CURVE.items() if curve in logged.names), "sft")
    if score_head(run) and stage == "sft":
        stage = "rm"
    settings |= {"stage": stage, "finetuning_type": "lora" if run.form == "adapter" else "full"}
    draft = training_draft(settings)
    spec = draft.spec()
    assert isinstance(spec, RunSpec)  # a draft of a training has no other
    used = [name for name in (CARD, STATE_FILE, ADAPTER_FILES[0]) if os.path.isfile(run.folder / name)]
    files = ", ".join(SETTINGS_FILES)
    note = problem("import-run-no-settings", files=files, used=", ".join(used) or "—", stage=stage)
    return spec, [note, *(note for note in draft.notes if note.code != "import-needless")]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# ------------------------------------------------------------------------------------------ adapter and base


def _put_adapter(plain: dict[str, Any], folder: Path) -> list[Problem]:
    """Put what the adapter's configuration says into the settings; returns what it does not say in our terms."""
    config = adapter_config(folder)
    method = plain["method"] if plain["method"]["kind"] == "lora" else {"kind": "lora"}
    method |= {name: config[name] for name in ADAPTER_SETTINGS if config.get(name) is not None}
    method |= {"lora_dropout": config.get("lora_dropout", 0.0), "init_lora_weights": "default"}
    method["modules_to_save"] = config.get("modules_to_save") or []
    targets = config.get("target_modules")
    if isinstance(targets, list) and targets:
        method["target_modules"] = sorted(map(str, targets))
    plain["method"] = method
    if base := config.get("base_model_name_or_path"):
        plain["model"]["model_name_or_path"] = str(base)
    if isinstance(targets, str) and targets != "all-linear":
        return [problem("import-run-targets", pattern=targets[:100])]
    return []


def _located_base(name: str, run: ForeignRun, workplace: Workplace) -> tuple[str, Problem | None]:
    """The base model on this machine, and a remark: it is elsewhere than the training says, outside of the models
    folders, or missing. A relative path is one from a folder above the training."""
    here = absolute_path(name, [*run.folder.parents, *workplace.model_roots], "config.json")
    if os.path.isdir(here):
        usable = is_hub_id(identity(here)) or is_inside(Path(here), workplace.model_roots)
        return here, None if usable else problem("import-run-base-outside", base=here, folder=Path(here).parent)
    last = _last_name(name)
    for model in find_models(workplace.model_roots):
        if model.name == name and is_hub_id(name):
            return str(model.path), None
        if _last_name(model.name) == last and run.form == "adapter" and _fits(run.weights, model.path):
            return str(model.path), problem("import-run-base-moved", base=name, folder=model.path)
    return name, problem("import-run-base-missing", base=name) if run.form == "adapter" else None


def _last_name(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()


def _fits(adapter: Path, base: Path) -> bool:
    """Whether the adapter's matrices have the sizes of the base's layers that they are named after."""
    header, (tensors, _) = read_header(adapter / ADAPTER_FILES[1]), tensors_of(base)
    pairs = list(_pairs({} if isinstance(header, Problem) else header, tensors))
    return bool(pairs) and all(ours == theirs for ours, theirs in pairs)


def _pairs(adapter: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    for name, tensor in adapter.items():
        matched = LORA_WEIGHT.fullmatch(name)
        layer = base.get(f"{matched[1]}.weight") if matched else None
        if matched and layer and len(layer.shape) == len(tensor.shape) == 2:
            axis = 1 if matched[2] == "A" else 0
            yield tensor.shape[axis], layer.shape[axis]
