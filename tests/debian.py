"""Debian's packages, for the programs that tests need besides Python's."""

from __future__ import annotations

import os
import subprocess


def apt_get(*words: str) -> None:
    """Debian and its kin, as root or through sudo. Raises OSError or CalledProcessError where that does not work."""
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run([*prefix, "apt-get", *words], check=True, env=environment, stdout=subprocess.DEVNULL)
