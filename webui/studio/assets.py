"""The scripts and styles of gradio's page, compressed once and kept by browsers; one finds components by an index.

Gradio reads and compresses each of them again for each visitor, some eighty per page.
"""

from __future__ import annotations

import mimetypes
import re
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
# For each input and output of each event, gradio searches the tree of all components, through Svelte's proxies. Here
# the nodes of a tree are indexed by id when it is first searched, and again after a part of it has been drawn anew.
# Gradio is pinned, and `tests/test_assets.py` fails if its script no longer reads like this.
SCRIPT_WITH_TREE = "core-*.js"
SEARCH = "(e,t){if(e.id===t)return e;if(e.children)for(let n of e.children){let e=Z(n,t);if(e)return e}return null}"
NODE_INDEX = {
    f"function Z{SEARCH}": f"function searchNode{SEARCH.replace('Z(', 'searchNode(')}"
    "var nodesOf=new WeakMap;function Z(e,t){let n=nodesOf.get(e);if(!n){nodesOf.set(e,n=new Map);"
    "let r=e=>{n.set(e.id,e);e.children&&e.children.forEach(r)};r(e)}"
    "let i=n.get(t)??searchNode(e,t);i&&n.set(t,i);return i}",
    "a.children=i.children,": "nodesOf.delete(this.root),a.children=i.children,",
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
    return with_node_index(content) if fnmatchcase(name, SCRIPT_WITH_TREE) else content


def with_node_index(script: bytes) -> bytes:
    """Gradio's script with NODE_INDEX; as it is, if it is not the one that this was written for."""
    text = script.decode("utf-8")
    if any(text.count(search) != 1 for search in NODE_INDEX):
        return script
    for search, indexed in NODE_INDEX.items():
        text = text.replace(search, indexed)
    return text.encode()
