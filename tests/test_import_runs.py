"""Trainings of LLaMA-Factory become runs: what is read of them, what is refused, and that theirs stays as it is."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import pytest
import yaml

from engine import __main__ as shell
from engine.api.callers import Caller
from engine.core import audit, rundir
from engine.core.problems import Problem, Refusal
from engine.importer import foreign_runs, run_import
from engine.importer.foreign_runs import find_runs
from engine.importer.run_import import candidates, import_run, remarks
from engine.importer.run_logs import read_logged
from engine.launch.workspace import Workplace
from engine.mcp.answers import answer as tool_answer
from engine.mcp.call import Call
from engine.runs import compare, failures, progress, results, runs
from engine.serving import servers
from tests.conftest import engine
from tests.foreign_training import QUESTION, SECONDS_PER_STEP, STEPS
from tests.no_space import no_space
from tests.preloaded import run_python
from tests.served import client_of, serving
from webui import charts
from webui.runs_tab.import_panel import ImportPanel
from webui.runs_tab.panel import Context
from webui.words import Words

pytestmark = pytest.mark.usefixtures("forked")


class Training(NamedTuple):
    folder: Path
    answer: str  # to QUESTION, greedy, and not that of the base


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Training:
    """A real training, in a folder as theirs are called."""
    folder = tmp_path_factory.mktemp("factory") / "saves" / "Tiny" / "lora" / "train_1"
    printed = run_python("-m", "tests.foreign_training", folder, tiny)
    before, answer = json.loads(printed.splitlines()[-1])
    assert answer not in ("", before)
    return Training(folder, answer)


@pytest.fixture
def theirs(tmp_path: Path, trained: Training) -> Path:
    """A copy of that folder, to spoil, below `tmp_path / "theirs"`."""
    return shutil.copytree(trained.folder, tmp_path / "theirs" / "lora" / "train_1")


def snapshot(folder: Path) -> dict[str, Any]:
    """All that a folder shows of itself, except when it was read."""
    paths = sorted(folder.rglob("*"))
    return {str(path): (path.lstat()[:7], path.lstat().st_mtime_ns, path.lstat().st_ctime_ns) for path in paths}


def codes(problems: list[Problem]) -> set[str]:
    return {each.code for each in problems}


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_a_training_is_a_run_that_answers_as_it_does_and_theirs_is_untouched(
    workplace: Workplace, trained: Training, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(trained.folder)
    printed = engine(workplace, "import-runs", str(trained.folder.parents[2]))
    assert printed.returncode == 0, printed.stderr
    (run,) = runs.find(workplace.saves)
    assert printed.stdout == f"new    {run.id}  {trained.folder}\n"
    assert "template (qwen)" in printed.stderr
    assert [(run.state, run.title, run.can)] == [("finished", "train_1", {"clone", "delete"})]
    spec = run.spec
    assert (spec.model.model_name_or_path, spec.stage.kind, spec.data.datasets) == (str(tiny), "sft", {"chat": 1.0})
    assert (spec.method.r, spec.method.lora_alpha, len(spec.method.target_modules)) == (4, 8, 7)
    assert (spec.training.learning_rate, spec.training.lr_scheduler_type) == (0.005, "cosine")

    curves = progress.curves(run)
    for name in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        values = {line["step"]: line[name] for line in history(trained.folder) if name in line}
        assert dict(zip(curves[name].step, curves[name].value, strict=True)) == pytest.approx(values), name
        assert list(curves[name].time) == [SECONDS_PER_STEP * step for step in values]
    assert {"train_runtime", "total_flos", "eval_runtime"}.isdisjoint(curves)
    assert np.isfinite(curves["loss"].tokens).all()
    figures = {figure.name: figure.values for figure in compare.figures([run], compare.curves([run]))}
    assert (figures["steps"], figures["duration"]) == ((STEPS,), (SECONDS_PER_STEP * STEPS,))
    assert failures.explain(run) is None

    result = results.result_of(run)
    assert result
    assert (result.adapter, result.stage) == (True, "sft")
    assert run.submitted == pytest.approx(
        os.stat(trained.folder / "adapter_model.safetensors").st_mtime - SECONDS_PER_STEP * STEPS
    )
    with serving(workplace, servers.choose(workplace, "", [run.id])) as server:
        answered = client_of(server).chat.completions.create(
            model=run.id, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=16
        )
        call, arguments = Call(workplace, Caller(audit.shell("root"))), {"run": "train_1", "question": QUESTION}
        by_tool = tool_answer(call, "ask_model", {**arguments, "temperature": 0, "max_tokens": 16})
    assert answered.choices[0].message.content == trained.answer
    assert (by_tool.content["answer"], by_tool.content["model"]) == (trained.answer, run.id)

    again = shell.parser().parse_args(["import-runs"])
    assert again.function(again, replace(workplace, import_from=(trained.folder,))) == 0
    assert capsys.readouterr().out == f"known  {run.id}  {trained.folder}\n"
    with pytest.raises(Refusal, match="LLaMA-Factory"):
        runs.resume(run)
    actions = [(entry.action, entry.what) for entry in audit.read(workplace.saves, 9)]
    assert actions == [("ask", run.id), ("import", str(trained.folder))]
    assert snapshot(trained.folder) == before
    runs.delete(run)
    assert snapshot(trained.folder) == before


def test_without_settings_the_card_and_the_logs_say_what_was_done(workplace: Workplace, theirs: Path) -> None:
    (theirs / "training_args.yaml").unlink()
    lines = [line | {"rewards/accuracies": 0.5} for line in history(theirs)]
    (theirs / "trainer_state.json").write_text(json.dumps({"log_history": lines, "max_steps": 8, "global_step": 8}))
    run, notes = import_run(theirs, theirs, workplace, "ada")
    spec = run.spec
    assert (spec.stage.kind, spec.data.datasets) == ("dpo", {"chat": 1.0, "text": 1.0})
    assert (spec.training.learning_rate, spec.training.max_steps) == (0.05, 8)
    assert (spec.training.per_device_train_batch_size, spec.method.r) == (2, 4)
    assert (run.by, codes(notes)) == ("ada", {"import-run-no-settings"})
    assert [note.text("zh") for note in remarks(run.dir)] == [note.text("zh") for note in notes]


def test_what_was_stopped_or_killed_is_not_called_finished(workplace: Workplace, theirs: Path) -> None:
    stopped = shutil.copytree(theirs, theirs.with_name("stopped"))
    logged = [json.loads(line) | {"total_steps": 80} for line in (stopped / "trainer_log.jsonl").open()]
    (stopped / "trainer_log.jsonl").write_text("\n".join(map(json.dumps, logged)) + '\n{"current_st')
    state = json.loads((stopped / "trainer_state.json").read_text()) | {"max_steps": 80}
    (stopped / "trainer_state.json").write_text(json.dumps(state))
    run, _ = import_run(stopped, stopped, workplace, "")
    assert (run.state, progress.progress(run).fraction, "resume" in run.can) == ("stopped", 0.1, False)

    for name in ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "train_results.json"):
        (theirs / name).unlink()
    os.utime(theirs / "trainer_log.jsonl", (1e9, 1e9))
    run, notes = import_run(theirs, theirs, workplace, "")
    assert (run.state, "import-run-from-checkpoint" in codes(notes)) == ("stopped", True)
    weights = theirs / "checkpoint-8" / "adapter_model.safetensors"
    assert (run.dir.adapter / weights.name).read_bytes() == weights.read_bytes()
    assert list(progress.curves(run)["loss"].step) == list(range(1, STEPS + 1))
    assert not list(run.dir.adapter.glob("optimizer*"))


def change(folder: Path, **settings: Any) -> None:
    """Change the adapter's configuration; settings in capitals are those of the training."""
    ours = {name: value for name, value in settings.items() if name.islower()}
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ours))
    file = folder / "training_args.yaml"
    others = {name.lower(): value for name, value in settings.items() if name.isupper()}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | others))


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "checkpoint-8")


