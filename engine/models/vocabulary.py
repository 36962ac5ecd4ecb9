"""The ids that a tokenizer can produce, compared with the model's embeddings; and the tokenizer's special tokens.

Everything is read from the files, without loading a tokenizer. Preparation compares the loaded tokenizer again
(`engine.worker.prepare`), so a tokenizer that differs from its files is noticed before a device is used.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from engine.core.problems import Problem, problem
from engine.models.adapters import adapter_embedding_rows, adapter_token_rows
from engine.models.checks import MAX_TOKENIZER_BYTES
from engine.models.facts import ModelFacts
from engine.models.json_objects import json_object_or_empty
from engine.models.safetensors_headers import tensors_of
from engine.models.trainable_modules import HEAD_MODULES, weight_matrices

TOKENIZER_JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Tokenizer classes without default special tokens: they have only those that their files name.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
EMBEDDING_MODULES = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
HEAD_BIASES = tuple(f"{name}.bias" for name in HEAD_MODULES)
MAX_TOKENS_NAMED = 5  # number of tokens named in a sentence


class Vocabulary(NamedTuple):
    """`rows` is the highest id + 1, 0 if the files do not show it; `added` are the tokens beyond the plain vocabulary,
    by id; `words` are the plain ones. `eos` and `pad` are None if there is none, "?" if the tokenizer's class may have
    one of its own."""

    rows: int
    words: frozenset[str]
    added: tuple[tuple[int, str], ...]
    eos: str | None
    pad: str | None


def vocabulary(folder: Path) -> Vocabulary:
    """What the files of the tokenizer in `folder` say, read once until one of them changes."""
    stamps = []
    for name in TOKENIZER_JSON_FILES:
        try:
            status = os.stat(folder / name)
            stamps.append((status.st_mtime_ns, status.st_size))
        except (OSError, ValueError):
            stamps.append((0, 0))
    return _vocabulary(folder, tuple(stamps))


@lru_cache(maxsize=64)
def _vocabulary(folder: Path, _stamps: tuple[tuple[int, int], ...]) -> Vocabulary:
    contents = {name: json_object_or_empty(folder / name, MAX_TOKENIZER_BYTES) for name in TOKENIZER_JSON_FILES}
    whole, config = contents["tokenizer.json"], contents["tokenizer_config.json"]
    model = whole.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    words = words or contents["vocab.json"]
    added = _added(whole, config, contents["added_tokens.json"])
    known: Collection[str]
    if isinstance(words, list):
        rows, known = len(words), {word[0] for word in words if isinstance(word, list) and word}
    else:
        ids = [number for number in words.values() if type(number) is int]
        rows, known = max(ids, default=-1) + 1, words.keys()
    rows = max([rows, *(number + 1 for number in added)]) if rows else 0
    special = {
        name: _text(contents["special_tokens_map.json"].get(name) or config.get(name)) for name in SPECIAL_TOKENS
    }
    for token in dict.fromkeys(special.values()):
        # Named but in no list: transformers gives it the next ID when it loads the tokenizer.
        if rows and token and token not in known and token not in added.values():
            added[rows] = token
            rows += 1
    plain = str(config.get("tokenizer_class", PLAIN_CLASSES[0])) in PLAIN_CLASSES
    eos, pad = (special[name] or (None if plain else "?") for name in ("eos_token", "pad_token"))
    return Vocabulary(rows, frozenset(known), tuple(sorted(added.items())), eos, pad)


def _added(whole: Mapping[str, Any], config: Mapping[str, Any], file: Mapping[str, Any]) -> dict[int, str]:
    """Tokens beyond the plain ones, by ID, from each of the three places where they are stored."""
    tokens: dict[int, str] = {}
    for entry in whole.get("added_tokens") or ():
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            tokens[entry["id"]] = _text(entry)
    for number, entry in _items(config.get("added_tokens_decoder")):
        if str(number).isdecimal():
            tokens.setdefault(int(number), _text(entry))
    for token, number in _items(file):
        if type(number) is int:
            tokens.setdefault(number, token)
    return tokens


def _items(value: Any) -> Any:
    return value.items() if isinstance(value, dict) else ()


def _text(value: Any) -> str:
    """A token given as its text, or as a mapping with it."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def embedding_rows(model: ModelFacts) -> int | None:
    """The number of token IDs with embeddings, by the model's weights, or by config.json if these cannot be read."""
    shapes = weight_matrices(model)
    rows = [shape[0] for name, shape in shapes.items() if name.rpartition(".")[2] in EMBEDDING_MODULES]
    return rows[0] if rows else model.vocab_size


