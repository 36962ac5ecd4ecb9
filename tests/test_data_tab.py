"""The handlers of the Data tab, called without a browser: what they answer into which component."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr
import pytest

from engine.core.problems import Refusal
from engine.launch.workspace import Workplace
from engine.spec.run_spec import RunSpec
from tests.conftest import wait_until
from webui.data_tab.check_panel import CheckPanel
from webui.data_tab.columns_panel import ColumnsPanel
from webui.data_tab.data_folder import DataFolder
from webui.data_tab.dataset_specs import stages_for, training_spec
from webui.data_tab.derive_panel import DerivePanel, split_settings
from webui.data_tab.documents_panel import DocumentsPanel
from webui.data_tab.draft_panel import DraftPanel
from webui.data_tab.head_panel import HeadPanel
from webui.data_tab.job_panel import JobPanel
from webui.data_tab.panel import Context, Panel, row_number
from webui.data_tab.rows_panel import SEARCHED, RowsPanel
from webui.data_tab.set_entry import Description, columns_for_kind, entry_from
from webui.data_tab.set_list import SetList
from webui.data_tab.set_view import SetView
from webui.words import Words

ENGLISH = Words("en")
ROWS = [{"question": f"What comes after {n}?", "answer": f"{n + 1}."} for n in range(25)]
COLUMNS = {"prompt": "question", "response": "answer"}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    """A set with 25 rows, one that lies on a hub, and a file that is in no set."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("numbers.json", "loose.json"):
        (data / name).write_text(json.dumps(ROWS))
    entries = {
        "away": {"hf_hub_url": "somebody/away", "columns": COLUMNS},
        "numbers": {"file_name": "numbers.json", "columns": COLUMNS},
    }
    (data / "dataset_info.json").write_text(json.dumps(entries))
    (tmp_path / "secret.json").write_text(json.dumps(ROWS))
    return Workplace(data=data, saves=tmp_path / "saves")


class Tab:
    """The panels that the tests call, and the view of an open set over them."""

    def __init__(self, workplace: Workplace):
        with gr.Blocks():
            context = Context(ENGLISH, workplace, "/root", message=gr.HTML(), chosen=gr.Textbox())
            self.context = context
            self.sets, self.jobs, self.rows = SetList(context), JobPanel(context), RowsPanel(context)
            self.head, self.check = HeadPanel(context, self.sets), CheckPanel(context, self.jobs)
            self.derive = DerivePanel(context, self.sets, self.jobs)
            self.columns = ColumnsPanel(context, self.sets, self.head)
            self.draft, self.documents = DraftPanel(context, self.sets), DocumentsPanel(context, list)
            others: list[Panel] = [self.sets, self.rows, self.check, self.columns]
            self.panels: list[Panel] = [self.head, self.draft, self.documents, *others]
            for panel in (*self.panels, self.jobs, self.derive):
                panel.layout()
            with gr.Tabs() as tabs, gr.Tab() as check_tab:
                pass
            self.view = SetView(context, tabs, self.head, self.draft, self.documents, others)
            self.view.wire(self.columns.sheet)
            self.check.wire(check_tab)
            self.derive.wire()
            self.jobs.wire()


@pytest.fixture
def tab(place: Workplace) -> Tab:
    return Tab(place)


def test_every_panel_answers_only_into_what_it_has_named(tab: Tab, place: Workplace) -> None:
    folder = DataFolder(place.data)
    for id in ("set:numbers", "set:away", "file:loose.json"):
        for panel in tab.panels:
            assert panel.opened(folder.select(id)).keys() <= set(panel.outputs)
    for panel in tab.panels:
        assert panel.closed().keys() <= set(panel.outputs)
    for id in ("", "set:numbers", "set:gone"):
        assert tab.view.open(id).keys() <= set(tab.view.outputs)


def test_a_set_opens_with_its_rows_and_a_file_with_its_columns(tab: Tab) -> None:
    numbers = tab.view.open("set:numbers")
    assert numbers[tab.view.tabs].selected == "rows"
    assert "What comes after 9?" in numbers[tab.rows.html]
    assert "What comes after 10?" not in numbers[tab.rows.html]
    assert numbers[tab.head.fetch]["visible"] is False
    assert numbers[tab.columns.roles["prompt"]]["value"] == "question"
    loose = tab.view.open("file:loose.json")
    assert loose[tab.view.tabs].selected == "columns"
    assert (loose[tab.head.use]["visible"], loose[tab.head.remove]) == (False, ENGLISH("remove-file"))
    assert "loose.json" in loose[tab.check.findings]  # it is in no set yet, which is why it cannot be checked
    away = tab.view.open("set:away")
    assert (away[tab.view.tabs].visible, away[tab.head.fetch]["visible"]) == (False, True)


