"""The structure of the model in a folder, without its weights: python -m engine.worker.models.skeleton FOLDER

It builds the model on torch's meta device, where tensors have shapes but no memory, and prints the JSON of
`engine.models.structure`.
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
    os.dup2(2, 1)  # output of libraries is not an answer
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    hide_unused_packages(quantizes=False)
    with library_imports():
        import torch
        from transformers import AutoConfig

        from engine.worker.models.structure import model_class, structure_of
    config = AutoConfig.from_pretrained(sys.argv[1])
    with contextlib.suppress(AttributeError):
        del config.quantization_config  # how the weights are stored does not change module names
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    print(structure_as_json(structure_of(model)), file=output, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
