"""Read JSON objects from a model folder with a size limit; faults are returned as a Problem, not raised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.core import regular_files
from engine.core.problems import Problem, problem

MAX_JSON_BYTES = 16 << 20  # bytes; the largest real headers, indexes and tokenizer configs are a few MiB


def files_in(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of the files directly in `folder`, with links followed."""
    try:
        return sorted((entry.name, entry.stat().st_size) for entry in regular_files.list_files(folder))
    except (OSError, ValueError):  # deleted in the meantime; a NUL in the name
        return []


def read_json_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any] | Problem:
    """A JSON object of at most `limit` bytes, or the problem with it."""
    try:
        if path.stat().st_size > limit:
            return problem("model-json-too-large", file=path.name, limit=limit >> 20)
        value = json.loads(regular_files.read_text(path, "utf-8-sig"))
    except json.JSONDecodeError as error:
        return problem("model-json-broken", file=path.name, line=error.lineno, column=error.colno, what=error.msg)
    except OSError as error:
        return problem("model-file-unreadable", file=path.name, what=error.strerror)
    except (ValueError, RecursionError):  # not UTF-8, a number of ten thousand digits, endless nesting
        return problem("model-json-not-text", file=path.name)
    return value if isinstance(value, dict) else problem("model-json-not-object", file=path.name)


def json_object_or_empty(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes; empty if it cannot be read, which other checks report."""
    value = read_json_object(path, limit)
    return {} if isinstance(value, Problem) else value
