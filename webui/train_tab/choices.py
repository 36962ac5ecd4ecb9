"""The available models, results and data sets, with their labels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.core.problems import Refusal
from engine.data.datasets import Dataset, count_rows, read_dataset_info
from engine.data.soundness import flaw, sound_first
from engine.launch.workspace import Workplace, absolute_path, is_inside
from engine.models.discovery import find_gguf, hub_cache
from engine.models.facts import ModelFacts, inspect_model
from engine.runs import recent
from engine.runs.results import Result, results, titles
from webui.form.settings import ADAPTER, MODEL
from webui.pickers import MAX_OFFERED
from webui.words import Words


def model_choices(workplace: Workplace) -> list[tuple[str, str]]:
    return [(model.name, str(model.path)) for model in recent.models(workplace)]


def models_and_results(workplace: Workplace, words: Words) -> list[tuple[str, str]]:
    """Full models: those in the model folders, and those from runs."""
    return model_choices(workplace) + result_choices(results(workplace.saves), MODEL, words)


def trainable_models(workplace: Workplace, words: Words) -> list[tuple[str, str]]:
    """Full models, and last the folders with a model as GGUF alone, which the page offers to convert."""
    packed = [(f"{name} · GGUF", str(folder)) for name, folder in find_gguf(workplace.model_roots)]
    return models_and_results(workplace, words) + packed


def result_choices(finished: Sequence[Result], path: str, words: Words) -> list[tuple[str, str]]:
    """Results of finished runs that can be used at `path`: adapters to continue from, reward models, or full models; of
    very many, the newest. Any other can be typed."""
    fits: dict[str, Callable[[Result], bool]] = {
        ADAPTER: lambda result: result.adapter,
        MODEL: lambda result: not result.adapter and result.stage != "rm",
    }
    named = titles(finished)
    return [
        (
            f"{named[result.run.id]} · {words.choice('stage', result.stage)} · {result.run.id.split('/')[0]}",
            str(result.folder),
        )
        for result in itertools.islice(
            filter(fits.get(path, lambda result: result.stage == "rm"), finished), MAX_OFFERED
        )
    ]


def dataset_choices(workplace: Workplace, words: Words) -> list[tuple[str, str]]:
    """The data sets; unreadable ones are marked and listed last."""
    return [
        (dataset_label(dataset, words), dataset.name) for dataset in sound_first(read_dataset_info(workplace.data)[0])
    ]


def dataset_label(dataset: Dataset, words: Words) -> str:
    if flaw(dataset):
        return words("broken-set", name=dataset.name)
    try:
        return words("rows-of", name=dataset.name, rows=f"{count_rows(dataset):,}")
    except Refusal:  # it is on a hub
        return dataset.name


def local_model(name_or_path: str, workplace: Workplace) -> ModelFacts | None:
    """The model that the text refers to, if it is a folder that the studio may read."""
    folder = Path(absolute_path(name_or_path or "", workplace.model_roots, "config.json"))
    known = os.path.isfile(folder / "config.json") and is_inside(folder, (*workplace.model_roots, hub_cache()))
    return inspect_model(folder) if known else None
