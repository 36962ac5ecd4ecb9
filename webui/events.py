"""How the events of the page are made: those that are done at once, and those that go on."""

from __future__ import annotations

from typing import Any

# The page has its own ways to say how far something is. Gradio's is told to every output of an event, at its beginning
# and at its end, and each time the browser looks the component up among five hundred: half of what opening the page
# took, and most of what each look at a run did. Without a component to show it on, nothing is told.
# The page calls its handlers by number. Each is named all the same, and by its function unless told otherwise: so one
# called `start` would take the name of the endpoint that other programs call.
SILENT: dict[str, Any] = {
    "show_progress": "hidden", "show_progress_on": [], "api_visibility": "private", "api_name": "page",
}  # fmt: skip

QUIET = SILENT | {"queue": False}


def concurrent(name: str, most: int) -> dict[str, Any]:
    """For a handler that goes on and answers piece by piece: at most `most` at once of all that have the name, since
    each holds a thread."""
    return SILENT | {"concurrency_limit": most, "concurrency_id": name}
