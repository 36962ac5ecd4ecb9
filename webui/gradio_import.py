"""Import gradio without what it does for others: writing type stubs, and importing matplotlib and mcp.

Writing the stubs, for editors, takes a second at each start. Gradio parses and rewrites a .pyi file for each of its
component classes when it is created, and skips classes that are not in a file. During its import, its components are
made to look like those. If gradio changes this check, the stubs are written again.

Around each event, gradio sets matplotlib's backend for functions that draw with it. The page has none, but the first
event of a studio would import matplotlib, which takes a third of a second and 30 MB.

Where the package mcp is installed, gradio imports it for a server of its own, which takes half a second; the studio has
another one (`engine.mcp`).

Each time a component is created, and each time the page is described, gradio works out the parameters of the
component's class anew. Here they are noted once per class.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

_getfile = inspect.getfile
_MCP = "mcp"


def _file_unless_of_gradio(owner: Any) -> str:
    if isinstance(owner, type) and owner.__module__.startswith("gradio."):
        raise OSError("no stub is written for a class without a file")
    return _getfile(owner)


@contextlib.contextmanager
def _without_mcp() -> Iterator[None]:
    """Gradio finds no package mcp, as if it were not installed."""
    if _MCP in sys.modules:
        yield
        return
    sys.modules[_MCP] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_MCP]


def _note_parameters(kind: type[Any]) -> None:
    """Leave the parameters of the class where `inspect` looks for them first, and those of the classes based on it."""
    if init := vars(kind).get("__init__"):
        function = inspect.unwrap(init)
        function.__signature__ = inspect.signature(function)
    for based in kind.__subclasses__():
        _note_parameters(based)


inspect.getfile = _file_unless_of_gradio  # type: ignore[assignment]  # the parameter has another name
try:
    with _without_mcp():
        import gradio
        import gradio.utils
finally:
    inspect.getfile = _getfile
_note_parameters(gradio.blocks.Block)
gradio.utils.MatplotlibBackendMananger = contextlib.nullcontext  # type: ignore[assignment, misc]
