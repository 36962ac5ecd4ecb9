"""What a person types into a shell: a slip of the pen is told in a sentence, in the shell's language, and makes nothing."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine import runs
from engine.problems import Refusal, reasons
from engine.spec import RunSpec
from engine.workplace import PROJECT, Workplace, make_saves
from tests.conftest import engine, flags_of


@pytest.fixture
def elsewhere(tmp_path: Path) -> Workplace:
    """A workplace whose saves folder is not there."""
    return Workplace(models=(tmp_path,), data=tmp_path, saves=tmp_path / "svaes" / "runs")


@pytest.mark.parametrize("words", [("list",), ("show", "a/b/c"), ("delete", "a/b/c"), ("resume", "a/b/c")])
def test_a_verb_about_runs_refuses_a_folder_that_is_not_there(
    elsewhere: Workplace, words: tuple[str, ...]
) -> None:
    done = engine(elsewhere, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"no folder {elsewhere.saves}" in done.stderr
    assert not elsewhere.saves.parent.exists()


def test_what_begins_a_saves_folder_says_that_it_has(elsewhere: Workplace) -> None:
    made = make_saves(elsewhere)
    assert elsewhere.saves.is_dir()
    assert str(elsewhere.saves) in made.text("en")
    assert str(elsewhere.saves) in made.text("zh")
    assert make_saves(elsewhere) is None


def test_a_saves_folder_that_cannot_be_made_is_a_sentence(elsewhere: Workplace) -> None:
    elsewhere.saves.parent.write_text("a file")
    with pytest.raises(Refusal) as refused:
        make_saves(elsewhere)
    assert "是文件" in refused.value.text("zh")


def test_a_run_is_found_by_its_id_by_its_folder_or_by_its_name(tmp_path: Path, demo_results: Path) -> None:
    """The names of two are "one" and "two"; a third is called as the second."""
    saves = shutil.copytree(demo_results, tmp_path / "saves")
    (saves / "demo_model/lora/one").rename(saves / "demo_model/lora/first")
    shutil.copytree(saves / "demo_model/lora/two", saves / "demo_model/lora/third")
    for called in ("demo_model/lora/first", "first", "one"):
        assert runs.get(saves, called).id == "demo_model/lora/first"
    assert runs.get(saves, "two").id == "demo_model/lora/two"  # a folder goes before a name
    (saves / "demo_model/lora/two").rename(saves / "demo_model/lora/second")
    with pytest.raises(Refusal, match=r"'two': demo_model/lora/\w+, demo_model/lora/\w+"):
        runs.get(saves, "two")
    for none in ("", "four", "../x", "demo_model/lora", "demo_model/lora/.."):
        with pytest.raises(Refusal, match="There is no run"):
            runs.get(saves, none)


def test_the_studio_says_that_it_made_a_folder_and_why_it_does_not_start(elsewhere: Workplace) -> None:
    taken = dataclasses.replace(elsewhere, saves=elsewhere.data / "file")
    taken.saves.write_text("")
    chinese = os.environ | {"LC_ALL": "zh_CN.UTF-8", "PYTHONUTF8": "1"}
    words = [sys.executable, "app.py", "--port", "0", *flags_of(taken)]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, env=chinese, timeout=60)
    assert done.returncode == 2
    assert "Errno" not in done.stderr
    assert f"无法写入运行目录 {taken.saves}：已有同名文件" in done.stderr


@pytest.mark.parametrize(
    ("file", "said"),
    [("gone.yaml", "there is no such file"), (".", "it is a folder"), ("bytes", "not UTF-8")],
)
def test_a_spec_that_cannot_be_read_is_a_sentence(elsewhere: Workplace, file: str, said: str) -> None:
    (elsewhere.data / "bytes").write_bytes(b"\xff\xfe\xff")
    done = engine(elsewhere, "check", str(elsewhere.data / file))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Errno" not in done.stderr


BROKEN = [
    "a: [1", "a: {b", "a: 1\n b: 2", "\tx: 1", "a: x: y", "a: 'b", "a: @x", "a: *", 'a: "\\q"', "a: 1\n---\nb: 2",
    "- a\nb: 1", "a: 1\n- b", "[a]: 1", "a: 1\nb", "a: \x07", "a: |x", "{a: 1}}", "a: ]", "x: y\n\tz: 1", "a: -",
    "'a': 'it's'", "%x",
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_wrong_with_yaml_is_told_in_the_readers_language(text: str) -> None:
    with pytest.raises(Refusal) as refused:
        RunSpec.from_yaml(text)
    (found,) = refused.value.problems
    told = reasons()[found.values["what"]]
    assert told["en"] in found.text("en")
    assert told["zh"] in found.text("zh")
    assert found.values["what"] not in found.text("zh")


def test_every_reason_has_both_languages() -> None:
    assert all(set(told) == {"en", "zh"} for told in reasons().values())
