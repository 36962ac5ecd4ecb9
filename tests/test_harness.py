"""Tasks of lm-evaluation-harness: their files are read and told of without the package, and run by the real one where
`pip install -r requirements-harness.txt` was done."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.core.problems import sentences
from engine.core.rundir import read_lines
from engine.evaluation import harness, report
from engine.launch.processes import find_processes
from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from engine.runs import failures, runs
from engine.spec.run_spec import RunSpec
from tests.conftest import engine, wait_until
from tests.sleeping import sleep_after
from tests.test_evaluate import asking, ended, finished_run, told
from webui import reports
from webui.words import Words

real = pytest.mark.skipif(not harness.installed(), reason="pip install -r requirements-harness.txt")

ROWS = [{"question": f"Is {n} a number?", "choices": ["Never.", "Yes, it is."], "right": 1} for n in range(24)]
CHOICE = {
    "task": "number",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WRITTEN = {
    "include": "number.yaml",
    "task": "written",
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{choices[right]}}",
    "generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 5.0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def put(workplace: Workplace, name: str, content: Any) -> Path:
    """A file in the harness folder: text as it is, rows as lines, anything else as YAML."""
    file = workplace.data / harness.TASKS_FOLDER / name
    file.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(one) + "\n" for one in content) if isinstance(content, list) else content
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
    return file


@pytest.fixture
def tasks(workplace: Workplace) -> Workplace:
    put(workplace, "rows.jsonl", ROWS)
    put(workplace, "number.yaml", CHOICE)
    put(workplace, "written.yaml", WRITTEN)
    return workplace


def why_not(workplace: Workplace) -> dict[str, str | None]:
    """Of each task that is there the code of what is wrong with it."""
    return {one.name: one.problem and one.problem.code for one in harness.tasks(workplace.data)}


def test_each_file_that_cannot_be_run_is_listed_with_a_sentence(tasks: Workplace, tmp_path: Path) -> None:
    assert why_not(tasks) == {"number": None, "written": None}
    one = CHOICE | {"task": "x"}
    outside = tmp_path / "elsewhere.jsonl"
    outside.write_text("{}", encoding="utf-8")
    wrong = {
        "harness-not-yaml": "task: [x",
        "harness-no-task": {"dataset_path": "json"},
        "harness-group": {"group": "all", "task": ["number", "written"]},
        "harness-code": "task: x\nprocess_docs: !function utils.process\n",
        "harness-hub": one | {"dataset_path": "cais/mmlu"},
        "harness-file": one | {"dataset_kwargs": {"data_files": "gone.jsonl"}},
        "path-outside": one | {"dataset_kwargs": {"data_files": str(outside)}},
        "harness-output": one | {"output_type": "painting"},
        "harness-key": one | {"doc_to_image": "picture"},
        "harness-metric": one | {"metric_list": [{"metric": "rouge"}]},
        "harness-metrics": one | {"metric_list": ["acc"]},
        "harness-circle": {"include": "bad.yaml", "task": "x"},
        "file-not-text": b"\xff\xfe\x00",
        "file-unreadable": {"include": "x" * 300, "task": "x"},
    }
    too = [
        ("harness-metrics", one | {"metric_list": 5}),
        ("path-outside", {"include": "a\0b", "task": "x"}),
        ("path-outside", one | {"dataset_kwargs": {"data_files": "a\0b"}}),
        ("harness-file", one | {"dataset_kwargs": {"data_files": "x" * 300}}),
    ]
    for code, content in [*wrong.items(), *too]:
        file = put(tasks, "bad.yaml", "") if isinstance(content, bytes) else put(tasks, "bad.yaml", content)
        if isinstance(content, bytes):
            file.write_bytes(content)
        found = {one.name: one for one in harness.tasks(tasks.data) if one.problem}
        assert [one.problem.code for one in found.values()] == [code]
        [told_of] = found.values()
        assert not told_of.config
        for language in ("en", "zh"):
            shown = reports.task_notes([told_of], tasks.data, True, Words(language))
            assert told_of.name in shown
            assert "{" not in told_of.problem.text(language).replace("{data_files: {test: rows.jsonl}}", "")
    put(tasks, "bad.yaml", CHOICE)
    assert why_not(tasks)["number"] == "harness-twice"
    # A file that others include is none, whatever it lacks.
    put(tasks, "bad.yaml", {"include": "base.yaml", "task": "small"})
    put(tasks, "base.yaml", {name: value for name, value in CHOICE.items() if name != "task"})
    assert why_not(tasks) == {"number": None, "small": None, "written": None}
    assert {code for code in sentences() if code.startswith("harness-")} == {
        *(code for code in wrong if code.startswith("harness-")),
        "harness-twice",
        "harness-unknown",
        "harness-judges",
        "harness-broken",
        "harness-failed",
    }


def test_a_link_out_of_the_folder_is_not_followed(tasks: Workplace, tmp_path: Path) -> None:
    elsewhere = tmp_path / "secret.yaml"
    elsewhere.write_text("task: secret", encoding="utf-8")
    (tasks.data / harness.TASKS_FOLDER / "link.yaml").symlink_to(elsewhere)
    assert why_not(tasks)["link.yaml"] == "path-outside"


def test_what_stands_in_the_way_of_tasks_is_told_before_the_start(
    tasks: Workplace, tiny: Path, make_spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"model__model_name_or_path": str(tiny), "data__datasets": []}
    monkeypatch.setattr(harness, "installed", lambda: True)
    assert told(tasks, asking(**base)) == ["evaluate-no-data"]
    assert told(tasks, asking(**base, harness__tasks=["number", "written"])) == []
    assert told(tasks, asking(**base, harness__tasks=["number", "gone"])) == ["harness-unknown"]
    assert told(tasks, asking(**{**base, "data__datasets": ["gone"]}, harness__tasks=["number"])) == ["data-unknown"]
    judge = finished_run(tasks, make_spec(), "judge", "rm")
    assert told(tasks, asking(results=[judge.id], data__datasets=[], harness__tasks=["number"])) == ["harness-judges"]
    monkeypatch.setattr(harness, "installed", lambda: False)
    assert told(tasks, asking(**base, harness__tasks=["number"])) == ["package-missing"]
    assert harness.PACKAGE in reports.task_notes([], tasks.data, False, Words("zh"))
    pinned = (PROJECT / "requirements-harness.txt").read_text(encoding="utf-8").splitlines()
    assert harness.PACKAGE in pinned


def test_tasks_in_a_spec_are_read_back() -> None:
    from engine.runs import kinds

    spec = asking(harness__tasks=["a"], harness__num_fewshot=3, harness__limit=10, harness__apply_chat_template=False)
    assert kinds.read(spec.to_yaml(brief=True)) == spec


@real
def test_the_measures_that_are_known_are_those_of_the_package() -> None:
    from lm_eval.api import metrics, registry

    assert metrics
    theirs = {name for name in registry.METRIC_REGISTRY if name not in ("bypass",)}
    assert set(harness.METRICS) == theirs
    assert set(harness.OUTPUT_TYPES) == set(registry.DEFAULT_METRIC_REGISTRY)


@real
@pytest.mark.slow
def test_what_was_learned_shows_in_tasks_and_a_killed_evaluation_measures_none_twice(
    tasks: Workplace, make_spec: Callable[..., RunSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"Is {n} a number?", "output": "Yes, it is."} for n in range(40)]
    (tasks.data / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    workplace = dataclasses.replace(tasks, models=(DEMO_MODEL,))
    trained = ended(
        workplace,
        runs.submit(
            make_spec(
                name="learned",
                model__model_name_or_path=str(DEMO_MODEL),
                training__max_steps=30,
                training__per_device_train_batch_size=8,
            ),
            workplace,
        ),
    )
    assert trained.state == "finished", failures.explain(trained)
    spec = asking(results=[trained.id], data__max_samples=10, harness__tasks=["number", "written"], harness__limit=16)
    sleep_after(monkeypatch, tmp_path / "start", "append_lines", 'path.name == "tasks.jsonl"')
    run = runs.submit(spec, workplace)
    lines = run.dir.report / "tasks.jsonl"
    wait_until(lambda: read_lines(lines))
    for process in find_processes(run.path):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    assert ended(workplace, run).state == "failed"
    assert 0 < len(read_lines(lines)) < 4
    monkeypatch.undo()
    runs.resume(run)
    run = ended(workplace, run)
    assert run.state == "finished", failures.explain(run)
    assert set(Counter((one["task"], one["voice"]) for one in read_lines(lines)).values()) == {1}

    found = report.summary(run.dir)
    assert found["rows"] == 10  # the data set beside the tasks
    number, written = found["tasks"]
    assert (number["task"], number["measure"], number["rows"], number["shown"]) == ("number", "acc", 16, 0)
    assert number["values"][trained.id]["value"] == 1
    # Written greedily whatever the task's file says, in the template of the
    # training, and so the answer that was learned.
    assert written["values"][trained.id] == {"value": 1, "stderr": 0}
    assert written["values"]["base"]["value"] == 0
    assert written["differences"][trained.id] == {"value": 1, "stderr": 0, "verdict": "better"}
    page = reports.summary(found, Words("en"))
    assert "written · exact_match" in page
    assert "written: exact_match" in engine(workplace, "show", run.id).stdout
    assert "huggingface.co" not in run.dir.log.read_text(encoding="utf-8")


@real
@pytest.mark.slow
def test_what_only_the_package_can_find_wrong_is_told_in_a_sentence_before_the_model_is_loaded(
    tasks: Workplace, tiny: Path
) -> None:
    base = {"model__model_name_or_path": str(tiny), "data__datasets": []}
    # Columns that are not there, and a template that would reach into Python.
    for text, said in (("{{nowhere}}", "nowhere"), ("{{ ''.__class__.__mro__ }}", "unsafe")):
        put(tasks, "wrong.yaml", CHOICE | {"task": "wrong", "doc_to_text": text})
        run = ended(tasks, runs.submit(asking(**base, harness__tasks=["number", "wrong"]), tasks))
        assert run.state == "failed"
        [why] = json.loads(run.dir.error.read_text(encoding="utf-8"))["problems"]
        assert why["code"] == "harness-broken"
        assert said in why["values"]["why"]
        assert "Loading weights" not in run.dir.log.read_text(encoding="utf-8")
