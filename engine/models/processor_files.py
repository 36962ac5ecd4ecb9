"""The files that convert images, videos and audio into numbers, kept next to a model trained on text."""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.models.json_objects import json_object_or_empty

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
