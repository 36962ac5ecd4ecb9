"""Adds embedding rows for tokens that a model does not have: before training, and when the result is loaded."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, TrainableTokensWrapper
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
    return _layer(model.get_input_embeddings()).weight.shape[0]


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
    fitted: Any = model
    fitted.own_rows = getattr(model, "own_rows", had)
    if rows < had and rows >= fitted.own_rows:
        return  # another adapter needs more
    if rows < had:
        model.resize_token_embeddings(rows, mean_resizing=False)
    elif rows > had:
        for part in {id(part.weight): part for part in map(_layer, _vocabulary_parts(model))}.values():
            _extend(part, rows)
        model.config.get_text_config().vocab_size = rows
        head = model.get_output_embeddings()
        if head is not None and had == fitted.own_rows:
            _layer(head).register_forward_hook(_narrow(_layer(head), had))


def _extend(part: Any, rows: int) -> None:
    """Make an embedding or a head longer where it is, since an adapter may lie around it. The new rows are zeros until
    an adapter brings its own."""
    for weight in filter(lambda weight: weight is not None, (part.weight, getattr(part, "bias", None))):
        weight.data = torch.cat([weight.data, weight.data.new_zeros(rows - weight.shape[0], *weight.shape[1:])])


def _layer(part: Any) -> Any:
    """The layer itself, whatever peft has put around it."""
    if isinstance(part, AuxiliaryTrainingWrapper):
        return _layer(part.original_module)
    return _layer(part.get_base_layer()) if isinstance(part, BaseTunerLayer) else part


def narrow_to_adapters(model: PeftModel) -> None:
    """Let each adapter that has trained rows alone give logits for the tokens that it knows, and none for those that
    the base has for another adapter."""
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    if not isinstance(head, TrainableTokensWrapper) or head in _NARROWED:
        return
    _NARROWED.add(head)

    def narrow(wrapper: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        indices = wrapper.token_adapter.token_indices
        known = [max(indices[name]) + 1 for name in wrapper.active_adapters if name in indices]
        return logits[..., : max([base.own_rows, *known])]

    head.register_forward_hook(narrow)


_NARROWED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _narrow(head: nn.Module, rows: int) -> Any:
    # peft copies the head with its hooks for each adapter: those copies give logits for all their rows.
    return lambda module, _given, logits: logits[..., :rows] if module is head else logits


def _keys_of(self: TrainableTokensWrapper, adapter_name: str) -> dict[str, str]:
    """As peft's own, but none for an adapter without rows: peft looks for them in every adapter that comes later."""
    return _PEFT_OWN(self, adapter_name) if adapter_name in self.token_adapter.token_indices else {}


_PEFT_OWN = TrainableTokensWrapper.adapter_state_dict_load_map
TrainableTokensWrapper.adapter_state_dict_load_map = _keys_of  # type: ignore[method-assign]
