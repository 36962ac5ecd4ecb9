"""Rows for tokens that a model was not made for: added before a training, and
made room for where its result is used."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from engine.models.adapters import adapter_embedding_rows
from engine.spec.run_spec import RunSpec
from engine.worker.models.tokenizer import load_tokenizer


def resize(spec: RunSpec, model: PreTrainedModel, path: str) -> None:
    """Give the model a row for every id of the tokenizer in `path`, if it lacks any. The new rows
    are drawn around the mean of the others (Hewitt 2021), by the seed that the process has set."""
    ids = load_tokenizer(spec, path).get_vocab().values()
    if max(ids) >= _row_count(model):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=True)
        resized: Any = model
        resized.has_new_rows = True


def _row_count(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return embedding.num_embeddings


def vocabulary_modules(model: PreTrainedModel) -> list[str]:
    """Full names of the modules with a row for each token, if rows were added to them: embedding and output head."""
    if not getattr(model, "has_new_rows", False):
        return []
    whole = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, part in model.named_modules() if any(part is embedding for embedding in whole)]


def fit_vocabulary(model: PreTrainedModel, adapters: Iterable[str | Path]) -> None:
    """Make embeddings and head as long as those that the adapters bring: their trainings had added tokens.

    Without its adapter the model stays what it was: its own head answers with as many logits as
    before, so that it neither writes a token it never learned, nor shares its probability with one.
    """
    rows = max((adapter_embedding_rows(folder) for folder in adapters), default=0)
    had = _row_count(model)
    if not rows or rows == had:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    if rows > had and head is not None:
        head.register_forward_hook(_narrow(head, had))


def _narrow(head: nn.Module, rows: int) -> Any:
    # peft copies the head with its hooks for each adapter: those copies answer for all their rows.
    return lambda module, _given, logits: logits[..., :rows] if module is head else logits
