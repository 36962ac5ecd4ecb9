"""Imports gradio without the type stubs that it writes for editors each time, a second of each start of the studio.

Gradio parses and rewrites a .pyi file beside each of its components as their classes are
made, and leaves out those that lie in no file. For the time of its import, that is what
its components are told to be. Where gradio changes how it looks, stubs are written again.
"""

from __future__ import annotations

import inspect
from typing import Any

_getfile = inspect.getfile


def _file_unless_of_gradio(owner: Any) -> str:
    if isinstance(owner, type) and owner.__module__.startswith("gradio."):
        raise OSError("no stub is written for a class that lies in no file")
    return _getfile(owner)


inspect.getfile = _file_unless_of_gradio  # type: ignore[assignment]  # the parameter has another name
try:
    import gradio  # noqa: F401
finally:
    inspect.getfile = _getfile
