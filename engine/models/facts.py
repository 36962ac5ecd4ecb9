"""Facts about a model folder, from config.json, the tokenizer's files and the safetensors headers.

Never raises because of a folder's content; `engine.models.checks` reports what is wrong with it.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engine.core import regular_files
from engine.core.problems import Problem
from engine.models.json_objects import MAX_JSON_BYTES, files_in, read_json_object
from engine.models.quantized_weights import (
    DEQUANTIZED,
    TEXT_CONFIG_KEYS,
    TRAINED_AS_THEY_ARE,
    bitsandbytes_kind,
    quantization_config,
    quantization_method,
)
from engine.models.safetensors_headers import Tensor, tensors_of

# The same fact under the names of different families; the first one present wins.
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "max_sequence_length", "n_ctx")
HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embed_dim")
LAYER_COUNT_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "layers",
)
LAYER_LIST_KEYS = ("layers_block_type", "layer_types", "hybrid_override_pattern")  # an entry for each layer
HEAD_COUNT_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
EXPERTS_PER_TOKEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
GENERATOR_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "WithLMHead")
SCORER_CLASSES = ("ForSequenceClassification", "ForTokenClassification", "RewardModel")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "chat_templates", "additional_chat_templates")
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn"}


@dataclass(frozen=True)
class ModelFacts:
    """What a model folder says about itself. A fact that is absent or cannot be read is None (text: "")."""

    name: str  # path inside its root, or its hub ID
    path: Path
    model_type: str = ""
    architecture: str = ""
    parameters: int | None = None
    bytes: int = 0  # of the files directly in the folder
    dtype: str = ""
    context_length: int | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    layers: int | None = None
    tied: bool = False  # the output head is the embedding
    rope: str | None = None  # how its context is already extended: "yarn", "llama3", …
    has_chat_template: bool = False
    quantized: str | None = None  # "gptq", "awq", "bitsandbytes", "fp8", …
    stored_kind: str = ""  # "4bit" or "8bit" of bitsandbytes
    needs_remote_code: bool = False
    adapter_of: str | None = None  # the folder is an adapter, of this base
    has_towers: bool = False  # it has vision or audio parts
    cache_width: int | None = None  # numbers that one layer keeps per token during generation
    experts_per_token: int = 0
    heads: int | None = None  # of attention


def is_language_model(folder: Path) -> bool:
    config = read_json_object(folder / "config.json")
    if isinstance(config, Problem):
        return True  # shown, so that someone repairs it, rather than silently left out
    architecture = architecture_of(config)
    if architecture:
        known = {*auto_classes("CAUSAL_LM").values(), *auto_classes("IMAGE_TEXT_TO_TEXT").values()}
        return architecture in known or any(word in architecture for word in (*GENERATOR_CLASSES, *SCORER_CLASSES))
    return bool(config.get("model_type")) and first_number(config, ("vocab_size",)) is not None


def inspect_model(path: str | Path, name: str = "") -> ModelFacts:
    """The facts about the folder `path`. Never raises because of its content: `model_problems` says what is wrong."""
    folder = Path(path)
    config = read_json_object(folder / "config.json")
    config = {} if isinstance(config, Problem) else config
    tensors, broken = tensors_of(folder)
    quantized = quantization_method(folder, config)
    countable = tensors and not broken and quantized in (None, *TRAINED_AS_THEY_ARE, *DEQUANTIZED)
    tied = bool(config.get("tie_word_embeddings", _text_part(config).get("tie_word_embeddings")))
    if tied and "lm_head.weight" in tensors and len(tensors) > 1:
        tensors = {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    return ModelFacts(
        name=name or folder.name,
        path=folder,
        model_type=as_text(config.get("model_type")),
        architecture=architecture_of(config),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()) if countable else None,
        bytes=sum(size for _, size in files_in(folder)),
        dtype=_dtype(config, tensors),
        context_length=first_number(config, CONTEXT_KEYS),
        vocab_size=first_number(config, ("vocab_size", "padded_vocab_size")),
        hidden_size=first_number(config, HIDDEN_SIZE_KEYS),
        layers=_layer_count(config),
        tied=tied,
        rope=_rope(config),
        has_chat_template=_has_chat_template(folder),
        quantized=quantized,
        stored_kind=bitsandbytes_kind(quantization_config(config)),
        needs_remote_code="auto_map" in config and not is_known_to_transformers(as_text(config.get("model_type"))),
        adapter_of=base_of_adapter(folder),
        has_towers=_has_towers(config),
        cache_width=_cache_width(config),
        heads=first_number(config, HEAD_COUNT_KEYS),
        experts_per_token=first_number(config, EXPERTS_PER_TOKEN_KEYS) or 0,
    )


def _cache_width(config: Mapping[str, Any]) -> int | None:
    """Keys and values of all heads that have their own (Ainslie et al. 2023, arXiv:2305.13245)."""
    heads, hidden = first_number(config, HEAD_COUNT_KEYS), first_number(config, HIDDEN_SIZE_KEYS)
    if not (heads and hidden):
        return None
    size = first_number(config, ("head_dim",)) or hidden // heads
    return 2 * size * (first_number(config, ("num_key_value_heads",)) or heads)


def _has_towers(config: Mapping[str, Any]) -> bool:
    """Whether the model has another part with its own configuration besides the language part."""
    parts = {key for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
    return any(
        "hidden_size" in config[key] or "model_type" in config[key] for key in parts.difference(TEXT_CONFIG_KEYS)
    )


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((config[part] for part in TEXT_CONFIG_KEYS if isinstance(config.get(part), dict)), {})


def first_number(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    for part in (config, _text_part(config)):
        for name in names:
            if type(part.get(name)) is int and part[name] > 0:
                return part[name]
    return None


def _layer_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers of the language part, or of the entries of a list or text that describes each of them."""
    described = (part.get(name) for part in (config, _text_part(config)) for name in LAYER_LIST_KEYS)
    lengths = (len(entries) for entries in described if isinstance(entries, (list, str)))
    return first_number(config, LAYER_COUNT_KEYS) or next(filter(None, lengths), None)


