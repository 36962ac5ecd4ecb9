"""Facts about each stage: what data it learns from, the names of its curves, which stages can follow it.

The settings of a stage are in `engine.spec.stage_settings`, its training in `engine.worker`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "chat", "pairs", "thumbs"]  # kinds of data sets
Form = Literal["text", "chat", "pairs", "thumbs", "prompts"]  # forms of the rows that a stage gets
# The kinds of data sets whose rows can be converted to each form.
KINDS_BY_FORM: dict[Form, tuple[Kind, ...]] = {
    "text": ("text",),
    "chat": ("chat",),
    "pairs": ("pairs",),
    "thumbs": ("thumbs",),
    "prompts": ("chat", "pairs", "thumbs"),
}


@dataclass(frozen=True)
class Stage:
    """`form`: the form of its rows; `curves`: drawn first, in this order.

    `tells`: the curve whose value is shown if there is room for only one number.
    `best`: the validation metric that identifies the best checkpoint: the lowest loss, otherwise the highest value.
    `answers`: whether the model generates answers during training. `follows`: the stages whose results are a good
    start for this one, the most common first. `pace`: the usual learning rate, as a multiple of that of SFT.
    `images`: whether it trains on rows with images.
    """

    form: Form
    curves: tuple[str, ...] = ("loss",)
    tells: str = "loss"
    best: str = "loss"
    answers: bool = False
    follows: tuple[str, ...] = ()
    pace: float = 1.0
    images: bool = False


_PREFERENCE = ("rewards/margins", "rewards/accuracies", "loss", "rewards/chosen", "rewards/rejected")
STAGES: dict[str, Stage] = {
    "pt": Stage("text"),
    "sft": Stage("chat", follows=("pt",), images=True),
    "rm": Stage("pairs", ("accuracy", "margin", "loss"), tells="accuracy", follows=("sft",)),
    "dpo": Stage("pairs", _PREFERENCE, follows=("sft", "ppo", "grpo"), pace=0.1, images=True),
    "kto": Stage(
        "thumbs",
        ("rewards/margins", "kl", "loss", "rewards/chosen", "rewards/rejected"),
        follows=("sft",),
        pace=0.1,
        images=True,
    ),
    "orpo": Stage("pairs", _PREFERENCE, follows=("pt", "sft"), pace=0.2, images=True),
    "simpo": Stage("pairs", _PREFERENCE, follows=("sft",), pace=0.1, images=True),
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
        images=True,
    ),
}


def next_stages(kind: str) -> list[str]:
    """Stages for which a result of this one is a good start."""
    return [name for name, stage in STAGES.items() if kind in stage.follows]
