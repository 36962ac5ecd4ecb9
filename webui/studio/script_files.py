"""The files that the page's script fetches: settings to search in, and texts. Compressed once, and kept by browsers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import brotli
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from webui.studio.assets import CACHE_CONTROL, QUALITY, reads_brotli
from webui.studio.first_steps import texts_file
from webui.train_tab.settings_index import index_file
from webui.words import LANGUAGES

FileOf = Callable[[str], tuple[str, str]]  # language → name, which changes with the content, and content
FILES: tuple[FileOf, ...] = (index_file, texts_file)


def routes() -> list[Route]:
    """One for each file and language."""
    return [
        Route(f"/{file_of(language)[0]}", partial(_respond, file_of(language)[1]))
        for file_of in FILES
        for language in LANGUAGES
    ]


def _respond(content: str, request: Request) -> Response:
    headers = {"Cache-Control": CACHE_CONTROL, "Vary": "Accept-Encoding"}
    if reads_brotli(request.headers.get("Accept-Encoding", "")):
        compressed = headers | {"Content-Encoding": "br"}
        return Response(_compressed(content), headers=compressed, media_type="application/json")
    return Response(content, headers=headers, media_type="application/json")


@cache  # of two files in two languages
def _compressed(content: str) -> bytes:
    return brotli.compress(content.encode(), brotli.MODE_TEXT, QUALITY)
