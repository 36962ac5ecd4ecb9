"""A model by its hub id: fetched before the eyes of the page, trained, kept; and every way in which that can fail."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.core.problems import say
from engine.core.rundir import RunDir, read_json, write_text
from engine.launch.workspace import PROJECT, Workplace
from engine.preflight.checks import preflight_problems
from engine.runs import failures, runs
from engine.runs.progress import progress
from engine.spec.run_spec import RunSpec
from tests.conftest import wait_until
from tests.hub import PATIENCE, Hub, files
from webui.runs_tab import head_html
from webui.words import Words

pytestmark = pytest.mark.slow

ID = "org/tiny"
HUBS = {"huggingface": ("HF_ENDPOINT", "HF_HOME"), "modelscope": ("MODELSCOPE_ENDPOINT", "MODELSCOPE_CACHE")}
both_hubs = pytest.mark.parametrize("which", HUBS)


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the tiny model, and an empty cache; what this machine has of its own hubs is no part of the test."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "MODELSCOPE_DOMAIN"):
        monkeypatch.delenv(name, raising=False)
    with Hub({ID: tiny}) as hub:
        for endpoint, home in HUBS.values():
            monkeypatch.setenv(endpoint, hub.address)
            monkeypatch.setenv(home, str(tmp_path / "hub home"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "hub home"))
        monkeypatch.setenv("MODELSCOPE_DOWNLOAD_RETRY_MAX_DELAY_SECONDS", "1")
        for name, value in PATIENCE.items():
            monkeypatch.setenv(name, value)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1")
        yield hub


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What a fetching process left: the folder, or why there is none."""

    folder: Path | None
    problems: list[Mapping[str, Any]]

    def is_told(self, code: str, *words: str) -> bool:
        """Whether it was refused for exactly this, with these words in both languages' sentences."""
        assert [one["code"] for one in self.problems] == [code], self.problems
        texts = [say(code, language, **self.problems[0]["values"]) for language in ("en", "zh")]
        assert all(word in text for text in texts for word in words), texts
        return texts[0] != texts[1]


@pytest.fixture
def fetch(make_spec: Callable[..., RunSpec], tmp_path: Path) -> Callable[..., Fetched]:
    """Fetch a model in a process of its own, as the preparation of a run does."""

    def fetch(name: str = ID, **changes: Any) -> Fetched:
        run = RunDir(tmp_path / "run")
        shutil.rmtree(run.path, ignore_errors=True)
        run.path.mkdir()
        write_text(run.spec, make_spec(model__model_name_or_path=name, **changes).to_yaml())
        words = [sys.executable, "-m", "tests.fetch", str(run.path)]
        soon = os.environ | {"MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"}  # it waits seven seconds for four
        done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, env=soon)
        problems = (read_json(run.error) or {}).get("problems", [])
        assert problems or done.returncode == 0, done.stderr[-3000:]
        return Fetched(Path(done.stdout.strip()) if not problems else None, problems)

    return fetch


def sent(hub: Hub, *names: str) -> list[str]:
    """The requests for the contents of these files."""
    return [one for one in hub.asked if one.startswith("GET") and one.endswith(names)]


