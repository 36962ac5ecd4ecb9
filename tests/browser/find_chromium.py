"""Finds a Chromium for the browser tests, or installs Debian's together with fonts that have Chinese.

The headless shell is the same engine without the windows, menus and services of a desktop browser: a page costs it two
thirds of the processor time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys

from tests.debian import apt_get

HEADLESS_SHELL = "chromium-headless-shell"
NAMES = (HEADLESS_SHELL, "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGES = (HEADLESS_SHELL, "chromium")  # the second where a distribution does not have the first
FONTS = "fonts-noto-cjk"
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
    """Debian's, unless the best is there already. Raises OSError or CalledProcessError where that does not work."""
    if os.environ.get("ATHANOR_CHROMIUM") or shutil.which(HEADLESS_SHELL):
        return
    apt_get("update", "-qq")
    for package in PACKAGES:
        with contextlib.suppress(subprocess.CalledProcessError):
            apt_get("install", "-y", "-qq", "--no-install-recommends", package, FONTS)
            return
    raise FileNotFoundError(f"none of {', '.join(PACKAGES)} can be installed")


def main() -> int:
    try:
        install()
    except (OSError, subprocess.CalledProcessError) as error:
        if not chromium():
            message = f"No Chromium, and none could be installed ({error}). Install {PACKAGES[0]} and {FONTS}."
            print(message, file=sys.stderr)
            return 1
    print(f"browser tests use {chromium()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
