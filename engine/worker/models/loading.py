"""Tokenizer, model, quantization and adapter of a spec."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from transformers import (
    AutoConfig,
    PreTrainedModel,
)

from engine.core.problems import Refusal, problem
from engine.models.facts import inspect_model
from engine.models.structure import is_or_below, remember
from engine.models.trainable_modules import ALL_LINEAR, chosen_layers, targeted_modules
from engine.models.vision_parts import VisionPlan, vision_plan
from engine.preflight.model_checks import frozen_weights_stay_in, trained_parameters
from engine.spec.method_settings import Freeze, Lora
from engine.spec.run_spec import RunSpec
from engine.worker.models.adapter_weights import add_whole_modules, refuse_empty_adapter
from engine.worker.models.dequantization import dequantization, forget_quantization, refuse_unread_scales
from engine.worker.models.embeddings import (
    fit_vocabulary,
    let_loss_read_head,
    make_rows,
    trained_rows,
    vocabulary_modules,
)
from engine.worker.models.mixed_precision import is_mixed, state_in_fp32, train_in_fp32
from engine.worker.models.quantization import device_map, expert_quantization, quantization_config
from engine.worker.models.structure import EXPERT_COUNT_KEYS, expose_backbone, model_class, structure_of
from engine.worker.models.training_forward import enable_text_training
from engine.worker.runtime.devices import auto_precision
from engine.worker.runtime.sharding import shards_weights


def precision(spec: RunSpec) -> str:
    """The spec's precision, with "auto" as this run means it. Raises Refusal if a GPU here does not have that."""
    return auto_precision() if spec.training.precision == "auto" else spec.training.precision


# A page of placeholders in each checkpoint, which takes as long to make as several steps of a small model.
assert hasattr(PeftModel, "create_or_update_model_card")
PeftModel.create_or_update_model_card = lambda *_: None  # type: ignore[method-assign]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCORE_HEAD = "score"  # transformers' name for the head of a model that scores a text


def load_model(spec: RunSpec, path: str) -> PreTrainedModel | PeftModel:
    """The model of `spec`, ready to train: loaded, quantized, with its trainable weights chosen. A reward model has one
    score in place of the next token; a head that is not in `path` starts with random weights."""
    base = load_base(spec, path, loading_dtype(spec.change("model.model_name_or_path", path)))
    enable_text_training(base)
    base.router_settings = _router_settings(base)  # type: ignore[assignment]  # TRL changes them while it trains
    structure = structure_of(base)
    remember(Path(path), structure)
    base.structure = structure  # type: ignore[assignment]  # by the names of the base
    text_config = base.config.get_text_config()
    if not structure.experts and hasattr(text_config, "router_aux_loss_coef"):
        text_config.router_aux_loss_coef = 0.0  # a family with and without experts: there is no router to balance here
    model = PREPARE_METHOD[spec.method.kind](spec, base)
    if spec.method.kind != "lora":
        train_in_fp32(model)
    _assert_trained_as_planned(spec, path, model)
    return model


def loading_dtype(spec: RunSpec) -> torch.dtype:
    """Trained weights are kept in fp32, since an update of 1e-5 is lost in bf16; frozen ones are not. FSDP2 divides
    weights of one type."""
    dtype = precision(spec)
    in_half = spec.method.kind == "lora" or (
        not shards_weights() and frozen_weights_stay_in(spec, inspect_model(spec.model.model_name_or_path), dtype)
    )
    return DTYPES[dtype] if in_half else torch.float32


def _router_settings(model: Any) -> dict[str, Any]:
    """Settings in the configuration for the routers' logits and loss."""
    text = vars(model.config.get_text_config())
    return {key: text[key] for key in ("output_router_logits", "router_aux_loss_coef") if key in text}


def _assert_trained_as_planned(spec: RunSpec, path: str, model: torch.nn.Module) -> None:
    """Checks that as many parameters are trained as the page shows before the start."""
    planned = trained_parameters(spec.change("model.model_name_or_path", path))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert planned in (None, trained), f"{trained} parameters are trained, and the plan says {planned}"


