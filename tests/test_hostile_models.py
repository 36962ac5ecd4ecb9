"""One model folder that cannot be read harms neither the list of models nor a question about another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.launch.workspace import DEMO_MODEL, PROJECT

LLAMA = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()
ODD = (
    b'{"model_type": ["x"], "architectures": 3, "hidden_size": '
    b'"a", "quantization_config": "x", "rope_scaling": 3, "torch_dtype": {}}'
)
KINDS: dict[str, bytes | Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a hole": lambda path: path.open("wb").truncate(1 << 40),
    "nesting": b"[" * 200_000,
    "digits": b'{"hidden_size": ' + b"9" * 10_000 + b"}",
    "odd": ODD,
    "no text": b"\xff" * 100,
    "empty": b"",
    "a list": b"[1]",
    "an index": b'{"weight_map": 5, "metadata": []}',
}
FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "generation_config.json",
    "adapter_config.json",
    "chat_template.jinja",
)
# In a child with a time limit: where a pipe is waited for, nothing else of a test would end it.
LOOK = """
import sys
from pathlib import Path
from engine.core.problems import Refusal
from engine.launch.workspace import Workplace
from engine.models.discovery import find_models
from engine.preflight import checks
from engine.runs import kinds, recent
from engine.spec.run_spec import RunSpec
models, data, saves = map(Path, sys.argv[1:])
workplace = Workplace(models=(models,), data=data, saves=saves)
for model in find_models(workplace.models):
    settings = {"datasets": ["chat"], "dataset_dir": str(data)}
    spec = RunSpec.read({"model": {"model_name_or_path": str(model.path)}, "data": settings})
    kinds.training_problems(spec, workplace)
    print(model.path.name)
recent.first_model(workplace)
"""


@pytest.mark.parametrize("file", FILES)
def test_a_model_that_cannot_be_read_harms_no_other(tmp_path: Path, data: Path, file: str) -> None:
    models = tmp_path / "models"
    models.mkdir()
    shutil.copytree(DEMO_MODEL, models / "good")
    (models / "loop").symlink_to("loop")
    (models / "around").symlink_to(".")
    for name, content in KINDS.items():
        folder = models / name
        folder.mkdir()
        if file != "config.json":
            (folder / "config.json").write_bytes(LLAMA)
        (folder / file).write_bytes(content) if isinstance(content, bytes) else content(folder / file)
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(models), str(data), str(tmp_path / "saves")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "good" in done.stdout.split()
