"""The optional last step of an export: its merged model as one GGUF file, read back before it counts.

llama.cpp's converter and the reading back are child processes, so that nothing they do can harm the merged model, which
is complete and in place. Errors are written to gguf.json and printed; the step can be repeated.
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
from engine.export import gguf, ollama
from engine.export.export_spec import ExportSpec, no_converter, weights
from engine.export.gguf import READ_BACK_BYTES_PER_WEIGHT, Converter
from engine.launch.workspace import PROJECT
from engine.models.facts import inspect_model
from engine.worker.exporting.model_card import write_checksums
from engine.worker.runtime.process_lifecycle import ProgressReport

MAGIC = b"GGUF"  # the first bytes of every such file
MAX_LINE_CHARS = 300  # of the last line of a child's output


def add_gguf_file(run: RunDir, spec: ExportSpec, report: ProgressReport) -> None:
    """Write the requested GGUF file next to the merged model, or record in gguf.json why there is none."""
    report("converting")
    began = {"type": spec.gguf, "status": "failed"}
    # The status until more is known: whatever ends this process, the step can be repeated.
    write_json(run.gguf, began | _problems_json([problem("export-gguf-cut-off", "gguf")]))
    try:
        made = _make_file(run, spec)
    except Refusal as refusal:
        made = began | _problems_json(refusal.problems)
    except OSError as error:  # such as a full disk
        why = problem("system-refused", "gguf", file=error.filename or "—", why=error.strerror or str(error))
        made = began | _problems_json([why])
    write_json(run.gguf, made)
    shutil.rmtree(_scratch(run), ignore_errors=True)
    _print(run, made)


def _scratch(run: RunDir) -> Path:
    return run.path / ".gguf.partial"


def _problems_json(problems: list[Problem]) -> dict[str, Any]:
    """Problems as codes, so that the page can show them in the reader's language."""
    plain = [{"code": reason.code, "values": {k: str(v) for k, v in reason.values.items()}} for reason in problems]
    return {"problems": plain}


def _print(run: RunDir, made: Mapping[str, Any]) -> None:
    for entry in made.get("problems", ()):
        print(problem(entry["code"], "gguf", **entry["values"]).text(shell_language()), flush=True)
    if made["status"] == "failed":
        print(problem("export-gguf-later", folder=run.model).text(shell_language()), flush=True)


def _make_file(run: RunDir, spec: ExportSpec) -> dict[str, Any]:
    """Convert, read back, move into place; returns the content of gguf.json. Raises Refusal or OSError if there is no
    file."""
    converter = gguf.converter()
    if converter is None:
        raise Refusal(no_converter())
    scratch = _scratch(run)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    file = scratch / f"model-{spec.gguf}.gguf"
    _convert(converter, spec, run.model, file)
    check = _read_back(converter, spec, run, file)
    if far := _rounding_problem(spec, check):
        raise Refusal(far)
    _install(run.model, file, check)
    return {"type": spec.gguf, "file": file.name, "bytes": (run.model / file.name).stat().st_size} | check


def _convert(converter: Converter, spec: ExportSpec, model: Path, file: Path) -> None:
    """Have the converter write the file; its output goes to the log. Raises Refusal with its last line."""
    code, last = _run_child(converter.command(model, file, spec.gguf), file.with_name("convert.log"))
    if code:
        raise Refusal(problem("export-gguf-failed", "gguf", code=code, why=last))
    if not file.is_file():
        raise Refusal(problem("export-gguf-nothing", "gguf", why=last))
    with file.open("rb") as content:
        if (begins := content.read(4)) != MAGIC:
            raise Refusal(problem("export-gguf-garbage", "gguf", why=f"{begins!r} ≠ {MAGIC!r}"))


def _run_child(command: list[str], log: Path, text: str = "") -> tuple[int, str]:
    """Run a child with `text` as its input; returns its exit code and its last line of output, all of which is
    printed."""
    print("$", *command, flush=True)
    with log.open("wb") as output:
        done = subprocess.run(
            command, input=text.encode(), stdout=output, stderr=subprocess.STDOUT, check=False, cwd=PROJECT
        )
    printed = log.read_text(encoding="utf-8", errors="replace")
    print(printed, flush=True)
    killed = signal.Signals(-done.returncode).name if done.returncode < 0 else "—"
    return done.returncode, (printed.strip().splitlines() or [killed])[-1][:MAX_LINE_CHARS]


# ------------------------------------------------------------------------------------------ read back


def _read_back(converter: Converter, spec: ExportSpec, run: RunDir, file: Path) -> dict[str, Any]:
    """The result of `engine.worker.exporting.gguf_check` for the file; `status` is "unread" if it could not be read
    here, although it may be correct. Raises Refusal if it is not a GGUF file."""
    needed, (free, _) = READ_BACK_BYTES_PER_WEIGHT * weights(spec), hardware.memory()
    if needed > free:
        sizes = {"needed": f"{needed / 1e9:.2f} GB", "free": f"{free / 1e9:.2f} GB"}
        return {"status": "unread"} | _problems_json([problem("export-gguf-no-memory", "gguf", **sizes)])
    answer = file.with_name("check.json")
    question = {
        "run": str(run.path),
        "model": str(run.model),
        "file": str(file),
        "answer": str(answer),
        "precision": inspect_model(run.model).dtype,
    }
    command = [converter.python, "-m", "engine.worker.exporting.gguf_check"]
    code, last = _run_child(command, file.with_name("check.log"), json.dumps(question))
    check = read_json(answer)
    if code or check is None:
        return {"status": "unread"} | _problems_json([problem("export-gguf-unread", "gguf", why=last)])
    if broken := check.get("broken"):
        raise Refusal(problem("export-gguf-garbage", "gguf", why=broken))
    if unread := check.get("unread"):
        return {"status": "unread"} | _problems_json([problem(unread["code"], "gguf", **unread["values"])])
    return {"status": "made"} | check


def _rounding_problem(spec: ExportSpec, check: Mapping[str, Any]) -> Problem | None:
    """The problem that a weight of the file differs from the merged one by more than rounding explains."""
    largest = check.get("weights", {}).get("largest")
    if largest is None or largest <= gguf.ROUNDING_TOLERANCE[spec.gguf]:
        return None
    values = {"name": check["weights"]["name"], "far": f"{largest:.1%}", "type": spec.gguf}
    return problem("export-gguf-differs", "gguf", most=f"{gguf.ROUNDING_TOLERANCE[spec.gguf]:.1%}", **values)


def _install(model: Path, file: Path, check: Mapping[str, Any]) -> None:
    """Move the file next to the merged model, with a Modelfile that refers to it, a line in the model card, and new
    checksums."""
    file.replace(model / file.name)
    for name, change in (
        ("Modelfile", lambda text: ollama.with_weights_file(text, file.name)),
        ("README.md", lambda text: f"{text.rstrip()}\n\n{_card_line(file.name, check)}\n"),
    ):
        if (model / name).is_file():
            write_text(model / name, change((model / name).read_text(encoding="utf-8")))
    write_checksums(model)


def _card_line(name: str, check: Mapping[str, Any]) -> str:
    """The model card's sentence about the file."""
    if check["status"] != "made":
        return f"GGUF: `{name}`; it was not read back."
    answers = check["answers"]
    text = f"GGUF: `{name}`, read back: its weights are within {check['weights']['largest']:.2%} of the merged ones"
    if answers["tokens"]:
        text += (
            f"; {answers['equal']} of {answers['prompts']} greedy answers are equal, and given the same beginning "
            f"{answers['same_tokens']} of {answers['tokens']} next tokens"
        )
    return f"{text}."
