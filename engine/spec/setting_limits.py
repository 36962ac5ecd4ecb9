"""Settings of which something has only some values: tables of them, and what of a spec is outside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from engine.spec.run_spec import SPEC_CHOICES, RunSpec


@dataclass(frozen=True)
class Limit:
    """A setting of which only some values are possible. `stages`: the stages in which this is so; () for all.
    `reason`: the code of the sentence that says why, if there is one."""

    path: str
    allowed: tuple[Any, ...]
    stages: tuple[str, ...] = ()
    reason: str = ""

    def applies_to(self, spec: RunSpec) -> bool:
        return not self.stages or spec.stage.kind in self.stages


def value_at(spec: RunSpec, path: str) -> Any:
    """The value of the setting at a path, or the kind of a choice; None if the chosen kind does not have the
    setting."""
    value: Any = spec
    for name in path.split("."):
        value = getattr(value, name, None)
    return value.kind if path in SPEC_CHOICES else value


def exceeded(limits: Iterable[Limit], spec: RunSpec) -> Iterator[tuple[Limit, Any]]:
    """What of `spec` is not possible: each limit with the value that exceeds it."""
    for limit in limits:
        value = value_at(spec, limit.path)
        if limit.applies_to(spec) and value is not None and value not in limit.allowed:
            yield limit, value


def named(values: Iterable[Any]) -> str:
    """The values in a sentence; — for none."""
    return ", ".join("—" if value in (None, [], "") else str(value) for value in values)
