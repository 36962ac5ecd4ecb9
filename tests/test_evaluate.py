"""Evaluations as runs: a base and an adapter that has learned something, measured, killed, resumed, repeated."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.core.problems import Refusal
from engine.core.rundir import RESULT_FILE, read_lines, write_json, write_text
from engine.data.datasets import count_rows, find
from engine.evaluation import evaluation_spec, report, trained_results
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.processes import find_processes
from engine.launch.workspace import DEMO_MODEL, Workplace
from engine.runs import failures, runs
from engine.runs.progress import curves
from engine.runs.results import result_of
from engine.spec.run_spec import RunSpec
from tests.conftest import end_runs, engine, short_training, wait_until
from tests.sleeping import sleep_after

pytestmark = pytest.mark.usefixtures("forked")


def asking(**changes: Any) -> EvaluationSpec:
    spec = EvaluationSpec.read(
        {"data": {"datasets": ["chat"]}, "generation": {"max_new_tokens": 24}, "hardware": {"device": "cpu"}}
    )
    for path, value in changes.items():
        spec = spec.change(path.replace("__", "."), value)
    return spec


def ended(workplace: Workplace, run: runs.Run) -> runs.Run:
    return wait_until(lambda: (now := runs.get(workplace.saves, run.id)).final and now)


def told(workplace: Workplace, spec: EvaluationSpec) -> list[str]:
    """The codes of what stands in its way."""
    return [one.code for one in evaluation_spec.problems(evaluation_spec.frozen(spec, workplace), workplace)]


def finished_run(workplace: Workplace, spec: RunSpec, name: str, stage: str = "sft") -> runs.Run:
    """A run's folder as one that has ended leaves it, its weights aside."""
    folder = workplace.saves / "tiny" / "lora" / name
    (folder / "adapter").mkdir(parents=True)
    write_text(folder / "spec.yaml", spec.to_yaml())
    write_json(folder / "adapter" / RESULT_FILE, {"attempt": 1, "complete": True, "stage": stage})
    write_json(folder / "exit.json", {"outcome": "finished", "reason": "finished", "ended": 1.0})
    write_json(folder / "request.json", {"by": "", "submitted": 1.0, "attempt": 1, "stop": None})
    return runs.get(workplace.saves, f"tiny/lora/{name}")


