"""How the page registers events: those that finish at once, and those that take a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypedDict

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component


class EventOptions(TypedDict, total=False):
    """Keyword arguments that all events of gradio accept."""

    show_progress: Literal["full", "minimal", "hidden"]
    show_progress_on: Component | list[Component]
    api_visibility: Literal["public", "private", "undocumented"]
    api_name: str
    queue: bool
    concurrency_limit: int
    concurrency_id: str
    trigger_mode: Literal["once", "multiple", "always_last"]


# The page has its own progress display. Gradio's notifies every output of an event at its beginning and end, and each
# time the browser looks up the component among five hundred, which was half of the time to open the page, and most of
# each refresh of a run. Without a component to show it on, nothing is sent. The page calls its handlers by number. Each
# has a name nevertheless, by default that of its function: so a handler called `start` would take the name of the
# endpoint for other programs.
SILENT: EventOptions = {
    "show_progress": "hidden",
    "show_progress_on": [],
    "api_visibility": "private",
    "api_name": "page",
}

QUIET: EventOptions = SILENT | {"queue": False}

# For whatever depends on a choice. While an event is being answered, gradio drops the next one. That is right for a
# button that starts something; but here the answer would be for what is no longer chosen, so it is asked again.
LATEST: EventOptions = QUIET | {"trigger_mode": "always_last"}


def concurrent(name: str, most: int) -> EventOptions:
    """For a handler that takes a while and answers piece by piece: at most `most` at once among all with that name,
    since each holds a thread."""
    return SILENT | {"concurrency_limit": most, "concurrency_id": name}


def changes(controls: Iterable[Any]) -> list[Any]:
    """The change event of each control, which gradio's base classes do not declare."""
    return [control.change for control in controls]


def of_tick(timer: gr.Timer, updates: dict[Any, Any]) -> dict[Any, Any]:
    """The answer to a tick, which may end its timer but not set it going: the reader may have left the tab meanwhile,
    where it rests."""
    going = timer in updates and updates[timer].active
    return {block: value for block, value in updates.items() if not (going and block is timer)}


def settled_trigger(name: str) -> gr.Button:
    """An invisible button for `on_settled`, which page.js presses; `name` is its element's id."""
    return gr.Button(elem_id=name, elem_classes="unseen")


def on_settled(
    trigger: gr.Button,
    handler: Callable[..., Any],
    inputs: Sequence[Block],
    outputs: Sequence[Block],
    js: str | None = None,
) -> None:
    """Call `handler` once no input has changed for a moment, so that a form that is being filled is read once.

    The changes themselves carry no values: the browser searches all components for each value of each event. `js` is a
    function of the values in the browser, which returns them.
    """
    # `change` and not `input`: a text box sends `input` for typed letters, but not for pasting and deleting.
    gr.on(changes(inputs), None, js=f"() => athanorSettled('{trigger.elem_id}')", **QUIET)
    trigger.click(handler, inputs, outputs, js=js, **LATEST)


def on_chosen(dropdown: Any, handler: Callable[..., Any], inputs: Sequence[Block], outputs: Sequence[Block]) -> Any:
    """Call `handler` once an entry of the dropdown, which needs an element id, is chosen, be it the same as before.
    When the list is left without a choice, whatever was typed there is replaced by the entry that was chosen before.
    Returns the event, for what is to follow it.

    Gradio sends `input` also when a list is only left, and `select` not for a choice with the keyboard.
    """
    id = dropdown.elem_id
    trigger = gr.Button(elem_id=f"{id}-chosen", elem_classes="unseen")  # which page.js presses
    dropdown.focus(None, dropdown, None, js=f"(value) => athanorOpened('{id}', value)", **QUIET)
    js = f"(value) => athanorLeft('{id}', value, '{trigger.elem_id}')"
    dropdown.input(None, dropdown, dropdown, js=js, **QUIET)
    return trigger.click(handler, inputs, outputs, **LATEST)
