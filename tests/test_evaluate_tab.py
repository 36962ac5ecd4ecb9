"""The handlers of the Evaluate tab, called without a browser: what they answer into which component."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from engine.core.locks import try_lock
from engine.core.problems import Refusal
from engine.core.rundir import ALIVE_BYTE, append_lines, write_json
from engine.evaluation.evaluation_spec import EvaluationSpec, frozen
from engine.launch.workspace import DEMO_MODEL, Workplace
from engine.runs import runs
from engine.runs.runs import Run, delete
from engine.spec.run_spec import RunSpec
from tests.old_saves import CUT_OFF, TRAINED, extract, run_called
from tests.past_runs import past_run
from webui.evaluate_tab.evaluation_models import EvaluationModels
from webui.evaluate_tab.form_panel import FormPanel
from webui.evaluate_tab.judge_panel import JudgePanel
from webui.evaluate_tab.list_panel import ListPanel
from webui.evaluate_tab.models_panel import ModelsPanel
from webui.evaluate_tab.panel import Context
from webui.evaluate_tab.questions_panel import QuestionsPanel
from webui.evaluate_tab.report_panel import ReportPanel
from webui.evaluate_tab.right_answers_panel import RightAnswersPanel
from webui.evaluate_tab.rows_panel import RowsPanel, page_number
from webui.evaluate_tab.sampling_panel import SamplingPanel
from webui.evaluate_tab.tab_view import TabView
from webui.evaluate_tab.tasks_panel import TasksPanel
from webui.words import Words

ENGLISH = Words("en")
DEMO = str(DEMO_MODEL)
ADA: Any = SimpleNamespace(name="ada")  # a request of hers
ROWS = ("asked", "", "1")  # how one looks at the rows at first


@pytest.fixture
def place(tmp_path: Path, data: Path) -> Workplace:
    """The old runs of the demo model, one of them with a report; a reward model of it; a
    run of another model; and a data set of pairs beside those of answers and of texts."""
    saves, other = tmp_path / "saves", tmp_path / "models" / "other"
    extract(saves)
    other.mkdir(parents=True)
    for name, base, stage, at in (("far", str(other), "sft", 1e9), ("judge", DEMO, "rm", 1e9 + 1)):
        spec = RunSpec.read({"name": name, "model": {"model_name_or_path": base}, "stage": {"kind": stage}})
        past_run(saves, spec, at=at)
    (data / "pairs.json").write_text(json.dumps([{"prompt": "Who?", "chosen": "I.", "rejected": "You."}]))
    info = json.loads((data / "dataset_info.json").read_text())
    columns = {name: name for name in ("prompt", "chosen", "rejected")}
    info["pairs"] = {"file_name": "pairs.json", "ranking": True, "columns": columns}
    write_json(data / "dataset_info.json", info)
    return Workplace(models=(DEMO_MODEL, other.parent), data=data, saves=saves)


class Tab:
    """The panels, put together as the page does it."""

    def __init__(self, workplace: Workplace):
        self.other = str(workplace.models[1] / "other")
        self.bases = [("demo_model", DEMO), ("other", self.other)]
        self.models = EvaluationModels(ENGLISH, workplace, lambda: self.bases)
        with gr.Blocks():
            self.context = context = Context(
                ENGLISH,
                workplace,
                "/root",
                gr.HTML(),
                lambda request: request.name,
                lambda run: ("<progress>", run.state, "<failure>"),
                self.models,
                gr.Textbox(),
            )
            self.listing, self.rows = ListPanel(context), RowsPanel(context)
            self.right_answers = RightAnswersPanel(context)
            self.report = ReportPanel(context, self.listing, self.rows, self.right_answers)
            self.questions, self.tasks = QuestionsPanel(context), TasksPanel(context)
            self.sampling, self.measured = SamplingPanel(context), ModelsPanel(context, self.questions)
            self.judge = JudgePanel(context)
            parts = (self.measured, self.questions, self.tasks, self.judge, self.sampling)
            self.form = FormPanel(context, *parts, self.report)
            for panel in (
                *parts,
                self.form,
                self.listing,
                self.right_answers,
                self.report,
                self.rows,
            ):
                panel.layout()
            self.view = TabView(context, self.measured, self.tasks, self.judge, self.report)

    def values(self, **changes: Any) -> dict[Any, Any]:
        """What the controls hold; `changes` by the names of their panels and components, with `__` between."""
        held = {control: control.value for control in [*self.form.inputs, *self.rows.view]}
        for path, value in changes.items():
            panel, name = path.split("__")
            held[getattr(getattr(self, panel), name)] = value
        return held


@pytest.fixture
def tab(place: Workplace) -> Tab:
    return Tab(place)


@pytest.fixture
def trained(place: Workplace) -> Run:
    return run_called(place.saves, "training", TRAINED)


@pytest.fixture
def evaluation(place: Workplace) -> Run:
    return run_called(place.saves, "evaluation", TRAINED)


@pytest.fixture
def occupied(place: Workplace) -> Iterator[None]:
    """A run is alive, so that whatever is started waits."""
    lock = try_lock(run_called(place.saves, "training", CUT_OFF).dir.lock, ALIVE_BYTE, shared=True)
    yield
    os.close(lock)


def with_more_rows(evaluation: Run, count: int) -> None:
    """The report as if `count` questions had been asked."""
    file = evaluation.dir.report / "rows.jsonl"
    first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    file.unlink()
    message = {"role": "user"}
    append_lines(
        file,
        [
            first | {"row": number, "messages": [message | {"content": f"Question {number:03}"}]}
            for number in range(1, count + 1)
        ],
    )


# ------------------------------------------------------------------------------------------ what can be chosen


def test_one_arrives_at_the_newest_run_with_its_base(tab: Tab, trained: Run) -> None:
    updates = tab.view.arrive("", "", None, [], [], [], None, [], *ROWS)
    assert updates.keys() == set(tab.view.outputs)
    assert updates[tab.measured.base] == gr.update(choices=tab.bases, value=DEMO)
    assert updates[tab.measured.results]["value"] == [str(trained.dir.adapter)]
    labels = [label for label, _ in updates[tab.measured.results]["choices"]]
    assert [label.split(" · ")[0] for label in labels] == ["before the move", "judge", "far"]
    assert labels[2].endswith("· other")
    assert updates[tab.questions.datasets] == gr.update(choices=["chat"], value=[])
    assert "before the move" in updates[tab.listing.html]
    assert updates[tab.report.nothing]["visible"] is True
    assert updates[tab.report.timer].active is False
    opened = tab.view.arrive("other/lora/far", "", None, [], [], [], None, [], *ROWS)  # the form begins with it
    far = runs.get(tab.context.workplace.saves, "other/lora/far").dir.adapter
    assert (opened[tab.measured.base]["value"], opened[tab.measured.results]["value"]) == (tab.other, [str(far)])
    assert tab.view.arrive("no/such/run", "", None, [], [], [], None, [], *ROWS)[tab.measured.base]["value"] == DEMO


def test_what_was_chosen_stays_where_it_fits(tab: Tab, trained: Run) -> None:
    kept = tab.view.arrive("", "", DEMO, [], ["chat", "gone", "pairs"], [], "gone", ["pairs", "chat"], *ROWS)
    assert kept[tab.measured.results]["value"] == []
    assert kept[tab.questions.datasets]["value"] == ["chat"]
    assert kept[tab.judge.model]["value"] == ""
    assert kept[tab.judge.ratings] == gr.update(choices=["pairs"], value=["pairs"])
    elsewhere = tab.measured.show_results(tab.other, [str(trained.dir.adapter)], None)
    assert elsewhere[tab.measured.results]["value"] == []
    assert elsewhere[tab.measured.results]["choices"][0][0].startswith("far")  # those of the base first


def test_a_result_brings_its_base_with_it(tab: Tab, trained: Run, place: Workplace, tmp_path: Path) -> None:
    far = str(runs.get(place.saves, "other/lora/far").dir.adapter)
    updates = tab.measured.choose_results(DEMO, [str(trained.dir.adapter), far], [])
    assert updates[tab.measured.base] == tab.other
    assert updates[tab.measured.results]["value"] == [far]
    link = tmp_path / "link"
    link.symlink_to(DEMO)
    stays = tab.measured.choose_results(str(link), [str(trained.dir.adapter)], [])
    assert stays[tab.measured.base] == str(link)  # another way to the same folder


def test_reward_models_are_measured_on_pairs_and_without_the_base(tab: Tab, trained: Run, place: Workplace) -> None:
    judge = str(runs.get(place.saves, "demo_model/lora/judge").dir.adapter)
    alone = tab.measured.choose_results(DEMO, [judge], ["chat", "pairs"])
    assert alone[tab.questions.datasets] == gr.update(choices=["pairs"], value=["pairs"])
    assert alone[tab.measured.with_base]["visible"] is False
    both = tab.measured.choose_results(DEMO, [judge, str(trained.dir.adapter)], ["chat"])
    assert both[tab.questions.datasets] == gr.update(choices=["chat"], value=["chat"])
    assert both[tab.measured.with_base]["visible"] is True


def test_questions_that_are_uploaded_are_a_data_set_and_chosen(tab: Tab, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "Who?"}\n{"question": "Where?"}\n')
    updates = tab.questions.receive(str(file), ["chat"], DEMO, [])
    assert updates[tab.questions.datasets]["value"] == ["chat", "mine"]
    assert "toast good" in updates[tab.context.message]
    assert not file.exists()
    prose = tmp_path / "prose.txt"
    prose.write_text("Once upon a time.\n")
    refused = tab.questions.receive(str(prose), ["chat"], DEMO, [])
    assert refused.keys() == {tab.context.message}
    assert "toast bad" in refused[tab.context.message]


def test_tasks_that_cannot_be_run_are_not_hidden(tab: Tab, data: Path) -> None:
    folder = data / "harness"
    folder.mkdir()
    (folder / "far.yaml").write_text("task: far\ndataset_path: cais/mmlu\n")
    (folder / "rows.json").write_text("[]")
    (folder / "near.yaml").write_text(
        "task: near\ndataset_path: json\ndataset_kwargs: {data_files: rows.json}\noutput_type: generate_until\n"
    )
    updates = tab.tasks.show(["near", "far", "gone"])
    assert "cais/mmlu" in updates[tab.tasks.unusable]
    assert updates[tab.tasks.tasks] == gr.update(choices=["near"], value=["near"])


# ------------------------------------------------------------------------------------------ the form


def test_a_form_that_cannot_be_started_says_why_in_its_own_words(tab: Tab, place: Workplace) -> None:
    before = {run.id for run in runs.find(place.saves)}
    for change, reason in (
        ({}, "No data set or task is chosen"),
        ({"questions__rows": "-5"}, "Rows must be"),
        ({"questions__max_tokens": "<b>many</b>"}, "Max answer length must be"),
        ({"sampling__seed": "1e99"}, f"{ENGLISH('evaluate-seed')} must be"),
        ({"tasks__limit": "none"}, "Questions must be"),
    ):
        updates = tab.form.start(tab.values(measured__base=DEMO, **change), ADA)
        assert updates.keys() == {tab.form.problems}
        assert reason in updates[tab.form.problems]
    twice = tab.form.start(tab.values(sampling__seed="x"), ADA)[tab.form.problems]
    assert twice.count("must be") == 1  # one box fills two settings
    assert {run.id for run in runs.find(place.saves)} == before


def test_what_the_form_holds_is_started_and_opened(tab: Tab, trained: Run, place: Workplace, occupied: None) -> None:
    values = tab.values(
        measured__base=DEMO,
        measured__results=[str(trained.dir.adapter)],
        questions__datasets=["chat"],
        questions__rows="0",
        questions__max_tokens=" ２０ ",
        sampling__name=" mine ",
        sampling__seed="7",
        tasks__limit="",
    )
    updates = tab.form.start(values, ADA)
    run = runs.get(place.saves, updates[tab.context.opened])
    assert (run.kind, run.state, run.by, run.title) == ("evaluation", "queued", "ada", "mine")
    assert (run.spec.data.max_samples, run.spec.data.seed, run.spec.generation.seed) == (None, 7, 7)
    assert (run.spec.data.datasets, run.spec.generation.max_new_tokens) == (["chat"], 20)
    assert run.spec.harness.limit is None
    assert updates[tab.form.problems] == ""
    assert updates[tab.report.timer].active is True
    assert f'data-run="{run.id}" class="on"' in updates[tab.listing.html]
    assert "mine" in updates[tab.report.head]


def test_a_form_that_a_spec_has_filled_reads_as_that_spec(tab: Tab, trained: Run, place: Workplace) -> None:
    spec = EvaluationSpec.read(
        {
            "name": "again",
            "results": [trained.id],
            "with_base": False,
            "data": {"datasets": ["chat"], "max_samples": 30, "seed": 3, "without_references": True},
            "generation": {"max_new_tokens": 99, "temperature": 0.25, "top_p": 0.5, "seed": 3, "batch_size": 2},
            "harness": {"num_fewshot": 0, "limit": 12, "apply_chat_template": False},
            "judge": {
                "model": DEMO,
                "criterion": "押韵",
                "language": "zh",
                "reason": False,
                "compare": False,
                "quantization": "8bit",
                "max_input_tokens": 777,
                "max_reason_tokens": 55,
                "ratings": ["pairs"],
            },
        }
    )
    filled = tab.form.fill(spec)
    assert filled.keys() == set(tab.form.filled)
    assert filled.pop(tab.form.problems) == ""
    values = {control: update["value"] if isinstance(update, dict) else update for control, update in filled.items()}
    assert frozen(tab.form.read(values), place) == frozen(spec, place)


def test_whatever_a_form_leaves_out_because_it_is_gone_is_named(tab: Tab) -> None:
    spec = EvaluationSpec.read(
        {
            "results": ["x/lora/deleted", str(tab.context.workplace.saves / "x/lora/too/adapter")],
            "data": {"datasets": ["chat", "removed"]},
            "harness": {"tasks": ["near", "far"]},
            "judge": {"model": "x/y/<b>gone", "ratings": ["pairs", "old"]},
        }
    )
    filled = tab.form.fill(spec)
    assert filled[tab.judge.model]["value"] == ""
    names = "x/lora/deleted, x/lora/too/adapter, removed, near, far, old, x/y/&lt;b&gt;gone"
    assert f"left out of the form: {names}." in filled[tab.form.problems]


def test_without_a_result_that_is_here_the_base_is_measured(tab: Tab) -> None:
    spec = EvaluationSpec.read({"model": {"model_name_or_path": DEMO}, "results": ["x/y/gone"], "with_base": False})
    filled = tab.form.fill(spec)
    assert filled[tab.measured.results]["value"] == []
    assert filled[tab.measured.with_base]["value"] is True
    assert filled[tab.tasks.shots] == ""


# ------------------------------------------------------------------------------------------ the judge


def test_only_models_that_write_answers_are_offered_as_a_judge(tab: Tab) -> None:
    labels = [label for label, _ in tab.judge.show(None, None)[tab.judge.model]["choices"]]
    assert labels == ["No judge", "demo_model", "other", "before the move", "far"]


def test_a_judge_that_cannot_be_checked_says_why(tab: Tab, place: Workplace) -> None:
    for change, reason in (
        ({}, "no judge to compare with them"),
        ({"judge__model": "../../etc/passwd"}, "/etc/passwd"),
        ({"judge__model": DEMO, "judge__max_input": "<b>9</b>"}, "Max input length must be"),
        ({"judge__model": DEMO, "judge__criterion": "x" * 9999}, "Criterion"),
        ({"judge__model": DEMO, "judge__ratings": ["<script>"]}, "&lt;script&gt;"),
    ):
        updates = tab.form.check_judge(tab.values(**change), ADA)
        assert updates.keys() == {tab.form.problems}
        assert reason in updates[tab.form.problems]
    (place.data / "dataset_info.json").write_text('{"chat": {"file_name": "chat.json"}}')
    nothing = tab.form.check_judge(tab.values(judge__model=DEMO), ADA)[tab.form.problems]
    assert "no rated answers yet" in nothing


def test_a_judge_is_checked_against_all_ratings_by_one_button(tab: Tab, place: Workplace, occupied: None) -> None:
    values = tab.values(judge__model=DEMO, measured__base=DEMO, questions__datasets=["chat"])
    run = runs.get(place.saves, tab.form.check_judge(values, ADA)[tab.context.opened])
    assert run.spec.only_compares_judge
    assert (run.spec.judge.ratings, run.spec.with_base, run.spec.data.datasets) == (["pairs"], False, [])


# ------------------------------------------------------------------------------------------ a report


def test_a_finished_evaluation_is_opened_with_its_findings_and_rows(tab: Tab, evaluation: Run) -> None:
    updates = tab.report.open(evaluation.id, *ROWS)
    assert updates.keys() == set(tab.report.outputs)
    assert "<progress>" in updates[tab.report.head]
    assert updates[tab.report.failure] == "<failure>"
    assert '<table class="report">' in updates[tab.report.summary]
    address = f"/root/download/{evaluation.id}/report/rows.csv"
    assert f'href="{address}"' in updates[tab.report.summary]
    assert updates[tab.report.timer].active is False
    assert updates[tab.rows.part]["visible"] is True
    assert "你叫什么名字？" in updates[tab.rows.html]


def test_what_is_no_evaluation_is_not_opened(tab: Tab, trained: Run) -> None:
    for id in ("", "x/evaluation/gone", trained.id):
        updates = tab.report.open(id, *ROWS)
        assert updates.keys() == set(tab.report.outputs)
        assert updates[tab.report.nothing]["visible"] is True
        assert (updates[tab.report.head], updates[tab.rows.html]) == ("", "")
        assert updates[tab.rows.part]["visible"] is False


def test_a_poll_answers_only_what_has_changed(tab: Tab, evaluation: Run) -> None:
    stamp = tab.report.open(evaluation.id, *ROWS)[tab.report.stamp]
    assert tab.report.tick(evaluation.id, stamp, *ROWS) == gr.skip()
    write_json(evaluation.dir.progress, {"phase": "evaluate", "done": 1})
    changed = tab.report.tick(evaluation.id, stamp, *ROWS)
    assert changed.keys() == {tab.listing.html, *tab.report.outputs}
    assert changed[tab.report.stamp] != stamp
    delete(evaluation)
    gone = tab.report.tick(evaluation.id, stamp, *ROWS)
    assert gone[tab.report.nothing]["visible"] is True
    assert tab.listing.html not in gone


def test_a_click_opens_an_evaluation_at_its_first_page(tab: Tab, evaluation: Run) -> None:
    with_more_rows(evaluation, 45)
    updates = tab.report.catch_up(evaluation.id, "another|", "asked", "", "3")
    assert updates[tab.rows.where] == "1"
    assert f'data-run="{evaluation.id}" class="on"' in updates[tab.listing.html]


def test_rows_are_turned_sorted_and_searched(tab: Tab, evaluation: Run) -> None:
    with_more_rows(evaluation, 45)
    rows, id = tab.rows, evaluation.id

    def numbers(updates: dict[Any, Any]) -> list[int]:
        return [int(number) for number in re.findall(r"Question (\d{3})", updates[rows.html])]

    assert numbers(rows.show(id, "asked", "")) == list(range(1, 21))
    second = rows.next_page(id, "asked", "", "1")
    assert (second[rows.where], numbers(second)[0]) == ("2", 21)
    assert "3" in second[rows.count]
    assert "45" in second[rows.count]
    assert rows.next_page(id, "asked", "", "3")[rows.where] == "3"
    assert rows.previous_page(id, "asked", "", "1")[rows.where] == "1"
    assert numbers(rows.show(id, "asked", "question 044", "9")) == [44]
    assert rows.show("x/evaluation/gone", *ROWS) == {rows.where: "1", rows.count: "", rows.html: ""}
    assert [page_number(text) for text in ("2", " 12 ", "", "-1", "x", "9" * 12)] == [2, 12, 1, 1, 1, 1]


# ------------------------------------------------------------------------------------------ from a run


def test_a_run_is_evaluated_with_its_base(tab: Tab, trained: Run, place: Workplace) -> None:
    assert tab.models.of_run(trained) == (DEMO, [str(trained.dir.adapter)])
    export = run_called(place.saves, "export", TRAINED)
    assert tab.models.of_run(export) == (str(export.dir.model), [])
    with pytest.raises(Refusal):
        tab.models.of_run(run_called(place.saves, "training", CUT_OFF))