@dataclass(frozen=True)
class Learned:
    """A short training of the demo model, which has learned enough before to learn this fast, and its evaluation."""

    workplace: Workplace
    training: runs.Run
    spec: EvaluationSpec
    evaluation: runs.Run


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learned]:
    folder = tmp_path_factory.mktemp("learned")
    workplace = Workplace(models=(DEMO_MODEL,), data=folder / "data", saves=folder / "saves")
    for place in (workplace.data, workplace.saves):
        place.mkdir()
    rows = [{"instruction": f"Is {n} a number?", "output": "Yes, it is."} for n in range(40)]
    (workplace.data / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    write_json(workplace.data / "dataset_info.json", {"chat": {"file_name": "chat.json"}})
    learning = short_training(
        DEMO_MODEL, workplace.data, name="learned", training__max_steps=30, training__per_device_train_batch_size=8
    )
    try:
        training = ended(workplace, runs.submit(learning, workplace))
        assert training.state == "finished", failures.explain(training)
        spec = asking(results=[training.id], data__max_samples=30)
        evaluation = ended(workplace, runs.submit(spec, workplace))
        assert evaluation.state == "finished", failures.explain(evaluation)
        yield Learned(workplace, training, spec, evaluation)
    finally:
        end_runs(workplace.saves)


@pytest.mark.slow
def test_what_was_learned_is_found(learned: Learned) -> None:
    training, run = learned.training, learned.evaluation
    assert run.id.startswith("demo_model/evaluation/")
    summary = report.summary(run.dir)
    assert (summary["rows"], summary["left_out"], summary["references"]) == (30, 0, 30)
    assert [model["title"] for model in summary["voices"]] == ["demo_model", "learned"]
    assert [model["trained_on"] for model in summary["voices"]] == [[], ["chat"]]
    differences = summary["differences"][training.id]
    for name in ("exact", "chrf", "rougeL", "loss", "perplexity"):
        assert differences[name]["verdict"] == "better", name
    assert summary["measures"]["exact"]["values"][training.id]["value"] == 100
    # What the training called its loss, of rows like those it has learned by heart.
    last = curves(training)["loss"].value[-1]
    assert summary["measures"]["loss"]["values"][training.id]["value"] == pytest.approx(last, abs=0.1)


@pytest.mark.slow
def test_what_was_found_is_read_row_by_row_as_a_table_and_in_the_shell(learned: Learned) -> None:
    run = learned.evaluation
    [best, *_] = report.page(run.dir, "best", "number").rows
    assert best["answers"][learned.training.id]["text"] == best["reference"] == "Yes, it is."
    file = run.dir.report / "rows.csv"
    assert file.read_bytes().startswith(b"\xef\xbb\xbf")
    table = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"), newline="")))
    assert len(table) == 30
    assert table[0]["learned: answer"] == "Yes, it is."
    shown = engine(learned.workplace, "show", run.id).stdout
    assert "exact" in shown
    assert "better" in shown
    assert "learned was trained on chat" in shown


@pytest.mark.slow
def test_a_killed_evaluation_asks_nothing_twice_and_finds_the_same(
    learned: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_answer = 'path.name == "answers.jsonl" and "answer" in content[0]'
    sleep_after(monkeypatch, tmp_path / "start", "append_lines", an_answer, count=40)  # of 60
    run = runs.submit(learned.spec, learned.workplace)
    answers = run.dir.report / "answers.jsonl"
    wait_until(lambda: answer_counts(answers).total() == 40)
    for process in find_processes(run.path):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    run = ended(learned.workplace, run)
    assert (run.state, run.exit["signal"]) == ("failed", "SIGKILL")
    assert answer_counts(answers).total() == 40
    monkeypatch.undo()
    runs.resume(run)
    run = ended(learned.workplace, run)
    assert run.state == "finished", failures.explain(run)
    counts = answer_counts(answers)
    assert len(counts) == 60
    assert set(counts.values()) == {1}
    # Greedy, and the same rows: the report is the same, however often it was interrupted.
    for name in ("summary.json", "rows.csv"):
        theirs = learned.evaluation.dir.report / name
        assert (run.dir.report / name).read_bytes() == theirs.read_bytes(), name


def answer_counts(answers: Path) -> Counter[tuple[str, int]]:
    """How often each model has answered each row."""
    return Counter((line["voice"], line["row"]) for line in read_lines(answers) if "answer" in line)


@pytest.mark.slow
def test_a_row_is_answered_several_times_and_measured_once(workplace: Workplace, tiny: Path) -> None:
    spec = asking(
        model__model_name_or_path=str(tiny), data__max_samples=3, generation__samples=3, generation__temperature=1.5
    )
    run = ended(workplace, runs.submit(spec, workplace))
    assert run.state == "finished", failures.explain(run)
    lines = [line for line in read_lines(run.dir.report / "answers.jsonl") if "answer" in line]
    assert sorted((line["row"], line.get("sample", 0)) for line in lines) == [
        (r, s) for r in range(3) for s in range(3)
    ]
    assert len({line["answer"] for line in lines}) > 3
    first = {line["row"]: line for line in lines if "sample" not in line}
    rows = report.rows(run.dir)
    assert [row["answers"]["base"]["scores"]["tokens"] for row in rows] == [first[n]["tokens"] for n in range(3)]
    assert [len(row["answers"]["base"]["samples"]) for row in rows] == [2, 2, 2]
    assert report.summary(run.dir)["rows"] == 3
    # What an earlier attempt has answered is not asked again.
    kept = lines[:5]
    write_text(run.dir.report / "answers.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
    run.dir.exit.unlink()
    (run.dir.report / "result.json").unlink()
    runs.resume(runs.get(workplace.saves, run.id))
    run = ended(workplace, run)
    again = [line for line in read_lines(run.dir.report / "answers.jsonl") if "answer" in line]
    assert again[:5] == kept
    assert sorted((line["row"], line.get("sample", 0)) for line in again) == [
        (r, s) for r in range(3) for s in range(3)
    ]


def test_several_answers_need_a_temperature(workplace: Workplace, tiny: Path) -> None:
    spec = asking(model__model_name_or_path=str(tiny), generation__samples=2)
    assert told(workplace, spec) == ["evaluate-samples-alike"]


@pytest.mark.slow
def test_right_answers_become_a_data_set_by_a_verb_of_the_shell(learned: Learned) -> None:
    right = sum(
        row["answers"][learned.training.id]["scores"]["exact"] == 100 for row in report.rows(learned.evaluation.dir)
    )
    assert right
    model = ("--model", learned.training.id)
    done = engine(learned.workplace, "right-answers", learned.evaluation.id, *model)
    name = done.stdout.strip()
    assert count_rows(find(learned.workplace.data, name)) == right
    assert f"{right} of 30 answered rows" in done.stderr
    done = engine(learned.workplace, "right-answers", learned.evaluation.id, *model, "--by", "number")
    assert done.returncode == 2  # no answer has a number


def test_questions_without_references_are_asked_only_if_that_is_wanted(workplace: Workplace, tiny: Path) -> None:
    (workplace.data / "ask.jsonl").write_text('{"question": "Who?"}\n{"question": "Where?"}\n', encoding="utf-8")
    assert evaluation_spec.add_questions(workplace.data, workplace.data / "ask.jsonl") == "ask"
    spec = asking(model__model_name_or_path=str(tiny), data__datasets=["ask"])
    assert told(workplace, spec) == ["evaluate-no-references"]
    # A question that is longer than the model reads is left out, and said to be.
    long = json.dumps({"question": "far " * 600})
    with (workplace.data / "ask.jsonl").open("a", encoding="utf-8") as file:
        file.write(long)
    run = ended(workplace, runs.submit(spec.change("data.without_references", True), workplace))
    assert run.state == "finished", failures.explain(run)
    found = report.summary(run.dir)
    assert set(found["measures"]) == {"ended", "tokens"}
    assert (found["rows"], found["left_out"], found["differences"]) == (2, 1, {})
    assert report.page(run.dir).rows[2]["answers"]["base"]["problem"]["code"] == "chat-too-long"


@pytest.mark.slow
def test_a_reward_model_is_measured_on_pairs(workplace: Workplace, make_spec: Callable[..., RunSpec]) -> None:
    pairs = [{"instruction": f"Count to {n}", "chosen": f"Gladly: {n}", "rejected": "No, never!"} for n in range(30)]
    (workplace.data / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    info = json.loads((workplace.data / "dataset_info.json").read_text(encoding="utf-8"))
    info["pairs"] = {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    }
    write_json(workplace.data / "dataset_info.json", info)
    spec = make_spec(stage={"kind": "rm"}, data__datasets=["pairs"], training__max_steps=12)
    judge = ended(workplace, runs.submit(spec, workplace))
    assert judge.state == "finished", failures.explain(judge)
    assert told(workplace, asking(results=[judge.id])) == ["evaluate-needs-pairs"]
    run = ended(workplace, runs.submit(asking(results=[judge.id], data__datasets=["pairs"]), workplace))
    assert run.state == "finished", failures.explain(run)
    found = report.summary(run.dir)
    assert found["measures"]["pair_accuracy"]["values"][judge.id] == {"value": 100, "low": 100, "high": 100}
    assert sum(found["histograms"][judge.id]["counts"]) == 30
    worst = report.page(run.dir, "worst").rows
    margins = [one["answers"][judge.id]["scores"]["margin"] for one in worst]
    assert margins == sorted(margins)
    assert margins[0] > 0


def test_what_stands_in_the_way_is_told_before_the_start(
    workplace: Workplace, tiny: Path, make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    base = {"model__model_name_or_path": str(tiny)}
    other = workplace.models[0] / "other"
    own, foreign, judge = (
        finished_run(workplace, make_spec(model__model_name_or_path=str(model)), name, stage)
        for name, model, stage in (("own", tiny, "sft"), ("foreign", other, "sft"), ("judge", tiny, "rm"))
    )
    assert told(workplace, asking(results=[own.id])) == []
    assert told(workplace, asking(results=[foreign.id], **base)) == ["chat-other-base"]
    [why] = evaluation_spec.problems(evaluation_spec.frozen(asking(results=[foreign.id], **base), workplace), workplace)
    assert str(other) in why.text("en")
    assert str(tiny) in why.text("zh")
    assert told(workplace, asking(results=[own.id, judge.id])) == ["evaluate-mixed"]
    assert told(workplace, asking(results=["tiny/lora/none"], **base))[0] == "path-outside"
    assert told(workplace, asking(results=[str(workplace.saves)], **base)) == ["evaluate-no-result"]
    assert told(workplace, asking(with_base=False, **base)) == ["evaluate-nobody"]
    assert told(workplace, asking(**base, data__datasets=[])) == ["evaluate-no-data"]
    assert told(workplace, asking(**base, data__datasets=["text"])) == ["evaluate-needs-answers"]
    assert told(workplace, asking(**base, data__datasets=["gone"])) == ["data-unknown"]
    assert told(workplace, asking(**base, generation__max_new_tokens=512)) == ["evaluate-context"]
    assert told(workplace, asking(model__model_name_or_path=str(tmp_path / "nowhere"))) != []
    assert told(workplace, asking()) == ["model-not-chosen"]


def test_an_evaluation_reads_back_as_it_was_written(workplace: Workplace, tiny: Path) -> None:
    from engine.runs import kinds

    spec = asking(model__model_name_or_path=str(tiny), model__quantization={"kind": "4bit"}, name="x")
    for brief in (True, False):
        assert kinds.read(spec.to_yaml(brief=brief)) == spec
    with pytest.raises(Refusal):
        kinds.read("kind: evaluation\nresult: [x]")


def test_rows_are_sorted_and_searched() -> None:
    def row(number: int, base: float, ours: float, text: str) -> dict[str, Any]:
        return {
            "row": number,
            "messages": [{"role": "user", "content": f"Question {number}"}],
            "answers": {
                "base": {"text": "same", "scores": {"chrf": base}},
                "x": {"text": text, "scores": {"chrf": ours}},
            },
        }

    found = [row(1, 10, 50, "Answer"), row(2, 90, 20, "other"), row(3, 0, 99, "same")]
    assert [one["row"] for one in report.sort(found, "worst")] == [2, 1, 3]
    assert [one["row"] for one in report.sort(found, "best")] == [3, 1, 2]
    assert [one["row"] for one in report.sort(found, "changed")] == [2, 1, 3]  # equal answers last
    assert [one["row"] for one in found if report.matches(one, "ANSWER question")] == [1]


def test_a_run_that_left_nothing_is_none(workplace: Workplace, make_spec: Callable[..., RunSpec]) -> None:
    run = finished_run(workplace, make_spec(), "own")
    assert trained_results.trained_result(result_of(run).folder).title == "own"
    (run.dir.adapter / RESULT_FILE).unlink()
    assert trained_results.trained_result(run.dir.adapter) is None
