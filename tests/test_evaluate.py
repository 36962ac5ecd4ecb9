"""Evaluations as runs: a base and an adapter that has learned something, measured, killed, resumed, repeated."""

from __future__ import annotations

import csv
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

from engine.core.problems import Refusal
from engine.core.rundir import RESULT_FILE, read_lines, write_json, write_text
from engine.evaluation import evaluation_spec, report
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.processes import find_processes
from engine.launch.workspace import DEMO_MODEL, Workplace
from engine.runs import failures, runs
from engine.runs.progress import curves
from engine.runs.results import result_of
from engine.spec.run_spec import RunSpec
from tests.conftest import engine, wait_until


def asking(**changes: Any) -> EvaluationSpec:
    spec = EvaluationSpec.read({
        "data": {"datasets": ["chat"]}, "generation": {"max_new_tokens": 24}, "hardware": {"device": "cpu"},
    })  # fmt: skip
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


@pytest.mark.slow
def test_what_was_learned_is_found_and_a_killed_evaluation_asks_nothing_twice(
    workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    rows = [{"instruction": f"Is {n} a number?", "output": "Yes, it is."} for n in range(40)]
    (workplace.data / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    workplace = dataclasses.replace(
        workplace, models=(DEMO_MODEL,)
    )  # which has learned enough to learn this fast
    learning = make_spec(
        name="learned", model__model_name_or_path=str(DEMO_MODEL), training__max_steps=30,
        training__per_device_train_batch_size=8,
    )  # fmt: skip
    trained = ended(workplace, runs.submit(learning, workplace))
    assert trained.state == "finished", failures.explain(trained)
    spec = asking(results=[trained.id], data__max_samples=30)

    run = ended(workplace, runs.submit(spec, workplace))
    assert run.state == "finished", failures.explain(run)
    assert run.id.startswith("demo_model/evaluation/")
    found = report.summary(run.dir)
    assert (found["rows"], found["left_out"], found["references"]) == (30, 0, 30)
    assert [one["title"] for one in found["voices"]] == ["demo_model", "learned"]
    assert [one["trained_on"] for one in found["voices"]] == [[], ["chat"]]
    verdicts = {name: one["verdict"] for name, one in found["differences"][trained.id].items()}
    assert {verdicts[name] for name in ("exact", "chrf", "rougeL", "loss", "perplexity")} == {"better"}
    assert found["measures"]["exact"]["values"][trained.id]["value"] == 100
    # What the training called its loss, of rows like those it has learned by heart.
    last = curves(trained)["loss"].value[-1]
    assert found["measures"]["loss"]["values"][trained.id]["value"] == pytest.approx(last, abs=0.1)

    [best, *_] = report.page(run.dir, "best", "number").rows
    assert best["answers"][trained.id]["text"] == best["reference"] == "Yes, it is."
    with (run.dir.report / "rows.csv").open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 30
    assert table[0]["learned: answer"] == "Yes, it is."
    assert (run.dir.report / "rows.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    shown = engine(workplace, "show", run.id).stdout
    assert "exact" in shown
    assert "better" in shown
    assert "learned was trained on chat" in shown

    again = runs.submit(spec, workplace)
    answers = again.dir.report / "answers.jsonl"
    wait_until(lambda: answers.exists() and b'"answer"' in answers.read_bytes(), every=0.01)
    for process in find_processes(again.path):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    again = ended(workplace, again)
    assert (again.state, again.exit["signal"]) == ("failed", "SIGKILL")
    before = Counter((one["voice"], one["row"]) for one in read_lines(answers) if "answer" in one)
    assert 0 < len(before) < 60
    runs.resume(again)
    again = ended(workplace, again)
    assert again.state == "finished", failures.explain(again)
    after = Counter((one["voice"], one["row"]) for one in read_lines(answers) if "answer" in one)
    assert len(after) == 60
    assert set(after.values()) == {1}
    # Greedy, and the same rows: the report is the same, however often it was interrupted.
    for name in ("summary.json", "rows.csv"):
        assert (again.dir.report / name).read_bytes() == (run.dir.report / name).read_bytes(), name


@pytest.mark.slow
def test_questions_without_references_are_asked_only_if_that_is_wanted(
    workplace: Workplace, tiny: Path
) -> None:
    (workplace.data / "ask.jsonl").write_text(
        '{"question": "Who?"}\n{"question": "Where?"}\n', encoding="utf-8"
    )
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
    pairs = [
        {"instruction": f"Count to {n}", "chosen": f"Gladly: {n}", "rejected": "No, never!"}
        for n in range(30)
    ]
    (workplace.data / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    info = json.loads((workplace.data / "dataset_info.json").read_text(encoding="utf-8"))
    info["pairs"] = {
        "file_name": "pairs.json", "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    }  # fmt: skip
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
    [why] = evaluation_spec.problems(
        evaluation_spec.frozen(asking(results=[foreign.id], **base), workplace), workplace
    )
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
        return {"row": number, "messages": [{"role": "user", "content": f"Question {number}"}], "answers": {
            "base": {"text": "same", "scores": {"chrf": base}}, "x": {"text": text, "scores": {"chrf": ours}},
        }}  # fmt: skip

    found = [row(1, 10, 50, "Answer"), row(2, 90, 20, "other"), row(3, 0, 99, "same")]
    assert [one["row"] for one in report.sort(found, "worst")] == [2, 1, 3]
    assert [one["row"] for one in report.sort(found, "best")] == [3, 1, 2]
    assert [one["row"] for one in report.sort(found, "changed")] == [2, 1, 3]  # equal answers last
    assert [one["row"] for one in found if report.matches(one, "ANSWER question")] == [1]


def test_a_run_that_left_nothing_is_none(workplace: Workplace, make_spec: Callable[..., RunSpec]) -> None:
    run = finished_run(workplace, make_spec(), "own")
    assert evaluation_spec.trained_result(result_of(run).folder).title == "own"
    (run.dir.adapter / RESULT_FILE).unlink()
    assert evaluation_spec.trained_result(run.dir.adapter) is None
