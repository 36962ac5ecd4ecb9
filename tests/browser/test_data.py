"""The Data tab as a person meets it: a file is dropped, understood, checked, seen as tokens, and trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from engine.documents import review
from engine.launch.workspace import Workplace
from tests.browser.conftest import Outside
from tests.test_uploads import image_folder, several_sheets
from tests.written_documents import complete_draft

pytestmark = pytest.mark.usefixtures("forked")

OpenPage = Callable[..., Page]
HOSTILE = '<img src=x onerror=alert(1)> it\'s "мой" 数据'
ROWS = [{"question": f"What comes after {n}?", "answer": f"{n + 1}."} for n in range(60)] + [
    {"question": "Who are you?", "answer": "I am {{NAME}}."},
    {"question": "broken", "answer": 3},
    {"question": "What comes after 3?", "answer": "4."},
    {"question": "<script>alert(1)</script>", "answer": "<b>bold</b>"},
    {"question": "long", "answer": "very long text " * 200},
]


@pytest.fixture
def place(refilled: tuple[str, Workplace]) -> Workplace:
    """The bundled data, with an entry that is broken."""
    _, workplace = refilled
    file = workplace.data / "dataset_info.json"
    info = json.loads(file.read_text())
    info["gone"] = {"file_name": "gone.json"}
    file.write_text(json.dumps(info))
    return workplace


@pytest.fixture
def data_studio(refilled: tuple[str, Workplace]) -> str:
    return refilled[0]


def part(page: Page, number: int) -> None:
    page.locator("#set-tabs").get_by_role("tab").nth(number).click()


def drop(page: Page, name: str, content: str) -> None:
    """Drop a file on the upload button, as from a desktop."""
    transfer = page.evaluate_handle(
        """([name, content]) => { const data = new DataTransfer();
        data.items.add(new File([content], name, { type: 'text/plain' })); return data; }""",
        [name, content],
    )
    for event in ("dragover", "drop"):
        page.dispatch_event("#upload", event, {"dataTransfer": transfer})


def test_a_file_is_dropped_understood_checked_seen_as_tokens_and_used_in_training(
    place: Workplace, data_studio: str, open_page: OpenPage, outside: Outside
) -> None:
    page = open_page(data_studio)
    alerts: list[str] = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    expect(page.locator("#summary .state")).to_be_visible()
    page.get_by_role("tab").nth(2).click()
    expect(page.locator("#sets a.on b")).to_have_text("alpaca_translate_zh")
    expect(page.locator("#sets .wrong")).to_contain_text("there is no")
    expect(page.locator("#rows article")).to_have_count(10)
    drop_and_save(page, place)
    see_what_the_check_finds(page)
    see_tokens(page)

    part(page, 0)
    page.locator("#search-rows input").fill("AFTER 33")
    page.keyboard.press("Enter")
    expect(page.locator("#rows article")).to_have_count(2)  # the other one answers with 33
    expect(page.locator("#rows mark").first).to_have_text("after")
    page.locator("#use-set").click()
    expect(page.locator("#f-data-datasets")).to_contain_text(HOSTILE)
    expect(page.locator("#summary")).to_contain_text("1 row of")
    assert alerts == []
    assert outside == []


def drop_and_save(page: Page, place: Workplace) -> None:
    """A file is dropped, its columns are guessed, and it becomes a set with a hostile name."""
    drop(page, "../../my questions 问题.jsonl", "\n".join(json.dumps(row) for row in ROWS))
    expect(page.locator("#set-head h1")).to_have_text(re.compile(r"my questions 问题\.jsonl"))
    expect(page.locator("#role-prompt input")).to_have_value("question")
    expect(page.locator("#role-response input")).to_have_value("answer")
    expect(page.locator("#mapped .speech.assistant").first).to_contain_text("1.")
    name = page.locator("#set-name input").first
    expect(name).to_have_value("my questions 问题")  # suggested; only then is there something to type over
    name.fill(HOSTILE)
    page.locator("#save-set").click()
    expect(page.locator("#set-head h1")).to_have_text(HOSTILE)
    info = json.loads((place.data / "dataset_info.json").read_text(encoding="utf-8"))
    assert info[HOSTILE]["columns"] == {"prompt": "question", "response": "answer"}
    assert list(info)[:3] == ["alpaca_translate_zh", "c4_demo", "identity"]


def see_what_the_check_finds(page: Page) -> None:
    """Rows that cannot be used, to download, and rows that look odd."""
    part(page, 1)
    expect(page.locator("#found .finding.bad")).to_contain_text("'answer' must be of type string, but is: number")
    expect(page.locator("#found")).to_contain_text("{{NAME}}")
    expect(page.locator("#found")).to_contain_text("the row is the same as")
    with page.expect_download() as download:
        page.locator("#found a.load").click()
    (bad,) = map(json.loads, Path(download.value.path()).read_text(encoding="utf-8").splitlines())
    assert (bad["line"], bad["content"]["question"]) == (62, "broken")


def see_tokens(page: Page) -> None:
    """Rows as a model would see them, those that are cut or refused among them, and a template that does not exist."""
    part(page, 2)
    expect(page.locator("#seen .tok.on").first).to_be_visible()
    expect(page.locator("#seen article").first).to_contain_text("<|im_end|>")
    assert page.locator("#seen article .tok").first.get_attribute("title").isdecimal()
    expect(page.locator("#seen-numbers svg .mark")).to_be_visible()
    page.locator("#seen-where input").fill("61")
    page.keyboard.press("Enter")
    expect(page.locator("#seen article.bad")).to_contain_text("must be of type string")
    expect(page.locator("#seen article em.cut")).to_contain_text("truncated")
    template = page.get_by_label("Chat template").last
    template.fill("nowhere")
    template.press("Enter")
    expect(page.locator("#seen")).to_contain_text("is neither a file nor one of")


def test_sets_are_made_of_a_set_and_a_set_can_be_removed_in_chinese(
    place: Workplace, data_studio: str, open_page: OpenPage
) -> None:
    page = open_page(f"{data_studio}/?tab=data&set=identity", locale="zh-CN", width=800)
    expect(page.locator("#set-head h1")).to_have_text("identity")
    part(page, 1)
    expect(page.locator("#found .stats")).to_contain_text("40")
    page.locator("#split-off").click()
    expect(page.locator("#set-head h1")).to_have_text("identity-train")
    expect(page.locator("#set-head .chips")).to_contain_text("36 行")
    assert "set=identity-train" in page.url
    page.locator("#remove-set").click()
    page.locator("#yes-remove").click()
    expect(page.locator("#sets a[data-set='set:identity-train']")).to_have_count(0)
    expect(page.locator("#sets a[data-set='file:identity-train.jsonl']")).to_have_count(1)
    assert "identity-train" not in json.loads((place.data / "dataset_info.json").read_text(encoding="utf-8"))
    assert (place.data / "identity-train.jsonl").exists()
    page.locator("#sets a[data-set='file:identity-train.jsonl']").click()
    expect(page.locator("#remove-set")).to_have_text("删除文件")
    page.locator("#remove-set").click()
    page.locator("#yes-remove").click()
    expect(page.locator("#sets a[data-set='file:identity-train.jsonl']")).to_have_count(0)
    assert not (place.data / "identity-train.jsonl").exists()
    seen = page.locator("body").inner_text()
    for english in ("Data set", "Rows", "Check", "What the model sees", "Search", "Remove", "Upload", "Drop"):
        assert english not in seen, english


def test_a_file_is_no_set_of_its_name_and_a_search_goes_through_all_rows_hit_by_hit(
    place: Workplace, data_studio: str, open_page: OpenPage
) -> None:
    image_folder(place.data / "pets", "cat/1.png", "dog/1.png")
    rows = [{"question": f"number {n}", "answer": "even" if n % 2 == 0 else "odd"} for n in range(60)]
    (place.data / "identity.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = open_page(f"{data_studio}/?tab=data&set=identity")
    expect(page.locator("#set-head h1")).to_have_text("identity")
    page.locator("#sets a[data-set='file:identity.jsonl']").click()
    expect(page.locator("#set-head h1")).to_have_text("identity.jsonl")
    expect(page.locator("#set-name input").first).to_have_value("identity")
    page.locator("#role-response input").fill("")
    page.keyboard.press("Enter")
    expect(page.locator("#mapped")).to_contain_text("it needs: Conversation / Question or text + Answer")
    for number, told in ((1, "#found"), (2, "#seen")):
        part(page, number)
        expect(page.locator(told)).to_contain_text("'identity.jsonl' is not in any data set yet")
    part(page, 0)
    where, search = page.locator("#rows-where input"), page.locator("#search-rows input")
    first = page.locator("#rows article header b").first
    where.fill("41")
    where.press("Enter")
    expect(first).to_have_text("41")
    search.fill("EVEN")
    search.press("Enter")
    expect(first).to_have_text("1")
    for hit in ("21", "41"):
        page.locator("#rows-on").click()
        expect(first).to_have_text(hit)
    page.locator("#rows-back").click()
    expect(first).to_have_text("1")
    page.locator("#sets a[data-set='set:identity']").click()
    expect(page.locator("#set-head h1")).to_have_text("identity")
    expect(search).to_have_value("")
    page.locator("#sets a[data-set='file:pets']").click()
    expect(page.locator("#set-head h1")).to_have_text("pets")
    page.locator("#make-rows").click()
    expect(page.locator("#set-head h1")).to_have_text("pets/rows.jsonl")
    expect(page.locator("#make-rows")).to_be_hidden()
    expect(page.locator("#sets a.on b")).to_have_text("pets/rows.jsonl")


def test_a_broken_catalogue_is_shown_where_it_is_broken_and_a_bad_upload_is_a_sentence(
    place: Workplace, data_studio: str, open_page: OpenPage
) -> None:
    page = open_page(f"{data_studio}/?tab=data")
    expect(page.locator("#rows article").first).to_be_visible()
    drop(page, "book.xlsx", "not a workbook")
    expect(page.locator("#told .bad")).to_contain_text("cannot be read as a workbook")
    drop(page, "cut.json", '[{"instruction": "a", "output": "b"}, {"instruction": "c", "out')
    expect(page.locator("#told .bad")).to_contain_text("cut.json breaks off at line 1: 1 row before that can be read")
    expect(page.locator("#set-name input").first).to_have_value("cut")
    (place.data / "dataset_info.json").write_text('{\n "a": {"file_name": "a.json"},\n "b" {}\n}')
    page.reload()
    expect(page.locator("#sets .problems")).to_contain_text("line 3, column 6")
    drop(page, "new.jsonl", '{"instruction": "a", "output": "b"}')
    expect(page.locator("#set-name input").first).to_have_value("new")
    page.locator("#save-set").click()
    expect(page.locator("#told .bad")).to_contain_text("line 3, column 6")
    assert '"b" {}' in (place.data / "dataset_info.json").read_text()


def test_the_encoding_and_the_sheet_of_a_file_are_chosen_where_they_are_open(
    place: Workplace, data_studio: str, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(data_studio)
    expect(page.locator("#summary .state")).to_be_visible()
    page.get_by_role("tab").nth(2).click()

    def choose(file: Any) -> None:
        with page.expect_file_chooser() as chooser:
            page.locator("#upload").click()
        chooser.value.set_files(file)

    table = {"name": "tw.csv", "mimeType": "text/csv", "buffer": "問題;答案\n你好;我很好\n".encode("big5")}
    choose(table)
    expect(page.locator("#read-as")).to_contain_text("semicolon · Big5, detected")
    expect(page.locator("#set-head .problems")).to_contain_text("too little text to be sure")
    expect(page.locator("#mapped .speech.assistant")).to_contain_text("我很好")
    page.locator("#set-encoding input").click()
    page.get_by_role("option", name="KOI8-R", exact=True).click()
    expect(page.locator("#mapped")).not_to_contain_text("我很好")
    page.locator("#set-encoding input").click()
    page.get_by_role("option", name="Big5", exact=True).click()
    expect(page.locator("#mapped .speech.assistant")).to_contain_text("我很好")
    expect(page.locator("#read-as")).to_contain_text("Big5, chosen manually")
    expect(page.locator("#set-head .problems")).to_have_count(0)
    page.locator("#save-set").click()
    expect(page.locator("#set-head h1")).to_have_text("tw")
    entry = json.loads((place.data / "dataset_info.json").read_text(encoding="utf-8"))["tw"]
    assert entry["encoding"] == "big5"
    assert entry["columns"] == {"prompt": "問題", "response": "答案"}

    choose(several_sheets(tmp_path / "book.xlsx"))
    expect(page.locator("#set-head h1")).to_have_text("book.jsonl")
    expect(page.locator("#set-sheet input")).to_have_value("two & co")
    expect(page.locator("#mapped .speech.assistant")).to_contain_text("2")
    page.locator("#set-sheet input").click()
    page.get_by_role("option", name="three & co").click()
    expect(page.locator("#mapped .speech.assistant")).to_contain_text("4")
    page.locator("#save-set").click()
    expect(page.locator("#set-head h1")).to_have_text("book")
    assert (place.data / "book.jsonl").read_text() == '{"x": "3", "y": "4"}\n'
    assert [file.name for file in place.data.glob(".book*")] == [".book.jsonl.rows"]
    part(page, 0)
    expect(page.locator("#rows article header")).to_contain_text("book.xlsx:'three & co'!A2")


def test_on_a_narrow_screen_the_chosen_set_is_in_view_and_a_broken_one_says_why(
    place: Workplace, data_studio: str, open_page: OpenPage
) -> None:
    info = json.loads((place.data / "dataset_info.json").read_text())
    info |= {f"again {n}": info["identity"] for n in range(40)}
    (place.data / "half.json").write_text((place.data / "identity.json").read_text()[:900])
    info["half"] = {"file_name": "half.json"}
    (place.data / "dataset_info.json").write_text(json.dumps(info))
    page = open_page(f"{data_studio}?tab=data&set=half", width=800)
    expect(page.locator("#set-head .problems")).to_contain_text("ends in the middle of its last row")
    expect(page.locator("#sets a.on .wrong")).to_contain_text("ends in the middle of its last row")
    chosen = page.locator("#sets a.on")
    expect(chosen).to_be_in_viewport(ratio=1)
    frame = page.locator("#sets ul.sets").bounding_box()
    box = chosen.bounding_box()
    assert frame["y"] <= box["y"] <= box["y"] + box["height"] <= frame["y"] + frame["height"]

    page.locator("#sets a", has_text="again 20").click()
    expect(page.locator("#set-head h1")).to_have_text("again 20")
    expect(page.locator("#sets a.on b")).to_have_text("again 20")
    expect(chosen).to_be_in_viewport(ratio=1)


def test_rows_from_documents_are_reviewed_by_keys_and_saved(
    place: Workplace, data_studio: str, open_page: OpenPage
) -> None:
    draft = complete_draft(place, "<b>Pump</b>", "")
    page = open_page(data_studio)
    page.get_by_role("tab").nth(2).click()
    page.locator("#drafts a").click()
    rows = page.locator("#draft article")
    expect(rows).to_have_count(10)
    expect(rows.first).to_contain_text("It is <b>Pump</b>.")
    expect(page.locator("#set-tabs")).to_be_hidden()

    page.keyboard.press("j")
    expect(rows.nth(1)).to_be_focused()
    page.keyboard.press("a")
    expect(rows.nth(1)).to_have_attribute("data-row", "3.1")  # the next one is in its place
    expect(rows.nth(1)).to_be_focused()
    page.keyboard.press("p")
    expect(rows.nth(1).locator("pre")).to_have_text("Part 3 is <b>Pump</b>.")
    page.keyboard.press("r")
    expect(rows.nth(1)).to_have_attribute("data-row", "4.1")
    page.keyboard.press("e")
    answer = rows.nth(1).locator("textarea[name=answer]")
    answer.fill("It is a pump, and j is no key here.")
    page.keyboard.press("Control+Enter")
    expect(rows.nth(1)).to_have_attribute("data-row", "5.1")
    page.locator("#draft [data-filter=accepted]").click()
    expect(rows).to_have_count(2)
    expect(rows.nth(1)).to_contain_text("and j is no key here.")
    assert {row.id: row.decision for row in review.rows_of(draft) if row.decision} == {
        "2.1": "accepted", "3.1": "rejected", "4.1": "accepted",
    }  # fmt: skip

    page.locator("#draft [name=least]").fill("0.9")
    page.locator("#draft [data-act=accept-supported]").click()
    expect(rows).to_have_count(4)  # 23.1 and 24.1; 25.1 repeats another
    page.locator("#draft [data-act=save]").first.click()
    expect(page.locator("#set-head h1")).to_have_text("<b>Pump</b>")
    expect(page.locator("#rows article")).to_have_count(4)
    expect(page.locator("#draft")).to_be_empty()
