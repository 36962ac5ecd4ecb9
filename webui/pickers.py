"""Lists to choose runs and results from: of thousands, the newest are offered, and those already chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from webui.words import Words

MAX_OFFERED = 500  # more of them would take the browser seconds, at each refresh
Choice = tuple[str, str]  # label, value


def picker(choices: Sequence[Choice], chosen: Sequence[str], info: str, words: Words) -> dict[str, Any]:
    """The update of a dropdown with these choices, newest first, some of them chosen. `info` is the text below it,
    which also says if choices are left out."""
    offered = list(choices[:MAX_OFFERED])
    offered += [choice for choice in choices[MAX_OFFERED:] if choice[1] in chosen]
    if len(offered) < len(choices):
        info = f"{info} {words('picker-newest', most=MAX_OFFERED, count=f'{len(choices):,}')}"
    return gr.update(choices=offered, value=list(chosen), info=info)
