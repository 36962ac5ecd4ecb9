"""The saves folder of a version before: `old_saves.tar.xz`, made on 2026-11-29 by the version whose modules
all lay flat in `engine/`. In it are a finished training, the same one cut off after its second checkpoint,
an evaluation and an export (without its weights), all called `TRAINED` but for the one that is `CUT_OFF`."""

from __future__ import annotations

import tarfile
from pathlib import Path

from engine.launch.workspace import PROJECT
from engine.runs import runs

TRAINED, CUT_OFF = "before-the-move", "cut-off"


def extract(saves: Path) -> None:
    """The old runs below `saves`, with the paths that their files name put right."""
    with tarfile.open(Path(__file__).parent / "old_saves.tar.xz") as archive:
        archive.extractall(saves, filter="data")
    for file in saves.rglob("*"):
        if file.suffix in (".yaml", ".json", ".txt", ".md"):
            text = file.read_text(encoding="utf-8")
            text = text.replace("@PROJECT@", str(PROJECT)).replace("@SAVES@", str(saves))
            file.write_text(text, encoding="utf-8")


def run_called(saves: Path, kind: str, name: str) -> runs.Run:
    return next(run for run in runs.find(saves, kind) if run.path.name.endswith(name))
