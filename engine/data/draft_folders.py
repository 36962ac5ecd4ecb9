"""Where the drafts of `engine.documents` are, and what was asked for: also for those who count what they take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core.rundir import read_object

DRAFTS_FOLDER = ".documents"  # in the saves folder
REQUEST_FILE = "request.json"


def draft_folders(saves: Path) -> list[Path]:
    """The folders of all drafts, newest first."""
    requests = (saves / DRAFTS_FOLDER).glob(f"[!.]*/{REQUEST_FILE}")
    return [file.parent for file in sorted(requests, reverse=True)]


def read_request(folder: Path) -> Mapping[str, Any]:
    """What was asked for; {} if it cannot be read. `by`: the name of the draft's owner, "" if it belongs to nobody."""
    return read_object(folder / REQUEST_FILE).get("given", {})
