"""Which users do not want to see the first steps again, on any machine: an empty file for each, in the saves folder.
Without a login, their browser remembers it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from engine.core.users import USER_NAME

FOLDER = ".first-steps-over"


def dismiss(saves: Path, user: str, over: bool = True) -> None:
    """Remember that the user is done with the first steps, or begins them again. What the disk refuses is not kept:
    then they are offered once more."""
    if path := _file(saves, user):
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            if over:
                path.touch(mode=0o600)
            else:
                path.unlink(missing_ok=True)


def is_dismissed(saves: Path, user: str) -> bool:
    """Whether the user is done with them."""
    path = _file(saves, user)
    return path is not None and os.path.exists(path)


def _file(saves: Path, user: str) -> Path | None:
    return saves / FOLDER / user if USER_NAME.fullmatch(user) else None
