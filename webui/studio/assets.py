"""The scripts and styles of gradio's page, compressed once and kept by browsers; two of them spend less time.

Gradio reads and compresses each of them again for each visitor, some eighty per page.
"""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import brotli
from gradio.route_utils import BUILD_PATH_LIB
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

FOLDER = Path(BUILD_PATH_LIB)
COMPRESSED_SUFFIXES = (".js", ".css")
QUALITY = 6  # of brotli, up to 11: a few ms for most of the files; 9 would save 1 %
# A new version of gradio has new names: each contains a hash of the file's content.
CACHE_CONTROL = "public, max-age=31536000, immutable"
# Gradio is pinned, and `tests/test_assets.py` fails if one of these scripts no longer reads like this.
_SEARCH = "(e,t){if(e.id===t)return e;if(e.children)for(let n of e.children){let e=Z(n,t);if(e)return e}return null}"
REPLACEMENTS: dict[str, dict[str, str]] = {
    # For each input and output of each event, gradio searches the tree of all components, through Svelte's proxies.
    # Here the nodes of a tree are indexed by id when it is first searched, and again after a part of it has been drawn
    # anew.
    "core-*.js": {
        f"function Z{_SEARCH}": f"function searchNode{_SEARCH.replace('Z(', 'searchNode(')}"
        "var nodesOf=new WeakMap;function Z(e,t){let n=nodesOf.get(e);if(!n){nodesOf.set(e,n=new Map);"
        "let r=e=>{n.set(e.id,e);e.children&&e.children.forEach(r)};r(e)}"
        "let i=n.get(t)??searchNode(e,t);i&&n.set(t,i);return i}",
        "a.children=i.children,": "nodesOf.delete(this.root),a.children=i.children,",
    },
    # A component counts the seconds of an event at each frame of the screen. One that the answer takes off the page
    # would do so for as long as the page is open, which keeps a sixth of a core busy. `U` is its element.
    "statustracker-*.js": {"W&&ze()": "W&&U?.isConnected&&ze()"},
}


class Assets(Route):
    """`/assets/<file>`, compressed for a browser that reads brotli, as all do; gradio answers for other files."""

    def __init__(self) -> None:
        super().__init__("/assets/{name}", _respond, methods=["GET"])

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        if match is Match.FULL and child_scope["path_params"]["name"] not in _names():
            match = Match.NONE
        return match, child_scope


def _respond(request: Request) -> Response:
    name = request.path_params["name"]
    headers = {"Cache-Control": CACHE_CONTROL, "Vary": "Accept-Encoding"}
    if reads_brotli(request.headers.get("Accept-Encoding", "")):
        headers["Content-Encoding"] = "br"
        content = _compressed(name)
    else:
        content = _content(name)
    return Response(content, headers=headers, media_type=mimetypes.guess_type(name)[0])


def reads_brotli(accepted: str) -> bool:
    """Whether Accept-Encoding has `br`, and not with the weight 0 (RFC 9110, 12.5.3)."""
    return re.search(r"(?:^|,)\s*br\s*(?:;\s*q\s*=\s*(?:1|0?\.0*[1-9]).*)?(?:,|$)", accepted.lower()) is not None


@cache
def _names() -> frozenset[str]:
    return frozenset(path.name for path in FOLDER.iterdir() if path.suffix in COMPRESSED_SUFFIXES)


@cache  # at most the files of the package: 6 MB
def _compressed(name: str) -> bytes:
    return brotli.compress(_content(name), brotli.MODE_TEXT, QUALITY)


def _content(name: str) -> bytes:
    content = (FOLDER / name).read_bytes()
    for pattern, replacements in REPLACEMENTS.items():
        if fnmatchcase(name, pattern):
            content = replaced(content, replacements)
    return content


def replaced(script: bytes, replacements: Mapping[str, str]) -> bytes:
    """Gradio's script with its replacements; as it is, if it is not the one that they were written for."""
    text = script.decode("utf-8")
    if any(text.count(search) != 1 for search in replacements):
        return script
    for search, replacement in replacements.items():
        text = text.replace(search, replacement)
    return text.encode()
