"""The GGUF file of an export: made by llama.cpp's converter, read back, and never at the cost of the merged model.

Most converters here are a few lines that do what a real one may do: fail, write nothing, write
rubbish. The real one, in the environment of `make gguf`, converts SmolLM2, where both are there.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core.problems import sentences
from engine.core.rundir import RunDir, read_json, write_json, write_text
from engine.export import gguf
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from engine.runs import runs
from tests.conftest import engine, wait_until
from tests.preloaded import run_python
from webui.export_tab import exports_html
from webui.words import Words

pytestmark = pytest.mark.usefixtures("forked")

WRITES = "import pathlib, sys; to = pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1])\n"
FAILS = "raise SystemExit('NotImplementedError: BPE pre-tokenizer was not recognized')"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
RUBBISH = f"{WRITES}to.write_bytes(b'<html>not found</html>' * 100)"


def empty_gguf(architecture: str) -> bytes:
    """A GGUF file of version 3 with no tensor and one fact, by llama.cpp's docs/gguf.md."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fact = text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + fact + bytes(64)


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program in the converter's place."""
    script = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    monkeypatch.setenv("ATHANOR_LLAMA_CPP", str(script.parent))
    return lambda program: script.write_text(program, encoding="utf-8") and None


@pytest.fixture
def exported(workplace: Workplace) -> RunDir:
    """An export whose merged model is there and whose GGUF file is not: its own next attempt is that step alone."""
    run = RunDir(workplace.saves / "demo_model" / "export" / "small")
    shutil.copytree(DEMO_MODEL, run.model)
    spec = ExportSpec.read({"name": "small", "model": {"model_name_or_path": str(DEMO_MODEL)}, "gguf": "q8_0"})
    write_text(run.spec, spec.to_yaml())
    write_json(run.request, {"kind": "export", "by": "", "submitted": 1.0, "queued": 1, "attempt": 2, "stop": None})
    write_json(run.model / "result.json", {"attempt": 1, "complete": True, "stage": "sft"})
    write_text(run.model / "Modelfile", "FROM .\n\nPARAMETER temperature 0\n")
    write_json(run.gguf, {"status": "failed", "problems": []})
    return run


def step(run: RunDir) -> dict[str, Any]:
    """What gguf.json says after the worker has gone on with the export."""
    printed = run_python("-m", "engine.worker.export", run.path)
    return read_json(run.gguf) | {"printed": printed}


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "result.json"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "code", "why"),
    [
        (FAILS, "export-gguf-failed", "not recognized"),
        (KILLED, "export-gguf-failed", "SIGKILL"),
        ("print('done')", "export-gguf-nothing", "done"),
        (RUBBISH, "export-gguf-garbage", "<htm"),
        (None, "export-converter-not-there", "llama.cpp"),
    ],
    ids=["fails", "killed", "nothing", "rubbish", "missing"],
)
def test_whatever_the_converter_does_the_merged_model_stays_as_it_is(
    program: str | None, code: str, why: str, exported: RunDir, converter: Callable[[str], None]
) -> None:
    if program:
        converter(program)
    before = files(exported.model)
    made = step(exported)
    assert (made["status"], [one["code"] for one in made["problems"]]) == ("failed", [code])
    assert why in str(made["problems"][0]["values"])
    assert files(exported.model) == before
    assert read_json(exported.model / "result.json")["attempt"] == 2  # so the run is finished all the same
    assert not (exported.path / ".gguf.partial").exists()
    assert "python -m engine resume" in made["printed"]
    assert gguf.can_be_tried_again(exported)


@pytest.mark.slow
def test_a_file_that_cannot_be_read_back_is_kept_and_said_to_be_unread(
    exported: RunDir, converter: Callable[[str], None]
) -> None:
    content = empty_gguf("nobodys-model")
    converter(f"{WRITES}to.write_bytes({content!r})")
    made = step(exported)
    assert made["status"] == "unread"
    assert made["problems"][0]["code"] == "export-gguf-architecture"
    assert (exported.model / "model-q8_0.gguf").read_bytes() == content
    assert (exported.model / "Modelfile").read_text() == "FROM ./model-q8_0.gguf\n\nPARAMETER temperature 0\n"
    sums = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=exported.model, capture_output=True)
    assert sums.returncode == 0
    assert b"model-q8_0.gguf: OK" in sums.stdout
    assert not gguf.can_be_tried_again(exported)


