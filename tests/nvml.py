"""A stand-in for NVIDIA's library, for a machine that has no GPU: it reports what a file says.

It is the only thing about GPUs that is not real. Processes that find its folder in PYTHONPATH use it; for them, a
driver is installed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine.core import hardware

LIBRARY = Path(__file__).with_name("nvml_library.py")
# Python runs it at the start of each process. The trace of a driver is a file that only a driver can create.
AT_START = f"""
import os.path
_exists = os.path.exists
os.path.exists = lambda path: path == {hardware.DRIVER_TRACES[0]!r} or _exists(path)
"""


class Nvml:
    """What the driver reports, from now on: `report(gpus=[…])` or `report(error="…")`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        folder.mkdir()
        (folder / "pynvml.py").write_text(LIBRARY.read_text())
        (folder / "sitecustomize.py").write_text(AT_START)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.report(gpus=[])

    def report(self, trace: bool = True, **answer: Any) -> None:
        """`trace`: whether this process finds a driver."""
        partial = self.folder / "answer.partial"
        partial.write_text(json.dumps(answer))
        os.replace(partial, self.folder / "answer.json")  # another process may be reading it
        self.monkeypatch.setattr(hardware, "DRIVER_TRACES", (str(self.folder if trace else self.folder / "none"),))
        self.monkeypatch.setattr(hardware, "_last_query", None)
