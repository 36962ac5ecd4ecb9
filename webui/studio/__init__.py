"""The studio: the tabs combined into one page, the page built in each language, and both at one address.

    tabs          the tabs, and what surrounds them        header        the head of the page
    navigation    opening the page or a tab                endpoints     what other programs can call
    transfers     from one tab to another                  application   both pages at one address

There are two pages instead of one that translates itself, because every word, including the server's, must be in the
reader's language. Both are built by the same function, so that a handler has the same number in both.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from engine.launch.workspace import Workplace
from webui.page_blocks import PageBlocks
from webui.studio.endpoints import add_endpoints
from webui.studio.navigation import Navigation
from webui.studio.tabs import lay_out_frame, lay_out_tabs
from webui.studio.transfers import FromLoaded, FromRun, IntoForm
from webui.words import Words


def page(workplace: Workplace, language: str, root: str = "", users_file: Path | None = None) -> gr.Blocks:
    """The whole page in one language; with a login, `users_file` has its users."""
    words = Words(language)
    with PageBlocks(title=words("title"), analytics_enabled=False, fill_width=True) as blocks:
        frame = lay_out_frame(words, workplace, root, users_file)
        tabs = lay_out_tabs(frame)
        Navigation(frame, tabs).wire(blocks)
        for transfer in (IntoForm, FromRun, FromLoaded):
            transfer(frame, tabs).wire()
        add_endpoints(workplace)
    return blocks
