"""What the modules of a model are for, determined from the model itself: language part, towers, experts, routers, and
the matrices that usually get an adapter."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from engine.models.structure import Shape, Structure, is_or_below
from engine.models.vision_parts import name_in_base

# Names of the number of experts in the configurations of different families.
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERT_MATRICES = ("gate_up_proj", "up_proj", "down_proj")  # in transformers' interface for experts
MAX_QUANTIZED = 2**31  # weights of a tensor: bitsandbytes counts them in 32 bits on a GPU, and does not notice more
HEADS = {"lm_head", "score", "v_head"}
TOWER_HEADS = {"head", "pooler", "classifier"}  # make a single vector of an image, which a language part does not use
# Names of modules outside the language part. There is no interface by which models say what they are for.
VISION = re.compile(
    r"vis|image|img_|vit\b|siglip|clip|projector|projection|connector|aligner|merger|resampler|qformer|query_tokens|"
    r"view_separator|patch"
)
OTHER_INPUTS = re.compile(r"audio|speech|sound|video|generation|vq")
PROJECTOR = re.compile(
    r"projector|projection|connector|aligner|merger|resampler|abstractor|qformer|query_tokens|adapter|newline|"
    r"view_separator|embed_vision|neck"
)
PROJECTOR_IN_TOWER = re.compile(r"projector|connector|aligner|merger|resampler|vision_adapter")


def model_class(config: Any, *, scorer: bool = False) -> Any:
    """The auto class that loads a model as a whole, as it is saved and exported again: a text-generating or a scoring
    one.

    Some families can be loaded with their language part alone, but would then be saved as a different model.
    """
    if scorer:
        return AutoModelForSequenceClassification
    sees = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if sees and sees in (config.architectures or [sees]):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def expose_backbone(model: Any) -> None:
    """Make `base_model` the part before the output head. TRL takes it for the hidden states of a loss without logits;
    in a few families it is the whole model, or a language model with its head (Llama 4)."""
    head = model.get_output_embeddings()
    if head is None or all(part is not head for part in model.base_model.modules()):
        return
    backbone = model.base_model
    while any(part is head for part in backbone.modules()):
        models = [part for part in backbone.children() if isinstance(part, PreTrainedModel)]
        holding = [part for part in models if any(inner is head for inner in part.modules())]
        if not models:
            return
        backbone = (holding or sorted(models, key=lambda part: part is not backbone.get_decoder()))[0]
    name = next(name for name, part in model.named_modules() if part is backbone)
    own: Any = type(model)
    exposed = {"base_model": property(lambda self: self.get_submodule(name)), "__module__": own.__module__}
    model.__class__ = type(own.__name__, (own,), exposed)


def structure_of(model: Any) -> Structure:
    """The structure of a transformers model, before any adapter is added."""
    names = {part: name for name, part in model.named_modules()}
    towers = tuple(_towers(model, names))
    shapes = {name: _shape(model, name, parameter) for name, parameter in model.named_parameters()}
    beside = Structure({}, towers=towers)
    experts = tuple(
        name for name, shape in shapes.items() if not beside.is_in_tower(name) and _is_of_experts(name, shape)
    )
    quantizable = tuple(name for name in quantizable_experts(model) if name in experts)
    linear = list(_linear(model, names, beside))
    refused = tuple(name for name in linear if not _is_adaptable(model, name))
    linear = [name for name in linear if name not in refused]
    # A scoring model is inspected as what it is; it is loaded as one only if that is requested.
    scores = hasattr(model, "score")
    vision, projectors = _vision(towers, names.values())
    return Structure(
        shapes, tuple(linear), _layers(model, beside), experts, quantizable, refused, towers, vision, projectors,
        vision_linear=tuple(_vision_linear(model, names, vision)), sharing=tuple(layers_with_one_weight(model)),
        writes=scores or hasattr(model, "prepare_inputs_for_generation"),
        shows_head=scores or model.get_output_embeddings() is not None,
        recomputes=model.supports_gradient_checkpointing, needs=_missing_inputs(model),
    )  # fmt: skip


def _layers(model: Any, beside: Structure) -> tuple[str, ...]:
    """The stack of layers of the language part: of its lists of modules, the one that is as long as the configuration
    says, or else the one with the most parameters."""
    stacks = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) and not beside.is_in_tower(name)
    }
    length = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    named = {name: stack for name, stack in stacks.items() if len(stack) == length} or stacks
    sizes = {name: sum(parameter.numel() for parameter in stack.parameters()) for name, stack in named.items()}
    longest = max(sizes, key=lambda name: sizes[name], default="")
    return tuple(f"{longest}.{index}" for index in range(len(stacks[longest]))) if longest else ()


def layers_with_one_weight(model: nn.Module) -> list[tuple[str, ...]]:
    """Groups of linear layers that have one weight together, as in a model that repeats its layers; by their names
    without peft's."""
    owners: dict[int, list[str]] = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            owners.setdefault(id(part.weight), []).append(name_in_base(name.removesuffix(".base_layer")))
    return [tuple(names) for names in owners.values() if len(names) > 1]


