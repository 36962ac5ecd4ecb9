"""Specs from the form: of the export that it describes, and of a training that continues from an export."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.core.problems import Refusal, problem
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import Workplace
from engine.runs.results import new_export_spec, result_of
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec


def export_spec_of(held: Mapping[str, Any], workplace: Workplace) -> ExportSpec:
    """The spec from the values of the controls, by their names. Raises Refusal with everything that cannot be
    parsed."""
    ids = list(held["runs"] or ())
    plain = {
        name: held[name].strip() if isinstance(held[name], str) else held[name]
        for name in held
        if name not in ("runs", "weights", "device", "prompts") and held[name] is not None
    }
    plain["svd_rank"] = plain.get("svd_rank") or None
    plain["prompts"] = [line for line in str(held["prompts"] or "").splitlines() if line.strip()]
    plain["hardware"] = {"device": held["device"]}
    return new_export_spec(workplace, _weights(str(held["weights"] or ""), ids), **plain)


def _weights(text: str, ids: Sequence[str]) -> dict[str, float]:
    """One number for each run, in their order; 1 by default. Raises Refusal."""
    typed = [part for part in re.split(r"[,，;；\s]+", text.strip()) if part] if len(ids) > 1 else []
    try:
        numbers = [float(part) for part in typed]
    except ValueError as error:
        raise Refusal(problem("spec-type-float", "adapters.weights", given=text[:60])) from error
    if len(numbers) > len(ids):
        raise Refusal(problem("export-weights-many", "adapters", given=len(numbers), runs=len(ids)))
    return dict(zip(ids, [*numbers, *[1.0] * (len(ids) - len(numbers))], strict=True))


def with_export(run: Run, spec: RunSpec) -> RunSpec:
    """The form's values with an export as the model; a LoRA-only export uses its base. Raises Refusal."""
    result = result_of(run)
    if result is None:
        raise Refusal(problem("export-no-result", id=run.id))
    base = str(run.spec.model.model_name_or_path if result.adapter else result.folder)
    adapter = str(result.folder) if result.adapter else None
    spec = spec.change("model.model_name_or_path", base).change("model.adapter_path", adapter)
    return spec.change("model.chat_template", None).change("model.quantization", {"kind": "none"})
