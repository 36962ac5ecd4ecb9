"""The command that serves an export with vLLM, and which adapters vLLM does not support. Pure: nothing is started."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, problem

# The values that vLLM accepts for --max-lora-rank (vllm/config/lora.py); the default is 16.
MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def serve_command(folder: Path, name: str, base: str = "", adapter: Mapping[str, Any] | None = None) -> str:
    """`vllm serve` for a full model, or for a base with a LoRA adapter."""
    if not adapter:
        return f"vllm serve {shlex.quote(str(folder))} --served-model-name {shlex.quote(name)}"
    words = ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"{name}={folder}"]
    if (needed := max_lora_rank(adapter)) and needed > 16:
        words += ["--max-lora-rank", str(needed)]
    if (folder / "chat_template.jinja").exists():
        words += ["--chat-template", str(folder / "chat_template.jinja")]
    return shlex.join(words)


def max_lora_rank(adapter: Mapping[str, Any]) -> int | None:
    """The smallest --max-lora-rank that fits the adapter; None if none does."""
    largest = max([adapter.get("r") or 0, *(adapter.get("rank_pattern") or {}).values()])
    return next((rank for rank in MAX_LORA_RANKS if rank >= largest), None)


def adapter_problems(adapter: Mapping[str, Any], *, on_vision: bool = False) -> list[Problem]:
    """Features of an adapter (its adapter_config.json) that vLLM does not support (vllm/lora/peft_helper.py). Empty: it
    can be served with its base. A merged model always can, if vLLM supports its architecture. `on_vision`: it also
    adapts the tower or the projector."""
    problems = []
    if on_vision:
        problems.append(problem("vllm-vision"))
    if adapter.get("task_type") == "SEQ_CLS":
        problems.append(problem("vllm-judge"))
    if whole := [*(adapter.get("modules_to_save") or ()), *(adapter.get("trainable_token_indices") or ())]:
        problems.append(problem("vllm-whole-modules", names=", ".join(whole)))
    if adapter.get("use_dora"):
        problems.append(problem("vllm-dora"))
    if adapter.get("bias", "none") != "none":
        problems.append(problem("vllm-bias"))
    if adapter.get("rank_pattern") or adapter.get("alpha_pattern"):
        problems.append(problem("vllm-patterns"))
    if max_lora_rank(adapter) is None:
        problems.append(problem("vllm-rank", rank=adapter.get("r"), most=MAX_LORA_RANKS[-1]))
    targets = adapter.get("target_modules") or ()
    ends = {target.rpartition(".")[2] for target in ([targets] if isinstance(targets, str) else targets)}
    if outer := sorted(ends & {"embed_tokens", "lm_head", "wte"}):
        problems.append(problem("vllm-embeddings", names=", ".join(outer)))
    return problems
