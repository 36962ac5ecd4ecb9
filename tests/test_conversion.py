"""GGUF files and pickled weights: offered for a conversion, converted once in a child, or refused unopened."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from engine.core import hardware
from engine.core.problems import Problem, Refusal
from engine.core.rundir import read_json, write_json
from engine.launch.workspace import Workplace
from engine.models.checks import model_problems
from engine.models.conversion import convertible
from engine.models.facts import inspect_model
from engine.worker.models import convert
from tests.conftest import engine, made_once
from tests.preloaded import run_python

pytestmark = pytest.mark.usefixtures("forked")

CHILD = """
import runpy, sys
sys.argv = ["convert", sys.argv[1]]
try:
    runpy.run_module("engine.worker.models.convert", run_name="__main__")
except SystemExit:
    pass
"""


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return made_once(tmp_path_factory, "packed", "tests.packed_models", str(tiny))


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "quantized", "tests.quantized_models")


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    """A model folder of this test's own."""
    return shutil.copytree(packed, tmp_path / "root")


def converted(root: Path, name: str, job: Path) -> Path | list[Problem]:
    """The folder that the job's process makes of what is called so, or why it makes none."""
    chosen = convertible(name, [root])
    assert chosen is not None
    job.mkdir()
    write_json(job / "request.json", {"given": {"file": str(chosen.file), "target": str(chosen.target)}})
    run_python("-c", CHILD, job)
    if result := read_json(job / "result.json"):
        return Path(result["folder"])
    return [Problem(entry["code"], entry["field"], entry["values"]) for entry in read_json(job / "error.json")]


