"""One file that cannot be read is one red entry: the other sets, the page's
list and every question stay as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine.core.problems import Refusal
from engine.data import browse, dataset_info_edits, uploads
from engine.data.datasets import count_rows, find, read_dataset_info
from engine.data.validation import check
from engine.launch.workspace import PROJECT

GOOD = '{"instruction": "Hi", "output": "Hello."}\n'
CONTENTS = {
    "nul.csv": b"a,b\n1,\0\0\0\n",
    "zeros.json": b"\0" * 100_000,
    "zeros.txt": b"\0" * 10,
    "deep.json": b"[" * 200_000,
    "deep.jsonl": b'{"a":' * 200_000,
    "deep-pretty.json": b'{\n"a":[' * 100_000,
    "digits.json": b'{"a": ' + b"9" * 10_000 + b"}",
    "digits.jsonl": b'{"a": 1}\n{"a": ' + b"9" * 10_000 + b"}\n",
    "half.jsonl": b'{"text": "\\ud83d"}\n',
    "bytes.jsonl": bytes(range(256)) * 50,
    "bytes.csv": bytes(range(256)) * 50,
    "bytes.txt": bytes(range(256)),
    "empty.csv": b"",
    "empty.json": b"",
    "empty.parquet": b"",
    "blank.json": b"\n \n",
    "header.csv": b"instruction,output\n",
    "same.csv": b"a,a\n1,2\n",
    "quote.csv": b'"' * 50_001,
    "quotes.csv": b'a,b\n"' + b"x\n" * 50_000,
    "separators.csv": b"," * 100_000 + b"\n" + b";" * 100_000,
    "cr.csv": b"instruction,output\rHi,Hello\r",
    "sep.csv": b"sep=",
    "sep2.csv": b"sep=\n\n",
    "wide.csv": b"sep=\xff\xff\na\xffb\n",
    "text.parquet": b"a,b\n",
    "cut.parquet": b"PAR1" + b"x" * 99 + b"PAR1",
    "page.json": b"<html>" * 999,
    "open.json": b"[",
    "brace.json": b"{",
    "quote.json": b'{"',
    "list.json": b"[[[]]]",
    "null.jsonl": b"null\n" * 1000,
    "mark.json": b"\xef\xbb\xbf",
    "marks.csv": b"\xff\xfe",
    "odd.csv": b"\xff\xfea",
    "mark32.csv": b"\xff\xfe\0\0",
    "escape.csv": b"a,\x1b$B\n\x1b$Bxxxxx",
    "latin.csv": "é,è\n".encode("latin-1"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "good.jsonl").write_text(GOOD)
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    (tmp_path / "circle").symlink_to("circle/..", target_is_directory=True)
    (tmp_path / "gone.csv").symlink_to("nowhere.csv")
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    with (tmp_path / "hole.csv").open("wb") as stream:  # takes no room on the disk
        stream.truncate(66 << 20)
    (tmp_path / os.fsdecode(b"\xff.csv")).write_bytes(b"a,b\n1,2\n")
    packed = ("rows.json.gz", "rows.csv.zip", "rows.jsonl.zst")
    for name in packed:
        (tmp_path / name).write_bytes(b"\x1f\x8b")
    names = [
        *CONTENTS,
        "pipe.csv",
        "folder.csv",
        "loop.csv",
        "circle",
        "gone.csv",
        "device.csv",
        "hole.csv",
        *packed,
    ]
    entries = {name: {"file_name": name} for name in names} | {
        "half name": {"file_name": "\ud800.csv"},
        "\ud800": {"file_name": "good.jsonl"},
        "nul name": {"file_name": "\0"},
        "long name": {"file_name": "x" * 5000},
        "encoding": {"file_name": "good.jsonl", "encoding": "bg5"},
        "number": {"file_name": 5},
        "encoding list": {"file_name": "good.jsonl", "encoding": ["big5"]},
        "whole folder": {"file_name": "."},
        "good": {"file_name": "good.jsonl"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    return tmp_path


def test_no_file_however_hostile_takes_the_others_along(folder: Path) -> None:
    sets, broken = read_dataset_info(folder)
    assert not broken
    assert len(sets) == len(json.loads((folder / "dataset_info.json").read_text()))
    red = {one.name: one.problem for one in sets if one.problem}
    assert all(found.text("en") and found.text("zh") for found in red.values())
    assert red["encoding"].text() == "There is no encoding 'bg5'. Did you mean 'big5'?"
    assert {
        "zeros.json",
        "deep.json",
        "page.json",
        "same.csv",
        "pipe.csv",
        "loop.csv",
        "rows.json.gz",
    } <= set(red)
    assert "cr.csv" not in red
    # Every question that a page or a run asks has an answer or a refusal.
    for one in sets:
        report = check(one, one.kind, limit=100)
        json.dumps([found.text() for found in (*report.problems, *report.warnings)], ensure_ascii=False).encode()
        if one.problem is None:
            assert report.usable or report.problems
        try:
            count_rows(one)
            browse.page(one, 1, 3)
        except Refusal:
            continue
        for file in one.files[:1]:
            dataset_info_edits.propose(dataset_info_edits.first_rows(file)) if dataset_info_edits.first_rows(
                file
            ) else None
    assert check(find(folder, "good"), "chat").good == 1
    json.dumps(uploads.unregistered(folder, []), ensure_ascii=False).encode()


def test_a_file_that_may_not_be_read_is_a_red_entry() -> None:
    """Asked by a process without rights: whoever runs the tests may be allowed everything."""
    code = (
        "import os, sys, pathlib; import engine.data.datasets as d\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "for one in d.read_dataset_info(pathlib.Path(sys.argv[1]))[0]: print(one.name, one.problem)"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "secret.csv").write_text("instruction,output\nHi,Hello\n")
        (folder / "good.jsonl").write_text(GOOD)
        (folder / "dataset_info.json").write_text(
            '{"secret.csv": {"file_name": "secret.csv"}, "good.jsonl": {"file_name": "good.jsonl"}}'
        )
        (folder / "secret.csv").chmod(0)
        done = subprocess.run([sys.executable, "-c", code, name], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "secret.csv secret.csv cannot be opened: permission denied. Give the studio's user read permission, or copy "
        "the file here again.",
        "good.jsonl None",
    ], done.stderr


@pytest.mark.parametrize("content", [b"[" * 200_000, b"9" * 10_000, b"{" * 9, b"\xff\xfe\xff", bytes(range(256))])
def test_a_catalogue_that_is_no_catalogue_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dataset_info.json").write_bytes(content)
    sets, (wrong,) = read_dataset_info(tmp_path)
    assert sets == []
    assert "dataset_info.json" in wrong.text()
    with pytest.raises(Refusal):
        dataset_info_edits.add(tmp_path, "x", {"file_name": "x.json"})
