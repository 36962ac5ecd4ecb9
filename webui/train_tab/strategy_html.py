"""The strategy on the form: choices that exclude each other are greyed out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.core import hardware
from engine.launch.command import can_divide_weights
from engine.preflight.package_checks import deepspeed_installed
from engine.spec.hardware_settings import Fsdp2
from engine.spec.run_spec import SPEC_CHOICES, RunSpec
from engine.spec.setting_limits import value_at
from engine.spec.strategies import LIMITS, ZERO_STAGES, limit_problems
from webui.form.settings import choices, control_kind, element_id
from webui.words import Words

STRATEGY = "hardware.strategy"


def disabled_choices_css(spec: RunSpec, words: Words) -> str:
    """A style sheet that greys out what cannot be combined with the other settings; choosing it anyway is refused."""
    greyed = [_selector(path, value, words) for path, value in excluded_choices(spec)]
    return f"<style>{','.join(greyed)}{{opacity:.4;pointer-events:none}}</style>" if greyed else ""


def excluded_choices(spec: RunSpec) -> Iterator[tuple[str, Any]]:
    """Choices that are not made and would be a problem: the path of a setting, and a value of it."""
    strategy, processes = spec.hardware.strategy, spec.hardware.num_processes
    chosen = strategy.kind
    for limit in LIMITS.get(chosen, ()):
        current = value_at(spec, limit.path)
        if limit.applies_to(spec) and current is not None:
            values = (True, False) if isinstance(current, bool) else choices(limit.path)
            yield from ((limit.path, value) for value in values if value not in (*limit.allowed, current))
    if isinstance(strategy, Fsdp2) and strategy.sharding != "hybrid" and not spec.hardware.can_be_hybrid:
        yield f"{STRATEGY}.sharding", "hybrid"
    possible = can_divide_weights(spec, len(hardware.planned_gpus()))
    divided = [kind for kind in LIMITS if not possible or limit_problems(spec, kind)]
    excluded = ["ddp", *LIMITS] if processes == 1 else ["single", *divided]
    yield from ((STRATEGY, kind) for kind in excluded if kind != chosen)


def hidden_choices_css(spec: RunSpec) -> str:
    """A style sheet that hides the strategies of DeepSpeed where it is not installed, unless one is chosen."""
    chosen = spec.hardware.strategy.kind
    if deepspeed_installed() or chosen in ZERO_STAGES:
        return ""
    labels = ",".join(f'#{element_id(STRATEGY)} label:has(input[value="{kind}"])' for kind in ZERO_STAGES)
    return f"<style>{labels}{{display:none}}</style>"


def _selector(path: str, value: Any, words: Words) -> str:
    if path in SPEC_CHOICES:
        return f'#{element_id(path)} label:has(input[value="{value}"])'
    if control_kind(path) == "tick":
        return f"#{element_id(path)}"
    return f'#{element_id(path)} li[aria-label="{words.choice(path, value)}"]'
