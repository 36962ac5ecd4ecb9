"""How many numbers an image processor makes of images, of which it may scale some and divide others into tiles.

A child process asks the processor itself: `engine.worker.models.image_values`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from engine.models import child
from engine.models.processor_files import PROCESSOR_FILES
from engine.spec.run_spec import RunSpec

Size = tuple[int, int]  # width and height in pixels


def image_values(spec: RunSpec, sizes: Sequence[Size]) -> int | None:
    """The numbers that the model of `spec` gets for the images of one row, in all: width × height × 3 of an image that
    is not scaled, more if tiles are added. None if its processor cannot be asked."""
    folder = Path(spec.model.model_name_or_path)
    settings = {
        "model": spec.model.model_dump(mode="json"),
        "data": {"image_min_pixels": spec.data.image_min_pixels, "image_max_pixels": spec.data.image_max_pixels},
    }
    try:
        return _image_values(json.dumps(settings), tuple(sizes), _stamps(folder))
    except child.NoAnswer:
        return None


@child.remembered
def _image_values(settings: str, sizes: tuple[Size, ...], _of: tuple[tuple[str, int], ...]) -> int | None:
    try:
        return int(child.ask("engine.worker.models.image_values", settings, json.dumps(sizes)))
    except child.TooSlow:
        raise
    except (child.NoAnswer, ValueError):
        return None


def _stamps(folder: Path) -> tuple[tuple[str, int], ...]:
    stamps = []
    for file in sorted(folder.glob(PROCESSOR_FILES)):
        try:
            stamps.append((file.name, os.stat(file).st_mtime_ns))
        except OSError:  # removed at this moment
            continue
    return tuple(stamps)
