"""Known failures → a change to the spec with which the run would probably have worked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from engine.core import regular_files
from engine.core.problems import Refusal
from engine.launch.accelerate_config import is_fsdp, is_hybrid
from engine.runs.failures import explain
from engine.runs.run import Run
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec

Change = dict[str, Any]  # path of a setting → its new value
LOADER_PROCESSES = "dataloader_num_workers"
MIN_MAX_LENGTH = 512  # a shorter one would truncate what people train on


def remedy(run: Run) -> RunSpec | None:
    """The spec of a failed training with the first valid change that helps against its failure; None if no change would
    help, or none is known."""
    why = explain(run)
    if why is None or run.kind != "training":
        return None
    codes = [code for code in (why.code, *(entry["code"] for entry in why.problems)) if code in REMEDIES]
    if not codes:
        return None
    try:
        spec = run.spec
        launched = regular_files.read_text(run.dir.accelerate) if run.dir.accelerate.exists() else ""
        if launched and is_fsdp(launched):  # which "auto" may have chosen
            spec = spec.change("hardware.strategy.kind", "fsdp2")
        if launched and is_hybrid(launched):
            spec = spec.change("hardware.strategy.sharding", "hybrid")
    except Refusal:
        return None
    before = {problem.code for problem in spec_problems(spec)}
    for change in REMEDIES[codes[0]](spec):
        changed = _changed(spec, change)
        if changed and changed != spec and before.issuperset(problem.code for problem in spec_problems(changed)):
            return changed
    return None


def _changed(spec: RunSpec, change: Change) -> RunSpec | None:
    try:
        for path, value in change.items():
            spec = spec.change(path, value)
    except Refusal:  # a value beyond its limit
        return None
    return spec


def _less_device_memory(spec: RunSpec) -> Iterator[Change]:
    """The cheapest change first; the number of examples per step stays the same."""
    training = spec.training
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if not training.gradient_checkpointing:
        yield {"training.gradient_checkpointing": True}
    if batch > 1:
        smaller = batch // 2 if batch % 2 == 0 else 1
        yield {
            "training.per_device_train_batch_size": smaller,
            "training.gradient_accumulation_steps": accumulation * batch // smaller,
        }
    if spec.hardware.num_processes > 1 and spec.hardware.strategy.kind in ("auto", "ddp"):
        yield {"hardware.strategy": {"kind": "fsdp2"}}
    if spec.hardware.copies > 1:
        yield {"hardware.strategy.sharding": "full"}
    if spec.method.kind == "lora" and spec.model.quantization.kind == "none":
        yield {"model.quantization": {"kind": "4bit"}}
    if spec.data.max_length > MIN_MAX_LENGTH:
        yield {"data.max_length": max(spec.data.max_length // 2, MIN_MAX_LENGTH)}


def _fewer_processes(spec: RunSpec) -> Iterator[Change]:
    if spec.extra.get(LOADER_PROCESSES):
        yield _with_extra(spec, **{LOADER_PROCESSES: 0})
    workers = spec.data.preprocessing_num_workers
    if workers is None or workers > 1:
        yield {"data.preprocessing_num_workers": 1}


def _plain_attention(spec: RunSpec) -> Iterator[Change]:
    yield {"model.attn_implementation": "auto"}
    yield {"model.attn_implementation": "eager"}


def _without_bitsandbytes(spec: RunSpec) -> Iterator[Change]:
    change: Change = {}
    if spec.model.quantization.kind != "none":
        change["model.quantization"] = {"kind": "none"}
    if any(word in spec.training.optim for word in ("bnb", "8bit", "paged")):
        change["training.optim"] = "adamw_torch"
    yield change


def _smaller_steps(spec: RunSpec) -> Iterator[Change]:
    if spec.training.precision == "fp16":
        yield {"training.precision": "bf16"}
    yield {"training.learning_rate": spec.training.learning_rate / 10}


def _with_extra(spec: RunSpec, **arguments: Any) -> Change:
    return {"extra": spec.extra | arguments}


def _without_extra(*names: str) -> Callable[[RunSpec], Iterator[Change]]:
    def change(spec: RunSpec) -> Iterator[Change]:
        yield {"extra": {name: value for name, value in spec.extra.items() if name not in names}}

    return change


REMEDIES: dict[str, Callable[[RunSpec], Iterator[Change]]] = {
    "device-memory": _less_device_memory,
    "cublas": _less_device_memory,
    "host-memory": _fewer_processes,
    "worker-killed": _fewer_processes,
    "shared-memory": _fewer_processes,
    "threads": _fewer_processes,
    "fork-cuda": _without_extra(LOADER_PROCESSES),
    "attention": _plain_attention,
    "card-access": _plain_attention,
    "bitsandbytes": _without_bitsandbytes,
    "precision": lambda spec: iter([{"training.precision": "auto"}, {"training.precision": "fp32"}]),
    "not-finite": _smaller_steps,
    "loss-not-finite": _smaller_steps,
    "loss-diverged": _smaller_steps,
    "compiler": _without_extra("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    "determinism": _without_extra("full_determinism"),
    "tracker": lambda spec: iter([{"logging.report_to": []}]),
    "token-beyond": lambda spec: iter([{"model.resize_embeddings": True}]),
    "unused-parameters": lambda spec: iter([_with_extra(spec, ddp_find_unused_parameters=True)]),
    "card-index": lambda spec: iter([{"hardware.devices": []}]),
}
