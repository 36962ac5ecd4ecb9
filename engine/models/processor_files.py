"""The files that convert images, videos and audio into numbers, kept next to a model trained on text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.models.json_objects import json_object_or_empty

SMALLEST_AREA = 10_000  # pixels: a limit below it is the length of a side
PROCESSOR_FILES = "*processor_config.json"  # of the processor as a whole, and of each kind of input


def copy_processor_files(base: Path, folder: Path) -> None:
    """Copy them, if there are any, from the folder of a base model to that of a result."""
    for file in base.glob(PROCESSOR_FILES):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def has_image_processor(folder: Path) -> bool:
    """Whether the folder of a model has an image processor."""
    contents = (json_object_or_empty(file) for file in sorted(folder.glob(PROCESSOR_FILES)))
    return any("image_processor_type" in content or "image_processor" in content for content in contents)


def pixel_limits(folder: Path) -> tuple[int, int] | None:
    """The least and the most pixels of an image for the image processor in a folder; None if it has no such limits."""
    for file in sorted(folder.glob(PROCESSOR_FILES)):
        content = json_object_or_empty(file)
        if limits := _limits(content.get("image_processor") or content):
            return limits
    return None


def _limits(content: Mapping[str, Any]) -> tuple[int, int] | None:
    size = content.get("size")
    size = size if isinstance(size, dict) else {}
    least = content.get("min_pixels") or size.get("shortest_edge")
    most = content.get("max_pixels") or size.get("longest_edge")
    if not isinstance(least, int) or not isinstance(most, int):
        return None
    # The limits of other processors are lengths of sides.
    return (least, most) if most >= SMALLEST_AREA or "max_pixels" in content else None


def set_pixel_limits(folder: Path, least: int | None, most: int | None) -> None:
    """Write other limits into the files of an image processor that has some; None leaves one as it is."""
    for file in sorted(folder.glob(PROCESSOR_FILES)):
        content = json_object_or_empty(file)
        own = content.get("image_processor") or content
        if limits := _limits(own):
            own["min_pixels"], own["max_pixels"] = least or limits[0], most or limits[1]
            own["size"] = {"shortest_edge": own["min_pixels"], "longest_edge": own["max_pixels"]}
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