def test_what_is_not_there_is_told_and_the_tab_shows_nothing(tab: Tab) -> None:
    for id in ("set:gone", "file:numbers.json", "file:../secret.json"):
        updates = tab.view.open(id)
        assert "toast bad" in updates[tab.context.message]
        assert (updates[tab.head.title], updates[tab.view.tabs]["visible"]) == ("", False)


def test_one_arrives_at_the_first_set_or_at_what_was_open(tab: Tab) -> None:
    assert tab.sets.arrive("") == {tab.sets.first: "set:away"}
    updates = tab.sets.arrive("file:loose.json")
    assert updates[tab.sets.first] == ""
    assert tab.context.chosen not in updates
    assert 'data-set="file:loose.json" class="on"' in updates[tab.sets.html]


def test_pages_are_turned_and_a_search_goes_on_where_it_has_stopped(tab: Tab) -> None:
    rows = tab.rows
    second = rows.next_page("set:numbers", "1", "", "")
    assert (second[rows.first], second[rows.where]) == ("11", "11")
    assert rows.previous_page("set:numbers", "11", "", "")[rows.first] == "1"
    assert rows.previous_page("set:numbers", "1", "", "")[rows.first] == "1"
    hits = rows.search("set:numbers", "after")
    assert hits[rows.further]["visible"] is True
    more = rows.next_page("set:numbers", "1", hits[rows.searched_to], "after")
    assert more[rows.first] == "11"
    last = rows.next_page("set:numbers", "11", more[rows.searched_to], "after")
    assert (last[rows.searched_to], last[rows.further]["visible"]) == (SEARCHED, False)
    assert rows.next_page("set:numbers", "21", SEARCHED, "after") == gr.skip()
    assert "nowhere" in rows.search("set:numbers", "nowhere")[rows.html]


def test_a_refusal_becomes_a_message_and_changes_nothing_else(tab: Tab) -> None:
    for updates in (
        tab.rows.search("set:gone", "x"),
        tab.head.remove_opened("set:gone"),
        tab.head.remove_opened("file:numbers.json"),
        tab.head.remove_opened("file:../secret.json"),
        tab.derive.split("set:numbers", "many", "42"),
        tab.derive.deduplicate("set:gone", "1"),
        tab.derive.deduplicate("set:numbers", "nearly"),
        tab.derive.deduplicate("set:numbers", "nan"),
        tab.derive.deduplicate("set:numbers", "0.2"),
        tab.check.check("file:loose.json", []),
    ):
        assert updates.keys() == {tab.context.message}
        assert "toast bad" in updates[tab.context.message]
    assert tab.check.check_unasked("file:loose.json", []) == gr.skip()


def test_a_file_is_described_becomes_a_set_and_is_taken_out_again(tab: Tab, place: Workplace) -> None:
    columns = ["question", "", "answer", *[""] * 7]
    updates = tab.columns.save("file:loose.json", " mine ", "chat", "", *columns)
    assert updates[tab.context.chosen] == "set:mine"
    assert 'data-set="set:mine" class="on"' in updates[tab.sets.html]
    info = place.data / "dataset_info.json"
    assert json.loads(info.read_text())["mine"] == {"file_name": "loose.json", "columns": COLUMNS}
    assert tab.head.remove_opened("set:mine")[tab.context.chosen] == ""
    assert list(json.loads(info.read_text())) == ["away", "numbers"]
    question = tab.view.open("file:loose.json")[tab.head.sure]
    assert "loose.json" in question
    removed = tab.head.remove_opened("file:loose.json")
    assert (removed[tab.context.chosen], "loose.json" in removed[tab.sets.html]) == ("", False)
    assert {file.name for file in place.data.glob("*.json")} == {"dataset_info.json", "numbers.json"}