def load_base(spec: RunSpec, path: str, dtype: torch.dtype, adapters: Iterable[str] = ()) -> PreTrainedModel:
    """The model in `path` with the spec's `model` part applied: RoPE scaling, quantization, and its GPU. `adapters`:
    folders of those that will be put on it; one that covers experts needs them unquantized."""
    config, attention = model_config(spec, path), spec.model.attn_implementation
    dequantized = dequantization(config)
    with expert_quantization(spec, adapters):
        model, report = model_class(config, scorer=is_reward_model(spec)).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            quantization_config=dequantized or quantization_config(spec, DTYPES[precision(spec)]),
            output_loading_info=True,
            device_map=device_map(spec),
            trust_remote_code=spec.model.trust_remote_code,
            use_safetensors=True,
            **({} if attention == "auto" else {"attn_implementation": attention}),
        )
    _refuse_missing_weights(report["missing_keys"])
    if dequantized:
        refuse_unread_scales(model, report["unexpected_keys"])
        forget_quantization(model, dtype)
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            # On a CPU, bitsandbytes would repack 4-bit weights in the first evaluation, round their scales permanently,
            # and then could not train through them.
            part.support_avx512bf16_for_cpu = False
    _turn_off_router_loss(model)
    if not is_reward_model(spec):
        expose_backbone(model)
    if is_reward_model(spec):
        keep_in_fp32(model.get_submodule(SCORE_HEAD))
        score_at_the_end(model)
    if spec.model.makes_rows:
        make_rows(spec, model, path)
    return model


def _refuse_missing_weights(names: set[str]) -> None:
    """Raises Refusal if weights were initialized randomly because no file contains them, except for a scoring head."""
    if missing := sorted(name for name in names if SCORE_HEAD not in name.split(".")):
        field = "model.model_name_or_path"
        raise Refusal(problem("weights-missing", field, count=len(missing), name=missing[0]))


def is_reward_model(spec: RunSpec) -> bool:
    """Whether the run trains a reward model, which scores texts instead of generating them."""
    return spec.stage.kind == "rm"


def keep_in_fp32(head: torch.nn.Module) -> None:
    """Keep a trained head in fp32 over a base that is not, with or without autocast."""
    head.float()
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def score_at_the_end(model: PreTrainedModel) -> None:
    """Use the score of a text's last token according to the attention mask, however a batch is padded.

    transformers uses the last token that is not the padding token: if the padding token also ends a turn, this is the
    token before it. Therefore the head's output at every position is replaced by that at the last token.
    """
    masks: list[Tensor | None] = [None]  # of the current forward pass

    def note_mask(_model: Any, _positional: Any, arguments: dict[str, Any]) -> None:
        masks[0] = arguments.get("attention_mask")

    def score_of_last(_head: Any, _hidden: Any, scores: Tensor) -> Tensor:
        length = scores.shape[1]
        if masks[0] is None:
            last = torch.full(scores.shape[:1], length - 1, device=scores.device)
        else:
            last = length - 1 - masks[0].to(scores.device).long().flip(1).argmax(1)
        return scores[torch.arange(len(scores), device=scores.device), last, None].expand_as(scores)

    model.register_forward_pre_hook(note_mask, with_kwargs=True)
    model.get_submodule(SCORE_HEAD).register_forward_hook(score_of_last)


def model_config(spec: RunSpec, path: str) -> Any:
    """The configuration in `path` with what the spec changes in it: RoPE scaling, a reward model's single score."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=spec.model.trust_remote_code)
    _name_experts(config.get_text_config())
    rope = spec.model.rope_scaling
    if rope.kind != "none":
        parameters = dict(getattr(config, "rope_parameters", None) or {})
        parameters |= {"rope_type": rope.kind, "factor": rope.factor}
        parameters.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        config.rope_parameters = parameters
        config.max_position_embeddings = int(config.max_position_embeddings * rope.factor)
    if is_reward_model(spec):
        config.num_labels = 1
    return config


def _name_experts(config: Any) -> None:
    """Some families' code of the router loss reads the number of experts under another name than their config has."""
    counts = (getattr(config, key, None) for key in EXPERT_COUNT_KEYS)
    if hasattr(config, "output_router_logits") and not hasattr(config, "num_experts"):
        config.num_experts = next((count for count in counts if isinstance(count, int)), None)


