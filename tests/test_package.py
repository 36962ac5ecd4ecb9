"""`pip install .` gives a command `athanor` that needs no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from engine.launch.workspace import PROJECT

SOURCES = ("app.py", "engine", "webui", "data", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the package, on top of this one's libraries. Nothing is fetched."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("package")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *SOURCES],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((PROJECT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    subprocess.run(build, check=True, env=os.environ | {"PIP_NO_INDEX": "1"})
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    binaries = folder / "venv" / "bin"
    (site,) = (folder / "venv").glob("lib/*/site-packages")
    (site / "base.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    install = [*pip, "--python", binaries / "python", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    return binaries


def athanor(binaries: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ATHANOR_")}
    return subprocess.run(
        [binaries / "athanor", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment | {"LANG": "C.UTF-8"},
    )


@pytest.mark.slow
def test_a_verb_is_what_the_shell_does(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(
        "stage: sft\nmodel: {model_name_or_path: demo_model}\ndata: {datasets: [identity], max_samples: 8}\n"
        "training: {max_steps: 1, per_device_train_batch_size: 4}\nhardware: {device: cpu}\n",
        encoding="utf-8",
    )
    assert athanor(installed, tmp_path, "--help").returncode == 0
    trained = athanor(installed, tmp_path, "train", "spec.yaml")
    assert trained.returncode == 0, trained.stderr + trained.stdout
    adapter = Path(trained.stdout.split()[-1])
    assert adapter.is_relative_to(tmp_path / "saves")
    assert (adapter / "adapter_model.safetensors").is_file()
    assert sys.prefix not in trained.stdout.split("[finished]")[0].split("$")[0]
