"""The modes of files: of everything that a process writes, and of files that libraries create for their owner only."""

from __future__ import annotations

import os
import re
from pathlib import Path

DEFAULT_UMASK = 0o022


def apply_umask(path: str | os.PathLike[str]) -> None:
    """Give a file or folder the mode of a newly created one, so that a team can read it if the umask allows."""
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~_umask())


def _umask() -> int:
    """The umask of this process. Only /proc shows it without changing it for other threads."""
    umask = re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(umask[1], 8) if umask else DEFAULT_UMASK


def keep_from_other_users() -> None:
    """If a login is required, other accounts of this machine must not read what this process and its runs write.
    Group permissions still follow the umask."""
    os.umask(os.umask(0o077) | 0o007)