def _turn_off_router_loss(model: Any) -> None:
    """A trainer requests the loss that balances the experts with each batch. A configuration that always requests it
    makes some families fail as soon as they generate with a cache, because its mask is longer than the input."""
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False


def _lora(spec: RunSpec, model: PreTrainedModel) -> PeftModel:
    method = spec.method
    assert isinstance(method, Lora)
    # Not prepare_model_for_kbit_training: it keeps what is not quantized in fp32, which for a vocabulary of 152,000
    # words and a hidden size of 4,096 takes 2.3 GiB more than bf16, and makes the activations between the layers twice
    # as large.
    if spec.model.adapter_path:
        return _continued(spec, method, model, spec.model.adapter_path)
    adapted = get_peft_model(model, LoraConfig(**lora_arguments(spec, method, model)))
    let_loss_read_head(adapted)
    if vocabulary_modules(model):
        # peft notices that the vocabulary has grown, and would save the embeddings again next to the trained ones.
        adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)  # type: ignore[method-assign]  # of this model alone
    return adapted


def lora_arguments(spec: RunSpec, method: Lora, model: PreTrainedModel) -> dict[str, Any]:
    """The arguments of peft's LoraConfig for a new adapter on the model."""
    # A new head starts as noise, to which an adapter could not give a meaning: it is trained in full.
    rows = trained_rows(model, method.modules_to_save)
    whole = list(dict.fromkeys([*method.modules_to_save, *([] if rows else vocabulary_modules(model))]))
    vision = vision_plan(structure_of(model), spec.vision)
    return {
        "task_type": "SEQ_CLS" if is_reward_model(spec) else "CAUSAL_LM",
        "r": method.r,
        "lora_alpha": method.lora_alpha,
        "lora_dropout": method.lora_dropout,
        "target_modules": _targets(method, model, whole, vision),
        "modules_to_save": [*whole, *vision.whole] or None,
        "trainable_token_indices": rows or None,
        "use_dora": method.use_dora,
        "use_rslora": method.use_rslora,
        "init_lora_weights": True if method.init_lora_weights == "default" else method.init_lora_weights,
        **(_expert_targets(method, model) if vision.language else {}),
    }


def _targets(method: Lora, model: PreTrainedModel, whole: Sequence[str], vision: VisionPlan) -> str | list[str]:
    """The modules to adapt, as peft expects them: a pattern as it is, otherwise short names if they are unambiguous,
    and full names if others have the same (those of a tower, a router)."""
    if isinstance(method.target_modules, str) and method.target_modules != ALL_LINEAR:
        return method.target_modules
    structure = structure_of(model)
    names = list(targeted_modules(structure, method.target_modules, whole)) if vision.language else []
    names += vision.adapters
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    alike = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends]
    return ends if set(alike) == set(names) else names


def _expert_targets(method: Lora, model: PreTrainedModel) -> dict[str, Any]:
    """peft's arguments for adapters on the experts, each a tensor of (experts, …, …), scaled like the others."""
    if not method.expert_r:
        return {}
    experts = structure_of(model).experts
    ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in experts))
    share = method.expert_r / method.r
    alpha = method.lora_alpha * (math.sqrt(share) if method.use_rslora else share)
    return {
        "target_parameters": ends,
        "rank_pattern": dict.fromkeys(ends, method.expert_r),
        "alpha_pattern": dict.fromkeys(ends, alpha),
    }


def _continued(spec: RunSpec, method: Lora, model: PreTrainedModel, folder: str) -> PeftModel:
    """The adapter in `folder` on the model. A reward model's adapter includes its head; if a scoring model continues
    the adapter of a text-generating one, its head starts as it is."""
    fit_vocabulary(model, [folder])
    config: Any = PeftConfig.from_pretrained(folder)
    config.lora_dropout = method.lora_dropout  # belongs to a training, not to the weights
    if not is_reward_model(spec) or config.task_type == "SEQ_CLS":
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=True, config=config)
        let_loss_read_head(adapted)
        return adapted
    config.task_type = "SEQ_CLS"  # with which peft trains and saves the head, too
    config.modules_to_save = [name for name in config.modules_to_save or () if name != "lm_head"]
    config.inference_mode = False
    if isinstance(config.trainable_token_indices, dict):
        names = {name for name, _ in model.named_modules()}
        config.trainable_token_indices = {
            name: rows for name, rows in config.trainable_token_indices.items() if name in names
        }
    scorer: Any = model.get_submodule(SCORE_HEAD)
    head = {f"base_model.model.{SCORE_HEAD}.weight": scorer.weight.detach().clone()}
    adapted = get_peft_model(model, config)
    set_peft_model_state_dict(adapted, load_peft_weights(folder, device="cpu") | head)
    return adapted


