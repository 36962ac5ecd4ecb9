"""Images of a question: small enough for a browser to keep with its conversation, as data URLs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

from engine.core.problems import Refusal, problem
from engine.data.images import decode, image_in_file

MAX_IMAGES = 6  # per question
MAX_SIDE = 768  # pixels; a browser has room for some thirty such images
JPEG_QUALITY = 88
OWN_URL = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+")


def attached_images(files: Sequence[str]) -> tuple[str, ...]:
    """The images in these files as data URLs, no side longer than MAX_SIDE. Raises Refusal if one cannot be read."""
    if len(files) > MAX_IMAGES:
        raise Refusal(problem("chat-many-images", images=len(files), limit=MAX_IMAGES))
    return tuple(_data_url(Path(file)) for file in files)


def _data_url(file: Path) -> str:
    image = decode(image_in_file(file))
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def image_bytes(url: str) -> bytes:
    """The content of a data URL from `attached_images`."""
    return base64.b64decode(url.partition(",")[2])
