"""What a person types into a shell: a slip of the pen is told in a sentence, in
the shell's language, and makes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import following
from engine.__main__ import main, parser
from engine.core.locks import try_lock
from engine.core.problems import Refusal, reasons
from engine.core.rundir import ALIVE_BYTE, RESULT_FILE, RunDir, write_json, write_text
from engine.evaluation import report
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace, make_saves
from engine.runs import runs
from engine.spec.run_spec import RunSpec
from engine.verbs import _evaluation
from tests.conftest import engine, flags_of

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Workplace:
    """A workplace whose saves folder is not there."""
    return Workplace(models=(tmp_path,), data=tmp_path, saves=tmp_path / "svaes" / "runs")


@pytest.mark.parametrize("words", [("list",), ("show", "a/b/c"), ("delete", "a/b/c"), ("resume", "a/b/c")])
def test_a_verb_about_runs_refuses_a_folder_that_is_not_there(elsewhere: Workplace, words: tuple[str, ...]) -> None:
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
    (saves / "demo_model/lora/two").rename(saves / "demo_model/lora/2-second")
    for called in ("lora/2-second", "2-s", "second"):
        assert runs.get(saves, called, abbreviated=True).path.name == "2-second"
        with pytest.raises(Refusal, match="There is no run"):
            runs.get(saves, called)  # what deletes takes no other than the run that is named
    for none in ("cond", "demo_model/lora/2"):  # the second may be the whole ID of a run that is gone
        with pytest.raises(Refusal, match="There is no run"):
            runs.get(saves, none, abbreviated=True)
    assert runs.get(saves, "first", lambda run: run.path.name == "2-second", abbreviated=True).path.name == "first"
    with pytest.raises(Refusal, match="'demo_model'"):  # no choice among several that an abbreviation leaves
        runs.get(saves, "demo_model", lambda run: run.path.name == "2-second", abbreviated=True)
    with pytest.raises(Refusal, match="'demo_model/lora': demo_model/lora/"):
        runs.get(saves, "demo_model/lora", abbreviated=True)
    with pytest.raises(Refusal, match=r"'two': demo_model/lora/[\w-]+, demo_model/lora/[\w-]+"):
        runs.get(saves, "two")
    for none in ("", "four", "../x", "demo_model/lora", "demo_model/lora/.."):
        with pytest.raises(Refusal, match="There is no run"):
            runs.get(saves, none)


@contextlib.contextmanager
def in_progress(run: Path) -> Iterator[None]:
    """The folder of a finished run, as if it were alive."""
    lock = try_lock(RunDir(run).lock, ALIVE_BYTE, shared=True)
    (run / "exit.json").rename(run / "ended")
    assert "delete" not in runs.read(run, run.parents[2]).can
    yield
    (run / "ended").rename(run / "exit.json")
    os.close(lock or 0)


def test_a_verb_looks_only_at_the_runs_that_it_can_take(
    tmp_path: Path,
    demo_results: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A training, its export, its evaluation and a stopped export are all called "tale"."""
    saves = shutil.copytree(demo_results, tmp_path / "saves")
    one = saves / "demo_model/lora/one"
    shutil.rmtree(saves / "demo_model/lora/two")
    text = (one / "spec.yaml").read_text(encoding="utf-8").replace("name: one", "name: tale")
    (one / "spec.yaml").write_text(text, encoding="utf-8")
    model = {"model": {"model_name_or_path": str(DEMO_MODEL)}, "name": "tale"}
    for number, (spec, outcome) in enumerate(
        [
            (ExportSpec.read(model), "finished"),
            (ExportSpec.read(model), "stopped"),
            (EvaluationSpec.read(model), "finished"),
        ]
    ):
        run = RunDir(saves / "demo_model" / spec.shelf / f"other-{number}")
        (run.path / "model").mkdir(parents=True)
        write_json(run.model / RESULT_FILE, {"attempt": 1, "complete": True, "stage": "sft"})
        write_text(run.spec, spec.to_yaml())
        write_json(run.exit, {"outcome": outcome, "reason": outcome, "ended": 1.0})
        write_json(run.request, {"kind": spec.kind, "by": "", "submitted": 2.0 + number, "attempt": 1, "stop": None})
    workplace = Workplace(models=(DEMO_MODEL,), data=data, saves=saves)

    def shell(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["engine", *words, *flags_of(workplace)])
        assert main() in (0, 2)
        return "".join(capsys.readouterr())

    began: list[Any] = []
    monkeypatch.setattr(runs, "submit", lambda spec, *_, **__: began.append(spec) or runs.get(saves, "one"))
    monkeypatch.setattr("engine.verbs.following.follow", lambda *_, **__: 0)
    monkeypatch.setattr(runs, "resume", lambda run, **_: began.append(run.id))
    shell("export", "tale")
    assert began.pop().adapters == {str(one / "adapter"): 1.0}
    shell("evaluate", "tale", "--datasets", "chat")
    assert began.pop().results == ["demo_model/lora/one"]
    shell("resume", "tale")
    assert began.pop() == "demo_model/export/other-1"
    assert "kind: dpo" in shell("follow", "tale", "dpo")
    assert shell("clone", "tale").count("demo_model/") == 4  # which can take any of them
    with in_progress(one):
        assert shell("delete", "tale").count("demo_model/") == 4  # nothing else of its name is deleted in its place
    refused = shell("stop", "tale")
    assert "any of the runs called 'tale'" in refused
    assert (refused.count("(finished)"), refused.count("(stopped)")) == (3, 1), refused
    shown = shell("show", "tale")
    assert "demo_model/lora/one: finished" in shown
    assert "Other runs with this name: demo_model/" in shown
    written: list[Any] = []
    monkeypatch.setattr("engine.verbs.plain_script.write_script", lambda run, *_: written.append(run.path))
    shell("script", "tale")
    assert written == [one]
    assert "finished" in shell("stop", "one")  # nothing of that name runs, so the one there is says why not
    assert not began


