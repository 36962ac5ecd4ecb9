"""The structure of the model in a folder, without its weights: python -m engine.worker.models.skeleton FOLDER

Builds the model on torch's meta device, where tensors have shapes and no
memory, and prints `engine.models.structure`'s JSON.
"""

from __future__ import annotations

import contextlib
import os
import sys

from engine.models.structure import structure_as_json
from engine.worker.runtime.optional_packages import hide_unused_packages
from engine.worker.runtime.process_lifecycle import library_imports


def main() -> None:
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    hide_unused_packages(quantizes=False)
    with library_imports():
        import torch
        from transformers import AutoConfig

        from engine.worker.models.structure import model_class, structure_of
    config = AutoConfig.from_pretrained(sys.argv[1])
    with contextlib.suppress(AttributeError):
        del config.quantization_config  # how the weights lie on disk changes no module's name
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    print(structure_as_json(structure_of(model)), file=output, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