@pytest.mark.slow
def test_an_export_without_its_gguf_file_is_finished_and_resume_makes_that_file_alone(
    workplace: Workplace, converter: Callable[[str], None]
) -> None:
    here = Workplace(models=(DEMO_MODEL,), data=workplace.data, saves=workplace.saves)
    converter(FAILS)
    spec = ExportSpec.read(
        {
            "name": "demo",
            "model": {"model_name_or_path": str(DEMO_MODEL)},
            "gguf": "q8_0",
            "check_prompts": 1,
            "hardware": {"device": "cpu"},
        }
    )
    id = runs.submit(spec, here).id

    def ended() -> runs.Run:
        return wait_until(lambda: (now := runs.get(here.saves, id)).final and now)

    run = ended()
    assert run.state == "finished", run.dir.log.read_text()
    assert "resume" in run.can
    page = exports_html.listed([run], "", Words("en"))
    assert "BPE pre-tokenizer was not recognized" in page
    assert f'data-retry="{id}"' in page
    weights = run.dir.model / "model.safetensors"
    as_it_was = weights.stat()

    converter(f"{WRITES}to.write_bytes({empty_gguf('nobodys-model')!r})")
    assert engine(here, "resume", id).returncode == 0
    run = ended()
    assert run.state == "finished", run.dir.log.read_text()
    assert (run.dir.model / "model-q8_0.gguf").exists()
    now = weights.stat()
    assert (now.st_ino, now.st_mtime_ns) == (as_it_was.st_ino, as_it_was.st_mtime_ns)  # not written again
    assert "resume" not in run.can
    page = exports_html.listed([run], "", Words("zh"))
    assert "data-retry" not in page
    assert "没有读回" in page


# ------------------------------------------------------------------------------------------ the real converter


@pytest.fixture(scope="module")
def real() -> Path:
    """The environment of `make gguf`."""
    there = [place for place in gguf.environments() if (place / "bin" / "convert-hf-to-gguf").exists()]
    if not there:
        pytest.skip("llama.cpp's converter is not here: make gguf")
    return there[0]


