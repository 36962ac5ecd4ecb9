"""Import gradio without what it does for others: writing type stubs, and importing matplotlib.

Writing the stubs, for editors, takes a second at each start. Gradio parses and rewrites a .pyi file for each of its
component classes when it is created, and skips classes that are not in a file. During its import, its components are
made to look like those. If gradio changes this check, the stubs are written again.

Around each event, gradio sets matplotlib's backend for functions that draw with it. The page has none, but the first
event of a studio would import matplotlib, which takes a third of a second and 30 MB.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

_getfile = inspect.getfile


def _file_unless_of_gradio(owner: Any) -> str:
    if isinstance(owner, type) and owner.__module__.startswith("gradio."):
        raise OSError("no stub is written for a class without a file")
    return _getfile(owner)


inspect.getfile = _file_unless_of_gradio  # type: ignore[assignment]  # the parameter has another name
try:
    import gradio
    import gradio.utils
finally:
    inspect.getfile = _getfile
gradio.utils.MatplotlibBackendMananger = contextlib.nullcontext  # type: ignore[assignment, misc]
