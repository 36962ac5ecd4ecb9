"""Write down which arguments each stage's configuration class has, so that `engine.spec` can check `extra`
without importing torch. `python -m engine.worker.arguments` renews the file; a test compares them."""

import dataclasses
import enum
import json
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from engine.spec import TRAINER_ARGUMENTS

CONFIGS = {
    "pt": SFTConfig, "sft": SFTConfig, "rm": RewardConfig, "dpo": DPOConfig, "kto": KTOConfig,
    "orpo": TrainingArguments, "simpo": TrainingArguments, "ppo": TrainingArguments, "grpo": GRPOConfig,
}  # fmt: skip
PLAIN = {int: "int", float: "float", bool: "bool", str: "str", dict: "dict", list: "list", type(None): "null"}


def arguments() -> dict[str, dict[str, str]]:
    """Stage → name → types ("float", "bool|null") of the arguments of its configuration class."""
    return {stage: _types(config) for stage, config in sorted(CONFIGS.items())}


def _types(config: type) -> dict[str, str]:
    hints = get_type_hints(config)
    return {
        field.name: _names(hints[field.name])
        for field in sorted(dataclasses.fields(config), key=lambda field: field.name)
    }


def _names(hint: Any) -> str:
    """A hint as the types that a value in YAML may have; "any" where one of them is none of those."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    names = {_name(part) for part in parts}
    if "dict" in names:
        names.discard("str")  # JSON text, or a file: for those who have no YAML
    return "any" if "any" in names else "|".join(sorted(names, key=[*PLAIN.values()].index))


def _name(hint: Any) -> str:
    plain = get_origin(hint) or hint
    return "str" if isinstance(plain, type) and issubclass(plain, enum.Enum) else PLAIN.get(plain, "any")


if __name__ == "__main__":
    TRAINER_ARGUMENTS.write_text(json.dumps(arguments(), indent=1) + "\n", encoding="utf-8")