def vocabulary_modules(model: ModelFacts, *, scorer: bool = False) -> list[str]:
    """Short names of the modules that have a row for each token: the embedding, and the head if the model generates
    text."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in weight_matrices(model)))
    return [end for end in ends if end in EMBEDDING_MODULES or (end in HEAD_MODULES and not scorer)]


def missing_rows(model: ModelFacts) -> int:
    """The number of rows that the embeddings lack for the tokenizer next to them; 0 if none, or unknown."""
    rows = embedding_rows(model)
    return max(vocabulary(model.path).rows - rows, 0) if rows else 0


def new_tokens(model: ModelFacts, tokens: Collection[str]) -> list[str]:
    """Those of the `tokens` that are missing in the tokenizer in the model's folder."""
    words = vocabulary(model.path)
    known = {token for _, token in words.added}
    return [token for token in tokens if token not in known and token not in words.words]


def new_rows(model: ModelFacts, tokens: Collection[str], *, resized: bool) -> tuple[int, int]:
    """The number of rows trained for tokens that are new to the model, and the number of rows created for them: it
    may have spare rows. `tokens`: the added tokens; `resized`: also create rows for tokens that the tokenizer
    already has."""
    added, rows, words = len(new_tokens(model, tokens)), embedding_rows(model) or 0, vocabulary(model.path)
    if not (added or resized):
        return 0, 0
    # A new token gets the id after the last one.
    first = words.rows or rows
    made = max(first + added - rows, 0)
    return made + min(max(rows - first, 0), added), made


def trains_rows_alone(model: ModelFacts) -> bool:
    """Whether an adapter can train only the new rows: peft ties a head to the embedding according to the configuration
    of the whole model, and drops the bias of a separate head. Otherwise embedding and head are trained in full."""
    tensors, _ = tensors_of(model.path)
    return not model.has_towers and not any(name.endswith(HEAD_BIASES) for name in tensors)


def rows_of_adapter(folder: str | None) -> int:
    """The number of token ids that have rows with this adapter: it contains all rows, or those of new tokens."""
    return max(adapter_embedding_rows(folder), adapter_token_rows(folder)) if folder else 0


def vocabulary_problems(model: ModelFacts, *, resized: bool, adapter: str | None) -> list[Problem]:
    """Token IDs without an embedding, unless they will be added (`resized`) or the adapter has them."""
    missing, words, rows = missing_rows(model), vocabulary(model.path), embedding_rows(model)
    brings = rows_of_adapter(adapter)
    if not missing or rows is None or brings >= words.rows:
        return []
    names = [f"{token} ({number})" for number, token in words.added if number >= rows]
    values = {
        "highest": words.rows - 1,
        "rows": rows,
        "missing": missing,
        "tokens": ", ".join(names[:MAX_TOKENS_NAMED]) or "—",
    }
    if adapter and resized:
        return [problem("resize-adapter", "model.resize_embeddings", **values)]
    return [] if resized else [problem("tokens-beyond-embeddings", "model.resize_embeddings", **values)]


def special_token_problems(model: ModelFacts, stage: str) -> list[Problem]:
    """The problem that a stage ends its texts with a token that the tokenizer does not have."""
    words = vocabulary(model.path)
    if stage == "pt" and words.rows and words.eos is None:
        return [problem("tokenizer-without-eos", "model.model_name_or_path")]
    return []
