"""Load, train, resume, export and ask mixtures of experts in 4 and 8 bits: `python -m tests.expert_runs FOLDER`.

One process; what there is to compare is printed as one JSON object. The oracle is transformers' own model, whose linear
layers it has quantized itself, and whose experts are replaced by what bitsandbytes makes of each of their matrices.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from engine.core.problems import Refusal
from engine.core.rundir import RunDir
from engine.export.export_spec import ExportSpec
from engine.models.facts import inspect_model
from engine.preflight.memory import memory_needed
from engine.spec.run_spec import RunSpec
from engine.worker.evaluation.respond import LoadedModels
from engine.worker.export import export
from engine.worker.models import quantized_experts
from engine.worker.models.loading import load_base, load_model, save_weights
from engine.worker.models.structure import quantizable_experts
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.prepare import prepare
from engine.worker.train import train
from tests import zoo
from tests.conftest import short_training
from tests.train_many import lay_out

FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral")
IDS = torch.arange(20, 40).view(2, 10)
ATTENTION = ["q_proj", "v_proj"]
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None, "recomputed": {"use_reentrant": False}, "reentrant": {"use_reentrant": True},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "4bit": {"kind": "4bit", "bnb_4bit_use_double_quant": False},
    "fp4": {"kind": "4bit", "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_type": "fp4"},
    "double": {"kind": "4bit", "bnb_4bit_use_double_quant": True},
    "8bit": {"kind": "8bit"},
}


def spec_of(folder: Path, **changes: Any) -> RunSpec:
    return short_training(folder, folder.parent, **{"training__max_steps": 4, "logging__save_steps": 2} | changes)


def rounded(matrix: Tensor, kind: str) -> Tensor:
    """A matrix in 4 or 8 bits and back, by bitsandbytes' own functions."""
    if kind == "8bit":
        codes, scales, _ = functional.int8_vectorwise_quant(matrix.half())
        return functional.int8_vectorwise_dequant(codes, scales)
    quant_type = "fp4" if kind == "fp4" else "nf4"
    row = matrix.reshape(-1)  # on a CPU, bitsandbytes goes wrong with rows that are not made of whole blocks
    codes, state = functional.quantize_4bit(row, quant_type=quant_type, compress_statistics=kind == "double")
    return functional.dequantize_4bit(codes, state).view(matrix.shape)


def by_hand(folder: Path, kind: str) -> Any:
    """The oracle, in fp32."""
    how = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="fp4" if kind == "fp4" else "nf4",
            bnb_4bit_use_double_quant=kind == "double",
            bnb_4bit_compute_dtype=torch.float32,
        )
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)
    for name, weight in model.named_parameters():
        if weight.ndim == 3 and ".experts." in name:
            # The scales of a tensor are quantized together.
            matrices = [weight.data] if kind == "double" else weight.data.unbind()
            weight.data = torch.stack([rounded(matrix, kind) for matrix in matrices]).view(weight.shape)
    for part in model.modules():
        part.support_avx512bf16_for_cpu = False  # rounds scales in an evaluation
    return model


