"""Every sentence is there in both languages, with the same values in it, and somebody says it."""

from __future__ import annotations

import re
import string

import pytest

from engine.problems import LANGUAGES, say, sentences
from engine.workplace import PROJECT


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("code", sentences())
def test_a_sentence_has_both_languages_and_the_same_values(code: str) -> None:
    texts = sentences()[code]
    assert set(texts) == set(LANGUAGES)
    assert placeholders(texts["en"]) == placeholders(texts["zh"])
    assert re.search(r"[\u4e00-\u9fff]", texts["zh"])
    values = dict.fromkeys(placeholders(texts["en"]), "x")
    assert say(code, "zh", **values) != say(code, "en", **values)


def test_every_code_that_is_said_has_a_sentence_and_every_sentence_is_said() -> None:
    source = "\n".join(
        file.read_text(encoding="utf-8")
        for folder in ("engine", "engine/worker", "webui", ".")
        for file in (PROJECT / folder).glob("*.py")
    )
    said = set(re.findall(r"problem\(\s*\"([a-z0-9-]+)\"", source))
    assert said <= set(sentences())
    unused = {
        code
        for code in set(sentences()) - said
        if f'"{code}"' not in source and not code.startswith(("failure-", "spec-type-", "kind-", "login-"))
    }
    assert not unused


def test_the_settings_page_of_the_docs_is_what_the_spec_declares() -> None:
    from docs.make import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page()