def tensors(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no dict


def content(folder: Path) -> bytes:
    """All numbers of a model, behind the header."""
    whole = (folder / "model.safetensors").read_bytes()
    return whole[8 + int.from_bytes(whole[:8], "little") :]


# ------------------------------------------------------------------------------------------ offered


def test_what_can_be_converted_is_told_with_the_way_to_do_it(root: Path) -> None:
    for name, code in (("gguf", "model-gguf"), ("gguf/model.Q8_0.gguf", "model-gguf"), ("bin", "model-pickled")):
        (issue,) = model_problems(root / name, [root])
        assert issue.code == code
        assert all(f"python -m engine convert {root / name}" in issue.text(language) for language in ("en", "zh"))


def test_the_result_goes_beside_what_is_converted_or_to_where_models_are_found(root: Path, tmp_path: Path) -> None:
    assert convertible("bin", [root]) == (root / "bin" / "pytorch_model.bin.index.json", root / "bin-safetensors")
    assert convertible("pt", [root]).target == root / "pt-safetensors"
    file = root / "gguf" / "model.Q8_0.gguf"
    assert convertible(str(file), [root]) == (file, root / "gguf" / "model.Q8_0-safetensors")
    # The folder of the model is all that the studio may look into: beside it nothing would be found.
    assert convertible(str(root / "gguf"), [root / "gguf"]).target == root / "gguf" / "gguf-safetensors"
    assert [convertible(text, [root]) for text in ("gguf-plain", "none", "", "a\0b", str(tmp_path))] == [None] * 5
    assert convertible(str(root / "gguf"), [root / "bin"]) is None


def test_of_several_files_one_is_to_be_chosen(root: Path) -> None:
    (root / "gguf" / "model.Q4_K.gguf").touch()
    (root / "gguf" / "mmproj-f16.gguf").touch()
    (issue,) = model_problems(root / "gguf", [root])
    assert (issue.code, issue.values["files"]) == ("convert-choose", "model.Q4_K.gguf, model.Q8_0.gguf")
    with pytest.raises(Refusal) as refused:
        convertible("gguf", [root])
    assert [issue.code for issue in refused.value.problems] == ["convert-choose"]


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = root / "pt" / "last.pt"
    monkeypatch.setattr(hardware, "memory", lambda: (10_000, 10_000))
    with pytest.raises(Refusal) as refused:
        convert.convert(file, root / "out", lambda *_: None)
    assert [issue.code for issue in refused.value.problems] == ["convert-no-memory"]
    monkeypatch.setattr(hardware, "memory", lambda: (1 << 40, 1 << 40))
    monkeypatch.setattr(hardware, "free_disk", lambda _: 10_000)
    with pytest.raises(Refusal) as refused:
        convert.convert(file, root / "out", lambda *_: None)
    assert [issue.code for issue in refused.value.problems] == ["convert-no-room"]


# ------------------------------------------------------------------------------------------ converted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bin", "pt"])
def test_pickled_weights_are_the_same_as_safetensors(root: Path, tiny: Path, tmp_path: Path, name: str) -> None:
    folder = converted(root, name, tmp_path / "job")
    assert isinstance(folder, Path), folder
    assert model_problems(folder, [root]) == []
    assert (tensors(folder), content(folder)) == (tensors(tiny), content(tiny))
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads((tiny / "tokenizer.json").read_text())
    assert inspect_model(folder).has_chat_template


@pytest.mark.slow
def test_quantized_weights_are_dequantized_once_for_a_training_that_quantizes_them_otherwise(
    quantized: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(quantized / "mxfp4", root / "oss")
    folder = converted(root, "oss", tmp_path / "job")
    assert folder == root / "oss-dequantized"
    assert model_problems(folder, [root]) == []
    model = inspect_model(folder)
    assert (model.quantized, model.dtype) == (None, "bfloat16")
    assert tensors(folder) == tensors(quantized / "mxfp4-plain")
    assert convertible(str(folder), [root]) is None


EQUAL = """
import sys
from safetensors.torch import load_file
made, plain = (load_file(f"{folder}/model.safetensors") for folder in sys.argv[1:])
same = all(weight.equal(plain[name].to(weight.dtype)) for name, weight in made.items())
print(sorted(made) == sorted(plain) and same)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_weights_that_gptq_and_awq_have_packed_are_dequantized_once(quantized: Path, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(quantized / kind, root / "int4")
    (root / "int4" / {"gptq": "quantize_config.json", "awq": "quant_config.json"}[kind]).write_text('{"bits": 4}')
    (issue,) = model_problems(root / "int4", [root])
    assert issue.code == "model-quantized-convert"
    folder = converted(root, "int4", tmp_path / "job")
    assert folder == root / "int4-dequantized", folder
    assert model_problems(folder, [root]) == []
    assert run_python("-c", EQUAL, folder, quantized / f"{kind}-plain").splitlines()[-1] == "True"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("hostile-torch", "convert-hostile"),
        ("hostile-pickle", "convert-hostile"),
        ("cut", "convert-broken"),
        ("text", "convert-broken"),
        ("lacking", "weights-missing"),
    ],
)
def test_what_is_no_honest_file_of_weights_is_refused_and_leaves_nothing(
    root: Path, tmp_path: Path, name: str, code: str
) -> None:
    before = {path.name for path in root.iterdir()}
    problems = converted(root, name, tmp_path / "job")
    assert isinstance(problems, list), problems
    assert [issue.code for issue in problems] == [code]
    assert code != "convert-hostile" or "posix.system" in problems[0].text()
    assert {path.name for path in root.iterdir()} == before  # nor has the code run, which would leave a file here


def test_a_folder_of_the_name_of_the_result_is_left_as_it_is(root: Path, tiny: Path, tmp_path: Path) -> None:
    for number, make in enumerate((Path.mkdir, lambda folder: shutil.copytree(tiny, folder))):
        place = tmp_path / str(number)
        shutil.copytree(root / "pt", place / "pt")
        folder = place / "pt-safetensors"  # of the user: another model, or no model at all
        make(folder)
        (folder / "notes.txt").write_text("mine")
        (issue,) = converted(place, "pt", tmp_path / f"job{number}")
        assert issue.code == "convert-taken"
        assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_result_is_taken_again_while_the_weights_are_the_same(root: Path, tmp_path: Path) -> None:
    folder = converted(root, "pt", tmp_path / "first")
    assert isinstance(folder, Path), folder
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert converted(root, "pt", tmp_path / "again") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    (weights,) = (root / "pt").glob("*.pt")
    os.utime(weights, ns=(1, 1))  # as another release laid over it
    assert converted(root, "pt", tmp_path / "other") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns > made


SAME = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.arange(3, 35)[None]
text = "What comes after 7? <|im_end|> Übermorgen 北京"
models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in sys.argv[1:]]
tokens = [AutoTokenizer.from_pretrained(folder) for folder in sys.argv[1:]]
chat = [{"role": "user", "content": text}]
with torch.inference_mode():
    one, two = (model(ids).logits.float() for model in models)
print(json.dumps([
    float((one - two).abs().max()),
    all(weight.equal(models[1].state_dict()[name]) for name, weight in models[0].state_dict().items()),
    tokens[0](text).input_ids == tokens[1](text).input_ids,
    tokens[0].apply_chat_template(chat, tokenize=False) == tokens[1].apply_chat_template(chat, tokenize=False),
    "quantization_config" in models[0].config.to_dict(),
]))
"""


@pytest.mark.slow
def test_a_gguf_file_becomes_the_model_that_it_stands_for_by_a_verb_of_the_shell(
    root: Path, workplace: Workplace
) -> None:
    place = replace(workplace, models=(root,))
    done = engine(place, "convert", "gguf")
    assert (done.returncode, done.stdout.strip()) == (0, str(root / "gguf-safetensors")), done.stderr
    assert model_problems(root / "gguf-safetensors", [root]) == []
    printed = run_python("-c", SAME, root / "gguf-safetensors", root / "gguf-plain")
    far, *same = json.loads(printed.splitlines()[-1])
    assert far < 1e-5
    assert same == [True, True, True, False]


@pytest.mark.slow
def test_a_gguf_model_in_several_files_is_one_model(root: Path, workplace: Workplace) -> None:
    place, folder = replace(workplace, models=(root,)), root / "gguf-parts"
    parts = sorted(file.name for file in folder.iterdir())
    assert len(parts) > 2
    assert convertible("gguf-parts", [root]) == (folder / parts[0], root / "gguf-parts-safetensors")
    assert convertible(str(folder / parts[1]), [root]) == (folder / parts[0], folder / "model-safetensors")
    done = engine(place, "convert", "gguf-parts")
    assert (done.returncode, done.stdout.strip()) == (0, str(root / "gguf-parts-safetensors")), done.stderr
    printed = run_python("-c", SAME, root / "gguf-parts-safetensors", root / "gguf-plain")
    far, *same = json.loads(printed.splitlines()[-1])
    assert far < 1e-5
    assert same == [True, True, True, False]
    assert not list((root / "gguf-parts-safetensors").glob("*.gguf"))
    (folder / parts[1]).unlink()
    done = engine(place, "convert", "gguf-parts")
    assert done.returncode == 2
    assert parts[1] in done.stderr


def test_the_verb_says_that_there_is_nothing_to_convert(root: Path, workplace: Workplace) -> None:
    place = replace(workplace, models=(root,))
    done = engine(place, "convert", "gguf-plain")
    assert done.returncode == 2
    assert "gguf-plain" in done.stderr
    assert str(root) in done.stderr
