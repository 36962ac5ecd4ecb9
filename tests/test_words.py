"""No word of the page is missing in a language, and both say the same thing about the same values."""

from __future__ import annotations

import ast
import string
from pathlib import Path

import pytest
import yaml

import webui
from engine.core.problems import sentences
from engine.export.export_spec import ExportSpec
from engine.launch.workspace import PROJECT
from engine.spec.run_spec import SPEC_CHOICES, RunSpec, fields
from webui.form import settings
from webui.words import FOLDER, LANGUAGES, Words


def words_file(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


ZH = words_file("zh")
YAML = [*FOLDER.glob("*.yaml"), *(PROJECT / "engine").rglob("*.yaml")]


def repeated(node: yaml.Node) -> list[str]:
    """The keys that a mapping in the document has twice; YAML takes the last of them without a word."""
    if isinstance(node, yaml.SequenceNode):
        return [key for one in node.value for key in repeated(one)]
    if not isinstance(node, yaml.MappingNode):
        return []
    keys = [key.value for key, _ in node.value]
    return [key for key in keys if keys.count(key) > 1] + [key for _, one in node.value for key in repeated(one)]


@pytest.mark.parametrize("file", YAML, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_no_word_is_said_twice(file):
    assert repeated(yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)) == []


def test_no_sentence_is_in_two_files():
    files = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in YAML if file.parent.name == "sentences"]
    assert sum(map(len, files)) == len(sentences())


def test_a_setting_has_a_chinese_label_and_help():
    written = {path for path, texts in ZH["settings"].items() if texts.get("label") and texts.get("help")}
    assert set(fields()) - written == set()


def test_a_choice_has_a_chinese_name_or_is_listed_as_a_name_of_its_own():
    names = {path: set(ZH["choices"].get(path, {})) | set(ZH["names"]) for path in set(fields()) - set(ZH["names_of"])}
    assert {path: rest for path, known in names.items() if (rest := set(settings.choices(path)) - known)} == {}


@pytest.mark.parametrize("name", [name for name in ExportSpec.model_fields if name not in ("model", "hardware")])
def test_a_setting_of_an_export_has_a_chinese_label_and_help(name):
    assert set(ZH["export"][name]) == {"label", "help"}
    assert set(ZH["export"]) < set(ExportSpec.model_fields)


@pytest.mark.parametrize("path", SPEC_CHOICES)
def test_each_kind_has_a_sentence_and_an_english_name(path):
    assert set(ZH["kinds"][path]) == set(SPEC_CHOICES[path])
    assert set(words_file("en")["choices"][path]) == set(SPEC_CHOICES[path])


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_part_of_the_spec_has_a_title(language):
    assert all(Words(language).part(name) for name in RunSpec.model_fields if name != "name")


def test_no_word_is_left_over_from_a_setting_that_is_gone():
    known = fields()
    assert set(ZH["settings"]) <= set(known)
    for language in ("en", "zh"):
        for path, values in words_file(language)["choices"].items():
            assert set(values) <= set(settings.choices(path)), f"{language}.yaml, choices.{path}"


def test_both_languages_of_a_page_word_fill_in_the_same_values():
    for code, texts in words_file("page").items():
        assert set(texts) == set(LANGUAGES), code
        assert placeholders(texts["en"]) == placeholders(texts["zh"]), code


def test_both_languages_of_a_sentence_fill_in_the_same_values():
    for code, texts in sentences().items():
        assert placeholders(texts["en"]) == placeholders(texts["zh"]), code


def test_every_word_that_the_code_asks_for_exists():
    import re

    code = "\n".join(path.read_text(encoding="utf-8") for path in Path(webui.__file__).parent.rglob("*.py"))
    asked = set(re.findall(r'\bwords\("([a-z-]+)"', code))
    assert asked
    assert asked <= set(words_file("page"))


def test_every_control_has_a_label_of_its_own() -> None:
    """Otherwise screen readers read gradio's English name of the kind of control, also where no label is shown."""
    kinds = {"Textbox", "Radio", "Dropdown", "Number", "Checkbox", "CheckboxGroup", "Slider"}
    without = []
    for file in Path(webui.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in kinds):
                continue
            names = {keyword.arg for keyword in call.keywords}  # None: more of them come from a mapping
            hidden = any("'unseen'" in ast.unparse(keyword.value) for keyword in call.keywords)
            if ast.unparse(call.func.value) == "gr" and not hidden and not names & {"label", None}:
                without.append(f"{file.name}:{call.lineno}")
    assert without == []
