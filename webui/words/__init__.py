"""All texts of the page, in one language.

English labels and help of the settings are in `engine/spec/` (`run_spec.py` and `*_settings.py`). `zh.yaml` has their
Chinese, `en.yaml` the English labels of choices whose value is not a label, and `page.yaml` the page's own texts in
both languages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from engine.core.problems import fill
from engine.export.export_spec import ExportSpec
from engine.runs.compare import ABSENT, format_value
from engine.spec.run_spec import SPEC_CHOICES, RunSpec, fields

FOLDER = Path(__file__).parent
LANGUAGES = ("en", "zh")


@cache
def _read(name: str) -> Mapping[str, Any]:
    return yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)


class Words:
    """The texts of one language: `words("start")` for the page's own, and methods for those of the settings."""

    def __init__(self, language: str):
        if language not in LANGUAGES:
            raise ValueError(f"no words in {language!r}; there are: {', '.join(LANGUAGES)}")
        self.language = language

    def __call__(self, code: str, **values: Any) -> str:
        return fill(_read("page")[code][self.language], **values)

    def knows(self, code: str) -> bool:
        return code in _read("page")

    def label(self, path: str) -> str:
        """The label of the setting at `path`."""
        return self._setting(path, "label", fields()[path].title)

    def help(self, path: str) -> str:
        """One or two sentences about the setting at `path`."""
        return self._setting(path, "help", fields()[path].description)

    def _setting(self, path: str, what: str, english: str) -> str:
        # A new setting without Chinese is shown in English; a test fails until it has Chinese.
        return english if self.language == "en" else _read("zh")["settings"].get(path, {}).get(what, english)

    def part(self, name: str) -> str:
        """The title of a part of the spec ("training")."""
        if self.language == "zh":
            return _read("zh")["parts"][name]
        if name in fields():
            return fields()[name].title
        about = RunSpec.model_fields[name].annotation.__doc__ or ""
        return about.split(":", 1)[0]

    def choice(self, path: str, value: str) -> str:
        """The label of a choice of the setting at `path`; a proper name is its own label."""
        return str(_read(self.language)["choices"].get(path, {}).get(value, value))

    def value(self, path: str, value: Any, brief: bool = True) -> str:
        """The value of the setting at `path` for display; `brief`: only the last part of a folder's path."""
        if value is ABSENT:
            return "—"
        if value is None or value in ("", [], {}):
            return self("empty")
        if isinstance(value, bool):
            return self("switched-on" if value else "switched-off")
        if isinstance(value, str):
            return Path(value).name if brief and os.path.isabs(value) else self.choice(path, value)
        if isinstance(value, list):
            return ", ".join(self.choice(path, str(choice)) for choice in value)
        return format_value(value)

    def of_export(self, name: str, what: str) -> str:
        """The "label" or the "help" of a setting of an export."""
        field = ExportSpec.model_fields[name]
        english = field.title if what == "label" else field.description
        return english or "" if self.language == "en" else _read("zh")["export"][name][what]

    def export_choice(self, name: str, value: str) -> str:
        """The label of a choice of a setting of an export."""
        return str(_read(self.language)["export_choices"].get(name, {}).get(value, value))

    def kind(self, path: str, kind: str) -> str:
        """One sentence about a kind of the union at `path`."""
        if self.language == "zh":
            return _read("zh")["kinds"][path][kind]
        return " ".join((SPEC_CHOICES[path][kind].__doc__ or "").split())
