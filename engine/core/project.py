"""Where the project is, for what is started as `python -m engine…`, without the imports of `engine.launch`."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
