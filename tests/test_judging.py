"""Evaluations with a judge as runs: one whose mind is known, one that is a real small model, both told to people."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.core.rundir import RESULT_FILE, read_json, read_lines, write_json, write_text
from engine.evaluation import evaluation_memory, evaluation_spec, report
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.workspace import DEMO_MODEL, Workplace
from engine.runs import evaluations, failures, runs
from engine.spec.run_spec import RunSpec
from tests.conftest import end_runs, engine, made_once, wait_until
from tests.test_evaluate import finished_run
from tests.tiny_judge import LIKED, score_without_marks

pytestmark = pytest.mark.usefixtures("forked")

ONE, TWO = "demo_model/lora/one", "demo_model/lora/two"
ROWS, THUMBS, PAIRS = 12, 30, 20


def judged_by(model: Path | str, **changes: Any) -> EvaluationSpec:
    spec = EvaluationSpec.read(
        {
            "results": [ONE],
            "data": {"datasets": ["chat"], "max_samples": ROWS},
            "generation": {"max_new_tokens": 8},
            "judge": {"model": str(model), "max_reason_tokens": 8},
            "hardware": {"device": "cpu"},
        }
    )
    for path, value in changes.items():
        spec = spec.change(path.replace("__", "."), value)
    return spec


def finished(workplace: Workplace, run: runs.Run) -> runs.Run:
    run = wait_until(lambda: (now := runs.get(workplace.saves, run.id)).final and now)
    assert run.state == "finished", failures.explain(run)
    return run


def add_data(workplace: Workplace) -> None:
    """Questions, and ratings of a person who likes what the known judge likes."""
    rows = [{"instruction": f"Is {n} a number?", "output": "Yes, it is."} for n in range(ROWS)]
    ask = {"role": "user", "content": "How was it?"}
    answers = {True: f"Fine{LIKED}", False: "Awful."}
    turns = {up: {"role": "assistant", "content": answer} for up, answer in answers.items()}
    thumbs = [{"messages": [ask, turns[n % 3 > 0]], "kto_tag": n % 3 > 0, "model": "base"} for n in range(THUMBS)]
    pairs = [{"messages": [ask], "chosen": turns[True], "rejected": turns[False]}] * PAIRS
    files = {"chat": rows, "thumbs": thumbs, "pairs": pairs}
    for name, content in files.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        write_text(workplace.data / f"{name}.jsonl", text)
    columns = {
        "thumbs": ("messages", "kto_tag"),
        "pairs": ("messages", "chosen", "rejected"),
    }
    info: dict[str, Any] = {"chat": {"file_name": "chat.jsonl"}}
    for name, own in columns.items():
        info[name] = {"file_name": f"{name}.jsonl", "formatting": "openai", "columns": {key: key for key in own}}
    info["pairs"]["ranking"] = True
    write_json(workplace.data / "dataset_info.json", info)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, demo_results: Path) -> Iterator[Workplace]:
    """Two finished runs of the demo model, data with ratings, and the judge made by hand."""
    folder = tmp_path_factory.mktemp("judged")
    shutil.copytree(demo_results, folder / "saves")
    shutil.copytree(made_once(tmp_path_factory, "tiny_judge", "tests.tiny_judge"), folder / "models" / "judge")
    workplace = Workplace(models=(DEMO_MODEL, folder / "models"), data=folder / "data", saves=folder / "saves")
    workplace.data.mkdir()
    add_data(workplace)
    yield workplace
    end_runs(workplace.saves)


@pytest.fixture(scope="module")
def known_judge(place: Workplace) -> runs.Run:
    """An evaluation with the judge made by hand."""
    spec = judged_by("judge", judge__reason=False)
    return finished(place, runs.submit(spec, place))


def notes(run: runs.Run) -> dict[str, Any]:
    summary = report.summary(run.dir)
    return {note.code: note for note in evaluations.notes_of(run, summary)}


@pytest.mark.slow
def test_the_scores_are_the_means_over_the_probabilities_that_are_known(known_judge: runs.Run) -> None:
    run = known_judge
    lines = [line for line in read_lines(run.dir.report / "judgements.jsonl") if line["kind"] == "score"]
    assert len(lines) == 2 * ROWS
    marks = {
        (row["row"] - 1, model): answer["text"].count(LIKED)
        for row in report.rows(run.dir)
        for model, answer in row["answers"].items()
    }
    plain = [line["score"] for line in lines if not marks[line["row"], line["voice"]]]
    assert plain
    assert plain == pytest.approx([score_without_marks()] * len(plain), abs=1e-4)
    mean = sum(line["score"] for line in lines if line["voice"] == ONE) / ROWS
    measure = report.summary(run.dir)["measures"]["judge"]
    assert measure["better"] == "higher"
    assert measure["values"][ONE]["value"] == pytest.approx(mean)
    assert measure["values"][ONE]["low"] is not None
    assert "judge" in report.summary(run.dir)["differences"][ONE]


@pytest.mark.slow
def test_a_judge_that_prefers_the_first_place_wins_nothing_for_anybody(known_judge: runs.Run) -> None:
    comparison = report.summary(known_judge.dir)["judge"]["comparisons"][ONE]
    assert comparison["rate"] == {"value": 50, "low": 50, "high": 50}
    assert comparison["inconsistent_share"] == 100
    assert (comparison["win"], comparison["loss"], comparison["none"]) == (0, 0, 0)
    assert comparison["inconsistent"] + comparison["same"] == ROWS
    assert {"judge-comparison", "judge-inconsistent"} <= notes(known_judge).keys()


@pytest.mark.slow
def test_what_the_judge_was_asked_and_decided_is_kept(known_judge: runs.Run, place: Workplace) -> None:
    facts = read_json(known_judge.dir.report / "judge.json")
    assert facts["reads"] == "probabilities"
    assert "{question}" in facts["prompts"]["score"]
    assert facts["criterion"] in facts["prompts"]["compare"]
    row = report.page(known_judge.dir, "best").rows[0]
    scores = [answer["scores"]["judge"] for answer in row["answers"].values()]
    assert all(1 <= score <= 5 for score in scores)
    best = [row["answers"][ONE]["scores"]["judge"] for row in report.page(known_judge.dir, "best").rows]
    assert best == sorted(best, reverse=True)
    assert "judge" in (known_judge.dir.report / "rows.csv").read_text(encoding="utf-8-sig").splitlines()[0]
    shown = engine(place, "show", known_judge.id).stdout
    assert "Each score is the expected value" in shown


@pytest.mark.slow
def test_the_judge_is_compared_with_a_persons_ratings_and_every_report_says_so(
    known_judge: runs.Run, place: Workplace
) -> None:
    assert "judge-never-compared" in notes(known_judge)
    options = ("--no-judge-reason", "--ratings", "thumbs", "pairs", "--device", "cpu")
    spec = known_judge.spec.judge
    file = place.saves.parent / "check.yaml"
    settings = {"judge": {"model": "judge", "reason": False, "max_reason_tokens": spec.max_reason_tokens}}
    write_text(file, json.dumps({"kind": "evaluation", **settings}))
    done = engine(place, "evaluate", str(file), *options)
    assert done.returncode == 0, done.stderr
    assert f"Agreement with {THUMBS} thumbs: AUC 1.00 [1.00, 1.00]" in done.stdout
    assert f"Agreement with {PAIRS} preferences: 50" in done.stdout  # it always says A
    assert "may be chance" in done.stdout
    [check] = [run for run in runs.find(place.saves, "evaluation") if run.id != known_judge.id]
    assert check.id.startswith("judge/evaluation/")
    agreement = report.summary(check.dir)["judge"]["agreement"]
    assert agreement["thumbs"]["best"]["kappa"]["value"] == pytest.approx(1)
    assert agreement["thumbs"]["median"]["threshold"] > 1
    assert agreement["preferences"]["inconsistent_share"] == 100
    # The earlier report knows it now; one that asks in another way does not.
    assert "judge-thumbs" in notes(known_judge)
    assert "judge-never-compared" not in notes(known_judge)
    assert evaluations.last_agreement(place.saves, spec.model_copy(update={"criterion": "Be kind."})) is None


@pytest.mark.slow
def test_a_real_model_judges_within_bounds_gives_reasons_and_repeats_itself(place: Workplace) -> None:
    spec = judged_by(TWO, judge__language="zh", judge__max_input_tokens=64, data__max_samples=10)
    run = finished(place, runs.submit(spec, place))
    summary, lines = report.summary(run.dir), list(read_lines(run.dir.report / "judgements.jsonl"))
    scored = [line for line in lines if line["kind"] == "score"]
    assert len(scored) == 20
    assert all(line["score"] is None or 1 <= line["score"] <= 5 for line in scored)
    unscored = sum(line["score"] is None for line in scored)
    assert sum(summary["judge"]["unscored"].values()) == unscored  # told, and not in the mean
    assert summary["judge"]["left_out"] == len({line["row"] for line in scored if line["score"] is None})
    assert summary["judge"]["adapter"].endswith("two/adapter")
    # Asked again, it decides the same; the models are not asked again.
    answers = (run.dir.report / "answers.jsonl").read_bytes()
    for file in (run.dir.report / "judgements.jsonl", run.dir.report / RESULT_FILE, run.dir.exit):
        file.unlink()
    runs.resume(runs.get(place.saves, run.id))
    run = finished(place, run)
    assert (run.dir.report / "answers.jsonl").read_bytes() == answers
    assert list(read_lines(run.dir.report / "judgements.jsonl")) == lines
    assert report.summary(run.dir) == summary


def codes(workplace: Workplace, spec: EvaluationSpec) -> list[str]:
    """The codes of what prevents an evaluation."""
    return [issue.code for issue in evaluation_spec.problems(evaluation_spec.frozen(spec, workplace), workplace)]


def test_what_prevents_a_judge_from_judging_is_said_before_the_start(
    place: Workplace, tmp_path: Path, make_spec: Callable[..., RunSpec], workplace: Workplace
) -> None:
    assert codes(place, judged_by("judge")) == []
    assert codes(place, judged_by(TWO)) == []
    assert codes(place, judged_by("", judge__ratings=["thumbs"])) == ["judge-missing"]
    assert codes(place, judged_by(tmp_path)) == ["path-outside"]
    assert codes(place, judged_by("../../etc/passwd")) == ["path-outside"]
    assert codes(place, judged_by(place.models[1])) != []  # a folder without a model
    assert codes(place, judged_by("judge", judge__ratings=["chat"])) == ["judge-no-ratings"]
    assert codes(place, judged_by("judge", judge__ratings=["<b>"])) == ["data-unknown"]
    reward_model = finished_run(workplace, make_spec(), "judge", "rm")
    base = str(workplace.models[0] / "tiny")
    spec = judged_by(reward_model.id, results=[], model__model_name_or_path=base)
    assert codes(workplace, spec) == ["judge-is-reward-model"]
    alone = judged_by("judge", results=[], data__datasets=[], judge__ratings=["thumbs"])
    assert codes(place, alone) == []
    assert codes(place, alone.change("results", [ONE])) == ["evaluate-no-data"]


def test_the_memory_of_the_largest_model_is_asked_for(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def need(spec: EvaluationSpec) -> int:
        return evaluation_memory.memory_needed(evaluation_spec.frozen(spec, place))

    alone, small = need(judged_by("")), need(judged_by("judge"))
    assert alone == small > (DEMO_MODEL / "model.safetensors").stat().st_size
    wide = judged_by(TWO, judge__max_input_tokens=10**5, generation__batch_size=64)
    assert need(wide) > need(wide.change("judge.model", ""))
    monkeypatch.setattr(evaluation_memory, "available_memory", lambda _: type("Room", (), {"bytes": 10**6}))
    warnings = evaluation_memory.doubts(evaluation_spec.frozen(judged_by("judge"), place), [])
    assert [warning.code for warning in warnings] == ["evaluate-may-not-fit", "judge-may-not-fit"]
