"""error.json: what ended a process of a run; refusals are stored as codes, to be shown in any language."""

from __future__ import annotations

import json
import time
import traceback

from engine.core.problems import Refusal
from engine.core.rundir import RunDir

MAX_CAUSES, MAX_CAUSE_CHARS = 20, 4000  # maximum number of recorded causes, and characters of each


def write_error(run: RunDir, error: Exception, rank: int = 0) -> None:
    """Write the error being handled to error.json. Raises FileExistsError if another rank has already written one."""
    record = {
        "type": type(error).__name__,
        "message": str(error),
        "rank": rank,
        "at": time.time(),
        "traceback": traceback.format_exc(),
        "causes": _causes(error),
    }
    if isinstance(error, Refusal):
        # As codes and values, so that the page can show them in the reader's language.
        record["problems"] = [
            {
                "code": reason.code,
                "field": reason.field,
                "values": {k: str(v) for k, v in reason.values.items()},
            }
            for reason in error.problems
        ]
    with run.error.open("x", encoding="utf-8") as file:
        json.dump(record, file, ensure_ascii=False, indent=1)


def _causes(error: BaseException) -> list[str]:
    """The causes of an error, nearest first, including errors during whose handling it was raised: a library may wrap
    the reason in an unrelated message and hide it from the traceback (`raise … from None`)."""
    chain: list[BaseException] = []
    cause = error.__cause__ or error.__context__
    while cause and cause not in chain and len(chain) < MAX_CAUSES:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return [f"{type(cause).__name__}: {cause}"[:MAX_CAUSE_CHARS] for cause in chain]
