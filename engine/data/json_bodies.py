"""The JSON object in the body of a request, as our chat servers and `engine.api` read it."""

from __future__ import annotations

import json
from typing import Any

from engine.core.problems import NOTHING, Refusal, problem
from engine.data.row_files import half_character


def json_object(sent: bytes) -> dict[str, Any]:
    """The object. Raises Refusal if it is not one, or has half a character in it, which no file could store."""
    try:
        body = json.loads(sent)
    except (ValueError, RecursionError) as error:  # the latter: thousands of brackets
        raise Refusal(problem("chat-request", what=NOTHING, why=error)) from None
    if not isinstance(body, dict):
        raise Refusal(problem("chat-request", what=NOTHING, why="not a JSON object"))
    if surrogate := half_character(body, sent):
        raise Refusal(problem("chat-request", what=NOTHING, why=f"{surrogate} is half of a character"))
    return body