def failed(folder: Path) -> None:
    pickled(folder)
    (folder / "adapter_model.bin").unlink()


def linked(folder: Path) -> None:
    secret = folder.parents[1] / "secret.json"
    (folder / "tokenizer.json").rename(secret)
    (folder / "tokenizer.json").symlink_to(secret)


def in_progress(folder: Path) -> None:
    (folder / "train_results.json").unlink()
    os.utime(folder / "trainer_log.jsonl")


def piped(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    (folder / "trainer_state.json").unlink()
    os.mkfifo(folder / "trainer_state.json")
    shutil.rmtree(folder / "checkpoint-8")


def on_a_merged_base(folder: Path) -> None:
    change(folder, ADAPTER_NAME_OR_PATH="a", CREATE_NEW_ADAPTER=True)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled": (pickled, "import-run-pickled"),
    "failed": (failed, "import-run-no-weights"),
    "linked": (linked, "import-run-outside"),
    "in-progress": (in_progress, "import-run-in-progress"),
    "oft": (lambda folder: change(folder, peft_type="OFT"), "import-run-method"),
    "pissa": (lambda folder: change(folder, init_lora_weights="pissa_niter_16"), "import-run-changed-base"),
    "reward": (lambda folder: change(folder, STAGE="rm"), "import-run-reward-model"),
    "merged": (on_a_merged_base, "import-run-merged-base"),
    "predicted": (lambda folder: change(folder, DO_TRAIN=False, DO_PREDICT=True), "import-run-not-training"),
    "broken": (lambda folder: (folder / "adapter_config.json").write_text("{"), "model-json-broken"),
    "ours": (lambda folder: (folder / "result.json").write_text("{}"), "import-run-own"),
    "a pipe": (piped, "file-unreadable"),
    "坏的\n名字 ‮": (failed, "import-run-no-weights"),
}  # fmt: skip


