"""Converters of LLaMA-Factory keys about data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from engine.importer.draft import Draft, as_list, converters_by_name
from engine.importer.table import reasons

INTERLEAVE_STRATEGIES = ("interleave_under", "interleave_over")


def datasets(draft: Draft, name: str, value: Any) -> None:
    names = list(value) if isinstance(value, Mapping) else as_list(value)
    draft.put(
        "data.datasets",
        {dataset_name: float(count) for dataset_name, count in Counter(map(str, names)).items()},
        name,
    )


def eval_datasets(draft: Draft, name: str, value: Any) -> None:
    draft.put("data.eval_datasets", list(dict.fromkeys(map(str, as_list(value)))), name)


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


def train_on_prompt(draft: Draft, name: str, value: Any) -> None:
    _train_on(draft, name, value, "everything")


def train_on_last_answer(draft: Draft, name: str, value: Any) -> None:
    _train_on(draft, name, value, "last_answer")


def _train_on(draft: Draft, name: str, value: Any, turns: str) -> None:
    if value is True:
        draft.put("stage.train_on", turns, name)
    else:
        draft.needless(name, value, "nothing-asked")


def mix_strategy(draft: Draft, name: str, value: Any) -> None:
    if value in ("concat", "interleave_once"):
        draft.needless(name, value, "default-path")
    elif len(as_list(draft.settings.get("dataset"))) < 2:
        draft.needless(name, value, "each-once")
    else:
        draft.put("data.mix_strategy", value, name)


def probabilities(draft: Draft, name: str, value: Any) -> None:
    """Probabilities become weights; data.mix_strategy says what they apply to."""
    names, chances = as_list(draft.settings.get("dataset")), [float(chance) for chance in as_list(value)]
    if draft.settings.get("mix_strategy") not in INTERLEAVE_STRATEGIES:
        draft.missing(name, value, "probabilities-concat")
    elif len(names) != len(chances) or len(set(names)) != len(names):
        draft.missing(name, value, "probabilities-count")
    else:
        draft.put("data.datasets", dict(zip(map(str, names), chances, strict=True)), name, beside=True)


def validation_size(draft: Draft, name: str, value: Any) -> None:
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


def neat_packing(draft: Draft, name: str, value: Any) -> None:
    if value is True:
        draft.put("data.packing", True, name)
    else:
        draft.needless(name, value, "nothing-asked")


CONVERTERS = converters_by_name(
    datasets, eval_datasets, dataset_dir, template, train_on_prompt, train_on_last_answer,
    mix_strategy, probabilities, validation_size, packing, neat_packing,
)  # fmt: skip
