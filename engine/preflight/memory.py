"""Estimate the memory that a training needs, on a GPU or on the CPU.

Arithmetic over the model's headers and the settings, with four constants fitted to trainings of 1.5B and 7B models on a
GPU (bench/RESULTS.md): pre-training, LoRA and freeze, in bf16. For those, the estimate was within 5 % of the allocated
memory; everything else is arithmetic alone. Lengths are assumed to be the maximum, so a run on shorter rows needs less.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from engine.core import hardware
from engine.core.gpu_choice import BF16_CAPABILITY, lacks
from engine.core.stages import STAGES
from engine.launch.command import on_cpu
from engine.models.facts import ModelFacts, inspect_model
from engine.models.structure import structure_of
from engine.models.trainable_modules import trainable_parameters
from engine.preflight.division import fsdp2_obstacles
from engine.preflight.image_memory import ACTIVATION_BYTES, image_bytes
from engine.preflight.model_checks import frozen_weights_stay_in, quantizes_experts, trained_parameters
from engine.preflight.suitable_gpus import usable_gpus
from engine.spec.hardware_settings import Fsdp2, Zero2, Zero3
from engine.spec.run_spec import RunSpec
from engine.spec.strategies import COMPARED_WITH_REFERENCE

# Bytes per vocabulary entry, while the loss is computed for a part of the positions at a time.
LOSS_BYTES = 3072
# What the driver and the libraries take in addition to allocations, and the overhead of the allocator's blocks.
CUDA_CONTEXT_BYTES, ALLOCATOR_FACTOR = 1200 << 20, 1.02
CPU_LIBRARY_BYTES = 700 << 20  # the same on a CPU
CRITIC_RANK = 16  # rank of the adapter that is PPO's critic if the policy has none
# Bytes per vocabulary entry and token of an answer, for PPO and GRPO: logits in fp32, their logarithms, and the
# gradients through them.
ANSWER_TOKEN_BYTES = 14
# Bytes of a quantized weight, with its scales: in 4 bits, one scale of 4 bytes per 64 weights, or of 1 byte and 4 more
# per 256 of them if scales are quantized, too (Dettmers et al. 2023, arXiv:2305.14314).
QUANTIZED_WEIGHT_BYTES = {"4bit": 0.5 + 4 / 64, "4bit, scales too": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.05}
# What eager attention keeps per pair of tokens and head, in half precision: scores, and their softmax, which is
# computed in fp32.
EAGER_PAIR_BYTES = 8
# Part of an optimizer's name → bytes that it keeps per trained weight. Adam's two moments if none matches.
OPTIMIZER_STATE_BYTES = {"4bit": 1.0, "8bit": 2.0, "adafactor": 0.1, "lomo": 0.0, "sgd": 0.0, "lion": 4.0}
# Elements, by DeepSpeed's defaults: of gradients that are exchanged at a time, of weights that are gathered.
ZERO_BUCKET, ZERO_GATHERED = 5e8, 1e9


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on each GPU."""

    weights: float  # of all models, including those that are trained
    learning: float  # gradients and optimizer state
    activations: float
    libraries: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def memory_needed(
    spec: RunSpec, model: ModelFacts, gpu_count: int, available: float | None = None
) -> MemoryNeed | None:
    """For one process of the run on a machine with this many GPUs; None if the model's weights cannot be counted. With
    the strategy "auto", for the one that would be chosen for `available` bytes (None: what the GPUs have)."""
    return _memory_of(with_strategy(spec, model, gpu_count, available), model, gpu_count)


def with_strategy(spec: RunSpec, model: ModelFacts | None, gpu_count: int, available: float | None = None) -> RunSpec:
    """The spec with the strategy, and the sharding of FSDP2, that "auto" means for it; `engine.preflight.strategy` says
    why it is that one."""
    if spec.hardware.strategy.kind == "auto":
        spec = _with(spec, _strategy_of(spec, model, gpu_count, available))
    if not isinstance(spec.hardware.strategy, Fsdp2) or spec.hardware.strategy.sharding != "auto":
        return spec
    full, hybrid = (spec.change("hardware.strategy.sharding", sharding) for sharding in ("full", "hybrid"))
    needed = _memory_of(hybrid, model, gpu_count) if model and spec.hardware.can_be_hybrid else None
    room = _room(spec, available) if needed else None
    return hybrid if needed and room is not None and needed.total <= room else full


