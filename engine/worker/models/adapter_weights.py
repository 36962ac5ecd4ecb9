"""The weights of a trained adapter: what is checked before they are saved, and what peft leaves out of the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.core.problems import Refusal, problem
from engine.models.vision_parts import name_in_base
from engine.spec.run_spec import RunSpec


def refuse_empty_adapter(spec: RunSpec, model: Any, whole: Mapping[str, Tensor] | None = None) -> None:
    """Raises Refusal if an adapter has learned nothing, or nothing in a vision part that was to get one. `whole`: its
    weights by name, if those in the model are divided among processes."""
    named = dict(model.named_parameters()) if whole is None else whole
    weights = {name: weight for name, weight in named.items() if "lora_B.default" in name}
    learned = {name: bool(weight.detach().any()) for name, weight in weights.items()}
    if learned and not any(learned.values()):
        raise Refusal(problem("adapter-empty"))
    for part in ("tower", "projector"):
        if getattr(spec.vision, part) == "adapter":
            names = [name for name in learned if model.structure.part_of(name_in_base(name)) == part]
            if not any(learned[name] for name in names):
                raise Refusal(problem("adapter-part-empty", f"vision.{part}"))


def add_whole_modules(model: PeftModel, file: Path) -> None:
    """Add the modules trained in full to an adapter that peft has converted, since peft writes only the converted
    matrices."""
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    whole = {name: tensor.contiguous() for name, tensor in adapter.items() if "lora_" not in name}
    save_file(load_file(file) | whole, file, metadata={"format": "pt"})
