"""A pasted text → what it is: YAML, a command line, or both; and all settings in it, in order of precedence."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml

from engine.core.problems import Problem, Refusal, problem
from engine.importer.launch import Launch, read_command
from engine.importer.shell import HERE_DOCUMENT, read_script
from engine.spec.yaml_text import MAX_YAML_DEPTH, read_yaml

YAML_KEY = re.compile(r"['\"]?[A-Za-z_][\w.\-]*['\"]?")
YAML_LINE = re.compile(r"^(?:['\"]?[A-Za-z_][\w.\-]*['\"]?\s*:(?:\s|$)|---\s*$)")
COMMAND_LINE = re.compile(
    r"(?:^|[\s/\\])(?:llamafactory-cli|lmf|torchrun|deepspeed|accelerate|python3?|axolotl)(?:\.exe)?\s"
    r"|\.py(?:\s|$)|^\s*--?\w"
)
FENCE = re.compile(r"^\s*```[\w-]*\s*$", re.M)
SPEC_VERBS = ("train", "export", "eval", "")  # verbs that a spec can represent
Reader = Callable[[str], str | None]


@dataclass
class Source:
    """What was read: the other program's `settings`, the `launch` that starts them, and `notes` on the text itself."""

    settings: dict[str, Any] = field(default_factory=dict)
    launch: Launch = field(default_factory=Launch)
    notes: list[Problem] = field(default_factory=list)
    secrets: set[str] = field(default_factory=set)