def _strategy_of(spec: RunSpec, model: ModelFacts | None, gpu_count: int, available: float | None) -> str:
    if spec.hardware.num_processes == 1:
        return "single"
    if on_cpu(spec, gpu_count) or model is None or fsdp2_obstacles(spec, model):
        return "ddp"
    needed, room = _memory_of(_with(spec, "ddp"), model, gpu_count), _room(spec, available)
    return "fsdp2" if needed and room is not None and needed.total > room else "ddp"


def _room(spec: RunSpec, available: float | None) -> float | None:
    """`available`, or otherwise the bytes that each process may take; None if that is unknown."""
    known = available_memory(spec) if available is None else None
    return known.bytes if known else available


def _with(spec: RunSpec, strategy: str) -> RunSpec:
    return spec.change("hardware.strategy", {"kind": strategy})


def _memory_of(spec: RunSpec, model: ModelFacts, gpu_count: int) -> MemoryNeed | None:
    adapted, trained = trainable_parameters(model, "lora", r=1), trained_parameters(spec)
    if not (adapted and trained and _parameters(model) and model.layers and model.hidden_size):
        return None
    cpu, lora = on_cpu(spec, gpu_count), spec.method.kind == "lora"
    half = _in_half_precision(spec, cpu)
    plain = 2.0 if half else 4.0
    # Next to PPO's policy, a critic learns: an adapter of its own.
    critic = (trained if lora else CRITIC_RANK * adapted) if spec.stage.kind == "ppo" else 0
    policy = _base_bytes(spec, model, plain) + 4.0 * trained if lora else _whole_bytes(spec, model, half)
    weights = policy + _reference_bytes(spec, policy, trained) + 4.0 * critic
    exchanged = 4.0 if spec.hardware.num_processes > 1 else 0.0  # a second copy of the gradients, for communication
    state = _optimizer_state_bytes(spec.training.optim)
    learning = (trained + critic) * (4.0 + exchanged + state)
    activations = max(
        _activation_bytes(spec, model, adapted + _expert_width(model), half), _generation_bytes(spec, model, plain)
    )
    activations += _dequantized_bytes(spec, model, plain) + (image_bytes(spec, model, half) or 0.0)
    strategy = spec.hardware.strategy
    if isinstance(strategy, Fsdp2):
        share = 0.0 if strategy.cpu_offload else spec.hardware.copies / spec.hardware.num_processes
        gathered, gradients = _gathered_bytes(spec, model, trained, plain)
        loaded = policy if spec.model.quantization.kind != "none" else 0.0  # it is quantized on the GPU, then divided
        learning = share * trained * (4.0 + state) + gradients
        weights = max(share * weights + gathered, loaded - learning - activations)
    elif isinstance(strategy, (Zero2, Zero3)):
        share = 0.0 if strategy.cpu_offload else 1 / spec.hardware.num_processes
        copy = 4.0  # in fp32, which the optimizer changes
        learning = share * trained * (copy + 4.0 + state) + 4.0 * min(trained, ZERO_BUCKET)
        weights = _zero_weights(model, weights, share, learning) if isinstance(strategy, Zero3) else weights
    weights += plain * _reward_model_parameters(spec)
    held = weights + learning + activations
    return MemoryNeed(
        weights,
        learning,
        activations,
        (CPU_LIBRARY_BYTES if cpu else CUDA_CONTEXT_BYTES) + (ALLOCATOR_FACTOR - 1) * held,
    )


def _gathered_bytes(spec: RunSpec, model: ModelFacts, trained: int, plain: float) -> tuple[float, float]:
    """With FSDP2: bytes of the weights that are gathered at a time, and of their gradients until they are divided.

    Those are the layer that computes and the next one, and, from the last layer's forward pass to its backward pass,
    embeddings and head. The reference is one unit: it is gathered as a whole.
    """
    parameters = _parameters(model)  # not 0, which is ensured by `memory_needed`
    assert model.layers
    lora, strategy = spec.method.kind == "lora", spec.hardware.strategy
    assert isinstance(strategy, Fsdp2)
    words = (model.vocab_size or 0) * (model.hidden_size or 0) * (1 if model.tied else 2)
    whole = _base_bytes(spec, model, plain) if lora else plain * parameters
    layer = (whole - plain * words) / model.layers
    gathered = plain * words + 2 * layer if strategy.reshard_after_forward else whole
    if not lora and spec.stage.kind in COMPARED_WITH_REFERENCE:
        gathered = plain * parameters + (0.0 if strategy.reshard_after_forward else whole)
    unit = (model.vocab_size or 0) * (model.hidden_size or 0)  # embeddings and head are divided separately
    largest = max(unit, 2 * (parameters - words) / model.layers) / parameters
    return gathered, trained * (2 / model.layers if lora else largest) * (plain + 4.0)