def test_an_evaluation_is_its_spec_and_what_options_change(elsewhere: Workplace) -> None:
    file = elsewhere.data / "asked.yaml"
    file.write_text("kind: evaluation\ndata: {datasets: [a], max_samples: 5}\ngeneration: {max_new_tokens: 9}\n")
    words = [
        "evaluate",
        str(file),
        "--rows",
        "all",
        "--no-with-base",
        "--tasks",
        "x",
        "y",
        "--temperature",
        "0.5",
    ]
    spec = _evaluation(parser().parse_args(words), elsewhere)
    assert (spec.data.datasets, spec.data.max_samples, spec.with_base) == (["a"], None, False)
    assert (spec.harness.tasks, spec.generation.temperature, spec.generation.max_new_tokens) == (
        ["x", "y"],
        0.5,
        9,
    )
    file.write_text("kind: export\n")
    with pytest.raises(Refusal, match="its kind is export"):
        _evaluation(parser().parse_args(words), elsewhere)
    for text, said in (("[1", "YAML"), ("rows: 3", "rows"), ("", "names to values")):
        file.write_text(text)
        done = engine(elsewhere, "evaluate", str(file))
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
    assert "no folder" in engine(elsewhere, "evaluate", "somebody").stderr
    assert not elsewhere.saves.exists()


@pytest.mark.slow
def test_evaluate_prints_what_was_found_with_intervals_and_where_the_report_is(
    tmp_path: Path, demo_results: Path, data: Path
) -> None:
    saves = shutil.copytree(demo_results, tmp_path / "saves")
    workplace = Workplace(models=(DEMO_MODEL,), data=data, saves=saves)
    words = (
        "--datasets",
        "chat",
        "--rows",
        "12",
        "--max-new-tokens",
        "4",
        "--device",
        "cpu",
        "--name",
        "asked",
    )
    done = engine(workplace, "evaluate", "one", *words)
    assert done.returncode == 0, done.stderr
    *lines, folder = done.stdout.splitlines()
    [run] = runs.find(saves, "evaluation")
    assert Path(folder) == run.dir.report
    assert run.title == "asked"
    found = report.summary(run.dir)
    assert found["rows"] == 12
    for name, measure in found["measures"].items():
        [line] = [line for line in lines if line.startswith(f"{name} ")]
        for value in measure["values"].values():
            interval = f"{value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
            assert interval in line
    assert engine(workplace, "check", str(run.dir.spec)).stdout == "ready to start\n"
    assert run.id in engine(workplace, "list").stdout
    assert "\n".join(lines[-len(found["measures"]) :]) in engine(workplace, "show", "asked").stdout


def test_a_spec_that_is_wrong_begins_no_saves_folder(elsewhere: Workplace) -> None:
    file = elsewhere.data / "spec.yaml"
    for verb in ("train", "submit"):
        file.unlink(missing_ok=True)
        assert "no such file" in engine(elsewhere, verb, str(file)).stderr
        file.write_text("data: {datasets: [nobody]}")
        done = engine(elsewhere, verb, str(file))
        assert done.returncode == 2
        assert "made" not in done.stderr
        assert not elsewhere.saves.parent.exists()


def test_the_studio_says_that_it_made_a_folder_and_why_it_does_not_start(elsewhere: Workplace) -> None:
    taken = dataclasses.replace(elsewhere, saves=elsewhere.data / "file")
    taken.saves.write_text("")
    chinese = os.environ | {"LC_ALL": "zh_CN.UTF-8", "PYTHONUTF8": "1"}
    words = [sys.executable, "app.py", "--port", "0", *flags_of(taken)]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, env=chinese, timeout=300)
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


def test_who_works_in_a_shell_has_the_name_of_the_account_if_no_variable_says_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    assert following.user_name() == pwd.getpwuid(os.getuid()).pw_name
    monkeypatch.setenv("USER", "ada")
    assert following.user_name() == "ada"
