"""The numbers that a model's image processor makes of images of given sizes, in all:
python -m engine.worker.models.image_values SETTINGS SIZES

SETTINGS: the parts of a spec that decide it, SIZES: a list of [width, height], both as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from engine.spec.run_spec import RunSpec
from engine.worker.runtime.optional_packages import hide_torch


def image_values(spec: RunSpec, sizes: list[list[int]]) -> int:
    """As of one row with these images. Raises Refusal if the model's processor does not process them."""
    import numpy as np
    from PIL import Image

    from engine.worker.models.processor import image_options, load_image_tokens
    from engine.worker.models.tokenizer import load_tokenizer

    path = spec.model.model_name_or_path
    tokens = load_image_tokens(path, load_tokenizer(spec, path), **image_options(spec))
    made = tokens.pixels([[Image.new("RGB", (width, height)) for width, height in sizes]], "np")
    arrays: list[Any] = [np.asarray(value) for value in made.values()]
    return sum(array.size for array in arrays if np.issubdtype(array.dtype, np.floating))


def main() -> None:
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries is not an answer
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    hide_torch()
    settings, sizes = sys.argv[1:]
    print(image_values(RunSpec.read(json.loads(settings)), json.loads(sizes)), file=output, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
