"""Finds a Chromium for the browser tests, or installs Debian's together with fonts that have Chinese."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from tests.debian import apt_get

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGES = ("chromium", "fonts-noto-cjk")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str | None:
    """Path of a Chromium on this machine; ATHANOR_CHROMIUM names one that is elsewhere."""
    given = os.environ.get("ATHANOR_CHROMIUM")
    return given or next(filter(None, map(shutil.which, NAMES)), None)


def install() -> None:
    """Debian's. Raises OSError or CalledProcessError where that does not work."""
    apt_get("update", "-qq")
    apt_get("install", "-y", "-qq", "--no-install-recommends", *PACKAGES)


def main() -> int:
    if not chromium():
        try:
            install()
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"No Chromium, and none could be installed ({error}). Install {' '.join(PACKAGES)}.",
                file=sys.stderr,
            )
            return 1
    print(f"browser tests use {chromium()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
