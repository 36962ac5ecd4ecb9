"""Base and adapters → one model in memory, and on disk: merged, as LoRA only, or quantized.

A merge is computed in fp32 and rounded once, layer by layer: W + BA of two bf16 terms would lose what the adapter
learned wherever that is smaller than the last bit of W, and a full model in fp32 would take twice the memory.
"""

from __future__ import annotations

import os
import resource
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from engine.core.problems import Refusal, problem
from engine.export.export_spec import PRUNING_COMBINATIONS, ExportSpec, needs_combination
from engine.models.facts import inspect_model
from engine.models.vision_parts import name_in_base
from engine.worker.exporting.base_model import Sources
from engine.worker.models.embeddings import fit_vocabulary
from engine.worker.models.loading import DTYPES, load_base
from engine.worker.models.structure import layers_with_one_weight, model_class
from engine.worker.runtime.devices import has_gpus

ADAPTER_NAME = "default"  # peft's name for the adapter whose files are in the folder itself


def load(spec: ExportSpec, sources: Sources) -> PreTrainedModel | PeftModel:
    """The base with the adapters combined into one, ready to answer.

    In the precision of its files, or in fp32 if that is requested: never in one that would round before the merge.
    """
    base = load_base(sources.loading(spec), str(sources.base), loading_dtype(spec, sources.base))
    if sources.stage == "rm":
        # From it, a program that loads the result finds the last token, whose score counts.
        base.config.get_text_config().pad_token_id = sources.tokenizer().pad_token_id
    model = _add_adapters(spec, sources, base) if sources.adapters else base
    return model.requires_grad_(False).eval()


def loading_dtype(spec: ExportSpec, base: Path) -> torch.dtype:
    """The type in which the base is loaded. Files of another type than these three are read as the target type."""
    target, stored = DTYPES[spec.precision], getattr(torch, inspect_model(base).dtype or "", None)
    if target == torch.float32 or stored is None or stored not in DTYPES.values():
        return target
    return stored


def _add_adapters(spec: ExportSpec, sources: Sources, model: PreTrainedModel) -> PeftModel:
    fit_vocabulary(model, sources.adapters)
    folders = list(sources.adapters)
    names = [f"part{number}" for number in range(len(folders))] if needs_combination(spec) else [ADAPTER_NAME]
    adapted = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
    for folder, name in zip(folders[1:], names[1:], strict=True):
        adapted.load_adapter(folder, adapter_name=name)
    if needs_combination(spec):
        # The combination gets the settings of the first, but its matrices are already scaled, and start at zero.
        first: Any = adapted.peft_config[names[0]]
        first.use_rslora, first.init_lora_weights = False, True
        pruning = {"density": spec.density} if spec.combination in PRUNING_COMBINATIONS else {}
        tuner: Any = adapted.base_model
        tuner.add_weighted_adapter(
            names,
            list(sources.adapters.values()),
            ADAPTER_NAME,
            combination_type=spec.combination,
            svd_rank=spec.svd_rank,
            **pruning,
        )
        for name in names:
            adapted.delete_adapter(name)
    adapted.set_adapter(ADAPTER_NAME, inference_mode=True)
    return adapted


# ------------------------------------------------------------------------------------------ on disk


