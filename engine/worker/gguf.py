"""A merged model as one GGUF file, by llama.cpp's own converter where it is installed. Its output goes to the log."""

from __future__ import annotations

import subprocess
from pathlib import Path

from engine import deploy
from engine.export import ExportSpec
from engine.problems import Refusal, problem


def convert(spec: ExportSpec, folder: Path) -> None:
    """Write the GGUF file that the spec wants into `folder`. Raises Refusal with the converter's last line."""
    script = deploy.converter()
    if spec.gguf == "none" or spec.form != "merged":
        return
    if script is None:
        raise Refusal(problem("export-no-converter", "gguf"))
    told = folder / ".gguf.log"
    with told.open("wb") as log:
        command = deploy.gguf_command(script, folder, folder / f"model-{spec.gguf}.gguf", spec.gguf)
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    text = told.read_text(encoding="utf-8", errors="replace")
    told.unlink()
    print(text, flush=True)
    if code:
        last = (text.strip().splitlines() or ["—"])[-1][:300]
        raise Refusal(problem("export-gguf-failed", "gguf", code=code, why=last))