def test_a_model_is_fetched_with_its_bytes_in_view_then_trained_and_the_next_run_has_it(
    hub: Hub,
    workplace: Workplace,
    make_spec: Callable[..., RunSpec],
    fetch: Callable[..., Fetched],
    tiny: Path,
) -> None:
    def fresh() -> runs.Run:
        return runs.get(workplace.saves, run.id)

    def half_way() -> Any:
        now = progress(fresh())
        return now if (now.phase, now.done, now.total) == ("downloading", rest, whole) else None

    hub.held["model.safetensors"] = threading.Event()
    whole = sum(file.stat().st_size for file in files(tiny))
    rest = whole - (tiny / "model.safetensors").stat().st_size
    run = runs.submit(make_spec(model__model_name_or_path=ID, training__max_steps=2), workplace)
    now = wait_until(half_way)
    assert now.unit == "B"
    shown = head_html.progress_bar(fresh(), now, Words("en"))
    assert f"{rest / 1000:.3g} KB of {whole / 1000:.3g} KB" in shown
    hub.held["model.safetensors"].set()
    wait_until(lambda: fresh().final)
    assert fresh().state == "finished", failures.explain(fresh()).traceback
    assert read_json(run.dir.adapter / "adapter_config.json")["base_model_name_or_path"] == ID
    hub.asked.clear()
    assert (fetch().folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert sent(hub, "model.safetensors", "tokenizer.json") == []


def test_the_other_hub_tells_its_bytes_too(
    hub: Hub, make_spec: Callable[..., RunSpec], tiny: Path, tmp_path: Path
) -> None:
    hub.held["model.safetensors"] = threading.Event()
    write_text(RunDir(tmp_path).spec, make_spec(model__model_name_or_path=ID, model__hub="modelscope").to_yaml())
    fetching = subprocess.Popen(
        [sys.executable, "-m", "tests.fetch", str(tmp_path)], cwd=PROJECT, stdout=subprocess.PIPE
    )
    whole = sum(file.stat().st_size for file in files(tiny))
    rest = whole - (tiny / "model.safetensors").stat().st_size
    try:
        wait_until(lambda: (read_json(RunDir(tmp_path).progress) or {}).get("done") == rest)
        assert read_json(RunDir(tmp_path).progress)["total"] == whole
        hub.held["model.safetensors"].set()
        assert (Path(fetching.communicate()[0].decode().strip()) / "model.safetensors").exists()
    finally:
        fetching.kill()
        fetching.wait()


@both_hubs
def test_the_wanted_revision_is_the_one_that_comes(
    hub: Hub, fetch: Callable[..., Fetched], tiny: Path, tmp_path: Path, which: str
) -> None:
    old = shutil.copytree(tiny, tmp_path / "old")
    (old / "generation_config.json").write_text(json.dumps({"max_length": 77}))
    hub.revisions["v1.0"] = old
    folder = fetch(model__hub=which, model__model_revision="v1.0").folder
    assert read_json(folder / "generation_config.json") == {"max_length": 77}
    assert fetch(model__hub=which, model__model_revision="v9").is_told("hub-revision", "v9", ID)


@both_hubs
def test_a_model_that_is_not_there_or_not_for_everybody_is_told(
    hub: Hub, fetch: Callable[..., Fetched], which: str
) -> None:
    assert fetch("org/gone", model__hub=which).is_told("hub-missing", "org/gone", hub.address)
    for status in (401, 403):
        hub.refused[ID] = (status, "GatedRepo")
        assert fetch(model__hub=which).is_told("hub-gated", ID, "TOKEN")


@both_hubs
def test_a_hub_that_dies_in_mid_file_is_told_and_the_next_attempt_fetches_the_rest(
    hub: Hub, fetch: Callable[..., Fetched], tiny: Path, which: str
) -> None:
    hub.dies_in = "model.safetensors"
    assert fetch(model__hub=which).is_told("hub-broke-off", ID, hub.address)
    with Hub({ID: tiny}, port=hub.server_port) as again:
        folder = fetch(model__hub=which).folder
        assert (folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
        assert sent(again, "tokenizer.json") == []  # it had come before the end


@both_hubs
def test_without_a_network_a_model_that_is_here_is_taken_and_another_one_is_told(
    hub: Hub, fetch: Callable[..., Fetched], which: str
) -> None:
    there = fetch(model__hub=which).folder
    hub.shutdown()
    hub.server_close()
    assert fetch(model__hub=which).folder == there
    assert fetch("org/other", model__hub=which).is_told("hub-silent", "org/other", hub.address)


@both_hubs
@pytest.mark.parametrize("file", ["pytorch_model.bin", "tiny-q4.gguf"])
def test_weights_that_cannot_be_trained_are_not_even_fetched(
    hub: Hub, fetch: Callable[..., Fetched], tiny: Path, tmp_path: Path, which: str, file: str
) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    (other / "model.safetensors").rename(other / file)
    hub.repositories["org/other"] = other
    assert fetch("org/other", model__hub=which).is_told("hub-not-safetensors", file)
    assert sent(hub, file, "tokenizer.json") == []


def test_what_is_wrong_with_a_fetched_model_is_told_as_of_a_local_one(
    hub: Hub, fetch: Callable[..., Fetched], tiny: Path, tmp_path: Path
) -> None:
    packed, bare = (shutil.copytree(tiny, tmp_path / name) for name in ("packed", "bare"))
    config = json.loads((packed / "config.json").read_text())
    quantization = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (packed / "config.json").write_text(json.dumps(config | quantization))
    (bare / "chat_template.jinja").unlink()
    hub.repositories |= {"org/packed": packed, "org/bare": bare}
    assert fetch("org/packed").is_told("model-quantized", "gptq")
    assert fetch("org/bare").is_told("no-template", "org/bare", "chatml")
    assert fetch("org/bare", model__chat_template="chatml").folder
    assert fetch(method__target_modules=["q_prj"]).is_told("lora-target-missing", "q_prj", "q_proj")


def test_a_disk_too_small_for_the_model_is_told_before_it_is_fetched(
    hub: Hub, fetch: Callable[..., Fetched], tiny: Path, tmp_path: Path
) -> None:
    huge = shutil.copytree(tiny, tmp_path / "huge")
    hub.repositories["org/huge"] = huge
    hub.sizes["model.safetensors"] = 1 << 50
    assert fetch("org/huge").is_told("hub-no-room", "1125899.91 GB")
    assert sent(hub, "tokenizer.json") == []


def test_a_studio_without_the_other_hubs_client_says_how_to_get_it(
    workplace: Workplace, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.preflight.package_checks.importlib.util.find_spec", lambda _: None)
    (found,) = preflight_problems(make_spec(model__model_name_or_path=ID, model__hub="modelscope"), workplace)
    assert "pip install modelscope-hub" in found.text("zh")
