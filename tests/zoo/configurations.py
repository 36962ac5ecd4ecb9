"""Shrink the configuration of any architecture, by its class's defaults and the rules of sizes.py."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from tests.zoo.sizes import (
    BEGIN,
    END,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    MISSING,
    OVERRIDES,
    PADDING,
    RULES,
    TEXT_TOKENS,
    WINDOW,
)

TOKEN_ID = re.compile(
    r"(?!.*layer)(\w*token|im(age|g)?_\w+|video_\w+|audio_\w+|vision_\w+|[be]o[ias]|pad|bos|eos)_(ids?|index)"
)
STANDARD_IDS = {
    "pad": PADDING,
    "bos": BEGIN,
    "eos": END,
    "cls": BEGIN,
    "sep": END,
    "decoder_start": BEGIN,
    "forced_bos": BEGIN,
    "forced_eos": END,
}
LAYER_INDICES = re.compile(r".*(layers|idxs?|indexes|indices|layer_ids)")
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "num_blocks", "encoder_layers")


class SpecialTokens:
    """The ids of image, video, audio and other special tokens: each name has its own, after those of text."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def id_of(self, field: str) -> int:
        name = re.sub(r"_?(token)?_(ids?|index)$", "", field) or field
        if name in STANDARD_IDS:
            return STANDARD_IDS[name]
        if name not in self.names:
            self.names.append(name)
        return TEXT_TOKENS + self.names.index(name)


def shrink_integer(name: str, value: int) -> int:
    for pattern, size in RULES:
        if re.fullmatch(pattern, name):
            return size(value) if callable(size) else size if value else value
    return value


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def layer_count(config: PreTrainedConfig) -> int | None:
    return next((count for name in LAYER_COUNTS if is_integer(count := getattr(config, name, None))), None)


def chosen_layers(values: dict[str, Any], count: int | None) -> list[int]:
    """Of a model with `count` layers the numbers of the few that a small one keeps: the first of each kind."""
    if not count:
        return []
    kinds: list[list[Any]] = [[] for _ in range(count)]
    for name, value in values.items():
        if isinstance(value, list | tuple) and len(value) == count and len({str(v) for v in value}) <= 4:
            marks = [str(v) for v in value]
        elif is_layer_indices(name, value, count) and 0 < len(value) < count:
            marks = [i in value for i in range(count)]
        elif name == "first_k_dense_replace" and value:
            marks = [i < value for i in range(count)]
        elif name == "num_kv_shared_layers" and value:
            marks = [i >= count - value for i in range(count)]
        elif name == "per_layer_config" and value:
            marks = [str(layer_values(value, i)) for i in range(count)]
        else:
            continue
        for kind, mark in zip(kinds, marks, strict=True):
            kind.append(mark)
    firsts = {tuple(kind): i for i, kind in reversed(list(enumerate(kinds)))}
    shared = [i for i, kind in enumerate(kinds) if "hybrid" in kind][:2]  # which share weights with each other
    chosen = sorted({*firsts.values(), *shared})
    return chosen if len(chosen) >= LAYERS else list(range(min(LAYERS, count)))


def is_layer_indices(name: str, value: Any, count: int) -> bool:
    if not (isinstance(value, list | tuple) and LAYER_INDICES.fullmatch(name)):
        return False
    return all(is_integer(v) and 0 <= v < count for v in value)


def layer_values(per_layer: dict[Any, Any], layer: int) -> dict[str, Any] | None:
    return next((values for key, values in per_layer.items() if str(key).isdigit() and int(key) == layer), None)


def shrink_list(name: str, value: Sequence[Any], chosen: list[int], count: int | None) -> list[Any]:
    if count and is_layer_indices(name, value, count):
        place = {old: new for new, old in enumerate(chosen)}
        if len(value) == count and len(set(value)) > 4:  # for each layer the number of another
            return [place.get(value[old], new) for new, old in enumerate(chosen)]
        kept = [place[v] for v in value if v in place]
        return kept or ([len(chosen) - 1] if value else [])
    if count and len(value) == count:
        return [shrink_value(name, value[old], chosen, count) for old in chosen]
    if all(isinstance(v, str) for v in value) and name.endswith("types"):
        return list(dict.fromkeys(value))  # a pattern that the layers repeat
    if "feature_layer" in name or name == "spatial_target_layers":
        return [max(-LAYERS, min(LAYERS - 1, v)) for v in value]
    return [shrink_value(name, v, chosen, count) for v in value]


