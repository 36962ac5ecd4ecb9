"""The review of a draft on the Data tab, called without a browser, by its owner and by others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from engine.core import audit
from engine.core.rights import Person
from engine.core.rundir import write_json
from engine.data.datasets import read_dataset_info
from engine.documents import drafts, review
from engine.documents.drafts import Draft
from engine.launch.workspace import Workplace
from tests.written_documents import complete_draft
from webui import people
from webui.data_tab.data_folder import draft_id
from webui.data_tab.documents_panel import DocumentsPanel
from webui.data_tab.draft_panel import DraftPanel, View
from webui.data_tab.panel import Context
from webui.data_tab.set_list import SetList
from webui.panels import Updates
from webui.words import Words

ADA, BOB, EVE = Person("ada", "user"), Person("bob", "user"), Person("eve", "viewer")
HOSTILE = '<img src=x onerror=alert(1)> "quoted"'


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    (tmp_path / "data").mkdir()
    (tmp_path / "saves").mkdir()
    return Workplace(models=(tmp_path / "models",), data=tmp_path / "data", saves=tmp_path / "saves")


@pytest.fixture
def draft(place: Workplace) -> Draft:
    return complete_draft(place, HOSTILE, "ada")


class Review:
    """The panel, used by a person."""

    def __init__(self, place: Workplace, draft: Draft):
        with gr.Blocks():
            self.context = Context(Words("en"), place, "", message=gr.HTML(), chosen=gr.Textbox())
            sets = SetList(self.context)
            self.panel, self.documents = (
                DraftPanel(self.context, sets),
                DocumentsPanel(self.context, lambda: [("m", "m")]),
            )
            for part in (sets, self.panel, self.documents):
                part.layout()
        self.id, self.view = draft_id(draft.id), ""

    def act(self, act: str, **values: Any) -> Updates:
        updates = self.panel.act(self.id, self.view, SimpleNamespace(_data={"act": act, **values}))
        self.view = updates.get(self.panel.view, self.view)
        return updates

    def message(self, act: str, **values: Any) -> str:
        return str(self.act(act, **values).get(self.context.message, ""))


@pytest.fixture
def reader(place: Workplace, draft: Draft, monkeypatch: pytest.MonkeyPatch) -> Review:
    monkeypatch.setattr(people, "_asking", SimpleNamespace(get=lambda: ADA))
    return Review(place, draft)


def test_rows_are_shown_by_filter_and_page_and_decided_by_their_ids(reader: Review, draft: Draft) -> None:
    first = reader.panel.draft_opened(reader.id)[reader.panel.html]
    assert first.count("<article") == 10
    assert "<img" not in first
    assert "Part 1 is &lt;img" in first
    last = reader.act("show", filter="open", page=3)[reader.panel.html]
    assert last.count("<article") == 4
    assert 'data-row="25.1"' not in last
    reader.act("accept", row="24.1")
    reader.act("reject", row="23.1")
    reader.act("accept", row="22.1")
    reader.act("undo", row="22.1")
    reader.act("edit", row="21.1", question="Why?", answer="So.")
    decided = {row.id: (row.decision, row.edited) for row in review.rows_of(draft) if row.decision}
    assert decided == {"21.1": ("accepted", True), "23.1": ("rejected", False), "24.1": ("accepted", False)}
    assert json.loads(reader.view) == {"filter": "open", "page": 3}
    assert "Accepted 7 rows" in reader.message("accept-supported", least="60%")  # 15 to 20, and 22
    repeated = reader.act("show", filter="repeated")[reader.panel.html]
    assert "100% like 1.1" in repeated


def test_accepted_rows_are_saved_as_a_set_that_opens(reader: Review, place: Workplace) -> None:
    assert "toast bad" in reader.message("save", format="alpaca")
    reader.act("accept", row="1.1")
    write_json(reader.panel._draft(reader.id).path / "request.json", read_with_name(reader, "pumps"))
    saved = reader.act("save", format="messages")
    assert saved[reader.context.chosen] == "set:pumps"
    (dataset,) = read_dataset_info(place.data)[0]
    assert (dataset.problem, dataset.name) == (None, "pumps")
    gone = reader.act("remove")
    assert gone[reader.context.chosen] == ""
    assert drafts.every_draft(place.saves) == []
    assert "no draft" in reader.message("accept", row="1.1")


def read_with_name(reader: Review, name: str) -> dict[str, Any]:
    request = json.loads((reader.panel._draft(reader.id).path / "request.json").read_text())
    request["given"]["name"] = name
    return request


def test_what_no_button_sends_is_refused_and_changes_nothing(reader: Review, draft: Draft) -> None:
    for act, values in (
        ("accept", {}),
        ("accept", {"row": "99.1"}),
        ("edit", {"row": "1.1", "question": "", "answer": None}),
        ("edit", {"row": "1.1", "question": "x", "answer": "y" * 10_000}),
        ("accept-supported", {"least": "nan"}),
        ("accept-supported", {"least": "all"}),
        ("save", {"format": "../x"}),
        ("__class__", {}),
        ("", {}),
    ):
        assert "toast bad" in reader.message(act, **values), (act, values)
    assert not (draft.path / review.DECISIONS_FILE).exists()
    assert View.read('{"filter": "no", "page": -1}') == View.read("[" * 9_000) == View()


def test_nobody_else_sees_or_changes_a_draft(
    reader: Review, draft: Draft, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted((path.name, path.stat().st_size) for path in draft.path.iterdir())
    assert draft.id in reader.documents.marking("")[reader.documents.list]
    for person in (BOB, EVE):
        monkeypatch.setattr(people, "_asking", SimpleNamespace(get=lambda person=person: person))
        assert reader.documents.marking("")[reader.documents.list] == ""
        for act in ("show", "accept", "reject", "edit", "accept-supported", "save", "stop", "continue", "remove"):
            updates = reader.act(act, row="1.1", question="x", answer="y", least="0", format="alpaca", filter="all")
            assert "Part 1" not in str(updates.get(reader.panel.html, ""))
            assert "toast bad" in str(updates[reader.context.message]), act
        assert "Part 1" not in str(reader.panel.refresh(reader.id, "{}"))
    assert sorted((path.name, path.stat().st_size) for path in draft.path.iterdir()) == before
    refused = [entry for entry in audit.read(place.saves, 100) if entry.outcome.startswith("refused: rights")]
    assert {entry.user for entry in refused} == {"bob", "eve"}


def test_a_form_that_cannot_be_used_makes_no_draft(reader: Review, place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    file = [str(tmp_path / "a.md")]
    for files, model, rows, instruction in (
        (None, None, "3", ""),
        (file, "run:../../etc", "3", ""),
        (file, "/etc", "3", ""),
        (file, "m", "-1", ""),
        (file, "m", "1e3", ""),
        (file, "m", "3", "x" * 10_000),
    ):
        updates = reader.documents.make(files, model, "en", rows, instruction, "name")
        assert updates.keys() == {reader.context.message}
        assert "toast bad" in updates[reader.context.message]
    assert len(drafts.every_draft(place.saves)) == 1
    assert (tmp_path / "a.md").exists()