def merge(spec: ExportSpec, model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Merge the adapter, if there is one, and write the full model. Raises Refusal for invalid numbers, and for
    adapters that no merged model can have."""
    dtype = DTYPES[spec.precision]
    if isinstance(model, PeftModel):
        _refuse_shared_weights(model)
        for name, part in model.named_modules():
            if isinstance(part, ParamWrapper):
                _merge_experts(name, part, dtype)
            elif isinstance(part, LoraLayer) and hasattr(part.get_base_layer(), "weight"):
                _merge_layer(name, part, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that all layers are already merged
            model = model.merge_and_unload()
    for name, weight in model.named_parameters():
        weight.data = rounded(name, weight.data, dtype)
    model.save_pretrained(str(folder), max_shard_size=int(spec.shard_gb * 10**9))


def _refuse_shared_weights(model: PeftModel) -> None:
    """Raises Refusal if a layer with an adapter shares its weight with another layer: merged into it, the adapter would
    also change the other."""
    adapted = {name_in_base(name) for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    for names in layers_with_one_weight(model):
        if first := next((name for name in names if name in adapted), None):
            other = next(name for name in names if name != first)
            raise Refusal(problem("export-shared-weights", "form", first=first, second=other))


def _merge_experts(name: str, part: Any, dtype: torch.dtype) -> None:
    """A tensor of (experts, …, …); several of a module are nested wrappers."""
    weight = part.get_param()
    weight.data = weight.data.float()
    try:
        part.merge(safe_merge=True)
    except ValueError as error:  # NaN or infinite
        raise Refusal(problem("export-broken-adapter", name=name)) from error
    weight.data = rounded(name, weight.data, dtype)


def _merge_layer(name: str, part: Any, dtype: torch.dtype) -> None:
    layer = part.get_base_layer()
    layer.weight.data = layer.weight.data.float()
    try:
        part.merge(safe_merge=True)
    except ValueError as error:  # NaN or infinite
        raise Refusal(problem("export-broken-adapter", name=name)) from error
    layer.weight.data = rounded(name, layer.weight.data, dtype)


def rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in another precision. Raises Refusal if it does not fit: fp16 ends at 65504."""
    if not weight.is_floating_point():
        return weight
    out = weight.to(dtype)
    if dtype == torch.float16 and (lost := int((~out.isfinite() & weight.isfinite()).sum())):
        raise Refusal(problem("export-overflow", "precision", name=name, count=lost, precision="fp16"))
    return out


def save_adapter(spec: ExportSpec, model: PeftModel, folder: Path) -> None:
    """Write the LoRA adapter, with the modules trained in full."""
    dtype = DTYPES[spec.precision]
    for name, weight in model.named_parameters():
        if f".{ADAPTER_NAME}." in name or name.endswith(f".{ADAPTER_NAME}"):
            weight.data = rounded(name, weight.data, dtype)
    model.save_pretrained(str(folder), selected_adapters=[ADAPTER_NAME])


WRITE: dict[str, Callable[[ExportSpec, Any, Path], None]] = {
    "merged": merge,
    "adapter": save_adapter,
}  # by form: (spec, model, folder)


def quantize(spec: ExportSpec, sources: Sources, whole: Path, folder: Path) -> None:
    """Write the merged model in `whole` again, in 8 or 4 bits, as a checkpoint that loads without further settings."""
    dtype = DTYPES[spec.precision]
    how = (
        BitsAndBytesConfig(load_in_8bit=True)
        if spec.quantize == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    )
    model = _auto_class(spec, sources, whole).from_pretrained(
        whole, quantization_config=how, dtype=dtype, device_map=_device()
    )
    model.save_pretrained(folder, max_shard_size=int(spec.shard_gb * 10**9))


def reload(spec: ExportSpec, sources: Sources, folder: Path) -> Any:
    """Load what was written as any user would: the full model, or the base with the written adapter."""
    if spec.form == "adapter":
        base = load_base(sources.loading(spec), str(sources.base), loading_dtype(spec, sources.base))
        fit_vocabulary(base, [folder])
        model: Any = PeftModel.from_pretrained(base, folder)
    else:
        remote = {"trust_remote_code": spec.model.trust_remote_code}
        model = _auto_class(spec, sources, folder).from_pretrained(folder, dtype="auto", device_map=_device(), **remote)
        _disable_weight_packing(model)
    return model.requires_grad_(False).eval()


def _disable_weight_packing(model: PreTrainedModel) -> None:
    parts: Iterable[Any] = model.modules()
    for part in parts:
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False  # see engine.worker.models.loading.load_base


def _auto_class(spec: ExportSpec, sources: Sources, folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.model.trust_remote_code)
    return model_class(config, scorer=sources.stage == "rm")


def _device() -> dict[str, int] | None:
    return {"": int(os.environ.get("LOCAL_RANK", 0))} if has_gpus() else None


def peak_memory() -> dict[str, int | None]:
    """The peak memory of this process in bytes: on the machine, and on the GPU."""
    return {
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
