"""The encoding of a file is detected, proved on all of it, and told where a few bytes leave it open."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.core.problems import Problem, Refusal
from engine.data import row_files
from engine.data.chunks import blocks
from engine.data.datasets import find, rows
from engine.data.encodings import ENCODINGS, encoding_key, encoding_of
from engine.data.row_files import entries
from engine.launch.workspace import Workplace
from engine.preflight.checks import preflight_problems
from engine.spec.run_spec import RunSpec

TEXTS = {
    "zh": (
        "gb18030",
        (
            "请用一句话解释什么是机器学习。先把水烧开，放入少许盐，再把面条下锅，"
            "煮到没有硬心时捞出。为什么天空是蓝色的？因为蓝光的波长较短，更容易被空气散射。"
        ),
    ),
    "tw": (
        "big5",
        (
            "請用一句話解釋什麼是機器學習。先把水燒開，放入少許鹽，再把麵條下鍋，"
            "煮到沒有硬心時撈出。為什麼天空是藍色的？因為藍光的波長較短，更容易被空氣散射。"
        ),
    ),
    "ja": (
        "shift_jis",
        (
            "機械学習とは何かを一文で説明してください。まずお湯を沸かし、"
            "塩を少し入れてから麺をゆでます。空はなぜ青いのですか。青い光は波長が短いからです。"
        ),
    ),
    "ja euc": (
        "euc_jp",
        (
            "機械学習とは何かを一文で説明してください。まずお湯を沸かし、"
            "塩を少し入れてから麺をゆでます。空はなぜ青いのですか。青い光は波長が短いからです。"
        ),
    ),
    "ja mail": (
        "iso-2022-jp",
        "機械学習とは何かを一文で説明してください。まずお湯を沸かし、塩を少し入れてから麺をゆでます。",
    ),
    "ko": (
        "euc_kr",
        (
            "기계 학습이 무엇인지 한 문장으로 설명해 주세요. 먼저 물을 끓이고 소금을 조금 "
            "넣은 다음 면을 삶습니다. 하늘은 왜 파란색인가요? 파란빛은 파장이 짧기 때문입니다."
        ),
    ),
    "fr": (
        "windows-1252",
        (
            "L’été dernier, ma mère a préféré rester à la maison, près de la forêt, où l’on dîne très tôt. "
            "Pourquoi le ciel est-il bleu ? Parce que la lumière bleue est davantage diffusée. Où êtes-vous "
            "né ? À Orléans, là où le fleuve décrit une boucle. Écrivez au client que le colis a été expédié "
            "hier et qu’il arrivera d’ici trois jours ; s’il y a un problème, il peut nous appeler à tout moment. "
            "Traduisez : demain matin à huit heures, nous nous retrouverons devant la bibliothèque."
        ),
    ),
    "es": (
        "windows-1252",
        (
            "¿Cómo se prepara una buena pasta? Primero se hierve el agua, se añade un poco de sal y se cuece. El niño "
            "pequeño soñó con una montaña; después comió jamón y bebió café. ¿Qué más? Mañana por la mañana llegará "
            "el envío que salió ayer. ¿Por qué el cielo es azul? Porque la luz azul tiene una longitud de onda más "
            "corta y el aire la dispersa más. Traduce: mañana a las ocho nos vemos delante de la biblioteca. Escribe "
            "al cliente que el envío llegará en tres días y que puede llamarnos cuando quiera, también los sábados."
        ),
    ),
    "ru": (
        "windows-1251",
        (
            "Объясните одним предложением, что такое машинное обучение. Сначала вскипятите "
            "воду, добавьте немного соли и варите до готовности. Почему небо голубое?"
        ),
    ),
}


def write(folder: Path, text: str, encoding: str) -> Path:
    file = folder / "rows.csv"
    half = len(text) // 2
    cells = [part.replace(",", "").replace('"', "") for part in (text[:half], text[half:])]
    file.write_bytes(f"instruction,output\n{cells[0]},{cells[1]}\n".encode(ENCODINGS[encoding][1]))
    return file


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_of_some_sentences_is_read_in_its_encoding(tmp_path: Path, name: str) -> None:
    encoding, text = TEXTS[name]
    file = write(tmp_path, text, encoding)
    detected = encoding_of(file)
    assert (detected.name, detected.sure) == (encoding, True)
    assert 0 < detected.confidence <= 1
    ((_, row),) = entries(file)
    assert row["instruction"] + row["output"] == text.replace(",", "")


@pytest.mark.parametrize("codec", ["utf-32", "utf-32-le", "utf-32-be", "utf-16", "utf-16-le", "utf-16-be"])
def test_unicode_is_known_by_its_mark_or_its_zero_bytes(tmp_path: Path, codec: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes('{"text": "你好"}\n{"text": "é"}\n'.encode(codec))
    assert [row for _, row in entries(file)] == [{"text": "你好"}, {"text": "é"}]
    assert encoding_of(file).sure


def test_a_few_bytes_are_read_as_the_likeliest_and_told_with_what_else_it_could_be(tmp_path: Path) -> None:
    file = write(tmp_path, "你好吗", "gb18030")
    assert not encoding_of(file).sure
    (doubt,) = row_files.source_of(file).doubts
    assert doubt.code == "encoding-unsure"
    assert doubt.values["encoding"] == encoding_of(file).label
    assert doubt.values["others"]
    # A choice settles it.
    assert row_files.source_of(file, "gbk").doubts == ()
    ((_, row),) = entries(file, encoding="gbk")
    assert row == {"instruction": "你", "output": "好吗"}


def test_what_was_chosen_is_how_the_file_is_read_or_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, TEXTS["tw"][1], "big5")
    ((_, row),) = entries(file, encoding="windows-1251")
    assert row["instruction"].startswith("Ѕ")  # nonsense, but it is what was asked for
    ((_, problem),) = entries(file, encoding="utf-8")
    assert problem.code == "file-encoding-chosen"
    assert "Big5" not in problem.text()
    assert "UTF-8" in problem.text()


def test_bytes_in_the_middle_that_are_not_of_the_encoding_are_told_with_their_line(tmp_path: Path) -> None:
    for encoding in ("shift_jis", "euc_kr", "gb18030", "utf-8"):
        text = TEXTS["ko" if encoding == "euc_kr" else "zh" if encoding == "gb18030" else "ja"][1]
        lines = [f"q,{text[n:]}".replace(",", "\t").encode(ENCODINGS[encoding][1]) for n in range(30)]
        file = tmp_path / f"{encoding}.tsv"
        file.write_bytes(b"\n".join([b"q\ta", *lines[:20], b"q\t\x81 x", *lines[20:]]))
        read = list(entries(file, encoding=encoding))
        assert sum(isinstance(row, dict) for _, row in read) == 30
        ((place, problem),) = [one for one in read if isinstance(one[1], Problem)]
        assert (place.line, problem.code) == (22, "row-bytes")
        assert ENCODINGS[encoding][0] in problem.text()


def test_utf8_with_a_broken_character_stays_utf8(tmp_path: Path) -> None:
    """As GB18030 all of it could be decoded, and every character would be wrong."""
    file = tmp_path / "x.jsonl"
    good = '{"text": "猫坐在垫子上，看着窗外。"}\n'.encode()
    file.write_bytes(good * 5 + good.replace("猫".encode(), "猫".encode()[:2]) + good * 5)
    assert encoding_of(file).name == "utf-8"
    assert sum(row == {"text": "猫坐在垫子上，看着窗外。"} for _, row in entries(file)) == 10


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("GBK", "gb18030"),
        ("gb2312", "gb18030"),
        ("cp950", "big5"),
        ("Big5", "big5"),
        ("sjis", "shift_jis"),
        ("CP932", "shift_jis"),
        ("cp949", "euc_kr"),
        ("utf8", "utf-8"),
        ("UTF-8-SIG", "utf-8"),
        ("latin1", "latin-1"),
        ("cp1252", "windows-1252"),
        ("ascii", "utf-8"),
    ],
)
def test_an_encoding_is_known_by_any_of_its_names(name: str, key: str) -> None:
    assert encoding_key(name) == key


@pytest.mark.parametrize(
    ("name", "nearest"), [("bg5", "big5"), ("shift-jsi", "shift_jis"), ("win-1252", "windows-1252")]
)
def test_a_misspelt_encoding_is_refused_with_the_one_that_was_meant(name: str, nearest: str) -> None:
    with pytest.raises(Refusal, match=f"Did you mean '{nearest}'"):
        encoding_key(name)


@pytest.mark.parametrize("name", ["", " ", "rot13", "unicode_escape", "idna", "base64", "x" * 500, "\0"])
def test_what_is_no_encoding_of_text_is_refused(name: str) -> None:
    with pytest.raises(Refusal, match="no encoding"):
        encoding_key(name)


def test_a_run_does_not_start_on_an_encoding_that_is_open_until_it_is_chosen(
    tmp_path: Path, workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "tiny.csv").write_bytes("instruction,output\n你好,再见\n".encode("gb18030"))
    entry = {"file_name": "tiny.csv"}
    spec = make_spec(data__dataset_dir=str(folder), data__datasets=["tiny"])

    def problems() -> list[str]:
        (folder / "dataset_info.json").write_text(json.dumps({"tiny": entry}))
        place = replace(workplace, data=folder)
        return [found.code for found in preflight_problems(spec, place) if found.code.startswith("encoding")]

    assert problems() == ["encoding-unsure"]
    entry["encoding"] = "gbk"
    assert problems() == []
    one = find(folder, "tiny")
    assert one.encoding == "gb18030"
    assert [row for _, row in rows(one, pytest.fail)] == [{"instruction": "你好", "output": "再见"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_blocks_and_places_are_read_in_the_encoding_that_was_chosen(tmp_path: Path, name: str) -> None:
    texts = [f"第{number}行：請用一句話解釋什麼是機器學習" for number in range(600)]
    written = {
        "rows.jsonl": "\n".join(f'{{"text": "{text}"}}' for text in texts),
        "rows.json": json.dumps([{"text": text} for text in texts], ensure_ascii=False),
        "rows.csv": "text\n" + "\n".join(texts),
    }[name]
    file = tmp_path / name
    file.write_bytes(written.encode("big5"))
    read = [row["text"] for block in blocks(file, "big5") for _, row in block.rows(pytest.fail)]
    assert read == texts
    kept, count = row_files.places(file, "big5")
    assert count == row_files.count(file, "big5") == 600
    assert next(entries(file, kept[2], "big5"))[1] == {"text": texts[512]}
