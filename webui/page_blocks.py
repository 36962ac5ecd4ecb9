"""`gr.Blocks` whose events process only what is new to a page.

Gradio hands each value of an event to a thread, 119 times for a refresh of the form, and creates each output's
component again for each page, changed or not: half of the time of a tick, and most of the memory of a page. Here plain
values are processed directly, unchanged outputs are skipped, and equal components are shared. The browser receives the
same; events that are not plain are left to gradio. The page is described only once it is complete.

One thing it does not receive: a value that comes back as it was sent. The browser has it already, or has a newer one,
which the reader has chosen while the answer was on its way, and which must stay. Excepted are hidden values that only
handlers change, handlers that answer several times, and what is left to gradio.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

import gradio as gr
from gradio.block_function import BlockFunction
from gradio.blocks import Block, postprocess_update_dict
from gradio.components import Component
from gradio.queueing import Queue
from gradio.state_holder import SessionState
from gradio.utils import delete_none, is_prop_update

from webui.panels import is_of_reader
from webui.people import note_person

SCALARS = (str, int, float, bool, type(None))
# Between two looks for events. Gradio looks every millisecond, which takes a twentieth of a core at all times.
EVENT_POLL_SECONDS = 0.01
# What the browser has sent with the event of this task, by the id of the component.
_sent: ContextVar[Mapping[int, Any]] = ContextVar("sent")


class PageBlocks(gr.Blocks):
    """The components of the page, and those that events have created for any page that is still held."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.changed_components: WeakValueDictionary[tuple[int, str], Block] = WeakValueDictionary()
        self._queue.sleep_when_free = EVENT_POLL_SECONDS

    def queue(self, *_: Any, **__: Any) -> PageBlocks:
        """Let events wait by gradio's defaults, which it asks for while a page has nothing on it. Its own function also
        makes a web app, which that of the complete page replaces."""
        self._queue = Queue(True, self.max_threads, 1, None, self, "not_set")
        return self

    def get_config_file(self) -> Any:
        """The description of the page for the browser. Gradio asks for it twice while the page is not yet complete, and
        again when it is served."""
        return super().get_config_file() if getattr(self, "exited", False) else {}

    async def call_function(
        self, block_fn: BlockFunction | int, processed_input: list[Any], iterator: Any = None, requests: Any = None,
        *rest: Any, **named: Any,
    ) -> Any:  # fmt: skip
        """Call a handler, for the person who has sent its request."""
        note_person(requests[0] if isinstance(requests, list) else requests)
        return await super().call_function(block_fn, processed_input, iterator, requests, *rest, **named)

    async def preprocess_data(
        self, block_fn: BlockFunction, inputs: list[Any], state: SessionState | None, explicit_call: bool = False
    ) -> list[Any]:  # fmt: skip
        """The inputs of the handler from the values sent by the browser."""
        # A handler that answers several times may return to a value that it has replaced before.
        sent = {} if block_fn.types_generator else dict(zip(block_fn.inputs, inputs, strict=False))
        _sent.set({block._id: value for block, value in sent.items()})
        if state is not None and not explicit_call and _takes_plain(block_fn, inputs):
            with contextlib.suppress(Exception):  # gradio processes it again, and reports the error
                return [
                    state.get(block._id, block).preprocess(value)
                    for block, value in zip(block_fn.inputs, inputs, strict=False)
                ]
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)

    async def postprocess_data(
        self, block_fn: BlockFunction, predictions: Any, state: SessionState | None
    ) -> list[Any]:
        """The values sent to the browser for the outputs of the handler."""
        updates = _updates_by_place(block_fn, predictions)
        if state is not None and updates is not None:
            with contextlib.suppress(Exception):  # as above
                answers: list[Any] = [gr.skip() for _ in block_fn.outputs]
                for place, value in updates.items():
                    answers[place] = self._answer(block_fn.outputs[place], value, state)
                return answers
        return await super().postprocess_data(block_fn, predictions, state)

    def _answer(self, block: Block, value: Any, state: SessionState) -> Any:
        if not _is_update(value):
            answer = state.get(block._id, block).postprocess(value)
            return gr.skip() if _was_sent(block, answer) else answer
        changes = (
            value.constructor_args.copy() if isinstance(value, Block) else delete_none(value.copy(), skip_value=True)
        )
        component = self._changed(block._id, state.get(block._id, block), changes)
        state[block._id] = component
        update = postprocess_update_dict(component, changes)  # type: ignore[arg-type]  # nothing else is ever an output
        if "value" in update and _was_sent(block, update["value"]):
            del update["value"]
        return update

    def _changed(self, id: int, component: Block, changes: Mapping[str, Any]) -> Block:
        """The component with these arguments in addition to its own; shared with another page that has the same."""
        arguments = {**component.constructor_args, **changes, "render": False}
        for name in ("value", "__type__"):
            arguments.pop(name, None)
        try:
            key = id, json.dumps(arguments, sort_keys=True)
        except TypeError:  # something that is not JSON
            return type(component)(**arguments)
        if (known := self.changed_components.get(key)) is None:
            known = self.changed_components[key] = type(component)(**arguments)
        return known


def _takes_plain(block_fn: BlockFunction, inputs: Sequence[Any]) -> bool:
    """Whether the inputs of an event are values that gradio would pass to the components unchanged."""
    return (
        block_fn.preprocess
        and not block_fn.component_prop_inputs
        and len(inputs) >= len(block_fn.inputs)
        and all(isinstance(block, Component) and _holds_plain(block) for block in block_fn.inputs)
        and all(map(_is_plain, inputs))
    )


def _updates_by_place(block_fn: BlockFunction, predictions: Any) -> dict[int, Any] | None:
    """The new values, by the place of their component among the outputs; None if gradio has to process them."""
    if not block_fn.postprocess or block_fn.is_validator_function or not isinstance(predictions, dict):
        return None
    if not predictions:
        return None
    if predictions == gr.skip():
        return {}
    places: dict[int, int] = {}
    for place, block in enumerate(block_fn.outputs):
        places.setdefault(block._id, place)
    updates = {}
    for block, value in predictions.items():
        if not isinstance(block, Block) or block._id not in places or not _holds_plain(block):
            return None
        if not _is_plain_answer(value):
            return None
        updates[places[block._id]] = value
    return updates


def _was_sent(block: Block, value: Any) -> bool:
    """Whether the browser has sent just this value of a component that the reader can change."""
    sent = _sent.get({}).get(block._id, ...)
    return isinstance(sent, bool) == isinstance(value, bool) and sent == value and is_of_reader(block)


def _holds_plain(block: Block) -> bool:
    """Whether its values are neither files nor kept by the server."""
    return not block.stateful and getattr(block, "data_model", None) is None


def _is_update(value: Any) -> bool:
    return isinstance(value, Block) or is_prop_update(value)


def _is_plain_answer(value: Any) -> bool:
    if _is_update(value):
        changes = value.constructor_args if isinstance(value, Block) else value
        return all(map(_is_plain, changes.values()))
    return _is_plain(value)


def _is_plain(value: Any) -> bool:
    """Whether it cannot contain a file."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, SCALARS)
