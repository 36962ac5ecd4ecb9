"""Limits of a trainer's extra arguments that their types do not show: beyond these the first step fails, or never
happens.

From the checks in transformers' TrainingArguments and in the constructors of PyTorch's optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.core.problems import Problem, problem

if TYPE_CHECKING:
    from engine.spec.run_spec import RunSpec

# Smallest and largest value; the upper limit of a momentum is exclusive.
EXTRA_ARGUMENT_LIMITS = {
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.9999999),
    "adam_epsilon": (0, 1),
    "label_smoothing_factor": (0, 0.999999),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, 10**6),
    "eval_delay": (0, 10**9),
    "eval_accumulation_steps": (1, 10**9),
    "ddp_bucket_cap_mb": (1, 10**6),
    "ddp_timeout": (1, 10**9),
    "torch_empty_cache_steps": (1, 10**9),
}
EXTRA_ARGUMENT_CHOICES = {"ddp_backend": ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl")}


def limit_problems(spec: RunSpec, measured: bool) -> Iterator[Problem]:
    """Invalid extra arguments; `measured`: there is validation."""
    extra = spec.extra
    for name, (low, high) in EXTRA_ARGUMENT_LIMITS.items():
        value = extra.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not low <= value <= high:
            yield problem("extra-limit", "extra", name=name, given=value, low=low, high=high)
    for name, choices in EXTRA_ARGUMENT_CHOICES.items():
        if isinstance(extra.get(name), str) and extra[name] not in choices:
            yield problem("spec-choice", f"extra.{name}", given=extra[name], choices=", ".join(choices))
    if extra.get("eval_on_start") is True and not measured:
        yield problem("needs-validation", "extra.eval_on_start")
    if extra.get("dataloader_prefetch_factor") and not extra.get("dataloader_num_workers"):
        yield problem("prefetch-needs-workers", "extra")
