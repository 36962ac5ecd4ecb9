"""Which tools there are, and the answer to a call of one, whatever its arguments: a result, or why there is none."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from engine.api.errors import ApiError
from engine.core.problems import Problem, Refusal, problem
from engine.mcp import model_tools, run_tools
from engine.mcp.call import Call, Tool
from engine.mcp.run_tools import as_object

TOOLS: Mapping[str, Tool] = run_tools.TOOLS | model_tools.TOOLS


@dataclass(frozen=True)
class Answer:
    """The structured result, or the problems; `text` is the same to read."""

    content: dict[str, Any]
    text: str
    failed: bool = False


def answer(call: Call, name: str, arguments: Mapping[str, Any]) -> Answer:
    """Call a tool by its name. Never raises."""
    try:
        if name not in TOOLS:
            raise Refusal(problem("mcp-no-tool", name=name[:80], known=", ".join(TOOLS)))
        tool = TOOLS[name]
        call.caller.require(*tool.scopes)
        content = tool.does(call, tool.arguments.model_validate(arguments))
        return Answer(content, json.dumps(content, ensure_ascii=False, indent=1))
    except Refusal as refusal:
        return failed(refusal.problems, call.language)
    except ApiError as error:
        return failed([error.reason], call.language)
    except ValidationError as error:
        return failed([_wrong_argument(fault) for fault in error.errors(include_url=False)], call.language)
    except OSError as error:
        values = {"file": error.filename or "—", "why": error.strerror or error}
        return failed([problem("system-refused", **values)], call.language)
    except Exception as error:  # its text may contain what the caller must not see
        logging.getLogger("uvicorn.error").error("an error in a tool", exc_info=error)
        return failed([problem("api-failed", why=type(error).__name__)], call.language)


def _wrong_argument(fault: Any) -> Problem:
    path = ".".join(map(str, fault["loc"]))
    return problem("mcp-argument", path, name=path or "—", why=fault["msg"])


def failed(problems: Sequence[Problem], language: str) -> Answer:
    """The answer to a call that could not be done."""
    content = {"problems": [as_object(issue, language) for issue in problems]}
    return Answer(content, "\n".join(issue.with_field(language) for issue in problems), failed=True)
