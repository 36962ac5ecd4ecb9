"""The image of a row: where it may be, its header, and its pixels. `engine.data.row_images` knows how rows refer to it.

Headers are read before pixels, so that a small file that would decompress to gigabytes is rejected unread.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageOps, UnidentifiedImageError

from engine.core.problems import Problem, Refusal, problem

# Represents an image in the text of a message: a code point that Unicode reserves for internal use.
IMAGE_MARK = "\ufdd0"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
METADATA_STEM, METADATA_SUFFIXES = "metadata", (".jsonl", ".csv")  # of ImageFolder in the datasets library
MAX_IMAGE_BYTES = 64 << 20  # per file
MAX_IMAGE_PIXELS = 64_000_000  # width times height; 192 MB as RGB
ORIENTATION_TAG = 0x0112  # of EXIF: how the camera was held
TURNED = (5, 6, 7, 8)  # orientations that swap width and height
# A size in pixels, width first.
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ImageSource:
    """A checked image: an absolute `path`, or the `content` of an image that is part of the row.

    `width` and `height` are in pixels, after the rotation of EXIF. `modified` (ns) and `bytes` are those of the file
    when it was checked.
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
        """Equal for equal images: the path, or a hash of the content."""
        return self.path or hashlib.sha256(self.content or b"").hexdigest()

    def is_unchanged(self) -> bool:
        """Whether the file is unchanged since it was checked."""
        if self.content is not None:
            return True
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.bytes, self.modified)


def image_from_json(image: Mapping[str, Any]) -> ImageSource:
    """An image as the questions of an evaluation are stored, with content that is part of a row as base64. Raises
    TypeError or ValueError if it is not one."""
    content = image["content"]
    return ImageSource(**{**image, "content": None if content is None else base64.b64decode(content)})


def image_in_file(path: Path) -> ImageSource:
    """The image in a file. Raises Refusal with the problem in its header, without a place."""
    try:
        status = path.stat()
    except OSError as error:
        raise Refusal(problem("row-image-broken", image=path.name, reason=error.strerror or error)) from error
    seen = _seen_in_file(str(path), status.st_size, status.st_mtime_ns)
    if isinstance(seen, Problem):
        raise Refusal(seen)
    return ImageSource(str(path), None, *seen, status.st_size, status.st_mtime_ns)


def image_in_bytes(content: bytes, name: str) -> ImageSource:
    """The image in the row itself, called `name` in sentences. Raises Refusal like `image_in_file`."""
    seen = _seen(io.BytesIO(content), len(content), name)
    if isinstance(seen, Problem):
        raise Refusal(seen)
    return ImageSource("", content, *seen, len(content), 0)


def image_in_url(url: str) -> ImageSource:
    """The image in a data URL (RFC 2397). Raises Refusal like `image_in_file`, and for all other URLs."""
    head, comma, body = url.partition(",")
    if not head.startswith("data:") or not comma:
        raise Refusal(problem("image-not-data", image=url[:80]))
    if len(body) > 2 * MAX_IMAGE_BYTES:
        size, limit = (f"{amount >> 20} MB" for amount in (len(body), MAX_IMAGE_BYTES))
        raise Refusal(problem("row-image-large", image="data URL", found=size, limit=limit))
    content = unquote_to_bytes(body)
    if head.endswith(";base64"):
        try:
            content = base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise Refusal(problem("row-image-broken", image="data URL", reason=str(error))) from error
    return image_in_bytes(content, "data URL")


@lru_cache(maxsize=65536)
def _seen_in_file(path: str, size: int, _modified: int) -> Size | Problem:
    return _seen(path, size, os.path.basename(path))


def _seen(stream: Any, size: int, name: str) -> Size | Problem:
    """Width and height from the header, or the problem."""
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
            # For a PNG without EXIF data, Pillow would decode the whole image to look for some at its end.
            exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
            turned = exif.get(ORIENTATION_TAG) in TURNED
            return (height, width) if turned else (width, height)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return _too_many_pixels(name, "?")
    except UnidentifiedImageError:
        return problem("row-image-format", image=name, known=", ".join(FORMATS))
    # Broken files make decoders raise anything: struct.error, zlib.error, EOFError, …
    except Exception as error:
        return problem("row-image-broken", image=name, reason=str(error) or type(error).__name__)


def _too_many_pixels(name: str, size: str) -> Problem:
    limit = f"{MAX_IMAGE_PIXELS // 1_000_000}"
    return problem("row-image-large", image=name, found=f"{size} px", limit=f"{limit} Mpx")


def decode(source: ImageSource) -> Image.Image:
    """The image as RGB, rotated as EXIF says. Raises Refusal if it is broken, or has changed."""
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
    """A problem that shows only when the whole image is decoded; cached for files."""
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


def is_metadata(file: Path) -> bool:
    """Whether the name of a file says that it describes the images next to it."""
    return file.stem.casefold() == METADATA_STEM and file.suffix.lower() in METADATA_SUFFIXES
