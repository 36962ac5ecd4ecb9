"""The files in which the page's script looks for settings: compressed once, kept by browsers, one for each language."""

from __future__ import annotations

from functools import cache, partial

import brotli
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from webui.studio.assets import CACHE_CONTROL, QUALITY, reads_brotli
from webui.train_tab.settings_index import index_file
from webui.words import LANGUAGES


def routes() -> list[Route]:
    """`/settings-<language>-<hash of the content>.json`."""
    return [Route(f"/{index_file(language)[0]}", partial(_respond, language)) for language in LANGUAGES]


def _respond(language: str, request: Request) -> Response:
    headers = {"Cache-Control": CACHE_CONTROL, "Vary": "Accept-Encoding"}
    content: bytes | str = index_file(language)[1]
    if reads_brotli(request.headers.get("Accept-Encoding", "")):
        headers["Content-Encoding"] = "br"
        content = _compressed(language)
    return Response(content, headers=headers, media_type="application/json")


@cache
def _compressed(language: str) -> bytes:
    return brotli.compress(index_file(language)[1].encode(), brotli.MODE_TEXT, QUALITY)