def adapted(model: Any) -> Any:
    """With the same adapter on attention each time, as if it had learned something."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM")
    adapted_model = get_peft_model(model, config)
    for name, weight in adapted_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return adapted_model


def gradients(model: Any, recompute: dict[str, Any] | None) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits, gradients, and the bytes that the forward pass keeps for the backward pass."""
    model.train()
    if recompute is not None:
        model.gradient_checkpointing_enable(recompute)
        model.enable_input_require_grads()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    gradients_by_name = {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }
    model.zero_grad()
    return logits.detach(), gradients_by_name, sum(kept.values())


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest one, as a share of the largest gradient."""
    assert ours.keys() == theirs.keys()
    assert ours
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours) / largest


def compared(folder: Path, kind: str) -> dict[str, Any]:
    """Ours beside the oracle: forward and backward pass, with and without recomputation, and a single token."""
    spec = spec_of(folder, model__quantization=KINDS[kind])
    ours, theirs = adapted(load_base(spec, str(folder), torch.float32)), adapted(by_hand(folder, kind))
    logits, expected, kept_by_theirs = gradients(theirs, None)
    report: dict[str, Any] = {"scale": float(logits.abs().max()), "kept by the oracle": kept_by_theirs}
    for way, recompute in WAYS.items():
        own, learned, kept = gradients(ours, recompute)
        report[way] = [float((own - logits).abs().max()), difference(learned, expected)]
        report.setdefault("kept", kept)
    experts = [weight for weight in theirs.parameters() if weight.ndim == 3]
    with torch.no_grad(), dequantized_weights() as counts:
        token = ours.eval()(IDS[:1, :1]).logits - theirs.eval()(IDS[:1, :1]).logits
    return report | {
        "token": float(token.abs().max()), "experts of a token": sum(counts),
        "experts": sum(weight.numel() for weight in experts),
        "bytes of experts": sum(weight.nbytes for weight in experts),
    }  # fmt: skip


@contextlib.contextmanager
def dequantized_weights() -> Iterator[list[int]]:
    """The number of weights of each tensor of experts that is dequantized inside the context."""
    counts: list[int] = []
    own = dict(quantized_experts.DEQUANTIZE)

    def noting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*arguments: Any) -> Tensor:
            matrices = function(*arguments)
            counts.append(matrices.numel())
            return matrices

        return noted

    quantized_experts.DEQUANTIZE.update({kind: noting(function) for kind, function in own.items()})
    try:
        yield counts
    finally:
        quantized_experts.DEQUANTIZE.update(own)


def memory_of_loading(folder: Path) -> dict[str, int]:
    """The number of tensors of experts, the bytes of the largest in the model's type, and how many bytes of experts
    are in that type at most while the model is loaded."""
    config, _ = zoo.tiny_config("qwen3_moe")
    config.num_hidden_layers, config.moe_intermediate_size = 4, 1024
    zoo.model_class("qwen3_moe", config)(config).save_pretrained(folder)
    shapes: list[int] = []
    held: list[int] = []
    own = quantized_experts._to_4_bits

    def noting(value: Tensor, how: Any) -> Any:
        shapes.append(value.nbytes)
        there = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and 1024 in thing.shape[-2:]]
        there += [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and 2048 in thing.shape[-2:]]
        storages = {thing.untyped_storage().data_ptr(): thing for thing in there if thing.device.type == "cpu"}
        held.append(sum(thing.untyped_storage().nbytes() for thing in storages.values() if thing.is_floating_point()))
        return own(value, how)

    quantized_experts._to_4_bits = noting
    try:
        load_base(spec_of(folder, model__quantization=KINDS["4bit"]), str(folder), torch.float32)
    finally:
        quantized_experts._to_4_bits = own
    return {"tensors": len(shapes), "largest": max(shapes), "held": max(held)}


def without_whole_blocks() -> float:
    """The error of two experts of four, whose matrices do not end with a block of 64 weights."""
    torch.manual_seed(4)
    value = torch.randn(4, 6, 10)
    weight = Params4bit(value.clone(), quant_type="nf4", compress_statistics=False).to("cpu")
    chosen = torch.tensor([1, 3])
    two = quantized_experts.DEQUANTIZE[Params4bit](weight, chosen, torch.float32)
    return float((two - rounded(value, "4bit")[chosen]).abs().max())


def large_experts() -> list[str]:
    """The names of tensors that would be quantized of DeepSeek-V3's experts: 7.5 billion weights in one."""
    config, _ = zoo.tiny_config("qwen3_moe")
    config.num_experts, config.moe_intermediate_size, config.hidden_size = 256, 2048, 7168
    with torch.device("meta"):
        return quantizable_experts(zoo.model_class("qwen3_moe", config)(config))


def estimated(folder: Path, kind: dict[str, Any]) -> list[float]:
    """Bytes of the weights as estimated, and as they are."""
    spec = spec_of(folder, model__quantization=kind)
    model = load_model(spec, str(folder))
    tensors = {id(tensor): tensor for tensor in model.parameters()}
    held = sum(tensor.nbytes for tensor in tensors.values())
    for tensor in tensors.values():
        state = getattr(tensor, "quant_state", None)
        scales = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
        scales += [tensor.SCB] if getattr(tensor, "SCB", None) is not None else []
        held += sum(scale.nbytes for scale in scales)
    need = memory_needed(spec, inspect_model(folder), gpu_count=0)
    assert need is not None
    return [need.weights, held]