def refusal(folder: Path, root: Path, workplace: Workplace) -> Problem | None:
    """The first reason why a training cannot be imported; None if it has been."""
    try:
        import_run(folder, root, workplace, "")
    except Refusal as refused:
        return refused.problems[0]
    return None


def test_what_cannot_be_used_is_named_with_its_reason_and_hinders_no_other(workplace: Workplace, theirs: Path) -> None:
    for name, (spoil, _) in REFUSED.items():
        spoil(shutil.copytree(theirs, theirs.parent / name))
    root = theirs.parent
    (root / "round").symlink_to(root)
    (root / "away").symlink_to("/")
    listed = candidates(root, workplace.saves)
    assert not next(each for each in listed if each.folder == theirs).hindrance
    assert len(listed) == len(REFUSED) + 1
    issues = {each.folder.name: issue for each in listed if (issue := refusal(each.folder, root, workplace))}
    reasons = {name: issue.code for name, issue in issues.items()}
    assert {each.folder.name: each.hindrance.code for each in listed if each.hindrance}.items() <= reasons.items()
    assert all(issue.text(language) for issue in issues.values() for language in ("en", "zh"))
    assert reasons == {name: code for name, (_, code) in REFUSED.items()}
    assert [run.title for run in runs.find(workplace.saves)] == ["train_1"]
    assert [path for path in workplace.saves.glob("*/*/*") if not (path / "request.json").exists()] == []
    for folder in ("/", str(theirs.parents[1] / "gone"), "", "\0", str(theirs / ".." / "..")):
        assert refusal(Path(folder), theirs, workplace), folder


def test_a_training_that_has_changed_is_another_run(workplace: Workplace, theirs: Path) -> None:
    first, _ = import_run(theirs, theirs.parent, workplace, "")
    assert import_run(theirs, theirs.parent, workplace, "")[0].id == first.id
    weights = (first.dir.adapter / "adapter_model.safetensors").read_bytes()
    with (theirs / "adapter_model.safetensors").open("r+b") as file:  # as another training writes it
        file.truncate(0)
    shutil.copyfile(theirs / "checkpoint-4" / "adapter_model.safetensors", theirs / "adapter_model.safetensors")
    second, notes = import_run(theirs, theirs.parent, workplace, "")
    assert second.id != first.id
    assert "import-run-changed" in codes(notes)
    assert (first.dir.adapter / "adapter_model.safetensors").read_bytes() == weights

    after = shutil.copytree(theirs, theirs.with_name("train_2"))
    change(after, ADAPTER_NAME_OR_PATH=str(theirs))
    third, _ = import_run(after, theirs.parent, workplace, "")
    assert Path(third.spec.model.adapter_path).parent in (first.path, second.path)


def test_the_base_is_looked_for_and_what_is_assumed_of_it_is_said(
    workplace: Workplace, theirs: Path, tiny: Path, tmp_path: Path
) -> None:
    def base_of(name: str, models: Path, **settings: Any) -> tuple[str, set[str]]:
        folder = shutil.copytree(theirs, theirs.with_name(name))
        change(folder, **settings)
        run, notes = import_run(folder, folder, replace(workplace, models=(models,)), "")
        return run.facts.base, codes(notes) - {"import-none", "import-differs"}

    gone = str(tmp_path / "gone" / "Tiny")
    assert base_of("moved", tiny.parent, base_model_name_or_path=gone) == (str(tiny), {"import-run-base-moved"})
    assert base_of("missing", tmp_path, base_model_name_or_path=gone) == (gone, {"import-run-base-missing"})
    assert base_of("hub", tmp_path, base_model_name_or_path="org/Nothing")[1] == {"import-run-base-missing"}
    assert base_of("outside", tmp_path / "data") == (str(tiny), {"import-run-base-outside"})
    other = shutil.copytree(tiny, tmp_path / "others" / "wider" / "tiny")
    shutil.copyfile(theirs / "adapter_model.safetensors", other / "model.safetensors")  # no layer of that name
    assert base_of("alike", tmp_path / "others", base_model_name_or_path=gone) == (gone, {"import-run-base-missing"})


