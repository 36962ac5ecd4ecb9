"""Settings of a LLaMA-Factory training → a RunSpec draft."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from engine.importer.converters import CONVERTERS
from engine.importer.draft import Converter, Draft
from engine.importer.launch import SECRET_NAME, parse_value
from engine.importer.model_converters import CONTEXT_LENGTH_KEY
from engine.importer.table import Entry, entries
from engine.spec.run_spec import RunSpec
from engine.spec.stage_settings import STAGE_SETTINGS
from engine.spec.trainer_arguments import trainer_arguments

# Defaults that change what is learned or kept and differ from ours (LLaMA-Factory 0.9.5).
DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 3.0,
    "cutoff_len": 2048,
    "lora_rank": 8,
}
# Of a stage: PPOConfig of TRL 0.9 and GeneratingArguments; packing is on by default only in pre-training.
STAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    "pt": {"packing": True},
    "simpo": {"pref_beta": 0.1, "simpo_gamma": 0.5},
    "ppo": {"ppo_target": 6.0, "temperature": 0.95, "top_p": 0.7, "max_new_tokens": 1024},
}
# The same, for settings that LLaMA-Factory has no key for.
STAGE_FIXED_SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"stage.init_kl_coef": 0.2, "stage.missing_eos_penalty": None}
}
CONVERSION_ERRORS = (
    ArithmeticError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
)  # raised by a converter for a value of a type it does not know
PROGRAM_NAMES = {"llamafactory": "LLaMA-Factory", "axolotl": "axolotl"}
LOSS_KEYS = ("pref_loss", "dpo_loss")


def training_draft(settings: Mapping[str, Any]) -> Draft:
    """The draft of a training, with LLaMA-Factory's defaults."""
    kind, settings, unknown = stage_of(settings)
    draft = Draft(RunSpec, kind, settings)
    draft.put("stage.kind", kind)
    draft.put("method.kind", "lora")
    for path, value in STAGE_FIXED_SETTINGS.get(kind, {}).items():
        draft.put(path, value)
    draft.put("logging.save_total_limit", None)  # all are kept
    for name, value in (DEFAULTS | STAGE_DEFAULTS.get(kind, {})).items():
        draft.put(entries("llamafactory")[name].path(kind), value)
    draft.put("method.lora_alpha", 2 * _rank(settings))
    if unknown is not None:
        draft.missing("stage", unknown, "stage-unknown")
    for name, value in settings.items():
        apply_key(draft, name, value)
    return draft


def _rank(settings: Mapping[str, Any]) -> int:
    rank = settings.get("lora_rank")
    return rank if isinstance(rank, int) and rank > 0 else DEFAULTS["lora_rank"]


def stage_of(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any], Any]:
    """The stage, the settings without it, and the stage if it is unknown. In LLaMA-Factory, ORPO and SimPO are losses
    of DPO."""
    rest = dict(settings)
    stage = rest.pop("stage", None)
    kind = "sft" if stage is None else str(stage)
    loss = next((name for name in LOSS_KEYS if rest.get(name) in ("orpo", "simpo")), None)
    if kind == "dpo" and loss:
        kind = rest.pop(loss)
    return (kind, rest, None) if kind in STAGE_SETTINGS else ("sft", rest, stage)


def apply_key(
    draft: Draft,
    name: str,
    value: Any,
    program: str = "llamafactory",
    converters: Mapping[str, Converter] = CONVERTERS,
) -> None:
    """Apply one of a program's keys, or note why not."""
    if name == CONTEXT_LENGTH_KEY:
        return
    entry = entries(program).get(name)
    if entry is None:
        put_unknown(draft, name, value, program)
    elif value is None:
        draft.needless(name, value, "empty")
    elif entry.part:
        if draft.settings.get(entry.part) is not True:
            draft.needless(name, value, "switched-off")
    elif entry.paths and not entry.path(draft.kind) and not (entry.same or entry.none):
        draft.needless(name, value, "other-stage")
    elif entry.converter:
        try:
            converters[entry.converter](draft, name, value)
        except CONVERSION_ERRORS as error:
            draft.note("import-value", name, value, {"en": str(error), "zh": str(error)})
    else:
        put_value(draft, entry, name, value)


def put_value(draft: Draft, entry: Entry, name: str, value: Any) -> None:
    """Put a value at its path unchanged if this stage has it; otherwise note it."""
    path = entry.path(draft.kind)
    if not path:
        draft.note_unused(name, value, entry if entry.same or entry.none else Entry(same="other-stage"))
    elif path.startswith("extra.") and path.removeprefix("extra.") not in trainer_arguments()[draft.kind]:
        draft.needless(name, value, "other-stage")
    else:
        # A mapping may be given as JSON text, as on a command line.
        text = path.startswith("extra.") and isinstance(value, str) and value.startswith("{")
        draft.put(path, parse_value(value) if text else value, name)


def put_unknown(draft: Draft, name: str, value: Any, program: str = "llamafactory") -> None:
    """A key that the program does not have: an argument of the trainer's configuration, or a typo."""
    if name in trainer_arguments().get(draft.kind, {}) and re.fullmatch(r"[a-z]\w*", name):
        draft.put(f"extra.{name}", value, name)
        return
    near = difflib.get_close_matches(name, entries(program), 1, 0.75)
    shown = "…" if SECRET_NAME.search(name) and isinstance(value, str) else value
    draft.note("import-unknown", name, shown, program=PROGRAM_NAMES[program], hint=near[0] if near else "—")