def shrink_value(name: str, value: Any, chosen: list[int], count: int | None) -> Any:
    if is_integer(value):
        return shrink_integer(name, value)
    if isinstance(value, list | tuple):
        if len(value) == 2 and isinstance(value[0], list) and is_integer(value[1]):
            return [value[0], 1]  # a pattern, and how often it is repeated
        shrunk = shrink_list(name, value, chosen, count)
        return type(value)(shrunk)
    return value


def rotary_pairs(values: dict[str, Any], rope: dict[str, Any]) -> int:
    """How many pairs of dimensions the rotary embedding turns in a head of the shrunken model."""
    head = values.get("qk_rope_head_dim") or values.get("head_dim") or HEAD_DIM
    partial = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    return int(head * partial) // 2


def shrink_rope(rope: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    pairs = rotary_pairs(values, rope)
    shrunk = dict(rope)
    for key, value in rope.items():
        if isinstance(value, dict):
            shrunk[key] = shrink_rope(value, values)
        elif key.endswith("section") and value:
            shrunk[key] = sections(pairs, len(value))
        elif key in ("long_factor", "short_factor") and value:
            shrunk[key] = list(value)[:pairs]
    return shrunk


def sections(pairs: int, number: int) -> list[int]:
    return [pairs // number + (i < pairs % number) for i in range(number)]


def declared(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of the fields that the class itself declares, as a configuration file would have them."""
    values, common = config.to_dict(), {field.name for field in dataclasses.fields(PreTrainedConfig)}
    kept = {"pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "is_decoder"}
    result = {}
    for name in [f.name for f in dataclasses.fields(config) if f.init and (f.name not in common or f.name in kept)]:
        for spelling in (name, config.attribute_map.get(name, name)):
            if spelling in values:
                result[name] = values[spelling]
                break
    if "per_layer_config" in values:
        result["per_layer_config"] = values["per_layer_config"]
    return result


def shrunk(config: PreTrainedConfig, tokens: SpecialTokens) -> PreTrainedConfig:
    """A configuration of the same class with small sizes, its sub-configurations shrunken likewise."""
    values = declared(config)
    count = layer_count(config)
    chosen = chosen_layers(values, count)
    small: dict[str, Any] = {}
    for name, value in values.items():
        sub = config.__dict__.get(name) or absent_part(config, name)
        if isinstance(sub, PreTrainedConfig):
            small[name] = shrunk(sub, tokens)
        elif value is None:
            small[name] = next((size for pattern, size in MISSING if re.fullmatch(pattern, name)), None)
        elif TOKEN_ID.fullmatch(name):
            small[name] = special_ids(name, value, tokens)
        else:
            small[name] = shrink_value(name, value, chosen, count)
    if chosen:
        repair_layers(small, values, chosen, count)
    repair(small, values)
    small |= {name: tokens.id_of(name) for name in undeclared_ids(config)}
    if isinstance(small.get("rope_parameters"), dict):
        small["rope_parameters"] = shrink_rope(with_sections(small["rope_parameters"], config), small)
    return type(config)(**small | OVERRIDES.get(config.model_type, {}))


def absent_part(config: PreTrainedConfig, name: str) -> PreTrainedConfig | None:
    """The configuration of a tower that the defaults leave out, although published models have it."""
    cls = config.sub_configs.get(name) if name in ("vision_config", "audio_config") else None
    return cls() if cls is not None and dataclasses.is_dataclass(cls) else None


def undeclared_ids(config: PreTrainedConfig) -> list[str]:
    """The special ids that the model reads of a configuration whose class does not declare them."""
    read = re.findall(r"self\.config\.((?:decoder|vision)_start_token_id)", modeling_source(type(config)))
    return [name for name in dict.fromkeys(read) if not hasattr(config, name)]


@cache
def modeling_source(config_class: type[PreTrainedConfig]) -> str:
    module = sys.modules[config_class.__module__]
    path = Path(inspect.getfile(module))
    path = path.with_name(path.name.replace("configuration_", "modeling_"))
    return path.read_text(encoding="utf-8") if path.exists() else ""


def with_sections(rope: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Rotary parameters with the sections that multimodal positions need, where the model falls back to large ones."""
    wants = "mrope_section" in modeling_source(type(config)) and "rope_theta" in rope
    return {"mrope_section": [24, 20, 20], **rope} if wants else rope


def special_ids(name: str, value: Any, tokens: SpecialTokens) -> Any:
    if isinstance(value, list | tuple):
        standard = re.sub(r"_token_ids?$", "", name) in STANDARD_IDS
        return type(value)(
            [tokens.id_of(name)] if standard else [tokens.id_of(f"{name}_{i}") for i in range(len(value))]
        )
    return tokens.id_of(name) if value >= 0 else value


def repair_layers(small: dict[str, Any], values: dict[str, Any], chosen: list[int], count: int) -> None:
    for name in LAYER_COUNTS:
        if name in small and values[name] == count:
            small[name] = len(chosen)
    if values.get("num_kv_shared_layers"):
        small["num_kv_shared_layers"] = sum(i >= count - values["num_kv_shared_layers"] for i in chosen)
    if values.get("first_k_dense_replace"):
        small["first_k_dense_replace"] = sum(i < values["first_k_dense_replace"] for i in chosen)
    if per_layer := values.get("per_layer_config"):
        small["per_layer_config"] = {
            new: {name: shrink_value(name, value, [], None) for name, value in own.items()}
            for new, old in enumerate(chosen)
            if (own := layer_values(per_layer, old))
        }


def repair(small: dict[str, Any], values: dict[str, Any]) -> None:
    """Restore the relations between fields that the rules, which see one at a time, cannot know."""
    repair_heads(small, values)
    if values.get("expand") or values.get("mamba_expand"):
        repair_state_space(small)
    if small.get("qk_head_dim"):
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if values.get("qk_rope_head_dim") and values.get("head_dim") == values["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    if values.get("attention_hidden_size") and values["attention_hidden_size"] == 2 * values["hidden_size"]:
        small |= {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS}
    if values.get("num_layers_per_stack"):  # derived, and would be multiplied again
        small["num_layers_per_stack"] = None
    if "sliding_attention" in (small.get("layer_types") or []) and "sliding_window" in small:
        small["sliding_window"] = small["sliding_window"] or WINDOW
    if values.get("languages") and "default_language" in values:
        small["default_language"] = small["languages"][0]


def repair_heads(small: dict[str, Any], values: dict[str, Any]) -> None:
    """As many key and value heads as heads, where the family has it so."""
    layers = (small.get("per_layer_config") or {}).values()
    for name in [n for n in small if re.fullmatch(r"\w*(key_value|kv)_heads", n)]:
        heads = re.sub(r"key_value_heads|kv_heads", "attention_heads", name)
        if values.get(heads) and values[name] == values[heads]:
            for sizes in (small, *layers):
                sizes.update({name: HEADS} if name in sizes else {})


def repair_state_space(small: dict[str, Any]) -> None:
    """So many heads that they are together as wide as the state space: hidden size times expansion."""
    width = HIDDEN * (small.get("expand") or small.get("mamba_expand"))
    if "mamba_d_ssm" in small:
        small["mamba_d_ssm"] = width
    for heads, size in (
        ("mamba_n_heads", "mamba_d_head"),
        ("mamba_num_heads", "mamba_head_dim"),
        ("num_heads", "head_dim"),
    ):
        if is_integer(small.get(heads)) and is_integer(small.get(size)):
            small[heads] = width // small[size]