def _zero_weights(model: ModelFacts, weights: float, share: float, learning: float) -> float:
    """Bytes of the weights with ZeRO-3, which divides the model once it is whole on each GPU."""
    gathered = weights * min(ZERO_GATHERED / _parameters(model), 1)
    return max(share * weights + gathered, weights - learning)


def _parameters(model: ModelFacts) -> int:
    """Parameters of the loaded model; 0 if they cannot be counted. Files may also have buffers, and a single matrix for
    embedding and head that are two in memory."""
    return sum(map(math.prod, structure_of(model).shapes.values())) if model.parameters else 0


def _in_half_precision(spec: RunSpec, cpu: bool) -> bool:
    return spec.training.precision != "fp32" and not (cpu and spec.training.precision == "auto")


def weight_bytes(spec: RunSpec, model: ModelFacts, gpu_count: int) -> float:
    """Bytes of the model's own weights once they are loaded; 0 if they cannot be counted."""
    half = _in_half_precision(spec, on_cpu(spec, gpu_count))
    if spec.method.kind != "lora":
        return _whole_bytes(spec, model, half)
    return _base_bytes(spec, model, 2.0 if half else 4.0)


def _frozen_weight_bytes(spec: RunSpec, model: ModelFacts, half: bool) -> float:
    """Bytes of each weight that freeze or full training leaves frozen. FSDP2 divides weights of one type."""
    if isinstance(spec.hardware.strategy, Fsdp2):
        return 4.0
    precision = spec.training.precision
    if precision == "auto":
        precision = "fp16" if any(lacks(gpu, BF16_CAPABILITY) for gpu in usable_gpus(spec)) else "bf16"
    return 2.0 if half and frozen_weights_stay_in(spec, model, precision) else 4.0


def _whole_bytes(spec: RunSpec, model: ModelFacts, half: bool) -> float:
    """Bytes of a model of which weights of its own are trained."""
    parameters = _parameters(model)
    frozen = max(parameters - (trained_parameters(spec) or 0), 0)
    return 4.0 * parameters - (4.0 - _frozen_weight_bytes(spec, model, half)) * frozen


def _reference_bytes(spec: RunSpec, policy: float, trained: int) -> float:
    """Bytes of the model at the start, as far as there are more of them: an adapter is turned off for it; PPO copies
    the whole policy, other stages what is trained."""
    if spec.method.kind == "lora" or spec.stage.kind not in ("dpo", "kto", "ppo", "grpo"):
        return 0.0
    return policy if spec.stage.kind == "ppo" else 4.0 * trained


def _expert_width(model: ModelFacts) -> int:
    """Inputs and outputs of the experts that process a token, in all layers together."""
    structure = structure_of(model)
    return model.experts_per_token * sum(sum(structure.shapes[name][-2:]) for name in structure.experts)


def _reward_model_parameters(spec: RunSpec) -> int:
    """Parameters of the reward model, which is loaded as a whole."""
    folder = getattr(spec.stage, "reward_model", "")
    if not folder:
        return 0
    base = inspect_model(folder)
    return _parameters(inspect_model(base.adapter_of) if base.adapter_of else base)


def _base_bytes(spec: RunSpec, model: ModelFacts, plain: float) -> float:
    """Bytes of the base below an adapter."""
    parameters = _parameters(model)
    quantization = spec.model.quantization
    kind = model.stored_kind or quantization.kind
    if kind == "none":
        return plain * parameters
    scales_too = kind == quantization.kind == "4bit" and quantization.bnb_4bit_use_double_quant
    each = QUANTIZED_WEIGHT_BYTES["4bit, scales too" if scales_too else kind]
    whole = unquantized_parameters(spec, model)
    return each * (parameters - whole) + plain * whole


def unquantized_parameters(spec: RunSpec, model: ModelFacts) -> int:
    """The number of parameters that bitsandbytes leaves unquantized: embeddings, head, some experts, and whatever is no
    matrix of a linear layer, such as norms, biases and routers."""
    words = (model.vocab_size or 0) * (model.hidden_size or 0) * (1 if model.tied else 2)
    structure = structure_of(model)
    matrices = {f"{module}.weight" for module in structure.matrices()}.union(structure.experts)
    small = sum(math.prod(shape) for name, shape in structure.shapes.items() if name not in matrices)
    return words + small + unquantized_expert_parameters(spec, model)


