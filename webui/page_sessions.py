"""What the server keeps for each opened page: little, and not forever.

Gradio keeps a copy of the configuration of every component for each page, with its last value, for "deep links", which
the studio does not have: 1 MB and 46 ms. It keeps those of ten thousand pages, since a page without `gr.State` does not
report that it was closed. Here only the components that events have changed are kept, so that choices that were offered
remain valid.
"""

from __future__ import annotations

from collections import ChainMap
from datetime import datetime, timedelta
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.blocks import BlocksConfig
from gradio.routes import App
from gradio.state_holder import SessionState, StateHolder
from starlette.routing import Mount

# A page that has been open for longer must be reloaded before its choices from lists are accepted. Browsers suspend
# pages that are not visible, so silence does not mean that a page was closed.
KEPT = timedelta(days=7)
MAX_SESSIONS = 5_000  # pages of one language; those silent for longest are ended first


class PageSession(SessionState):
    """The components that events have changed for one page, in front of those shared by all pages."""

    def __init__(self, blocks: gr.Blocks):
        common = blocks.default_config
        self.blocks_config = BlocksConfig(blocks)
        self.blocks_config.blocks = ChainMap({}, common.blocks)  # type: ignore[assignment]  # used as the dict that it stands for
        self.blocks_config.fns, self.blocks_config.fn_id = common.fns, common.fn_id
        self.config_values: dict[int, dict[str, Any]] = {}
        self.state_data: dict[int, Any] = {}
        self._state_ttl: dict[int, Any] = {}
        self.is_closed = False
        self.STATE_TTL_WHEN_CLOSED = 3600

    def __setitem__(self, key: int, value: Any) -> None:
        if isinstance(self.blocks_config.blocks.get(key), gr.State):
            super().__setitem__(key, value)
        else:
            self.blocks_config.blocks[key] = value

    def _update_config(self, key: int) -> None:
        """No configuration is kept."""

    def _update_value_in_config(self, key: int, value: Any) -> None:
        """No value is kept."""


class PageSessions(StateHolder):
    """The sessions of one page app, by session hash, most recently used last."""

    def __getitem__(self, session_id: str) -> SessionState:
        if session_id not in self.session_data:
            self._end_old()
            self.session_data[session_id] = PageSession(self.blocks)
        return super().__getitem__(session_id)

    def _end_old(self) -> None:
        with self.lock:
            while self.session_data:
                oldest = next(iter(self.session_data))
                if datetime.now() - self.time_last_used.get(oldest, datetime.min) < KEPT:
                    return
                del self.session_data[oldest]
                self.time_last_used.pop(oldest, None)


def keep_little(app: FastAPI, blocks: gr.Blocks) -> None:
    """Have gradio keep its sessions here, for `blocks` that are mounted in `app`."""
    blocks.state_session_capacity = MAX_SESSIONS
    for route in app.routes:
        if isinstance(route, Mount) and isinstance(route.app, App):
            route.app.state_holder = PageSessions()
            route.app.state_holder.set_blocks(blocks)
