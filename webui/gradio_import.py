"""Import gradio without the type stubs that it writes for editors each time, which saves a second at each start.

Gradio parses and rewrites a .pyi file for each of its component classes when it is created, and skips classes that are
not in a file. During its import, its components are made to look like those. If gradio changes this check, the stubs
are written again.
"""

from __future__ import annotations

import inspect
from typing import Any

_getfile = inspect.getfile


def _file_unless_of_gradio(owner: Any) -> str:
    if isinstance(owner, type) and owner.__module__.startswith("gradio."):
        raise OSError("no stub is written for a class without a file")
    return _getfile(owner)


inspect.getfile = _file_unless_of_gradio  # type: ignore[assignment]  # the parameter has another name
try:
    import gradio  # noqa: F401
finally:
    inspect.getfile = _getfile
