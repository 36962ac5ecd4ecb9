"""What prevents training a model folder: missing or damaged files, unsupported formats and architectures."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, problem
from engine.models.discovery import SMOLLM2, allowed_roots, find_models, is_below, is_hub_id, locate
from engine.models.facts import (
    DTYPE_NAMES,
    HIDDEN_SIZE_KEYS,
    SCORER_CLASSES,
    ModelFacts,
    auto_classes,
    base_of_adapter,
    first_number,
    inspect_model,
    is_known_to_transformers,
    is_language_model,
)
from engine.models.json_objects import files_in, read_json_object
from engine.models.quantized_weights import quantization_problems
from engine.models.safetensors_headers import Tensor, gguf_problem, names_in_line, tensors_of

MAX_TOKENIZER_BYTES = 128 << 20  # the largest tokenizer.json, with 260,000 words, has about 35 MiB
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json",
)  # fmt: skip


def model_problems(
    path_or_id: str | Path,
    roots: Sequence[Path],
    field: str = "model.model_name_or_path",
    *,
    allow_remote_code: bool = False,
    scorer: bool = False,
) -> list[Problem]:
    """Everything that prevents training this model; [] for a sound folder and for a hub ID, which is only known after
    the download. `scorer`: a reward model is wanted, so a classification head is not a problem."""
    text = str(path_or_id)
    if unclear := _path_problem(text):
        return [replace(unclear, field=field)]
    place = locate(text, roots)
    if place is None:
        return (
            []
            if is_hub_id(text)
            else [replace(_shell_character_problem(text) or _missing_problem(text, roots), field=field)]
        )
    if not is_below(place, allowed_roots(roots)):
        return [problem("model-outside-roots", field, path=text, roots=names_in_line(map(str, roots)))]
    if place.is_file() and place.suffix == ".gguf":
        return [problem("model-gguf", field, file=place.name, path=place)]
    if place.is_file():
        return [problem("model-is-a-file", field, file=place.name, folder=place.parent)]
    return [replace(problem, field=field) for problem in _folder_problems(place, allow_remote_code, scorer)]


def _path_problem(text: str) -> Problem | None:
    """What cannot be in the path of a model, whether it exists or not."""
    if not text.strip():
        return problem("model-empty")
    if not text.isprintable():
        return problem("model-path-characters", given=ascii(text[:80])[1:-1])
    if ".." in Path(text).parts:
        return problem("model-path-dots", given=text[:80])
    if len(os.fsencode(text)) > 1024 or any(len(os.fsencode(part)) > 255 for part in Path(text).parts):
        return problem("model-path-long", given=text[:80])
    return None


def _shell_character_problem(text: str) -> Problem | None:
    """An existing folder may have any name, since no name is passed to a shell; if there is none, someone who pasted
    half a command should be told."""
    if re.search(r"[;|&<>$`!*?\"']", text) or text[0] in "-~":
        return problem("model-path-characters", given=text[:80])
    return None


def _missing_problem(text: str, roots: Sequence[Path]) -> Problem:
    """The most similar by the last part of the name, ignoring case, since most typos are there."""
    if Path(text).name == SMOLLM2.name:
        return problem("model-smollm2", given=text, place=SMOLLM2)
    names = [model.name for model in find_models(roots)]
    by_end = {name.rsplit("/")[-1].casefold(): name for name in names}
    near = difflib.get_close_matches(Path(text).name.casefold(), by_end, n=3, cutoff=0.5)
    if near:
        return problem("model-missing", given=text, nearest=names_in_line(by_end[end] for end in near))
    return problem("model-missing-alone", given=text, roots=names_in_line(map(str, roots)), count=len(names))


def _folder_problems(folder: Path, allow_remote_code: bool, scorer: bool) -> list[Problem]:
    if base := base_of_adapter(folder):
        return [problem("model-is-adapter", folder=folder.name, base=base)]
    if not (folder / "config.json").exists():
        return [gguf_problem(folder) or problem("model-no-config", folder=folder)]
    config = read_json_object(folder / "config.json")
    if isinstance(config, Problem):
        return [config]

    model, problems = inspect_model(folder), []
    if model.needs_remote_code and not allow_remote_code:
        problems.append(problem("model-remote-code", model=model.name, model_type=model.model_type or "?"))
    if config.get("is_encoder_decoder"):
        problems.append(problem("model-encoder-decoder", architecture=model.architecture or model.model_type))
    elif any(word in model.architecture for word in SCORER_CLASSES):
        if not scorer:
            problems.append(problem("model-is-scorer", architecture=model.architecture))
    elif not is_language_model(folder):
        problems.append(problem("model-not-language", architecture=model.architecture or model.model_type or "?"))
    elif not is_known_to_transformers(model.model_type) and not model.needs_remote_code:
        version = importlib.metadata.version("transformers")
        problems.append(problem("model-unknown", model_type=model.model_type, version=version))
    elif model.has_towers and not _can_write(model):
        problems.append(problem("model-with-senses", architecture=model.architecture or model.model_type))
    tensors, damaged = tensors_of(folder)
    problems += quantization_problems(folder, model.quantized, config, tensors)
    return problems + damaged + _shape_problems(config, tensors) + _tokenizer_problems(folder)


def _can_write(model: ModelFacts) -> bool:
    """Whether transformers loads the model as a text-generating one, with or without other inputs besides text."""
    tables = (auto_classes("CAUSAL_LM"), auto_classes("IMAGE_TEXT_TO_TEXT"))
    return model.needs_remote_code or any(model.model_type in table for table in tables)


def _shape_problems(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Problem]:
    """A config.json of another model than the weights, detected by the embedding."""
    embedding = tensors.get("model.embed_tokens.weight")
    declared = {
        "vocab_size": first_number(config, ("vocab_size",)),
        "hidden_size": first_number(config, HIDDEN_SIZE_KEYS),
    }
    if not embedding or len(embedding.shape) != 2 or embedding.dtype not in DTYPE_NAMES:
        return []
    return [
        problem("model-config-differs", name=name, said=number, size=size)
        for (name, number), size in zip(declared.items(), embedding.shape, strict=True)
        if number and number != size
    ]


def _tokenizer_problems(folder: Path) -> list[Problem]:
    names = [name for name, _ in files_in(folder)]
    if not any(name in TOKENIZER_FILES or name.endswith(".tiktoken") for name in names):
        return [problem("model-no-tokenizer", folder=folder.name)]
    problems = []
    if "tokenizer.json" in names:
        status = (folder / "tokenizer.json").stat()
        problems.append(_tokenizer_json_problem(folder / "tokenizer.json", status.st_mtime_ns, status.st_size))
    if "tokenizer_config.json" in names and isinstance(
        config := read_json_object(folder / "tokenizer_config.json"), Problem
    ):
        problems.append(config)
    return [problem for problem in problems if problem]


@lru_cache(maxsize=256)
def _tokenizer_json_problem(path: Path, modified: int, size: int) -> Problem | None:
    """The problem with a tokenizer.json; these are larger than any other JSON of a model, so they are read once."""
    content = read_json_object(path, MAX_TOKENIZER_BYTES)
    if isinstance(content, Problem):
        return content
    model = content.get("model")
    sound = isinstance(model, dict) and isinstance(model.get("vocab"), (dict, list))
    return None if sound else problem("model-tokenizer-broken", file=path.name)
