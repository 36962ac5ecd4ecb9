"""The images of prepared rows as a column of a table: their paths and sizes, without pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from engine.data.images import ImageSource

IMAGES_COLUMN = "image_sources"  # exists if any row has images
# The fields are those of `engine.data.images.ImageSource`.
IMAGES_TYPE = pa.list_(
    pa.struct(
        {
            "path": pa.string(),
            "content": pa.binary(),
            "width": pa.int32(),
            "height": pa.int32(),
            "bytes": pa.int64(),
            "modified": pa.int64(),
        }
    )
)


def images_column(rows: Iterable[Sequence[ImageSource]]) -> pa.ListArray:
    """The images of each row."""
    return pa.array([[asdict(image) for image in images] for images in rows], IMAGES_TYPE)


def images_unchanged(file: Path) -> bool:
    """Whether all image files of the rows in a table are unchanged since they were prepared."""
    files: set[tuple[str, int, int]] = set()
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
        for batch in stream:
            images = batch.column(IMAGES_COLUMN).flatten()
            fields = (images.field(name).to_pylist() for name in ("path", "bytes", "modified"))
            files.update(zip(*fields, strict=True))
    return all(ImageSource(path, None, 0, 0, size, modified).is_unchanged() for path, size, modified in files if path)
