"""Every sentence is there in both languages, with the same values in it, and somebody says it."""

from __future__ import annotations

import itertools
import re
import string

import pytest

from engine.core.problems import LANGUAGES, NOTHING, Refusal, fill, problem, say, sentences
from engine.launch.workspace import PROJECT
from engine.spec.run_spec import RunSpec
from webui import notices
from webui.words import Words


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_a_sentence_has_both_languages_and_the_same_values() -> None:
    for code, texts in sentences().items():
        assert set(texts) == set(LANGUAGES), code
        assert placeholders(texts["en"]) == placeholders(texts["zh"]), code
        assert re.search(r"[\u4e00-\u9fff]", texts["zh"]), code
        values = dict.fromkeys(placeholders(texts["en"]), "x")
        assert say(code, "zh", **values) != say(code, "en", **values), code


def test_a_word_goes_with_its_number() -> None:
    assert say("bad-rows", "en", bad=1, name="x").startswith("1 row of x")
    assert say("bad-rows", "en", bad=2, name="x").startswith("2 rows of x")
    assert fill("{n:.1f} of {of} {of:row/rows}", n=1, of="1") == "1.0 of 1 row"


def test_a_setting_of_another_stage_is_told_whose_it_is() -> None:
    with pytest.raises(Refusal) as refused:
        RunSpec.read({"stage": {"kind": "sft", "beta": 0.1}, "method": {"kind": "full", "r": 8}})
    of_stage, of_method = (one.text("en") for one in refused.value.problems)
    assert "'stage.beta'; it belongs to: dpo, kto" in of_stage
    assert "The method full has no setting 'method.r'; it belongs to: lora" in of_method


def test_no_sentence_ends_twice_or_shows_how_it_is_put_together() -> None:
    """With values as parsers and the system give them: sentences themselves, or nothing at all."""
    for code, language in itertools.product(sentences(), LANGUAGES):
        names = placeholders(sentences()[code][language])
        full = say(code, language, **dict.fromkeys(names, "It cannot be read."))
        assert not re.search(r"\w\.\.(?!\.)|\.。|。。", full), full
        assert not re.search(r"\[\[|\]\]|  ", full), full
        bare = say(code, language, **dict.fromkeys(names, NOTHING))
        assert not re.search(r"\[\[|\]\]|  |\(\)|（）", bare), bare


def test_what_is_not_there_is_left_out_of_a_sentence() -> None:
    known = say("data-unknown", name="x", folder="data", known="a, b")
    assert known == "There is no data set 'x' in data. Available: a, b."
    assert say("data-unknown", name="x", folder="data", known=NOTHING) == "There is no data set 'x' in data."
    assert say("extra-unknown", "zh", config="sft", name="x", hint=NOTHING) == "训练器配置（sft）没有参数“x”。"


def test_a_field_is_said_once_on_a_line() -> None:
    assert str(problem("spec-limit", "method.r", limit="≥ 1", given=0)) == "method.r must be ≥ 1; 0 was given."
    assert str(problem("spec-unknown-key", "a.b", key="a.b", hint="b")).startswith("There is no setting 'a.b'.")
    assert str(problem("no-targets", "method.target_modules")).startswith("method.target_modules: LoRA has")


def test_a_place_that_no_page_takes_is_shown_escaped() -> None:
    assert problem("mask-unproven").at("a\ud800.jsonl:3").text().startswith("a\\ud800.jsonl:3: ")


def test_a_heading_over_rows_is_nothing_to_mend() -> None:
    found = [problem("bad-rows", bad=9, name="x"), problem("no-cards"), problem("no-cards")]
    assert notices.counted(found, Words("en")).startswith("2 to fix")


def test_every_code_that_is_said_has_a_sentence_and_every_sentence_is_said() -> None:
    source = "\n".join(
        file.read_text(encoding="utf-8")
        for file in [
            PROJECT / "app.py",
            *(PROJECT / "engine").rglob("*.py"),
            *(PROJECT / "webui").rglob("*.py"),
        ]
    )
    said = set(re.findall(r"problem\(\s*\"([a-z0-9-]+)\"", source))
    assert said <= set(sentences())
    unused = {
        code
        for code in set(sentences()) - said
        if f'"{code.removesuffix("-fix")}"' not in source
        and not code.startswith(("failure-", "spec-type-", "kind-", "login-"))
    }
    assert not unused


def test_the_settings_page_of_the_docs_is_what_the_spec_declares() -> None:
    from docs.make import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page()