def test_rows_are_made_of_a_folder_of_images_by_a_button(tab: Tab, place: Workplace) -> None:
    for name in ("cat", "dog"):
        (place.data / "pets" / name).mkdir(parents=True)
        (place.data / "pets" / name / "1.png").write_bytes(b"")
    opened = tab.view.open("file:pets")
    assert "pets" in opened[tab.head.title]
    assert opened[tab.head.of_folder]["visible"]
    assert not (place.data / "pets" / "rows.jsonl").exists()
    made = tab.head.make_rows("file:pets")
    assert made[tab.context.chosen] == "file:pets/rows.jsonl"
    assert "pets/rows.jsonl" in made[tab.context.message]
    assert not tab.view.open("file:pets/rows.jsonl")[tab.head.of_folder]["visible"]
    assert "toast bad" in tab.head.make_rows("file:pets")[tab.context.message]


def test_a_file_takes_no_set_s_place_by_its_name(tab: Tab, place: Workplace) -> None:
    info = place.data / "dataset_info.json"
    info.write_text(info.read_text().replace('"numbers":', '"loose":'))
    updates = tab.columns.save("file:loose.json", "loose", "chat", "", "question", "", "answer", *[""] * 7)
    assert updates.keys() == {tab.context.message}
    assert json.loads(info.read_text())["loose"]["file_name"] == "numbers.json"


def test_a_role_that_is_missing_is_called_as_the_page_calls_it(place: Workplace) -> None:
    description = Description("chat", "", [""] * 10)
    with pytest.raises(Refusal) as refusal:
        entry_from(DataFolder(place.data), "set:numbers", description, ENGLISH)
    assert ENGLISH("role-prompt") in refusal.value.problems[0].text("en")


def test_columns_stay_when_the_kind_changes_and_the_others_are_guessed(place: Workplace) -> None:
    dataset = DataFolder(place.data).select("set:numbers").dataset
    chosen = Description("chat", "", ["", "", "question", *[""] * 7])
    existing, columns = columns_for_kind(dataset, chosen)
    assert existing == ["question", "answer"]
    assert (columns["prompt"], columns["response"]) == ("question", "question")


def watched_to_its_end(tab: Tab, job_id: str, id: str) -> dict:
    return wait_until(lambda: tab.jobs.timer in (updates := tab.jobs.watch(job_id, id)) and updates)


def test_a_check_is_shown_where_it_was_begun_and_remembered(tab: Tab) -> None:
    started = tab.check.check("set:numbers", [])
    assert started[tab.jobs.timer].active is True
    job_id = started[tab.jobs.job_id]
    findings = watched_to_its_end(tab, job_id, "set:numbers")[tab.check.findings]
    assert '<dd class="">25</dd>' in findings
    assert tab.check.findings not in tab.jobs.watch(job_id, "set:away")  # the reader has gone on
    assert tab.view.open("set:numbers")[tab.check.findings] == findings


def test_a_split_opens_the_first_of_its_sets_unless_the_reader_has_gone_on(tab: Tab) -> None:
    job_id = tab.derive.split("set:numbers", "20%", "1")[tab.jobs.job_id]
    updates = watched_to_its_end(tab, job_id, "set:numbers")
    assert updates[tab.context.chosen].startswith("set:numbers-")
    elsewhere = tab.jobs.watch(job_id, "set:away")
    assert tab.context.chosen not in elsewhere
    assert "toast good" in elsewhere[tab.context.message]


def test_a_job_that_nobody_knows_stops_the_watch(tab: Tab) -> None:
    updates = tab.jobs.watch("check-gone", "set:numbers")
    assert updates.keys() == {tab.jobs.timer, tab.jobs.progress}


def test_a_set_goes_into_the_form_with_a_stage_that_takes_it(place: Workplace) -> None:
    folder = DataFolder(place.data)
    dataset = folder.saved_set("set:numbers")
    spec = RunSpec.read({"stage": {"kind": "dpo"}})
    assert "dpo" not in stages_for(dataset)
    used = training_spec(spec, dataset)
    assert (used.stage.kind, used.data.datasets) == ("sft", {"numbers": 1.0})
    with pytest.raises(Refusal):
        training_spec(spec, folder.saved_set("set:away"))


def test_numbers_are_read_as_they_are_typed() -> None:
    assert [row_number(text) for text in ("12", " 1,200 ", "", "-3", "x", "9" * 20)] == [12, 1200, 1, 1, 1, 1]
    assert split_settings("15%", " 7 ") == (pytest.approx(0.15), 7)
    for share, seed in (("x", "1"), ("0.1", "-1"), ("0.1", "")):
        with pytest.raises(Refusal):
            split_settings(share, seed)
