"""Tiny random models of every architecture that transformers can train on text.

No architecture is listed here. The configuration class of a family says what its defaults are, and general rules on the
names and kinds of its fields shrink them: `build("qwen3_vl", folder)` writes a folder as people download it, and
`python -m tests.zoo` tries all of them. Imports torch: tests use it in child processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from tests import tiny_model
from tests.zoo.configurations import SpecialTokens, shrunk
from tests.zoo.sizes import IMAGE, LARGEST, PATCH, TEXT_TOKENS

# The tests' ChatML, which also takes a content of several parts, as processors do.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ IMAGE_MARK }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def families() -> list[str]:
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def tiny_config(model_type: str) -> tuple[PreTrainedConfig, SpecialTokens]:
    """A small configuration of the family, and the special tokens that its ids stand for."""
    tokens = SpecialTokens()
    config = CONFIG_MAPPING[model_type]()
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True  # encoders look both ways without it
    return shrunk(config, tokens), tokens


def model_class(model_type: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def tiny(model_type: str, seed: int = 0) -> tuple[PreTrainedModel, SpecialTokens]:
    """A model of the family with random weights in fp32, for training.

    Raises:
        ValueError: it would have more than LARGEST parameters; the largest are named.
    """
    config, tokens = tiny_config(model_type)
    cls = model_class(model_type, config)
    with torch.device("meta"):
        sizes = {name: weight.numel() for name, weight in cls(config).named_parameters()}
    if sum(sizes.values()) > LARGEST:
        largest = [f"{name} {sizes[name]:,}" for name in sorted(sizes, key=lambda name: sizes[name])[-3:]]
        raise ValueError(f"{sum(sizes.values()):,} parameters, most of them in {', '.join(largest)}")
    torch.manual_seed(seed)
    return cls(config).float().train(), tokens


def tokenizer_with(tokens: SpecialTokens) -> PreTrainedTokenizerFast:
    """The tests' tiny tokenizer with the special tokens of a family at its end."""
    names = {f"{name}_token": f"<{name}>" for name in tokens.names}
    tokenizer = tiny_model.tokenizer(extra_special_tokens=names)
    tokenizer.add_tokens(list(names.values()), special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(names.values()))
    assert ids == list(range(TEXT_TOKENS, TEXT_TOKENS + len(names))), ids
    marks = [f"<{name}>" for name in ("vision_start", "image", "vision_end") if name in tokens.names]
    tokenizer.chat_template = CHATML.replace("IMAGE_MARK", repr("".join(marks)))
    return tokenizer


def image_processor(config: PreTrainedConfig) -> BaseImageProcessor | None:
    """The family's image processor at the sizes of its tiny model; None where this machine cannot make it."""
    classes = IMAGE_PROCESSOR_MAPPING.get(type(config), None) or {}
    vision = getattr(config, "vision_config", config)
    try:
        cls = classes.get("pil") or classes["torchvision"]
        defaults = cls().to_dict()
        settings: dict[str, Any] = {}
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            if name in defaults:
                settings[name] = getattr(vision, name, getattr(vision, f"spatial_{name}", defaults[name]))
        for name in ("size", "crop_size"):
            if defaults.get(name):
                settings[name] = {side: tiny_side(side, length) for side, length in defaults[name].items()}
        return cls(**settings)
    except (KeyError, ImportError, TypeError, ValueError):
        return None


def tiny_side(name: str, length: int) -> int:
    """The side of an image in pixels; some processors write areas under the same names."""
    if length > 10_000 or (name == "shortest_edge" and length == 56 * 56):
        return IMAGE * IMAGE if name == "longest_edge" else (2 * PATCH) ** 2
    return IMAGE


def processor(
    config: PreTrainedConfig, images: BaseImageProcessor | None, tokenizer: PreTrainedTokenizerFast
) -> ProcessorMixin | None:
    """The family's processor without videos and sounds; None where this machine cannot make it."""
    parts: dict[str, Any] = {"image_processor": images, "tokenizer": tokenizer}
    try:
        cls = PROCESSOR_MAPPING[type(config)]
        if images is None or set(cls.get_attributes()) != parts.keys():
            return None
        return cls(**parts, chat_template=tokenizer.chat_template)
    except (KeyError, ImportError, TypeError, ValueError, AttributeError):
        return None


def build(model_type: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny random model of the family into a folder, as people download it, and return the folder.

    What it holds: config.json, model.safetensors, generation_config.json, a tokenizer with a chat template, and for
    a model that sees a processor, or an image processor, where this machine can make one.

    Raises:
        Exception: whatever the family's classes raise, a missing package for example.
    """
    model, tokens = tiny(model_type, seed)
    model.save_pretrained(folder)
    tokenizer = tokenizer_with(tokens)
    tokenizer.save_pretrained(folder)
    images = image_processor(model.config)
    for part in (images, processor(model.config, images, tokenizer)):
        if part is not None:
            part.save_pretrained(folder)
    return folder
