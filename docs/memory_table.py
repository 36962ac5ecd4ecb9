"""docs/memory.md: what trainings of well-known shapes need, by the estimate that the page shows before a start."""

from __future__ import annotations

import json
import math
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.models.facts import inspect_model
from engine.models.safetensors_headers import DTYPE_BITS
from engine.preflight.memory import MemoryNeed, memory_needed
from engine.spec.run_spec import RunSpec

PAGE = Path(__file__).parent / "memory.md"
TEXT = Path(__file__).parent / "memory.md.template"
GB = 1e9
MAX_LENGTH = 2048


def dense(hidden: int, inner: int, layers: int, heads: int, key_heads: int, words: int) -> dict[str, Any]:
    """The configuration of a model of Llama's build, whose attention and MLP have no biases."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "vocab_size": words, "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }  # fmt: skip


SHAPES = {
    "Qwen2.5-7B": dense(3584, 18944, 28, 28, 4, 152064),
    "Llama-3.1-8B": dense(4096, 14336, 32, 32, 8, 128256),
    "Qwen2.5-14B": dense(5120, 13824, 48, 40, 8, 152064),
    "Qwen2.5-32B": dense(5120, 27648, 64, 40, 8, 152064),
    "Llama-3.1-70B": dense(8192, 28672, 80, 64, 8, 128256),
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "hidden_size": 2048,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"kind": "full"}},
    "freeze, 2 layers": {"method": {"kind": "freeze", "trainable_layers": 2}},
    "LoRA": {"method": {"kind": "lora", "r": 16}},
    "QLoRA, 8 bits": {"method": {"kind": "lora", "r": 16}, "quantization": {"kind": "8bit"}},
    "QLoRA, 4 bits": {"method": {"kind": "lora", "r": 16}, "quantization": {"kind": "4bit"}},
}
# GB for models of 7, 14, 30 and 70 billion parameters, as LLaMA-Factory's README estimates them (its table of hardware
# requirements, rows full (bf16 or fp16), LoRA, QLoRA with 8 and with 4 bits).
PEER = {
    "full": (120, 240, 600, 1200), "LoRA": (16, 32, 64, 160), "QLoRA, 8 bits": (10, 20, 40, 80),
    "QLoRA, 4 bits": (6, 12, 24, 48),
}  # fmt: skip
PEER_SHAPES = ("Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B", "Llama-3.1-70B")


def tensor_sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes of a model's matrices as they are published; norms, 0.01 % of it, are left out."""
    hidden, words, heads = config["hidden_size"], config["vocab_size"], config["num_attention_heads"]
    size = config.get("head_dim", hidden // heads)
    keys = size * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (words, hidden)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (words, hidden)
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        yield f"{start}.self_attn.q_proj.weight", (size * heads, hidden)
        yield f"{start}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{start}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{start}.self_attn.o_proj.weight", (hidden, size * heads)
        experts = config.get("num_experts", 0)
        inner = config["moe_intermediate_size"] if experts else config["intermediate_size"]
        if experts:
            yield f"{start}.mlp.gate.weight", (experts, hidden)
        for part in [f"experts.{number}." for number in range(experts)] or [""]:
            yield f"{start}.mlp.{part}gate_proj.weight", (inner, hidden)
            yield f"{start}.mlp.{part}up_proj.weight", (inner, hidden)
            yield f"{start}.mlp.{part}down_proj.weight", (hidden, inner)


def write_headers(folder: Path, config: Mapping[str, Any], dtype: str = "BF16") -> Path:
    """A model folder with its configuration and the header of its weights; the weights are a hole in the file."""
    folder.mkdir(parents=True)
    header, at, each = {}, 0, DTYPE_BITS[dtype] // 8
    for name, size in tensor_sizes(config):
        header[name] = {"dtype": dtype, "shape": size, "data_offsets": [at, at := at + each * math.prod(size)]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def spec_of(model: Path, method: str) -> RunSpec:
    """One example of MAX_LENGTH tokens at a time on a GPU in bf16, with recomputation; the rest as by default."""
    changes = METHODS[method]
    return RunSpec.read({
        "model": {"model_name_or_path": str(model)} | {key: changes[key] for key in changes if key == "quantization"},
        "method": changes["method"],
        "data": {"datasets": ["rows"], "max_length": MAX_LENGTH},
        "training": {
            "precision": "bf16", "per_device_train_batch_size": 1, "gradient_checkpointing": True,
            "gradient_accumulation_steps": 16,
        },
        "hardware": {"device": "cuda"},
    })  # fmt: skip


def needs() -> dict[str, dict[str, MemoryNeed]]:
    """By shape, then by method."""
    rows: dict[str, dict[str, MemoryNeed]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, config in SHAPES.items():
            facts = inspect_model(write_headers(Path(place) / name, config))
            for method in METHODS:
                need = memory_needed(spec_of(facts.path, method), facts, gpu_count=1)
                assert need is not None
                rows.setdefault(name, {})[method] = need
    return rows


def page(rows: Mapping[str, Mapping[str, MemoryNeed]]) -> str:
    """The whole page as Markdown."""
    table = [f"| | {' | '.join(METHODS)} |", f"|---|{'---:|' * len(METHODS)}"]
    for name, row in rows.items():
        table.append(f"| {name} | {' | '.join(f'{row[method].total / GB:,.1f}' for method in METHODS)} |")
    parts = ["| Qwen2.5-7B | weights | gradients, optimizer | activations | libraries |", "|---|---:|---:|---:|---:|"]
    for method, need in rows["Qwen2.5-7B"].items():
        values = (need.weights, need.learning, need.activations, need.libraries)
        parts.append(f"| {method} | {' | '.join(f'{value / GB:,.1f}' for value in values)} |")
    beside = ["| | 7B | 14B | 30B | 70B |", "|---|---:|---:|---:|---:|"]
    for method, published in PEER.items():
        held = [rows[name][method] for name in PEER_SHAPES]
        pairs = zip(held, published, strict=True)
        cells = (f"{(need.weights + need.learning) / GB:,.0f} · {theirs:,}" for need, theirs in pairs)
        beside.append(f"| {method} | {' | '.join(cells)} |")
    return TEXT.read_text(encoding="utf-8").format(
        length=f"{MAX_LENGTH:,}", table="\n".join(table), parts="\n".join(parts), beside="\n".join(beside)
    )
