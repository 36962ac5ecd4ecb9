"""Loads the server, which needs an optional package; the tools themselves need none."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from engine.core.problems import Refusal, problem


def load_server() -> ModuleType:
    """The module `engine.mcp.server`. Raises Refusal if the package is not installed."""
    if importlib.util.find_spec("mcp") is None:
        raise Refusal(problem("mcp-package", file="requirements-mcp.txt"))
    from engine.mcp import server

    return server
