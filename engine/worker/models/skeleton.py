"""The structure of the model in a folder, without its weights: python -m engine.worker.models.skeleton FOLDER

It builds the model on torch's meta device, where tensors have shapes but no memory, and prints the JSON of
`engine.models.structure`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from typing import Any

from engine.models.structure import structure_as_json
from engine.worker.runtime.optional_packages import hide_unused_packages
from engine.worker.runtime.process_lifecycle import library_imports


def main() -> None:
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries is not an answer
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    hide_unused_packages(quantizes=False)
    with library_imports():
        from engine.worker.models.structure import structure_of
    model, missing = load_without_weights(sys.argv[1])
    print(structure_as_json(replace(structure_of(model), missing=missing)), file=output, flush=True)
    os._exit(0)


def load_without_weights(folder: str) -> tuple[Any, tuple[str, ...]]:
    """The model in a folder with weights that have shapes but no memory, and the names of those that its files lack."""
    import torch
    from transformers import AutoConfig

    from engine.worker.models.structure import model_class

    config = AutoConfig.from_pretrained(folder)
    if not hasattr(config, "quantization_config"):
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):  # files of another model
            model, report = model_class(config).from_pretrained(
                folder, config=config, device_map={"": "meta"}, use_safetensors=True, output_loading_info=True
            )
            return model, tuple(sorted(report["missing_keys"]))
    with contextlib.suppress(AttributeError):
        del config.quantization_config  # how the weights are stored does not change module names
    with torch.device("meta"):
        return model_class(config).from_config(config), ()


if __name__ == "__main__":
    main()
