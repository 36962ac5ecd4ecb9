"""Images of a question: small enough for a browser to keep with its conversation, as data URLs.

They are decoded in a process with limits, a few at a time: an image may take hundreds of megabytes.
"""

from __future__ import annotations

import base64
import io
import re
import threading
from collections.abc import Sequence
from pathlib import Path

from engine.core.problems import Refusal, problem
from engine.data import limited_process
from engine.data.images import decode, image_in_file

MAX_IMAGES = 6  # per question
MAX_SIDE = 768  # pixels; a browser has room for some thirty such images
JPEG_QUALITY = 88
MAX_SECONDS = 60  # of CPU time, for an image
OWN_URL = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+")
_turns = threading.BoundedSemaphore(2)  # images that are decoded at a time, however many people attach some


def attached_images(files: Sequence[str]) -> tuple[str, ...]:
    """The images in these files as data URLs, no side longer than MAX_SIDE. Raises Refusal if one cannot be read."""
    if len(files) > MAX_IMAGES:
        raise Refusal(problem("chat-many-images", images=len(files), limit=MAX_IMAGES))
    return tuple(_data_url(Path(file)) for file in files)


def _data_url(file: Path) -> str:
    image_in_file(file)  # a header alone may be a reason to refuse it
    try:
        with _turns:
            return limited_process.ask(__name__, file, seconds=MAX_SECONDS)["url"]
    except Refusal as refusal:
        if refusal.problems[0].code != "file-takes-too-much":
            raise
        raise Refusal(problem("chat-image-takes-too-much", image=file.name)) from refusal


def image_bytes(url: str) -> bytes:
    """The content of a data URL from `attached_images`."""
    return base64.b64decode(url.partition(",")[2])


def _read(file: Path) -> dict[str, str]:
    """In the process: the image as a data URL."""
    try:
        image = decode(image_in_file(file))
    except Refusal as refusal:
        if isinstance(refusal.__cause__, MemoryError):
            raise MemoryError from refusal
        raise
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return {"url": f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"}


if __name__ == "__main__":
    limited_process.reply(_read)