def normalized(text: str) -> str:
    """The text with uniform line ends, and without byte order mark, code fences and non-standard spaces."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    return FENCE.sub("", text.replace("\u200b", ""))


def read_source(text: str, reader: Reader) -> Source:
    """All settings of a text. `reader` returns the text of a file that a command refers to, or None. Raises Refusal if
    there is nothing that could be a setting."""
    source = Source()
    if _is_yaml(text):
        _add_yaml(source, text)
        return source
    command, document = _split_command_and_yaml(text)
    if not COMMAND_LINE.search(command) and len(re.findall(YAML_LINE.pattern, text, re.M)) > len(text.splitlines()) / 3:
        _add_yaml(source, text)  # meant as YAML, but broken: report where
        return source
    try:
        script = read_script(command)
    except ValueError as error:
        raise Refusal(problem("import-unreadable", why=error)) from None
    launches = [launch for words in script.commands if (launch := read_command(words, script.exported))]
    source.launch = _choose_launch(launches, source.notes)
    if not launches and not document:
        raise Refusal(problem("import-nothing"))
    source.notes += [
        problem("import-variable", name=name) for name in dict.fromkeys(script.unknown) if _is_used(name, source.launch)
    ]
    for index, file in enumerate(source.launch.files):
        content = document if index == 0 and document else _here_document(script.documents, file) or reader(file)
        if content is None:
            source.notes.append(problem("import-file", file=file))
        else:
            _add_yaml(source, content)
    if document and not source.launch.files:
        _add_yaml(source, document)
    _add_settings(source, source.launch.settings, over=bool(source.launch.files))
    return source


def _is_used(name: str, launch: Launch) -> bool:
    held = [str(value) for _, value in launch.settings] + launch.files
    return any(name in value or name.replace(" ", "_") in value for value in held)


def _choose_launch(launches: Sequence[Launch], notes: list[Problem]) -> Launch:
    """The first command that a spec can represent; the others are noted. Raises Refusal if there are only others."""
    acting = [launch for launch in launches if launch.verb in SPEC_VERBS]
    if launches and not acting:
        raise Refusal(problem(OTHER_VERBS.get(launches[0].verb, "import-verb"), verb=launches[0].verb))
    for other in launches:
        if acting and other is not acting[0]:
            notes.append(problem("import-second", command=" ".join(other.words)[:80]))
    return acting[0] if acting else Launch()


OTHER_VERBS = {"chat": "import-chat", "webchat": "import-chat", "api": "import-api", "webui": "import-webui"}


def _here_document(documents: Mapping[str, str], file: str) -> str | None:
    """The text that the script itself wrote to a file of that name."""
    name = PurePosixPath(file).name
    return next((text for path, text in documents.items() if PurePosixPath(path).name == name), None)


# ------------------------------------------------------------------------------------------ YAML


def _is_yaml(text: str) -> bool:
    """Whether the text is YAML with settings: a mapping whose keys are names. For YAML,
    `llamafactory-cli train --x {a: 1}` is also a mapping."""
    try:
        names = _top_level_keys(_without_tabs(text)[0])
    except (yaml.YAMLError, ValueError):
        return False
    return bool(names) and all(YAML_KEY.fullmatch(name) for name in names)


def _top_level_keys(text: str) -> list[str]:
    """The top-level keys of all documents of a text; [""] if one is not a mapping. Read from events, so that nothing is
    built from a text that is nested a thousand times. Raises yaml.YAMLError."""
    names: list[str] = []
    depth, key = 0, False
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        closes = isinstance(event, yaml.CollectionEndEvent)
        depth -= closes
        if isinstance(event, yaml.NodeEvent) and depth == 0:
            empty = isinstance(event, yaml.ScalarEvent) and not event.value
            if not isinstance(event, yaml.MappingStartEvent) and not empty:
                return [""]
            key = True
        elif depth == 1 and (closes or isinstance(event, (yaml.NodeEvent))):
            if key:
                names.append(event.value if isinstance(event, yaml.ScalarEvent) else "")
            key = not key if not isinstance(event, yaml.CollectionStartEvent) else key
        depth += isinstance(event, yaml.CollectionStartEvent)
        if depth > MAX_YAML_DEPTH:
            return names
    return names


def _split_command_and_yaml(text: str) -> tuple[str, str]:
    """A command and the YAML pasted below or above it; "" if there is only one of them."""
    if HERE_DOCUMENT.search(text):
        return text, ""
    lines = text.split("\n")
    for index in [i for i, line in enumerate(lines) if YAML_LINE.match(line)]:
        below = "\n".join(lines[index:])
        if _is_yaml(below):
            return "\n".join(lines[:index]), below
    for index in range(len(lines) - 1, 0, -1):
        above = "\n".join(lines[:index])
        if COMMAND_LINE.search(lines[index]) and _is_yaml(above):
            return "\n".join(lines[index:]), above
    return text, ""


def _without_tabs(text: str) -> tuple[str, int]:
    """The text with tabs at the beginning of lines replaced by spaces, as YAML requires, and the first such line (0:
    none)."""
    tabbed = next((number for number, line in enumerate(text.split("\n"), 1) if re.match(r" *\t", line)), 0)
    return re.sub(r"^[ \t]+", lambda blanks: blanks[0].replace("\t", "  "), text, flags=re.M), tabbed


def _add_yaml(source: Source, text: str) -> None:
    """Settings of YAML, each key once: the last one wins, which is noted. Raises Refusal with line and column."""
    text, tabbed = _without_tabs(normalized(text))
    if tabbed:
        source.notes.append(problem("import-tab", line=tabbed))
    documents = _documents(text)
    if len(documents) > 1:
        source.notes.append(problem("import-documents", count=len(documents)))
    for document in documents:
        settings = read_yaml(document)
        if not isinstance(settings, dict):
            raise Refusal(problem("import-nothing"))
        _add_settings(source, [(str(name), settings[name]) for name in settings], over=False)
        source.notes += [problem("import-twice", name=name, value=settings[name]) for name in _repeated_keys(document)]


def _documents(text: str) -> list[str]:
    """The parts between `---`, without those that contain only comments."""
    parts = re.split(r"^---(?:[ \t].*)?$|^\.\.\.[ \t]*$", text, flags=re.M)
    held = [
        part for part in parts if any(line.strip() and not line.lstrip().startswith("#") for line in part.split("\n"))
    ]
    return held or [text]


def _repeated_keys(text: str) -> list[str]:
    names = _top_level_keys(text)
    return sorted({name for name in names if names.count(name) > 1})


def _add_settings(source: Source, settings: Sequence[tuple[str, Any]], over: bool) -> None:
    """`over`: these are meant to override the content of a file."""
    seen: set[str] = set()
    for name, value in settings:
        if name in seen or (name in source.settings and not over):
            source.notes.append(problem("import-twice", name=name, value=value))
        seen.add(name)
        source.settings[name] = value
