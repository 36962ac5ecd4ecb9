"""Adds embedding rows for tokens that a model does not have: before training, and when the result is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft.utils import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from engine.models.adapters import adapter_embedding_rows, adapter_token_rows
from engine.models.facts import inspect_model
from engine.models.vocabulary import trains_rows_alone
from engine.spec.run_spec import RunSpec
from engine.worker.models.tokenizer import load_tokenizer


def make_rows(spec: RunSpec, model: PreTrainedModel, path: str) -> None:
    """Give the model a row for every id of its tokenizer, if any are missing; `new_rows` of the model are the rows of
    tokens that are new to it. They are initialized around the mean of the others (Hewitt 2021), with the seed set by
    the process."""
    tokenizer: Any = load_tokenizer(spec, path)
    had, needed = _row_count(model), max(tokenizer.get_vocab().values()) + 1
    within = [row for row in tokenizer.new_token_ids if row < had]  # many models have spare rows
    if within:
        _begin_as_mean(model, within)
    if needed > had:
        model.resize_token_embeddings(needed, mean_resizing=True)
    grown: Any = model
    grown.new_rows = sorted({*within, *range(had, needed)})
    grown.rows_alone = trains_rows_alone(inspect_model(path))


def _begin_as_mean(model: PreTrainedModel, rows: list[int]) -> None:
    """Set these rows to the mean of the others; untrained rows may contain anything."""
    kept = torch.ones(_row_count(model), dtype=torch.bool)
    kept[rows] = False
    for weight in {id(part.weight): part.weight for part in _vocabulary_parts(model)}.values():
        weight.data[rows] = weight.data[kept.to(weight.device)].float().mean(0).to(weight.dtype)


def _row_count(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return embedding.num_embeddings


def _vocabulary_parts(model: PreTrainedModel) -> list[Any]:
    """The embedding, and the output head of a generating model."""
    return [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]


def vocabulary_modules(model: PreTrainedModel) -> list[str]:
    """Full names of the modules with a row for each token (embedding and output head) if there are new rows."""
    if not getattr(model, "new_rows", None):
        return []
    whole = _vocabulary_parts(model)
    return [name for name, part in model.named_modules() if any(part is embedding for embedding in whole)]


def trained_rows(model: Any, whole: Iterable[str]) -> dict[str, list[int]]:
    """Module → its new rows, which an adapter trains and contains; {} if all of the modules are trained because peft
    cannot train single rows. `whole`: names, or ends of names, of modules that are trained in full anyway."""
    if not getattr(model, "rows_alone", False):
        return {}
    named = [name for name in vocabulary_modules(model) if not any(name.endswith(end) for end in whole)]
    embedding, *head = _vocabulary_parts(model)
    if head and head[0].weight is embedding.weight:  # peft lets the head follow
        named = [name for name in named if model.get_submodule(name) is embedding]
    return dict.fromkeys(named, model.new_rows)


def let_loss_read_head(model: nn.Module) -> None:
    """TRL computes its losses from weight and bias of the head; peft's head with separate rows has no bias
    attribute."""
    for part in model.modules():
        if isinstance(part, TrainableTokensWrapper):
            part.register_parameter("bias", None)


def fit_vocabulary(model: PreTrainedModel, adapters: Iterable[str | Path]) -> None:
    """Extend embeddings and head to the length of those in the adapters, whose trainings added tokens.

    Without its adapter the model stays the same: its own head gives as many logits as before, so that it neither
    generates a token it never learned, nor assigns probability to one.
    """
    folders, had = list(adapters), _row_count(model)
    rows = max((adapter_embedding_rows(folder) for folder in folders), default=0) or had
    rows = max([rows, *map(adapter_token_rows, folders)])
    if rows == had:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    if rows > had and head is not None:
        head.register_forward_hook(_narrow(head, had))


def _narrow(head: nn.Module, rows: int) -> Any:
    # peft copies the head with its hooks for each adapter: those copies give logits for all their rows.
    return lambda module, _given, logits: logits[..., :rows] if module is head else logits