def trained(run: RunDir) -> RunDir:
    prepare(run)
    train(run)
    return run


def whole_way(folder: Path, **changes: Any) -> dict[str, Any]:
    """Trained, resumed from the middle, exported and asked."""
    spec = spec_of(folder, model__quantization="4bit", **changes)
    run = trained(lay_out(RunDir(folder.parent / "runs" / "whole"), spec))
    half = RunDir(folder.parent / "runs" / "half")
    shutil.copytree(run.path, half.path)
    shutil.rmtree(half.adapter)
    shutil.rmtree(half.path / "checkpoint-4")
    train(half)
    resumed, learned = (load_file(trained_run.adapter / "adapter_model.safetensors") for trained_run in (half, run))
    merged = lay_out(RunDir(folder.parent / "runs" / "merged"), ExportSpec.read({
        "model": {"model_name_or_path": str(folder)}, "adapters": {str(run.adapter): 1.0}, "precision": "fp32",
        "check_prompts": 0, "prompts": ["What comes after 3?"],
    }))  # fmt: skip
    export(merged)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), run.adapter)
    together = AutoModelForCausalLM.from_pretrained(merged.model, dtype=torch.float32)
    loaded = LoadedModels.load(spec.model, str(folder), {"adapter": str(run.adapter)}, "base", 4)
    oracle = PeftModel.from_pretrained(by_hand(folder, "4bit"), run.adapter)
    with torch.no_grad():
        answering = loaded.generator.adapted.eval()
        return {
            "resumed": max(float((resumed[name] - tensor).abs().max()) for name, tensor in learned.items()),
            "same names": sorted(resumed) == sorted(learned),
            "learned": max(float(tensor.abs().max()) for name, tensor in learned.items() if "lora_B" in name),
            "merged": float((plain(IDS).logits - together(IDS).logits).abs().max()),
            "asked": float((answering(IDS).logits - oracle(IDS).logits).abs().max()),
            "quantized for answers": is_quantized(loaded.generator.model),
        }


def adapters_on_experts(folder: Path) -> dict[str, Any]:
    """Whether the experts below adapters of their own are quantized; and what is said of such an adapter where they
    are."""
    spec = spec_of(folder, model__quantization="4bit", method__expert_r=2, method__r=4)
    model = load_model(spec, str(folder))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapter = folder.parent / "on-experts"
    save_weights(spec, model, adapter, adapter / "none")
    load_tokenizer(spec, str(folder)).save_pretrained(adapter)
    fits = LoadedModels.load(spec.model, str(folder), {"a": str(adapter)}, None, 4)
    quantized = is_quantized(fits.generator.model)
    fits.end()
    other = LoadedModels.load(spec.model, str(folder), {}, "base", 4)
    refused: list[str] = []
    try:
        other.generator.load_adapter(str(adapter))
    except Refusal as refusal:
        refused = [problem.code for problem in refusal.problems]
    return {
        "while trained": is_quantized(model.get_base_model()), "for answers": quantized, "refused": refused,
    }  # fmt: skip


def is_quantized(model: Any) -> bool:
    return getattr(model, "has_quantized_experts", False)


def data(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": f"What comes after {n}?", "output": f"{n + 1}."} for n in range(16)]
    (folder / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text('{"chat": {"file_name": "chat.json"}}', encoding="utf-8")


def main(root: Path) -> None:
    report: dict[str, Any] = {}
    for family in FAMILIES:
        data(root / family)
        folder = zoo.build(family, root / family / "base")
        report[family] = {
            "compared": {kind: compared(folder, kind) for kind in KINDS},
            "estimated": {name: estimated(folder, kind) for name, kind in KINDS.items()},
        }
    base = root / "qwen3_moe" / "base"
    report["without whole blocks"], report["too large"] = without_whole_blocks(), large_experts()
    report["loading"] = memory_of_loading(root / "large")
    report["adapters on experts"] = adapters_on_experts(base)
    report["whole way"] = whole_way(base, model__quantization__bnb_4bit_use_double_quant=False)
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