def _missing_inputs(model: Any) -> str:
    """The arguments of the forward pass that a text does not provide."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    named = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    required = [parameter.name for parameter in named if parameter.default is parameter.empty]
    others = [name for name in required if name not in ("self", "input_ids", "attention_mask", "labels")]
    return ", ".join(others) or _images_demanded(model)


def _images_demanded(model: Any) -> str:
    """The argument for images, if the code itself rejects a text without them."""
    reads_images = "pixel_values" in inspect.signature(type(model).forward).parameters
    if model.device.type != "meta" or not reads_images:
        return ""
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception as error:  # other failures without memory for the weights mean nothing
        return "pixel_values" if isinstance(error, ValueError) and "pixel_values" in str(error) else ""
    return ""


def _shape(model: nn.Module, name: str, parameter: Any) -> Shape:
    """The true shape of a weight, which bitsandbytes packs."""
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    packed = name.endswith(".weight") and isinstance(owner, nn.Linear) and not parameter.is_floating_point()
    if packed:
        return owner.out_features, owner.in_features
    state = getattr(parameter, "quant_state", None)  # of experts in 4 bits
    return tuple(state.shape if state else parameter.shape)


def _towers(model: Any, names: dict[nn.Module, str]) -> Iterator[str]:
    """The topmost modules and parameters outside the language part: everything next to it, except the output head, in a
    composite model; and whole models with another configuration inside it."""
    decoder = _language_part(model)
    language, head = names[decoder], _head(model, names)
    if model.config.get_text_config() is not model.config:
        path = language.split(".") if language else []
        for depth in range(len(path)):
            for name in _children(model, ".".join(path[:depth])):
                if not any(f"{kept}.".startswith(f"{name}.") for kept in (language, head) if kept):
                    yield name
    last = ""
    for part, name in names.items():
        nested = isinstance(part, PreTrainedModel) and part.config is not decoder.config
        if nested and name.startswith(f"{language}.") and not (last and name.startswith(f"{last}.")):
            last = name
            yield name


def _vision(towers: Iterable[str], names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of the `towers` that images pass through, and the projectors in them; () without a tower for images."""
    ends = {tower: tower.rpartition(".")[2] for tower in towers}
    vision = tuple(tower for tower, end in ends.items() if VISION.search(end) and not OTHER_INPUTS.search(end))
    projectors = [tower for tower in vision if PROJECTOR.search(ends[tower])]
    rest = [tower for tower in vision if tower not in projectors]
    for name in names:
        inside = any(name.startswith(f"{tower}.") for tower in rest) and PROJECTOR_IN_TOWER.search(name.split(".")[-1])
        if inside and not any(is_or_below(name, projector) for projector in projectors):
            projectors.append(name)
    return (vision, tuple(projectors)) if rest else ((), ())


def _vision_linear(model: Any, names: dict[nn.Module, str], vision: Iterable[str]) -> Iterator[str]:
    for part, name in names.items():
        inside = isinstance(part, nn.Linear) and any(is_or_below(name, root) for root in vision)
        if inside and TOWER_HEADS.isdisjoint(name.split(".")) and _is_adaptable(model, name):
            yield name


def _head(model: Any, names: dict[nn.Module, str]) -> str:
    """The name of the module that computes the next token, or the score, from the last hidden state."""
    writing = names.get(model.get_output_embeddings(), "")
    return writing or next((name for name, _ in model.named_children() if name in HEADS), "")


def _language_part(model: Any) -> Any:
    decoder = model.get_decoder()
    return model.base_model if decoder is model.get_output_embeddings() else decoder


def _children(model: nn.Module, name: str) -> Iterator[str]:
    """Full names of what is directly in a module and has weights."""
    owner = model.get_submodule(name)
    for child, part in owner.named_children():
        if any(True for _ in part.parameters()):
            yield f"{name}.{child}".lstrip(".")
    for parameter, _ in owner.named_parameters(recurse=False):
        yield f"{name}.{parameter}".lstrip(".")


