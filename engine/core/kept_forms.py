"""The form of each user as they left it, so that they find it on another machine: a small file for each, in the saves
folder. What the values mean is the page's business; whoever writes last has the whole form."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from engine.core.regular_files import read_text
from engine.core.rundir import write_text
from engine.core.users import USER_NAME

FOLDER = ".forms"
MAX_BYTES = 1 << 20  # a form with the longest settings that a spec may have


def keep(saves: Path, user: str, text: str) -> None:
    """Replace what is kept of the user's form. A longer text is not kept; nor is one that the disk refuses: the form
    works without, and whatever else needs the disk says so."""
    path = _file(saves, user)
    if path is None or len(text.encode("utf-8", "replace")) > MAX_BYTES or kept(saves, user) == text:
        return
    with contextlib.suppress(OSError, UnicodeEncodeError):
        path.parent.mkdir(exist_ok=True)
        write_text(path, text, durable=False, private=True)


def kept(saves: Path, user: str) -> str:
    """What is kept of the user's form; "" if there is nothing that can be read."""
    path = _file(saves, user)
    try:
        return read_text(path) if path else ""
    except (OSError, UnicodeDecodeError):
        return ""


def forget(saves: Path, user: str) -> None:
    """Delete it, so that it does not become that of another user with the same name."""
    if path := _file(saves, user):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _file(saves: Path, user: str) -> Path | None:
    return saves / FOLDER / f"{user}.json" if USER_NAME.fullmatch(user) else None