@pytest.mark.slow
def test_a_real_model_becomes_a_file_that_says_the_same(
    smollm2: Path, real: Path, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATHANOR_LLAMA_CPP", raising=False)
    run = RunDir(workplace.saves / "SmolLM2-135M-Instruct" / "export" / "real")
    run.model.mkdir(parents=True)
    for file in smollm2.iterdir():
        os.link(file, run.model / file.name) if file.suffix == ".safetensors" else shutil.copy(file, run.model)
    (run.model / "SHA256SUMS").unlink()
    spec = ExportSpec.read({"model": {"model_name_or_path": str(smollm2)}, "gguf": "q8_0"})
    write_text(run.spec, spec.to_yaml())
    write_json(run.request, {"kind": "export", "by": "", "submitted": 1.0, "attempt": 2, "stop": None})
    write_json(run.model / "result.json", {"attempt": 1, "complete": True, "stage": "sft"})
    # The answer that `make smollm2` has heard, as the export would have written it down.
    tokenizer = json.loads((smollm2 / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis", "ĠParis", "."]
    answer = {"tokens": [tokenizer[word] for word in words], "finish": "stop"}
    row = {
        "source": "own",
        "prompt": "?",
        "after": "The capital of France is Paris.",
        "answer": answer,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    write_json(run.model / "comparison.json", {"rows": [row]})
    write_json(run.gguf, {"status": "failed", "problems": []})
    made = step(run)
    assert made["status"] == "made", made
    assert (made["weights"]["compared"], made["weights"]["count"]) == (272, 272)
    assert 0.001 < made["weights"]["largest"] < 0.01
    assert made["answers"]["rows"][0]["after"] == "The capital of France is Paris."
    assert (made["answers"]["equal"], made["answers"]["same_tokens"]) == (1, made["answers"]["tokens"])
    file = (run.model / "model-q8_0.gguf").read_bytes()[:8]
    assert file == b"GGUF" + struct.pack("<I", 3)
    assert 140e6 < made["bytes"] < 150e6  # 8.5 bits a weight


COMPARE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from engine.worker.exporting.gguf_check import compare_weights
torch.manual_seed(0)
merged = {name: torch.randn(64, 64) for name in ("a", "b", "c")}
save_file(merged, Path(sys.argv[1], "model.safetensors"))
wrong = {"same": merged, "rounded": {**merged, "b": merged["b"].half().float()},
         "swapped": {**merged, "b": merged["c"], "c": merged["b"]}, "turned": {**merged, "b": merged["b"].T},
         "nan": {**merged, "c": merged["c"] * float("nan")}, "other": {**merged, "a": merged["a"][:32]},
         "absent": {"x": merged["a"]}}
print(json.dumps({name: compare_weights(read, Path(sys.argv[1])) for name, read in wrong.items()}))
"""


@pytest.mark.slow
def test_weights_in_a_wrong_place_are_not_mistaken_for_rounding(tmp_path: Path) -> None:
    told = json.loads(run_python("-c", COMPARE, tmp_path).splitlines()[-1])
    assert told["same"] == {"largest": 0.0, "name": "", "compared": 3, "count": 3}
    assert 0 < told["rounded"]["largest"] < gguf.ROUNDING_TOLERANCE["f16"]
    assert told["rounded"]["name"] == "b"
    for name in ("swapped", "turned"):
        assert 1.2 < told[name]["largest"] < 1.6  # √2: two that have nothing to do with each other
    assert told["nan"]["name"] == "c"
    assert told["nan"]["largest"] != told["nan"]["largest"]
    assert told["other"]["largest"] == float("inf")
    assert (told["absent"]["largest"], told["absent"]["compared"]) == (None, 0)


# ------------------------------------------------------------------------------------------ where it is


def test_the_converter_is_found_where_it_is_named_and_nowhere_else_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    for file in (script, environment / "bin" / "convert-hf-to-gguf"):
        file.touch(0o755)
    monkeypatch.setenv("ATHANOR_LLAMA_CPP", str(tmp_path / "nothing"))
    assert gguf.converter() is None
    for named in (tmp_path, script):
        monkeypatch.setenv("ATHANOR_LLAMA_CPP", str(named))
        assert gguf.converter().command(Path("/m"), Path("/f"), "q8_0")[1:] == [
            str(script),
            "/m",
            "--outfile",
            "/f",
            "--outtype",
            "q8_0",
        ]
    for named in (environment, environment / "bin" / "convert-hf-to-gguf"):
        monkeypatch.setenv("ATHANOR_LLAMA_CPP", str(named))
        assert gguf.converter().words == (str(environment / "bin" / "python"), "-m", "convert_hf_to_gguf")
    # Unset: the environment that make gguf makes, else the path.
    monkeypatch.delenv("ATHANOR_LLAMA_CPP")
    monkeypatch.setenv("PATH", "/nothing")
    monkeypatch.setattr(gguf, "environments", lambda: [tmp_path / "none"])
    assert gguf.converter() is None
    assert gguf.commands(Path("/x")) == "make gguf"
    monkeypatch.setenv("PATH", str(environment / "bin"))
    assert gguf.converter().place == environment
    monkeypatch.setattr(gguf, "environments", lambda: [environment])
    monkeypatch.setenv("PATH", "/nothing")
    assert gguf.converter().python == str(environment / "bin" / "python")
    assert gguf.commands(Path("/x y")).endswith("'/x y' --outfile '/x y/model-q8_0.gguf' --outtype q8_0")


def test_every_reason_that_is_written_down_has_its_sentences() -> None:
    source = "".join(
        (PROJECT / "engine" / "worker" / "exporting" / f"{name}.py").read_text() for name in ("gguf", "gguf_check")
    )
    for code in [code for code in sentences() if code.startswith("export-gguf-")]:
        if code not in ("export-gguf-adapter",):
            assert f'"{code}"' in source, code


@pytest.mark.parametrize("text", ["", "[]", "null", '{"status": "made"}', '{"status": "good"}', '{"status": "failed"}'])
def test_a_gguf_json_that_somebody_has_edited_breaks_no_page(text: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.gguf.write_text(text)
    assert gguf.outcome(run) is None
    assert not gguf.can_be_tried_again(run)
