"""How the page registers events: those that finish at once, and those that take a while."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypedDict

from gradio.components import Component


class EventOptions(TypedDict, total=False):
    """Keyword arguments that every event of gradio takes."""

    show_progress: Literal["full", "minimal", "hidden"]
    show_progress_on: Component | list[Component]
    api_visibility: Literal["public", "private", "undocumented"]
    api_name: str
    queue: bool
    concurrency_limit: int
    concurrency_id: str


# The page has its own ways to say how far something is. Gradio's is told to every output of an event, at its beginning
# and at its end, and each time the browser looks the component up among five hundred: half of what opening the page
# took, and most of what each look at a run did. Without a component to show it on, nothing is told.
# The page calls its handlers by number. Each is named all the same, and by its function unless told otherwise: so one
# called `start` would take the name of the endpoint that other programs call.
SILENT: EventOptions = {
    "show_progress": "hidden",
    "show_progress_on": [],
    "api_visibility": "private",
    "api_name": "page",
}

QUIET: EventOptions = SILENT | {"queue": False}


def concurrent(name: str, most: int) -> EventOptions:
    """For a handler that goes on and answers piece by piece: at most `most` at once of all that have the name, since
    each holds a thread."""
    return SILENT | {"concurrency_limit": most, "concurrency_id": name}


def changes(controls: Iterable[Any]) -> list[Any]:
    """The event of each control that its value has changed: gradio's base classes do not say that they have one."""
    return [control.change for control in controls]
