"""Images of rows: read in every spelling, refused by name where they cannot be used, and never fetched."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.core.problems import Refusal
from engine.core.rundir import RunDir
from engine.data import dataset_info_edits, derive, images
from engine.data.columns import ColumnMapping
from engine.data.datasets import Example, examples, find
from engine.data.images import IMAGE_MARK, decode, image_in_bytes, image_in_file
from engine.data.row_images import images_of
from engine.data.validation import check
from engine.evaluation import report
from engine.worker.evaluation.questions import Question, _as_json
from engine.worker.serving.schemas import ChatCompletionRequest
from tests.test_row_spellings import RIGHT, dataset, read, refused
from webui import reports
from webui.thumbnails import thumbnail
from webui.words import Words

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(file: Path, size: tuple[int, int] = (6, 4), colour: tuple[int, int, int] = RED, **more: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file, **more)
    return file


def png(size: tuple[int, int] = (6, 4), colour: tuple[int, int, int] = RED) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def asking(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, RIGHT]}


def marked(text: str, *files: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, RIGHT], "images": list(files)}


WHAT = {"type": "text", "text": "What?"}
URL = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
SPELLINGS = [
    marked("<image>What?", "a.png"),
    marked("<image>What?", "./sub/../a.png"),
    marked("<image>What?", {"path": "a.png", "bytes": None}),
    marked("<image>What?", URL),
    {"messages": [{"role": "user", "content": "<image>What?"}, RIGHT], "image": "a.png"},
    {"instruction": "<image>What?", "output": "No: four.", "images": ["a.png"]},
    {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Red."}], "image": "a.png"},
    asking({"type": "image_url", "image_url": {"url": URL}}, WHAT),
    asking({"type": "image_url", "image_url": "a.png"}, WHAT),
    asking({"type": "input_image", "image_url": URL}, WHAT),
    asking({"type": "image", "image": "a.png"}, WHAT),
    asking({"type": "image", "path": "a.png", "text": None}, WHAT),
    asking({"type": "image", "url": "file://FOLDER/a.png"}, WHAT),
    asking({"image": "a.png"}, WHAT),
    asking({"type": "image"}, WHAT) | {"images": ["a.png"]},
]


@pytest.mark.parametrize("row", SPELLINGS)
def test_an_image_is_read_in_every_spelling(tmp_path: Path, row: dict[str, Any]) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    for part in row.get("messages", [{}])[0].get("content", ()):
        if isinstance(part, dict) and "url" in part:
            part["url"] = part["url"].replace("FOLDER", str(tmp_path))
    (example,) = read(tmp_path, row)
    message = example["messages"][0]
    assert message["content"] == f"{IMAGE_MARK}What?"
    (image,) = message["images"]
    assert image.size == (6, 4)
    assert decode(image).getpixel((5, 3)) == RED


def test_images_of_a_parquet_file_are_in_it(tmp_path: Path) -> None:
    row = marked("<image>or <image>?", {"bytes": png(), "path": None}, {"bytes": png((2, 3), BLUE), "path": "b.png"})
    (example,) = read(tmp_path, row, file="rows.parquet")
    assert [image.size for image in images_of(example)] == [(6, 4), (2, 3)]
    assert decode(list(images_of(example))[1]).getpixel((0, 0)) == BLUE


def test_marks_take_the_images_of_the_column_in_order_of_the_conversation(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / f"{number}.png", (number + 1, 1))
    turns = [{"role": "user", "content": "<image>Is it <image>?"}, RIGHT, {"role": "user", "content": "<image>"}, RIGHT]
    (example,) = read(tmp_path, {"messages": turns, "images": ["0.png", "1.png", "2.png"]})
    widths = [[image.width for image in message.get("images", ())] for message in example["messages"]]
    assert widths == [[1, 2], [], [3], []]


def test_an_image_beside_a_data_file_in_a_folder_is_read(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "rows.jsonl").write_text("")
    assert read(tmp_path, marked("<image>What?", "a.png"), file="set/rows.jsonl")


def test_an_image_is_turned_as_the_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = 6
    picture(tmp_path / "a.jpg", (6, 4), exif=exif)
    (image,) = images_of(read(tmp_path, marked("<image>What?", "a.jpg"))[0])
    assert image.size == decode(image).size == (4, 6)


BAD = {
    "is not in a supported format": marked("<image>", "text.png"),
    "is neither in": marked("<image>", "none.png"),
    "is outside of": marked("<image>", "../out.png"),
    "is outside of ": marked("<image>", "link.png"),
    "is an address": marked("<image>", "https://example.org/a.png"),
    "is an address.": asking({"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}),
    "is animated: 3 frames": marked("<image>", "moving.gif"),
    "is too large: 9000 × 9000 px": marked("<image>", "bomb.png"),
    "refer to 2 images (<image>, or parts of the type image), but the row has 1.": marked("<image><image>", "a.png"),
    "refer to 1 image (<image>, or parts of the type image), but the row has 2.": marked("<image>", "a.png", "a.png"),
    "refer to 0 images": marked("What?", "a.png"),
    "refer to 1 image (<image>, or parts of the type image), but the row has 0.": asking({"type": "image"}, WHAT),
    "a message from 'assistant' has an image": {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<image>"}], "images": ["a.png"]
    },
    "a message from 'system' has an image": {
        "messages": [{"role": "system", "content": [{"type": "image", "image": "a.png"}]}, *asking(WHAT)["messages"]]
    },
    "'data URL' cannot be read": marked("<image>", "data:image/png;base64,§"),
}  # fmt: skip


@pytest.mark.parametrize(("reason", "row"), BAD.items())
def test_a_row_whose_image_cannot_be_used_is_named(tmp_path: Path, reason: str, row: dict[str, Any]) -> None:
    folder = tmp_path / "data"
    picture(folder / "a.png")
    picture(tmp_path / "out.png")
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "text.png").write_text("no picture")
    frames = [Image.new("RGB", (4, 4), (n, 0, 0)) for n in (0, 90, 180)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("1", (9_000, 9_000)).save(folder / "bomb.png")
    (text,) = refused(folder, row)
    assert text.startswith("rows.jsonl:1: ")
    assert reason.strip() in text


def test_whether_there_is_a_file_elsewhere_is_not_told(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    picture(tmp_path / "out.png")
    folder.mkdir()
    there, absent = (refused(folder, marked("<image>", f"../{name}.png"))[0] for name in ("out", "off"))
    assert there.replace("out.png", "off.png") == absent


PAIR = {"chosen": [RIGHT], "rejected": [RIGHT | {"content": "Five."}]}
ASKED = {"role": "user", "content": "<image>What?"}
WRITTEN = {"role": "user", "content": [{"type": "image", "image": "a.png"}, WHAT]}
PAIRS = {
    "LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "<image>What?"}],
            "chosen": {"from": "gpt", "value": "Red."},
            "rejected": {"from": "gpt", "value": "Blue."},
            "images": ["a.png"],
        },
        {"formatting": "sharegpt", "columns": {"messages": "conversations"} | {n: n for n in (*PAIR, "images")}},
    ),
    "Alpaca": ({"instruction": "<image>What?", "chosen": "Red.", "rejected": "Blue.", "images": ["a.png"]}, {}),
    "messages": ({"messages": [ASKED], **PAIR, "image": "a.png"}, {"formatting": "openai"}),
    "parts": ({"messages": [WRITTEN], **PAIR}, {"formatting": "openai"}),
    "whole conversations": (
        {side: [WRITTEN, *answer] for side, answer in PAIR.items()},
        {"formatting": "openai", "columns": {side: side for side in PAIR}},
    ),
    "TRL": (
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, WHAT]}],
            **PAIR,
            "images": [{"bytes": png(), "path": None}],
        },
        {},
    ),
}


@pytest.mark.parametrize("spelling", PAIRS)
def test_the_image_of_a_pair_is_read_in_every_spelling(tmp_path: Path, spelling: str) -> None:
    picture(tmp_path / "a.png")
    row, entry = PAIRS[spelling]
    file = "rows.parquet" if spelling == "TRL" else "rows.jsonl"
    (example,) = read(tmp_path, row, entry={"ranking": True} | entry, form="pairs", file=file)
    assert [message["content"] for message in example["messages"]] == [f"{IMAGE_MARK}What?"]
    (image,) = images_of(example)
    assert decode(image).getpixel((5, 3)) == RED
    assert not any("images" in message for side in PAIR for message in example[side])


BAD_PAIRS = {
    "refer to 2 images": {"messages": [ASKED | {"content": "<image><image>What?"}], **PAIR, "images": ["a.png"]},
    "refer to 0 images": {"messages": [ASKED | {"content": "What?"}], **PAIR, "images": ["a.png"]},
    "is neither in": {"messages": [ASKED], **PAIR, "images": ["none.png"]},
    "a message from 'assistant' has an image": {
        "messages": [ASKED], **PAIR, "chosen": [RIGHT | {"content": "<image>"}], "images": ["a.png", "a.png"]
    },
    "after the point where the two answers differ": {
        "messages": [ASKED], "rejected": [RIGHT], "chosen": [RIGHT | {"content": "Sure?"}, WRITTEN, RIGHT],
        "images": ["a.png"],
    },
}  # fmt: skip


@pytest.mark.parametrize(("reason", "row"), BAD_PAIRS.items())
def test_a_pair_whose_image_cannot_be_used_is_named(tmp_path: Path, reason: str, row: dict[str, Any]) -> None:
    picture(tmp_path / "a.png")
    entry = {"formatting": "openai", "ranking": True}
    (text,) = refused(tmp_path, row, entry=entry, form="pairs")
    assert text.startswith("rows.jsonl:1: ")
    assert reason in text


def test_texts_with_images_are_refused(tmp_path: Path) -> None:
    entry = {"columns": {"prompt": "text"}}
    (text,) = refused(tmp_path, {"text": "<image>?", "images": ["a.png"]}, form="text", entry=entry)
    assert "The row has images" in text


def test_rows_with_images_are_bad_for_a_stage_that_trains_on_none(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows = dataset(tmp_path, marked("<image>What?", "a.png"))
    assert [problem.code for problem in check(rows, "prompts", images=False).problems] == ["row-images-stage"]
    assert check(rows, "prompts").pictured == 1


def test_a_request_has_its_images_with_it() -> None:
    parts = [{"type": "text", "text": "Is this "}, {"type": "image_url", "image_url": {"url": URL}}]
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": parts}]})
    (message,) = request.messages
    assert message["content"] == f"Is this {IMAGE_MARK}"
    assert [image.size for image in message["images"]] == [(6, 4)]
    for url in ("https://example.org/a.png", "/etc/passwd", "file:///etc/passwd", "data:image/png;base64,AAAA"):
        parts[1]["image_url"] = {"url": url}
        with pytest.raises(Refusal):
            ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": parts}]})


def test_an_image_broken_behind_its_header_is_found_by_the_check_of_all_rows(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    rows = [marked("<image>What?", "a.jpg"), marked("<image>What?", "b.jpg")]
    report = check(dataset(tmp_path, *rows), "chat")
    assert (report.good, report.bad) == (1, 1)
    assert report.problems[0].text().startswith("rows.jsonl:2: The image 'b.jpg' cannot be read: ")
    assert check(dataset(tmp_path, *rows), "chat", limit=2).good == 2  # by the header it looks whole


def test_rows_that_differ_in_their_images_alone_are_no_repetition(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    rows = [marked("<image>What?", name) for name in ("a.png", "b.png", "a.png")]
    report = check(dataset(tmp_path, *rows), "chat")
    assert report.counts == {"row-repeated": 1}


def test_another_choice_of_columns_leaves_the_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows = [{"q": "<image>What?", "a": "Red.", "photo": ["a.png"], "other": "Blue."}]
    columns = {"prompt": "q", "response": "a", "images": "photo"}
    before = {"file_name": "rows.jsonl", "columns": columns}
    assert list(images_of(read(tmp_path, *rows, entry=before)[0]))
    mapping = ColumnMapping("chat", {"prompt": "q", "response": "other"})
    entry = dataset_info_edits.entry_for_mapping("rows.jsonl", mapping, rows, before)
    assert list(images_of(read(tmp_path, *rows, entry=entry)[0]))


@pytest.mark.parametrize("file", ["rows.parquet", "set/rows.jsonl"])
def test_sets_that_are_made_of_one_keep_its_images(tmp_path: Path, file: str) -> None:
    for number in range(4):
        picture(tmp_path / "set" / f"{number}.png", (number + 1, 1))
    if file.endswith(".parquet"):
        rows = [marked(f"<image>What {n}?", {"bytes": png((n + 1, 1)), "path": None}) for n in range(4)]
    else:
        rows = [marked(f"<image>What {n}?", f"{n}.png") for n in range(4)]
    dataset(tmp_path, *rows, file=file)
    made = derive.split(tmp_path, "rows", 0.5, 1)
    widths = []
    for name in made.names:
        for example in examples(find(tmp_path, name), lambda bad: pytest.fail(bad.text())):
            (image,) = images_of(example)
            assert str(image.width - 1) in example["messages"][0]["content"]
            widths.append(decode(image).width)
    assert sorted(widths) == [1, 2, 3, 4]


def test_a_changed_file_is_another_image(tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png")
    example: Example = read(tmp_path, marked("<image>What?", "a.png"))[0]
    (image,) = images_of(example)
    assert image.is_unchanged()
    picture(file, (9, 9))
    assert not image.is_unchanged()
    os.unlink(file)
    assert not image.is_unchanged()


def test_the_studio_draws_no_small_picture_of_a_huge_image(tmp_path: Path) -> None:
    for name, side in (("large.png", 5000), ("small.png", 500), ("large.jpg", 5000)):  # a JPEG is read at an eighth
        Image.new("RGB", (side, side)).save(tmp_path / name)
    drawn = {path.name: "<img" in thumbnail(image_in_file(path)) for path in tmp_path.iterdir()}
    assert drawn == {"large.png": False, "small.png": True, "large.jpg": True}


def test_a_report_shows_the_images_of_its_questions(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.report.mkdir()
    sources = [image_in_file(picture(tmp_path / f"{name}.png")) for name in "abc"]
    in_row = image_in_bytes((tmp_path / "a.png").read_bytes(), "a")
    turns = [[{"images": sources[:2]}, {}], [{}], [{"images": [in_row]}], [{"images": [sources[2]]}]]
    questions = [
        Question(row, "s", "", messages=[{"role": "user", "content": IMAGE_MARK} | turn for turn in of_row])
        for row, of_row in enumerate(turns)
    ]
    lines = [_as_json(question) for question in questions]
    (run.report / report.QUESTIONS_FILE).write_text("\n".join([*lines, '{"row": 7, "images"', '"images"']) + "\n")
    assert report.images(run, range(1, 9)) == {1: sources[:2], 3: [in_row], 4: [sources[2]]}
    picture(tmp_path / "c.png", (9, 9))  # not what the model has seen
    assert report.images(run, [3, 4]) == {3: [in_row], 4: []}
    assert report.images(RunDir(tmp_path / "gone"), [1]) == {}
    row = {"row": 1, "set": "s", "place": "p:1", "messages": [{"content": "<image>?"}], "reference": "a", "answers": {}}
    html = reports.rows(report.Page([row], 1, 1, 1), [], Words("en"), {1: sources[:2]})
    assert html.count('class="thumbnail"') == 2
    assert html.index("a.png") < html.index("reference")
