"""Problems: the values by which all of Athanor reports what is wrong, shown in the reader's language.

The sentences are in `engine/core/sentences/*.yaml`, English and Chinese side by side, so that whoever changes one sees
the other. A sentence names the thing, what was given and the smallest fix. Reasons given by a parser or the operating
system are translated, too, by `engine/core/reasons.yaml`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

SENTENCES = Path(__file__).parent / "sentences"
REASONS = Path(__file__).parent / "reasons.yaml"
LANGUAGES = ("en", "zh")
NOTHING = "—"  # a value that does not exist; a part `[[ … {value}.]]` of a sentence is then left out
_OPTIONAL = re.compile(r"\[\[(.*?)\]\]")
_BEFORE_STOP = re.compile(r"\{(\w+)\}(?=[.。])")


@cache
def sentences() -> Mapping[str, Mapping[str, str]]:
    """All sentences: code → language → text with `{placeholders}`. Raises ValueError if a code is defined twice."""
    sentences_by_code: dict[str, Mapping[str, str]] = {}
    for path in sorted(SENTENCES.glob("*.yaml")):
        for code, texts in yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader).items():
            if code in sentences_by_code:
                raise ValueError(f"sentence {code!r} is in two files; the second is {path.name}")
            sentences_by_code[code] = texts
    return sentences_by_code


@cache
def reasons() -> Mapping[str, Mapping[str, str]]:
    """Messages of other programs in English → language → our wording."""
    return yaml.load(REASONS.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)


def say(code: str, language: str = "en", /, **values: Any) -> str:
    """The sentence `code` in `language` ("en" or "zh") with its placeholders filled in. Raises KeyError if unknown."""
    localized = {name: _localized(language, value) for name, value in values.items()}
    text = _OPTIONAL.sub(lambda part: _optional_part(part[1], localized), sentences()[code][language])
    for name in _BEFORE_STOP.findall(text):
        localized[name] = _without_stop(localized.get(name))
    return fill(text, **localized)


def _without_stop(value: Any) -> Any:
    """The text without its final full stop, so that the sentence can continue."""
    return (value.rstrip().rstrip(".。") or value) if isinstance(value, str) else value


def _optional_part(part: str, values: Mapping[str, Any]) -> str:
    """An optional part of a sentence, left out if there is no value for it."""
    names = {name for _, name, _, _ in string.Formatter().parse(part) if name}
    return "" if any(values.get(name) == NOTHING for name in names) else part


def _localized(language: str, value: Any) -> Any:
    """A value in the given language: a known reason, or a value that has a text in each language."""
    if isinstance(value, Mapping) and set(value) == set(LANGUAGES):
        return value[language]
    return reasons()[value][language] if _is_known_reason(value) else printable(value)


def printable(value: Any) -> Any:
    """The text with characters that no terminal, file or page accepts (half characters, NUL) written as escapes."""
    if not isinstance(value, (str, os.PathLike)):
        return value
    return str(value).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


class _Filling(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        singular, slash, plural = format_spec.partition("/")
        return (singular if str(value) == "1" else plural) if slash else super().format_field(value, format_spec)


def fill(text: str, /, **values: Any) -> str:
    """The text with its placeholders filled in. `{rows:row/rows}` is the singular or plural word for that number."""
    return _Filling().vformat(text, (), values)


def _is_known_reason(value: Any) -> bool:
    return isinstance(value, str) and value in reasons()


def shell_language() -> str:
    """The language of this process's reader, from the usual environment variables."""
    language = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")[:2]
    return language if language in LANGUAGES else "en"


@dataclass(frozen=True)
class Problem:
    """A problem. `field` is the path of the spec field it belongs to ("" = none), which its sentence may contain as
    `{field}`."""

    code: str
    field: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def text(self, language: str = "en") -> str:
        """The sentence, preceded by its place if it does not contain it."""
        text, place = say(self.code, language, field=self.field, **self.values), self.values.get("place")
        return f"{printable(place)}: {text}" if place and "{place}" not in sentences()[self.code][language] else text

    def at(self, place: object) -> Problem:
        """The same problem at this place (file and line)."""
        return dataclasses.replace(self, values={**self.values, "place": str(place)})

    def with_field(self, language: str = "en") -> str:
        """The sentence for a reader without a form: preceded by its field, unless it contains it."""
        named = "{field}" in sentences()[self.code][language] or self.field in self.values.values()
        return self.text(language) if named or not self.field else f"{self.field}: {self.text(language)}"

    def __str__(self) -> str:
        return self.with_field()


class Refusal(Exception):
    """Raised if an action cannot be done; carries all problems, not only the first."""

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[type[Refusal], tuple[list[Problem]]]:
        return type(self), (self.problems,)  # for passing it between processes

    def text(self, language: str = "en") -> str:
        return "\n".join(problem.text(language) for problem in self.problems)


def problem(code: str, field: str = "", /, **values: Any) -> Problem:
    """Short form: `problem("model-missing", "model.model_name_or_path", path=path)`."""
    return Problem(code, field, values)