def architecture_of(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return as_text(names[0]) if isinstance(names, list) and names else ""


def _dtype(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """As in the config, otherwise the type of most weights."""
    for part in (config, _text_part(config)):
        if dtype := as_text(part.get("dtype")) or as_text(part.get("torch_dtype")):
            return dtype
    values: Counter[str] = Counter()
    for tensor in tensors.values():
        values[tensor.dtype] += math.prod(tensor.shape)
    common = max(values, key=values.__getitem__, default="")
    return DTYPE_NAMES.get(common, common.lower())


def may_need_bitsandbytes(path: str, kind: str = "none") -> bool:
    """Whether a model may have weights in bitsandbytes' format: it is loaded with it (`kind`), is stored in it, or is
    not here yet."""
    return kind != "none" or not os.path.isdir(path) or inspect_model(path).quantized == "bitsandbytes"


def _rope(config: Mapping[str, Any]) -> str | None:
    """The kind of scaling in the config, under the names it has had; families may have one for each kind of layer."""
    for part in (config, _text_part(config)):
        for parameters in (part.get("rope_parameters"), part.get("rope_scaling")):
            if isinstance(parameters, dict):
                scalings = [
                    parameters,
                    *(scaling for scaling in parameters.values() if isinstance(scaling, dict)),
                ]
                kinds = [as_text(scaling.get("rope_type") or scaling.get("type")) for scaling in scalings]
                if scaled := [kind for kind in kinds if kind not in ("", "default", "mrope")]:
                    return scaled[0]
                if len(scalings) > 1:
                    return ", ".join(parameters)
    return None


def _has_chat_template(folder: Path) -> bool:
    return bool(chat_template(folder)) or any(os.path.exists(folder / name) for name in TEMPLATE_FILES)


def chat_template(folder: Path) -> tuple[str, str] | None:
    """(file, text) of the template that transformers uses for plain conversations; None if there is none."""
    file = folder / TEMPLATE_FILES[0]
    try:
        if os.path.isfile(file) and file.stat().st_size <= MAX_JSON_BYTES:
            return file.name, regular_files.read_bytes(file).decode("utf-8", "replace")
    except OSError:
        return None
    config = read_json_object(folder / "tokenizer_config.json")
    template = None if isinstance(config, Problem) else config.get("chat_template")
    if isinstance(template, list):  # several, by name
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return ("tokenizer_config.json", template) if template and isinstance(template, str) else None


def base_of_adapter(folder: Path) -> str | None:
    if not os.path.isfile(folder / "adapter_config.json"):
        return None
    adapter = read_json_object(folder / "adapter_config.json")
    return "?" if isinstance(adapter, Problem) else as_text(adapter.get("base_model_name_or_path")) or "?"


@cache
def is_known_to_transformers(model_type: str) -> bool:
    """Whether the installed transformers has this family's code, so that the model's own is not needed. Looks for the
    folder, or the name in a table, because importing transformers would take seconds."""
    package = importlib.util.find_spec("transformers")
    if model_type in auto_classes("CAUSAL_LM") or model_type in auto_classes("IMAGE_TEXT_TO_TEXT"):
        return True  # also a language part, which is in its family's folder
    folder = model_type.replace("-", "_")
    if not package or not re.fullmatch(r"\w+", folder):
        return False
    return any(Path(place, "models", folder).is_dir() for place in package.submodule_search_locations or ())


@cache
def auto_classes(table: str) -> Mapping[str, str]:
    """Family → class in one of the installed transformers' tables, such as "CAUSAL_LM". Read from the source, since
    importing it would take seconds."""
    package = importlib.util.find_spec("transformers")
    places = package.submodule_search_locations if package else ()
    for place in places or ():
        source = Path(place, "models", "auto", "modeling_auto.py").read_text(encoding="utf-8")
        start = rf"^MODEL_FOR_{table}_MAPPING_NAMES = .*?^\)"
        if match := re.search(start, source, re.MULTILINE | re.DOTALL):
            return dict(re.findall(r'\("([\w.-]+)", "(\w+)"\)', match[0]))
    return {}


@cache
def has_reward_model(model_type: str) -> bool:
    """Whether the installed transformers can put a score in place of this family's next-token head: it has a class for
    it whose head is one matrix called "score". Those of encoders have other kinds of heads."""
    families = auto_classes("SEQUENCE_CLASSIFICATION")
    if model_type not in families:
        return not families  # without transformers nothing can be trained on this machine
    declaration = rf"^class {families[model_type]}\((.*?)\):(.*?)(?=^\S|\Z)"
    for file in _modeling_files(model_type):
        if match := re.search(declaration, file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            return "GenericForSequenceClassification" in match[1] or "self.score =" in match[2]
    return True


def _modeling_files(model_type: str) -> list[Path]:
    """The files of the installed transformers with the classes of a family; [] if its folder has another name."""
    package = importlib.util.find_spec("transformers")
    parts = model_type.replace("-", "_").split("_")
    for place in (package.submodule_search_locations if package else None) or ():
        for end in range(len(parts), 0, -1):  # a language part is in its family's folder
            if files := sorted(Path(place, "models", "_".join(parts[:end])).glob("modeling_*.py")):
                return files
    return []
