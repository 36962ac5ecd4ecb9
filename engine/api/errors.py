"""Errors of the interface: an HTTP status, and a body that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from engine.core.openai_errors import error_body
from engine.core.problems import NOTHING, Problem, Refusal, problem

# Refusals of the engine that are not the fault of the request; all others are answered with 400.
STATUS_BY_CODE = {
    "rights-viewer": 403,
    "rights-owner": 403,
    "rights-no-owner": 403,
    "rights-operator": 403,
    "chat-too-many": 503,
    "chat-card-taken": 503,
    "chat-busy": 503,
    "chat-died": 500,
    "chat-job-ended": 500,
    "chat-without-gpu": 500,
    "chat-waits": 503,
    "chat-was-unloaded": 503,
    "chat-slurm-refused": 503,
    "chat-unreachable": 503,
    "chat-no-memory": 507,
    "chat-not-loaded": 500,
    "cannot-write": 507,
    "data-not-writable": 507,
    "upload-too-large": 413,
    "api-body-too-large": 413,
    "api-failed": 500,
}


class ApiError(Exception):
    """An answer with an error status. `param` is the argument that is wrong, `code` a name that clients may know."""

    def __init__(self, status: int, reason: Problem, param: str | None = None, code: str | None = None):
        super().__init__(reason.text())
        self.status, self.reason, self.param, self.code = status, reason, param, code
        self.headers: dict[str, str] = {}

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.reason, self.status, self.code, self.param)


def not_found(code: str, id: str, param: str, known_as: str | None = None) -> ApiError:
    """404 for an id that does not exist, or belongs to somebody else, which must look alike. `known_as`: the code that
    clients know."""
    return ApiError(404, problem(code, id=id[:100]), param, known_as)


def refused(refusal: Refusal, param: str | None = None) -> ApiError:
    """A refusal of the engine as an answer. All its problems are in the message."""
    first, *others = refusal.problems
    reason = problem("api-several", problems="\n".join(map(str, refusal.problems))) if others else first
    return ApiError(STATUS_BY_CODE.get(first.code, 400), reason, param or first.field or None, first.code)


def invalid(error: ValidationError) -> ApiError:
    """What is wrong with the arguments of a request: the first thing."""
    first = error.errors(include_url=False)[0]
    # Pydantic names the members of a union, too, which are no keys of the request.
    steps = [str(step) for step in first["loc"] if not str(step).startswith(("literal[", "constrained-", "function-"))]
    path = ".".join(step for step in steps if step not in ("int", "float", "str"))
    why = first["msg"].removeprefix("Value error, ")
    return ApiError(400, problem("chat-request", what=path or NOTHING, why=why), path or None, first["type"])
