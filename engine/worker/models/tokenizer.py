"""The tokenizer of a spec, with the run's chat template. Imports no torch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.core.problems import Refusal
from engine.launch.workspace import template_file
from engine.models.chat_templates import TEMPLATE_FOLDER
from engine.spec.run_spec import RunSpec
from engine.worker.templates.conversations import end_of_turn_ids


def load_tokenizer(spec: RunSpec, path: str) -> PreTrainedTokenizerFast:
    """The tokenizer in `path` with the tokens that the spec adds: `new_token_ids` has the ids of those that are new to
    it. Its chat template is the spec's, if the spec names one."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=spec.model.trust_remote_code)
    if spec.model.chat_template:
        file = template_file(spec) or TEMPLATE_FOLDER / f"{spec.model.chat_template}.jinja"
        tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
    tokenizer.new_token_ids = _add_tokens(spec, tokenizer)
    if tokenizer.pad_token is None:
        # Only used for padding batches: labels and attention never depend on it.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if spec.stage.kind == "rm":
        tokenizer.pad_token_id = padding_beside_ends(tokenizer)
    return tokenizer


def _add_tokens(spec: RunSpec, tokenizer: Any) -> list[int]:
    """Add the tokens of the spec; returns the ids of those that are new."""
    known = tokenizer.get_vocab() if spec.model.added_tokens else {}
    tokenizer.add_tokens(spec.model.add_tokens)
    tokenizer.add_tokens(spec.model.add_special_tokens, special_tokens=True)
    return tokenizer.convert_tokens_to_ids([token for token in spec.model.added_tokens if token not in known])


def padding_beside_ends(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The padding token's id for a reward model: one that does not end turns, if the tokenizer has one.

    Other programs read the score at the last token that is not padding, and would skip the end of the turn.
    """
    ends = end_ids(tokenizer)
    special = sorted(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    choices = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *special]
    return next((id for id in choices if id is not None and id not in ends), tokenizer.pad_token_id)


def end_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The tokens that may end a conversation: the end of a text, and of a turn if the chat template shows it."""
    ends = {tokenizer.eos_token_id} - {None}
    with contextlib.suppress(Refusal):  # raised again where the template is needed
        ends |= set(end_of_turn_ids(tokenizer)) if tokenizer.chat_template else set()
    return ends
