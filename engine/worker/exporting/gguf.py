"""The optional last step of an export: its merged model as one GGUF file, read back before it counts.

llama.cpp's converter and the reading back are children of this process, so that nothing they do can harm the merged model,
which is finished and in its place. Whatever goes wrong is written into gguf.json and printed; the step can be tried again.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core import hardware
from engine.core.problems import Problem, Refusal, problem, shell_language
from engine.core.rundir import RunDir, read_json, write_json, write_text
from engine.export import deployment, gguf
from engine.export.export_spec import ExportSpec, no_converter, weights
from engine.export.gguf import READING, Converter
from engine.launch.workspace import PROJECT
from engine.models.facts import inspect
from engine.worker.exporting.model_card import seal
from engine.worker.runtime.process_lifecycle import Report

MAGIC = b"GGUF"  # what every such file begins with
LAST = 300  # characters of a child's last line that are told


def add(run: RunDir, spec: ExportSpec, report: Report) -> None:
    """Put the GGUF file that the spec wants beside the merged model, or say in gguf.json why there is none."""
    report("converting")
    began = {"type": spec.gguf, "status": "failed"}
    # As long as nothing else is known: whatever ends this process, the step can be tried again.
    write_json(run.gguf, began | _told([problem("export-gguf-cut-off", "gguf")]))
    try:
        made = _made(run, spec)
    except Refusal as refusal:
        made = began | _told(refusal.problems)
    except OSError as error:  # a full disk, say
        why = problem("system-refused", "gguf", file=error.filename or "—", why=error.strerror or str(error))
        made = began | _told([why])
    write_json(run.gguf, made)
    shutil.rmtree(_scratch(run), ignore_errors=True)
    _print(run, made)


def _scratch(run: RunDir) -> Path:
    return run.path / ".gguf.partial"


def _told(problems: list[Problem]) -> dict[str, Any]:
    """Problems as codes, so that the page can say them in the reader's language."""
    plain = [{"code": one.code, "values": {k: str(v) for k, v in one.values.items()}} for one in problems]
    return {"problems": plain}


def _print(run: RunDir, made: Mapping[str, Any]) -> None:
    for one in made.get("problems", ()):
        print(problem(one["code"], "gguf", **one["values"]).text(shell_language()), flush=True)
    if made["status"] == "failed":
        print(problem("export-gguf-later", folder=run.model).text(shell_language()), flush=True)


def _made(run: RunDir, spec: ExportSpec) -> dict[str, Any]:
    """Convert, read back, put in place; what gguf.json says then. Raises Refusal or OSError where there is no file."""
    converter = gguf.converter()
    if converter is None:
        raise Refusal(no_converter())
    scratch = _scratch(run)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    file = scratch / f"model-{spec.gguf}.gguf"
    _convert(converter, spec, run.model, file)
    found = _read_back(converter, spec, run, file)
    if far := _too_far(spec, found):
        raise Refusal(far)
    _put(run.model, file, found)
    return {"type": spec.gguf, "file": file.name, "bytes": (run.model / file.name).stat().st_size} | found


def _convert(converter: Converter, spec: ExportSpec, model: Path, file: Path) -> None:
    """Have the converter write the file; its output goes to the log. Raises Refusal with its last line."""
    code, last = _child(converter.command(model, file, spec.gguf), file.with_name("convert.log"))
    if code:
        raise Refusal(problem("export-gguf-failed", "gguf", code=code, why=last))
    if not file.is_file():
        raise Refusal(problem("export-gguf-nothing", "gguf", why=last))
    with file.open("rb") as content:
        if (begins := content.read(4)) != MAGIC:
            raise Refusal(problem("export-gguf-garbage", "gguf", why=f"{begins!r} ≠ {MAGIC!r}"))


def _child(command: list[str], log: Path, text: str = "") -> tuple[int, str]:
    """Run a child with `text` as its input; its exit code, and the last line that it printed. All of it is printed here."""
    print("$", *command, flush=True)
    with log.open("wb") as output:
        done = subprocess.run(
            command, input=text.encode(), stdout=output, stderr=subprocess.STDOUT, check=False, cwd=PROJECT
        )
    told = log.read_text(encoding="utf-8", errors="replace")
    print(told, flush=True)
    killed = signal.Signals(-done.returncode).name if done.returncode < 0 else "—"
    return done.returncode, (told.strip().splitlines() or [killed])[-1][:LAST]


# ------------------------------------------------------------------------------------------ read back


def _read_back(converter: Converter, spec: ExportSpec, run: RunDir, file: Path) -> dict[str, Any]:
    """What `engine.worker.exporting.gguf_check` has found in the file; `status` "unread" where it could not be read here, though
    it may be right. Raises Refusal if it is no GGUF file."""
    needed, (free, _) = READING * weights(spec), hardware.memory()
    if needed > free:
        sizes = {"needed": f"{needed / 1e9:.2f} GB", "free": f"{free / 1e9:.2f} GB"}
        return {"status": "unread"} | _told([problem("export-gguf-no-memory", "gguf", **sizes)])
    answer = file.with_name("check.json")
    question = {
        "run": str(run.path), "model": str(run.model), "file": str(file), "answer": str(answer), "precision": inspect(run.model).dtype,
    }  # fmt: skip
    command = [converter.python, "-m", "engine.worker.exporting.gguf_check"]
    code, last = _child(command, file.with_name("check.log"), json.dumps(question))
    found = read_json(answer)
    if code or found is None:
        return {"status": "unread"} | _told([problem("export-gguf-unread", "gguf", why=last)])
    if broken := found.get("broken"):
        raise Refusal(problem("export-gguf-garbage", "gguf", why=broken))
    if unread := found.get("unread"):
        return {"status": "unread"} | _told([problem(unread["code"], "gguf", **unread["values"])])
    return {"status": "made"} | found


def _too_far(spec: ExportSpec, found: Mapping[str, Any]) -> Problem | None:
    """That a weight of the file is further from the merged one than rounding explains."""
    largest = found.get("weights", {}).get("largest")
    if largest is None or largest <= gguf.ROUNDING[spec.gguf]:
        return None
    values = {"name": found["weights"]["name"], "far": f"{largest:.1%}", "type": spec.gguf}
    return problem("export-gguf-differs", "gguf", most=f"{gguf.ROUNDING[spec.gguf]:.1%}", **values)


def _put(model: Path, file: Path, found: Mapping[str, Any]) -> None:
    """The file beside the merged model, with a Modelfile that names it, a line in the card, and new checksums."""
    file.replace(model / file.name)
    for name, change in (
        ("Modelfile", lambda text: deployment.from_file(text, file.name)),
        ("README.md", lambda text: f"{text.rstrip()}\n\n{_line(file.name, found)}\n"),
    ):
        if (model / name).is_file():
            write_text(model / name, change((model / name).read_text(encoding="utf-8")))
    seal(model)


def _line(name: str, found: Mapping[str, Any]) -> str:
    """The card's sentence about the file."""
    if found["status"] != "made":
        return f"GGUF: `{name}`; it was not read back."
    answers = found["answers"]
    text = f"GGUF: `{name}`, read back: its weights are within {found['weights']['largest']:.2%} of the merged ones"
    if answers["tokens"]:
        text += (
            f"; {answers['equal']} of {answers['prompts']} greedy answers are equal, and given the same beginning "
            f"{answers['same_tokens']} of {answers['tokens']} next tokens"
        )
    return f"{text}."