def modules_in_training(spec: RunSpec, method: Freeze, model: PreTrainedModel) -> tuple[str, ...]:
    """The modules and parameters that freeze trains; all others stay as they are."""
    structure = structure_of(model)
    chosen = tuple(method.trainable_modules) or chosen_layers(structure, method.trainable_layers)
    chosen += (SCORE_HEAD,) if is_reward_model(spec) else ()
    chosen += tuple(vocabulary_modules(model))
    vision = vision_plan(structure, spec.vision)
    return (*(chosen if vision.language else ()), *vision.parameters)


def _freeze(spec: RunSpec, model: PreTrainedModel) -> PreTrainedModel:
    method = spec.method
    assert isinstance(method, Freeze)
    chosen = modules_in_training(spec, method, model)
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(is_or_below(name, module) for module in chosen)
        trained += parameter.requires_grad
    if not trained:
        names = ", ".join(name for name, _ in model.named_children())
        raise Refusal(problem("freeze-nothing", "method.trainable_modules", given=", ".join(chosen), known=names))
    return model


def _full(spec: RunSpec, model: PreTrainedModel) -> PreTrainedModel:
    structure = structure_of(model)
    vision = vision_plan(structure, spec.vision)
    for name, parameter in model.named_parameters():
        language = vision.language and not structure.is_in_tower(name)
        parameter.requires_grad = language or name in vision.parameters
    return model


PREPARE_METHOD: dict[str, Callable[[RunSpec, PreTrainedModel], PreTrainedModel | PeftModel]] = {
    "lora": _lora,
    "freeze": _freeze,
    "full": _full,
}


def moves_base(spec: RunSpec) -> bool:
    """Whether the adapter starts with a part of the base (PiSSA, OLoRA); a continued one does not."""
    if spec.method.kind != "lora" or spec.model.adapter_path:
        return False
    return spec.method.init_lora_weights in ("pissa", "olora")


def keep_initial(spec: RunSpec, model: Any, folder: Path) -> None:
    """Save the initial adapter of a PiSSA or OLoRA run, atomically.

    These methods move a part of the base into the adapter. With its initial state, the result can be written as a
    change of the *original* base, an ordinary LoRA of twice the rank, which every tool can use.
    """
    if moves_base(spec) and not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        partial.rename(folder)


def save_weights(
    spec: RunSpec, model: Any, folder: Path, initial: Path, whole: Mapping[str, Tensor] | None = None
) -> None:
    """Write the trained weights as safetensors. `whole`: these by name, if those in the model are divided. Raises
    Refusal if an adapter has learned nothing at all."""
    for key, value in getattr(model, "router_settings", {}).items():
        setattr(model.config.get_text_config(), key, value)  # with the routers' logits on, generation would fail
    options: dict[str, Any] = {}
    _turn_off_router_loss(model)  # which TRL has turned on
    if spec.method.kind == "lora":
        refuse_empty_adapter(spec, model, whole)
        for config in model.peft_config.values():
            # The name that others can download; a hub's model was loaded from a cache of this machine.
            config.base_model_name_or_path = spec.model.model_name_or_path
            config.revision = spec.model.model_revision
        if initial.exists():
            options["path_initial_model_for_weight_conversion"] = str(initial)
        # and not a critic's, nor the copy that some stages keep for comparison
        options["selected_adapters"] = ["default"]
    elif whole is None and is_mixed(model):
        whole = state_in_fp32(model)
    model.save_pretrained(folder, safe_serialization=True, state_dict=whole, **options)
    if "path_initial_model_for_weight_conversion" in options:
        add_whole_modules(model, folder / SAFETENSORS_WEIGHTS_NAME)
