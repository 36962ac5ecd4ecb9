"""Finds an nginx for the tests of the reverse proxy, or fetches Debian's. It is
not installed: an installed one would serve port 80."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.debian import apt_get

PACKAGE = "nginx"
FOLDER = Path("~/.cache/athanor/nginx").expanduser()
FETCHED = FOLDER / "usr" / "sbin" / "nginx"


def nginx() -> str | None:
    """Path of an nginx on this machine. Debian installs it where only root looks."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which("nginx", path=path) or shutil.which(FETCHED)


def fetch() -> None:
    """Unpack Debian's package in `FOLDER`. Raises OSError or CalledProcessError where that does not work."""
    with tempfile.TemporaryDirectory() as folder:
        download = ["apt-get", "download", "-qq", PACKAGE]
        if subprocess.run(download, cwd=folder, capture_output=True, check=False).returncode:
            apt_get("update", "-qq")  # an image often comes without lists of packages, or with old ones
            subprocess.run(download, cwd=folder, check=True)
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", package, FOLDER], check=True)
    subprocess.run([FETCHED, "-v"], check=True, capture_output=True)  # it may want a library


def main() -> int:
    if not nginx():
        try:
            fetch()
        except (OSError, subprocess.CalledProcessError) as error:
            shutil.rmtree(FOLDER, ignore_errors=True)
            print(
                f"No nginx, and none could be fetched ({error}): tests of the reverse proxy are SKIPPED.",
                file=sys.stderr,
            )
            return 1
    print(f"tests of the reverse proxy use {nginx()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
