"""What a model is asked: for questions and answers on a passage, and whether an answer is supported by it.

The texts are in prompts.yaml, in the language in which the questions are to be. All of it is one message of the user,
because some chat templates have no system message.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import yaml

from engine.core.problems import fill
from engine.data.validation import script_of
from engine.documents.passages import Passage

Language = Literal["passage", "en", "zh"]
Form = Literal["lines", "json"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
FORMS: tuple[Form, ...] = get_args(Form)  # the first is the default
MARK = re.compile(r"<[\s/]*(?:passage|question|answer)(-\d+)?", re.IGNORECASE)


@cache
def _texts() -> Mapping[str, Mapping[str, str]]:
    return yaml.load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)


def _language_of(language: Language, passage: Passage) -> str:
    """The language in which the model is asked: that of the questions, otherwise the one nearer to the passage."""
    if language == "passage":
        return "zh" if script_of(passage.text) == "han" else "en"
    return language


def _suffix(*texts: str) -> str:
    """What follows the names of the marks, so that no text can end what is between them: nothing, or -2, -3 …"""
    taken = {suffix for text in texts for suffix in MARK.findall(text)}
    suffixes = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(suffix for suffix in suffixes if suffix not in taken)


def question_prompt(passage: Passage, rows: int, language: Language, instruction: str, form: Form) -> str:
    """Ask for `rows` questions and answers on the passage. `instruction`: what else they should be like."""
    texts = _texts()
    own = _language_of(language, passage)
    section = fill(texts["section"][own], headings=" › ".join(passage.headings)) if passage.headings else ""
    code = "language-of-passage" if language == "passage" else f"language-{language}"
    wishes = f" {' '.join(instruction.split())}" if instruction.strip() else ""
    values = {"file": passage.file, "section": section, "text": passage.text, "instruction": wishes}
    suffix = _suffix(passage.text, passage.file, *passage.headings, instruction)
    request = fill(texts["ask"][own], rows=rows, language=texts[code][own], suffix=suffix, **values)
    return f"{request}\n\n{fill(texts[f'form-{form}'][own])}"


def judge_prompt(passage: Passage, question: str, answer: str, language: Language, form: Form) -> str:
    """Ask for a score, from 1 to 5, of how well the passage supports the answer."""
    texts = _texts()
    own = _language_of(language, passage)
    suffix = _suffix(passage.text, question, answer)
    request = fill(texts["judge"][own], text=passage.text, question=question, answer=answer, suffix=suffix)
    return f"{request}\n\n{fill(texts[f'judge-{form}'][own])}"
