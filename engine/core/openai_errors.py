"""An error in the format of OpenAI's API, as our chat servers and `engine.api` both answer."""

from __future__ import annotations

from typing import Any

from engine.core.problems import Problem


def error_body(reason: Problem, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an answer with this HTTP status. `code` is the name that OpenAI's clients know, by default our own;
    our code and its values are added for clients that show the error in another language."""
    values = {name: str(value) for name, value in reason.values.items()}
    error = {
        "message": reason.text(),
        "type": "invalid_request_error" if status < 500 else "server_error",
        "param": param,
        "code": code or reason.code,
    }
    return {"error": error | {"problem": {"code": reason.code, "values": values}}}