def _is_of_experts(name: str, shape: Shape) -> bool:
    parts = name.split(".")
    return "experts" in parts and len(shape) == 3


def quantizable_experts(model: Any) -> list[str]:
    """The matrices of experts that `engine.worker.models.quantized_experts` can quantize: those of classes with
    transformers' interface for experts, unless there are more of them than bitsandbytes can count."""
    names: list[str] = []
    for name, part in model.named_modules():
        if hasattr(part, "_apply_gate") and hasattr(part, "is_transposed"):
            matrices = [matrix for matrix in EXPERT_MATRICES if matrix in part._parameters]
            if all(getattr(part, matrix).numel() < MAX_QUANTIZED for matrix in matrices):
                names += [f"{name}.{matrix}" for matrix in matrices]
    return names


def _linear(model: Any, names: dict[nn.Module, str], towers: Structure) -> Iterator[str]:
    """The matrices of attention and MLP: no embeddings, heads, towers, routed experts or routers."""
    head = names.get(model.get_output_embeddings(), "")
    for part, name in names.items():
        if not isinstance(part, (nn.Linear, Conv1D)) or name == head or towers.is_in_tower(name):
            continue
        path = name.split(".")
        usual = HEADS.isdisjoint(path) and "experts" not in path and not _is_top_level(model, name)
        if usual and not _chooses_experts(model, name):
            yield name


def _is_adaptable(model: Any, name: str) -> bool:
    """Whether an adapter on this linear layer works and learns: peft accepts it and does not take its name for that of
    the experts; the layer is called, is an ordinary product, and the loss depends on it."""
    owner, _, end = name.rpartition(".")
    kind: Any = type(model.get_submodule(owner))
    accepted = _is_accepted(model, end) and not _means_experts(model, end)
    # The module that selects the tokens to attend to (DeepSeek V3.2) is trained by its own loss, which no library
    # computes.
    picks = "indexer" in name.split(".")
    return accepted and not picks and _is_product(model.get_submodule(name)) and not _is_bypassed(kind, end)


def _is_product(layer: Any) -> bool:
    """Whether a linear layer of a family's own class maps inputs to outputs of its sizes, as an adapter does."""
    if not type(layer).__module__.startswith("transformers.models."):
        return True
    inputs = torch.empty(1, 1, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    try:
        with torch.no_grad():
            outputs = layer(inputs)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return isinstance(outputs, torch.Tensor) and outputs.shape == (1, 1, layer.out_features)


def _means_experts(model: Any, end: str) -> bool:
    """Whether peft maps this name to that of fused experts, as adapters of transformers 4 need it."""
    family = _MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type, "")
    return end in _MOE_TARGET_MODULE_MAPPING.get(family, ())


def _chooses_experts(model: Any, name: str) -> bool:
    """Whether a linear layer is a router, or a gate: by its name, or because it is next to experts and has one output
    for each of them, or one for all."""
    path = name.split(".")
    if any(part == "router" or part.endswith("_router") for part in path):
        return True
    for depth in range(len(path) - 2, len(path)):
        owner = model.get_submodule(".".join(path[:depth]))
        if any(child == "experts" for child, _ in owner.named_children()):
            outputs = getattr(model.get_submodule(name), "out_features", 0)
            gate = path[depth] == "gate" or path[depth].endswith("_gate")
            return gate or (depth == len(path) - 1 and outputs in _expert_counts(model))
    return False


def _expert_counts(model: Any) -> set[int]:
    config = model.config.get_text_config()
    return {number for key in EXPERT_COUNT_KEYS if isinstance(number := getattr(config, key, None), int)}


def _is_top_level(model: Any, name: str) -> bool:
    """A head next to the base model, such as that of a score."""
    prefix = model.base_model_prefix
    return "." not in name and bool(prefix) and hasattr(model, prefix)


def _is_accepted(model: Any, end: str) -> bool:
    """Whether peft can put an adapter on modules with this name in this family."""

    class Config:
        peft_type = "LORA"

    try:
        _check_lora_target_modules_mamba(Config, model, end)  # type: ignore[arg-type]  # reads nothing else
    except ValueError:
        return False
    return True


@lru_cache(maxsize=1024)
def _is_bypassed(owner: Any, name: str) -> bool:
    """Whether the owner's code passes the weight of its module `name` to a kernel instead of calling the module, as the
    fused kernels of state-space layers do: an adapter on it would learn nothing."""
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):
        return False
    used = rf"(?<!isinstance\()\bself\.{re.escape(name)}\.weight\b(?!\.(?:dtype|device|shape|size|data_ptr)|\[)"
    return re.search(used, source) is not None