def unquantized_expert_parameters(spec: RunSpec, model: ModelFacts) -> int:
    """Parameters of routed experts that keep the precision of the training while other weights are quantized."""
    structure = structure_of(model)
    quantized = _quantized_experts(spec, model)
    return sum(math.prod(structure.shapes[name]) for name in structure.experts if name not in quantized)


def _quantized_experts(spec: RunSpec, model: ModelFacts) -> frozenset[str]:
    """Those that are quantized as they are loaded. A quantized model on disk has others as they are."""
    loaded_quantized = quantizes_experts(spec) and not model.stored_kind
    return frozenset(structure_of(model).quantizable if loaded_quantized else ())


def _dequantized_bytes(spec: RunSpec, model: ModelFacts, plain: float) -> float:
    """The largest tensor of quantized experts while it is computed with: dequantized, and its scales in fp32."""
    shapes = structure_of(model).shapes
    return max((math.prod(shapes[name]) for name in _quantized_experts(spec, model)), default=0) * (plain + 4 / 64)


def _generation_bytes(spec: RunSpec, model: ModelFacts, plain: float) -> float:
    """Keys and values of the answers generated at a time, at their maximum length. They are freed before learning
    begins."""
    stage, training = spec.stage, spec.training
    if stage.kind not in ("ppo", "grpo"):
        return 0.0
    at_once = training.per_device_train_batch_size * training.gradient_accumulation_steps
    tokens = at_once * (spec.data.max_length + stage.max_new_tokens)
    return tokens * plain * (model.layers or 0) * (model.cache_width or 0)


def _optimizer_state_bytes(optimizer: str) -> float:
    return next((size for part, size in OPTIMIZER_STATE_BYTES.items() if part in optimizer), 8.0)


def _activation_bytes(spec: RunSpec, model: ModelFacts, width: int, half: bool) -> float:
    """Activations of the longest batch. With recomputation (Chen et al. 2016, arXiv:1604.06174), each layer keeps only
    its input, and one layer at a time all the rest."""
    training, batch = spec.training, spec.training.per_device_train_batch_size
    answer = getattr(spec.stage, "max_new_tokens", 0)
    tokens = batch * (spec.data.max_length * (2 if STAGES[spec.stage.kind].form == "pairs" else 1) + answer)
    assert model.layers  # ensured by `memory_needed`
    assert model.hidden_size
    # No gradient passes below the lowest trained layer.
    top = getattr(spec.method, "trainable_layers", model.layers) or model.layers
    depth = (model.layers if top < 0 else min(top, model.layers)) if spec.method.kind == "freeze" else model.layers
    kept = tokens * width / model.layers * ACTIVATION_BYTES * (1 if half else 2)
    # Trained embeddings are in fp32, and so is their output.
    lora = spec.method.kind == "lora"
    stream = 2 if half and (lora or _frozen_weight_bytes(spec, model, half) == 2) else 4
    # PPO recomputes in a way that does not cover 8-bit products: see engine.worker.training.trainers.
    escapes = spec.stage.kind == "ppo" and spec.model.quantization.kind == "8bit"
    if spec.model.attn_implementation == "eager" and model.heads:
        kept += tokens * (tokens // batch) * model.heads * EAGER_PAIR_BYTES * (1 if half else 2)
    if training.gradient_checkpointing and not escapes:
        layers = tokens * depth * model.hidden_size * stream + kept
    else:
        layers = depth * kept
    return layers + (LOSS_BYTES + ANSWER_TOKEN_BYTES * batch * answer) * (model.vocab_size or 0)


@dataclass(frozen=True)
class AvailableMemory:
    """The available memory: bytes of a GPU, or of the machine's memory."""

    bytes: int
    card: str  # its name; "" for the machine's memory


def available_memory(spec: RunSpec) -> AvailableMemory | None:
    """What each process of the run may take: as much as there is on enough GPUs for all of them, since the schedule
    gives it GPUs into which it fits. None if that is unknown."""
    gpus, processes = hardware.planned_gpus(), spec.hardware.processes_per_machine
    if on_cpu(spec, len(gpus)) or not gpus:
        whole = hardware.planned_memory()
        return None if whole is None else AvailableMemory(whole // processes, "")
    largest = sorted(usable_gpus(spec) or gpus, key=lambda gpu: -(gpu.memory or math.inf))[:processes]
    smallest = min(largest, key=lambda gpu: gpu.memory)
    return AvailableMemory(smallest.memory, smallest.name) if smallest.memory else None


def size_text(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:,.1f} GB"
