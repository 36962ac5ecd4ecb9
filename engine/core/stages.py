"""Facts of each stage: what data it learns from, what its curves are called, what may follow it.

What settings a stage has is in `engine.spec.stage_settings`; how it trains, in `engine.worker`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "chat", "pairs", "thumbs"]  # of a data set
Form = Literal["text", "chat", "pairs", "thumbs", "prompts"]  # of a row that a stage is given
# The kinds of data sets whose rows can be made into each form.
KINDS_BY_FORM: dict[Form, tuple[Kind, ...]] = {
    "text": ("text",),
    "chat": ("chat",),
    "pairs": ("pairs",),
    "thumbs": ("thumbs",),
    "prompts": ("chat", "pairs", "thumbs"),
}


@dataclass(frozen=True)
class Stage:
    """`form` is what a row is made into; `curves` are drawn first, in this order.

    `tells`: the curve that is looked at first, where there is room for one number.
    `best`: what a validation measures that says which checkpoint is best: the lowest loss, the highest of all else.
    `answers`: the model writes answers of its own while it trains. `follows`: the stages whose result is a good
    start for this one, the most usual first. `pace`: the usual learning rate, as a multiple of that of SFT.
    """

    form: Form
    curves: tuple[str, ...] = ("loss",)
    tells: str = "loss"
    best: str = "loss"
    answers: bool = False
    follows: tuple[str, ...] = ()
    pace: float = 1.0


_PREFERENCE = ("rewards/margins", "rewards/accuracies", "loss", "rewards/chosen", "rewards/rejected")
STAGES: dict[str, Stage] = {
    "pt": Stage("text"),
    "sft": Stage("chat", follows=("pt",)),
    "rm": Stage("pairs", ("accuracy", "margin", "loss"), tells="accuracy", follows=("sft",)),
    "dpo": Stage("pairs", _PREFERENCE, follows=("sft", "ppo", "grpo"), pace=0.1),
    "kto": Stage(
        "thumbs",
        ("rewards/margins", "kl", "loss", "rewards/chosen", "rewards/rejected"),
        follows=("sft",),
        pace=0.1,
    ),
    "orpo": Stage("pairs", _PREFERENCE, follows=("pt", "sft"), pace=0.2),
    "simpo": Stage("pairs", _PREFERENCE, follows=("sft",), pace=0.1),
    "ppo": Stage(
        "prompts",
        ("reward", "kl", "entropy", "value_loss", "clip_fraction", "answer_length"),
        tells="reward",
        best="reward",
        answers=True,
        follows=("sft", "dpo", "ppo", "grpo"),
        pace=0.1,
    ),
    "grpo": Stage(
        "prompts",
        ("reward", "kl", "entropy", "clip_fraction", "answer_length"),
        tells="reward",
        best="reward",
        answers=True,
        follows=("sft", "dpo", "ppo", "grpo"),
        pace=0.1,
    ),
}


def next_stages(kind: str) -> list[str]:
    """Stages that a result of this one is a good start for."""
    return [name for name, stage in STAGES.items() if kind in stage.follows]
