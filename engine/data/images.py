"""An image of a row: where it may lie, what its header says, and its pixels. What a row means by it is left to
`engine.data.row_images`.

A header is read before any pixel is, so that a small file that unfolds into gigabytes is refused unseen.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from engine.core.problems import Problem, Refusal, problem

# Stands for an image in the text of a message: a code point that Unicode reserves for the inside of programs.
IMAGE_MARK = "\ufdd0"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_IMAGE_BYTES = 64 << 20  # of a file
MAX_IMAGE_PIXELS = 64_000_000  # width times height; 192 MB as colours
ORIENTATION_TAG = 0x0112  # of EXIF: how the camera was held
TURNED = (5, 6, 7, 8)  # orientations that swap width and height
# A size in pixels, width before height.
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image that was looked at: an absolute `path`, or the `content` of one that the row itself holds.

    `width` and `height` are in pixels, turned as the camera was held. `modified` (ns) and `bytes` are those of the file
    when it was looked at.
    """

    path: str
    content: bytes | None
    width: int
    height: int
    bytes: int
    modified: int

    @property
    def size(self) -> Size:
        return self.width, self.height

    @property
    def identity(self) -> str:
        """The same for the same image: its path, or a hash of what it holds."""
        return self.path or hashlib.sha256(self.content or b"").hexdigest()

    def is_unchanged(self) -> bool:
        """Whether the file is the one that was looked at."""
        if self.content is not None:
            return True
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.bytes, self.modified)


def image_in_file(path: Path) -> ImageSource:
    """The image in a file. Raises Refusal with what its header says is wrong, without a place."""
    try:
        status = path.stat()
    except OSError as error:
        raise Refusal(problem("row-image-broken", image=path.name, reason=error.strerror or error)) from error
    seen = _seen_in_file(str(path), status.st_size, status.st_mtime_ns)
    if isinstance(seen, Problem):
        raise Refusal(seen)
    return ImageSource(str(path), None, *seen, status.st_size, status.st_mtime_ns)


def image_in_bytes(content: bytes, name: str) -> ImageSource:
    """The image in a row itself, called `name` in sentences. Raises Refusal as `image_in_file`."""
    seen = _seen(io.BytesIO(content), len(content), name)
    if isinstance(seen, Problem):
        raise Refusal(seen)
    return ImageSource("", content, *seen, len(content), 0)


@lru_cache(maxsize=65536)
def _seen_in_file(path: str, size: int, _modified: int) -> Size | Problem:
    return _seen(path, size, os.path.basename(path))


def _seen(stream: Any, size: int, name: str) -> Size | Problem:
    """Width and height by the header, or what is wrong."""
    if size > MAX_IMAGE_BYTES:
        limit = f"{MAX_IMAGE_BYTES >> 20} MB"
        return problem("row-image-large", image=name, found=f"{size / (1 << 20):.0f} MB", limit=limit)
    try:
        with Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                return _too_many_pixels(name, f"{width} × {height}")
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                return problem("row-image-animated", image=name, frames=frames)
            turned = image.getexif().get(ORIENTATION_TAG) in TURNED
            return (height, width) if turned else (width, height)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return _too_many_pixels(name, "?")
    except UnidentifiedImageError:
        return problem("row-image-format", image=name, known=", ".join(FORMATS))
    # Whatever a broken file makes a decoder raise: struct.error, zlib.error, EOFError, …
    except Exception as error:
        return problem("row-image-broken", image=name, reason=str(error) or type(error).__name__)


def _too_many_pixels(name: str, size: str) -> Problem:
    limit = f"{MAX_IMAGE_PIXELS // 1_000_000}"
    return problem("row-image-large", image=name, found=f"{size} px", limit=f"{limit} Mpx")


def decode(source: ImageSource) -> Image.Image:
    """The image as RGB, turned as the camera was held. Raises Refusal if it is broken, or no longer what it was."""
    name = os.path.basename(source.path) or "image"
    try:
        with Image.open(_readable(source), formats=FORMATS) as image:
            pixels = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # see above
        reason = str(error) or type(error).__name__
        raise Refusal(problem("row-image-broken", image=name, reason=reason)) from error
    if pixels.size != source.size:
        raise Refusal(problem("image-changed", image=source.path))
    return pixels


def _readable(source: ImageSource) -> Any:
    return source.path or io.BytesIO(source.content or b"")


def decoding_problem(source: ImageSource) -> Problem | None:
    """What is wrong with an image that shows only when all of it is decoded; remembered for files."""
    if source.content is None:
        return _file_decoding_problem(source)
    return _decoding_problem(source)


@lru_cache(maxsize=65536)
def _file_decoding_problem(source: ImageSource) -> Problem | None:
    return _decoding_problem(source)


def _decoding_problem(source: ImageSource) -> Problem | None:
    name = os.path.basename(source.path) or "image"
    try:
        with Image.open(_readable(source), formats=FORMATS) as image:
            image.draft("RGB", (1, 1))  # a JPEG is read to its end, at an eighth of its size
            image.load()
    except Exception as error:  # see above
        return problem("row-image-broken", image=name, reason=str(error) or type(error).__name__)
    return None
