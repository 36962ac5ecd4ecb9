"""Small pictures of the images of rows, as data URLs in the page: no address serves files of the data folder."""

from __future__ import annotations

import base64
import io
import math
import threading
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image, ImageOps

from engine.data.images import FORMATS, ImageSource

SIDE = 96  # pixels of the longer side
MAX_PIXELS = 16_000_000  # to decode: the studio would hold 4 bytes of each
_turn = threading.Lock()  # one image is decoded at a time, however many pages show some


def thumbnail(image: ImageSource) -> str:
    """The image as HTML, with its name and size; only these if it cannot be decoded, or is too large to
    be decoded by the studio."""
    label = f"{Path(image.path).name or '—'} · {image.width} × {image.height}"
    url = _url(image) if image.content is None else _drawn(image)
    picture = f'<img class="thumbnail" src="{url}" alt="">' if url else ""
    return f'<span class="picture">{picture}<small>{escape(label)}</small></span>'


def pictures(images: Sequence[ImageSource]) -> str:
    """A line of thumbnails; empty without images."""
    return f'<p class="pictures">{"".join(map(thumbnail, images))}</p>' if images else ""


@lru_cache(maxsize=2048)
def _url(image: ImageSource) -> str:
    return _drawn(image)


def _drawn(image: ImageSource) -> str:
    try:
        with _turn, Image.open(image.path or io.BytesIO(image.content or b""), formats=FORMATS) as opened:
            opened.draft("RGB", (2 * SIDE, 2 * SIDE))  # JPEGs are decoded at a fraction of their size
            if math.prod(opened.size) > MAX_PIXELS:
                return ""
            turned = ImageOps.exif_transpose(opened).convert("RGB")
            turned.thumbnail((SIDE, SIDE))
    except Exception:  # broken files make decoders raise anything; the check of the rows reports them
        return ""
    stream = io.BytesIO()
    turned.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
