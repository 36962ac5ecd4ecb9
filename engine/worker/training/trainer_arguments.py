"""Record the arguments of each stage's configuration class and each schedule, so that `engine.spec.run_spec` can check
`extra` without importing torch.

`python -m engine.worker.training.trainer_arguments` updates the files; a test compares them.
"""

import dataclasses
import enum
import inspect
import json
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR, SchedulerType
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from engine.spec.schedules import SCHEDULE_ARGUMENTS_FILE as SCHEDULE_ARGUMENTS
from engine.spec.trainer_arguments import TRAINER_ARGUMENTS_FILE

CONFIGS = {
    "pt": SFTConfig,
    "sft": SFTConfig,
    "rm": RewardConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "orpo": TrainingArguments,
    "simpo": TrainingArguments,
    "ppo": TrainingArguments,
    "grpo": GRPOConfig,
}
TYPE_NAMES = {
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    dict: "dict",
    list: "list",
    type(None): "null",
}
# Schedules whose function passes its keywords to a class, and those to which transformers passes none.
SCHEDULER_CLASSES = {SchedulerType.REDUCE_ON_PLATEAU: ReduceLROnPlateau, SchedulerType.GREEDY: GreedyLR}
WITHOUT_KEYWORDS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
SET_BY_RUN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # determined by the run


def arguments() -> dict[str, dict[str, str]]:
    """Stage → name → types ("float", "bool|null") of the arguments of its configuration class."""
    return {stage: _types(config) for stage, config in sorted(CONFIGS.items())}


def schedules() -> dict[str, dict[str, str]]:
    """Schedule → name → types of the keywords that its function accepts, except those determined by the run."""
    return {
        kind.value: _keywords(SCHEDULER_CLASSES.get(kind) or function) if kind not in WITHOUT_KEYWORDS else {}
        for kind, function in sorted(TYPE_TO_SCHEDULER_FUNCTION.items(), key=lambda entry: entry[0].value)
    }


def _keywords(function: Any) -> dict[str, str]:
    is_class = inspect.isclass(function)
    hints = get_type_hints(function.__init__ if is_class else function)
    keywords = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in SET_BY_RUN:
            keywords[name] = _type_names(hints[name]) if name in hints else _type_name(type(parameter.default))
    return keywords


def _types(config: type) -> dict[str, str]:
    hints = get_type_hints(config)
    return {
        field.name: _type_names(hints[field.name])
        for field in sorted(dataclasses.fields(config), key=lambda field: field.name)
    }


def _type_names(hint: Any) -> str:
    """A type hint as the types that a value in YAML may have; "any" if one of them is something else."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    names = {_type_name(part) for part in parts}
    if "dict" in names:
        names.discard("str")  # JSON text, or a file: not needed in YAML
    return "any" if "any" in names else "|".join(sorted(names, key=[*TYPE_NAMES.values()].index))


def _type_name(hint: Any) -> str:
    plain = get_origin(hint) or hint
    return "str" if isinstance(plain, type) and issubclass(plain, enum.Enum) else TYPE_NAMES.get(plain, "any")


if __name__ == "__main__":
    TRAINER_ARGUMENTS_FILE.write_text(json.dumps(arguments(), indent=1) + "\n", encoding="utf-8")
    SCHEDULE_ARGUMENTS.write_text(json.dumps(schedules(), indent=1) + "\n", encoding="utf-8")