def test_a_tokenizer_comes_from_where_models_are_and_nothing_else_of_this_machine_does(
    workplace: Workplace, theirs: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (*theirs.rglob("tokenizer*"), *theirs.rglob("chat_template*")):
        file.unlink()
    secret = tmp_path / "secret.json"
    secret.write_text("the hashes of all passwords")
    hub = tmp_path / "hub" / "models--org--tiny"
    monkeypatch.setenv("HF_HUB_CACHE", str(hub.parent))

    def base(folder: Path, target: Path) -> Path:
        folder.mkdir(parents=True)
        shutil.copyfile(tiny / "config.json", folder / "config.json")
        (folder / "tokenizer.json").symlink_to(target)
        return folder

    def outcome(name: str, base: Path, **places: Any) -> tuple[str, bytes]:
        folder = shutil.copytree(theirs, theirs.with_name(name))
        change(folder, base_model_name_or_path=str(base))
        run, notes = import_run(folder, folder, replace(workplace, **places), "")
        (code,) = codes(notes) & {"import-run-tokenizer", "import-run-no-tokenizer"}
        copied = [path for path in run.path.rglob("*") if path.name.startswith(("tokenizer", "chat_template"))]
        return code, b"".join(path.read_bytes() for path in copied if path.name == "tokenizer.json")

    nothing = ("import-run-no-tokenizer", b"")
    real = (tiny / "tokenizer.json").read_bytes()
    assert outcome("known", tiny) == ("import-run-tokenizer", real)
    blob = hub / "blobs" / "0"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(real)
    cached = base(hub / "snapshots" / "0", Path("..", "..", "blobs", "0"))
    assert outcome("cached", cached) == ("import-run-tokenizer", real)
    assert outcome("outside", base(tmp_path / "mallory", secret)) == nothing
    within = base(workplace.models[0] / f"leads-out-{os.getpid()}", secret)
    try:
        assert outcome("within", within) == nothing
    finally:
        shutil.rmtree(within)
    kept = workplace.saves / "tokenizer.json"
    kept.write_text("of somebody's run")
    nested = base(tmp_path / "mine", kept)  # the runs are in a models folder
    assert outcome("nested", nested, models=(tmp_path,)) == nothing


def refuse_link(*_: Any, **__: Any) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_whole_model_shares_its_weights_or_is_not_copied(
    workplace: Workplace, theirs: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.copytree(tiny, theirs.with_name("full"))
    for name in ("trainer_log.jsonl", "trainer_state.json", "train_results.json", "training_args.yaml"):
        shutil.copyfile(theirs / name, whole / name)
    file = whole / "training_args.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"finetuning_type": "full"}))
    run, notes = import_run(whole, whole, workplace, "")
    result = results.result_of(run)
    assert result
    assert (result.adapter, run.facts.method) == (False, "full")
    shared = os.path.samefile(whole / "model.safetensors", run.dir.model / "model.safetensors")
    assert shared == ("import-run-shares" in codes(notes))
    assert not os.path.samefile(whole / "config.json", run.dir.model / "config.json")
    assert servers.choose(workplace, "", [run.id]).base == run.dir.model

    others = shutil.copytree(whole, theirs.with_name("others"))
    with monkeypatch.context() as refusing:  # as for the files of another user, except that tests may run as root
        refusing.setattr(run_import, "_cloned", lambda *_: False)
        refusing.setattr(os, "link", refuse_link)
        assert refusal(others, others, workplace).code == "import-run-model-no-link"

    elsewhere = Path("/dev/shm")
    if os.stat(elsewhere).st_dev == os.stat(whole).st_dev:
        pytest.skip("there is no second file system")
    away = shutil.copytree(whole, elsewhere / f"full-{os.getpid()}")
    try:
        with pytest.raises(Refusal) as refused:
            import_run(away, away, workplace, "")
        assert codes(refused.value.problems) == {"import-run-model-elsewhere"}
        assert len(runs.find(workplace.saves)) == 1
    finally:
        shutil.rmtree(away)


def test_times_go_on_after_a_resume_and_damaged_lines_count_for_nothing() -> None:
    entries = [
        {"current_steps": 1, "total_steps": 9, "loss": 3.0, "elapsed_time": "23:59:59"},
        {"current_steps": 2, "total_steps": 9, "loss": float("nan"), "elapsed_time": "1 day, 0:00:09"},
        {"current_steps": 3, "total_steps": 9, "loss": 1.0, "lr": 1e-5, "accuracy": 0.5, "elapsed_time": "0:00:05"},
        {"current_steps": 4, "loss": "low", "eval_loss": True, "elapsed_time": "soon", "epoch": "last"},
        {"current_steps": -1, "loss": 1.0},
        {"current_steps": 10**30, "loss": 1.0},
        {"current_steps": 10**400, "loss": 1.0, "elapsed_time": "0:00:06"},
        {"current_steps": 4, "loss": 10**400, "elapsed_time": f"{'9' * 5000}:00:00"},
        {"current_steps": 5, "loss": 0.5, "percentage": 55.0, "epoch": 10**400},
    ]
    log = "\n".join(map(json.dumps, entries)) + '\n[1]\nnull\n{"current_steps": 6, "lo'
    logged = read_logged(log.encode() + b"\xff\n", b"[]")
    day = 24 * 3600.0
    assert [(line["step"], line["time"]) for line in logged.lines] == [
        (1, day - 1),
        (2, day + 9),
        (3, day + 14),
        (5, day + 14),
    ]
    assert logged.names == {"loss", "learning_rate", "rewards/accuracies"}
    assert (logged.step, logged.total, logged.complete) == (5, None, None)
    nothing = read_logged(b"", b"{" * 100_000)
    assert (nothing.lines, nothing.step, nothing.complete) == ([], 0, None)


def test_an_enormous_log_and_too_many_folders_are_not_read(
    workplace: Workplace, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("trainer_log.jsonl", "training_args.yaml"):
        with (theirs / name).open("r+b") as file:
            file.truncate(1 << 40)  # takes no space on the disk
    run, notes = import_run(theirs, theirs, workplace, "")
    assert {"import-run-log-long", "import-run-settings-long", "import-run-no-settings"} <= codes(notes)
    loss = progress.curves(run)["loss"]  # from the other file, which has no times
    assert (list(loss.step), np.isnan(loss.time).all()) == (list(range(1, STEPS + 1)), True)
    assert "Times were not recorded" in charts.charts(progress.curves(run), Words("en"), "time")
    monkeypatch.setattr(foreign_runs, "MAX_FOLDERS", 2)
    with pytest.raises(Refusal, match="more than 2 folders"):
        list(find_runs(theirs.parents[2]))
    monkeypatch.setattr(run_import, "_write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        import_run(theirs / "checkpoint-4", theirs, workplace, "")
    assert [path.name for path in rundir.run_folders(workplace.saves)] == [run.path.name]
    assert len(list(run.path.parent.iterdir())) == 1


def test_files_of_any_size_and_a_disk_that_is_full_are_sentences(
    workplace: Workplace, theirs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = replace(workplace, import_from=(theirs.parent,))
    with gr.Blocks():
        panel = ImportPanel(Context(Words("en"), place, "", gr.HTML(), lambda request: "", gr.Textbox()))
        panel.layout()

    def brought(*folders: Path) -> str:
        return str(list(panel.bring([str(folder) for folder in folders]))[-1][panel.report])

    names = {"adapter_model.safetensors": "free", "chat_template.jinja": "at most 256 MB"}
    for name in names:  # files that take no space on the disk, and would fill it
        shutil.copytree(theirs, theirs.parent / name)
        with (theirs.parent / name / name).open("r+b") as file:
            file.truncate(1 << 42)
    text = brought(*(theirs.parent / name for name in names))
    assert [reason in text for reason in names.values()] == [True, True]
    assert runs.find(workplace.saves) == []
    with no_space():
        text = brought(theirs, theirs.parent / "gone", Path("/"), Path("\0"))
    assert ("was not imported: File too large" in text, "Reload the list" in text) == (True, True)
    assert list(workplace.saves.glob("*/*/*")) == []
    where = [f"--{name}={folder}" for name, folder in {"saves": place.saves, "data": place.data}.items()]
    monkeypatch.setattr("sys.argv", ["engine", "import-runs", str(theirs.parent), *where])
    with no_space():
        assert shell.main() == 1
    printed = capsys.readouterr()
    assert "new " not in printed.out
    assert "was not imported" in printed.err
    assert "1 run imported" in brought(theirs)
