"""Configurations of other programs → a spec, and what could not be imported, each with the reason.

The input is a command line, a YAML file or a saved LLaMA Board form of LLaMA-Factory, or an axolotl YAML. Tables next
to this module list the keys and their counterparts; a key that cannot be imported never affects the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from engine.core.problems import Problem, Refusal, problem
from engine.importer import axolotl, board
from engine.importer.draft import Draft
from engine.importer.launch import put_hardware
from engine.importer.model_converters import CONTEXT_LENGTH_KEY
from engine.importer.purposes import evaluation_draft, export_draft, spec_kind
from engine.importer.sources import Source, normalized, read_source
from engine.importer.table import entries
from engine.importer.training import training_draft
from engine.runs import kinds
from engine.spec.run_spec import RunSpec, Spec
from engine.spec.yaml_text import read_yaml

DRAFT_FUNCTIONS: dict[str, Callable[..., Draft]] = {
    "training": training_draft,
    "evaluation": evaluation_draft,
    "export": export_draft,
}


@dataclass(frozen=True)
class Imported:
    """A spec, and what it leaves out or changes of the original."""

    spec: Spec
    left_out: tuple[Problem, ...]

    @property
    def lost(self) -> tuple[Problem, ...]:
        """What a reader has to know, without the settings that were not needed."""
        return tuple(note for note in self.left_out if note.code != "import-needless")


def decoded(content: bytes, name: str = "") -> str:
    """The text of a file: UTF-8, UTF-16 as written by PowerShell, or GB18030 of a Chinese Windows. Raises Refusal."""
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    for encoding in ("utf-16",) if wide else ("utf-8-sig", "gb18030"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise Refusal(problem("file-not-text", file=name))


def no_file(_name: str) -> None:
    """No file can be reached from a page; there is only what was pasted."""


def read_any(text: str, context_of: Callable[[str], int | None] = lambda _: None) -> Imported:
    """Our spec unchanged, or another program's translated, for a box that accepts either. Raises Refusal."""
    text = normalized(text)
    if is_spec_yaml(text):
        return Imported(kinds.read(text), ())
    return read(text, context_of=context_of)


def is_spec_yaml(text: str) -> bool:
    """Whether the text is, or is meant to be, the YAML of one of our specs."""
    try:
        plain = read_yaml(text)
    except Refusal:
        return (
            bool(re.search(r"^(model|training|data|method|logging|hardware|extra):", text, re.M)) and "--" not in text
        )
    if not isinstance(plain, dict):
        return False
    names = {str(name) for name in plain}
    if any(
        isinstance(plain.get(part), dict)
        for part in ("model", "training", "logging", "hardware", "method", "data", "stage")
    ):
        return True
    theirs = {
        name
        for name in names
        if name in entries("llamafactory") or board.is_board_key(name) or axolotl.is_axolotl_key(name)
    }
    return not theirs - set(RunSpec.model_fields) and not board.is_board(plain) and bool(names)


def read(
    text: str,
    reader: Callable[[str], str | None] = no_file,
    context_of: Callable[[str], int | None] = lambda _: None,
) -> Imported:
    """A pasted command, YAML file or both as a spec of the right kind.

    `reader` returns the text of a file that a command refers to; `context_of` the context length of a model, if it can
    be read. Raises Refusal if there is nothing that could be a setting, or nothing that a spec could represent.
    """
    source = read_source(normalized(text), reader)
    settings = source.settings
    if source.launch.axolotl or axolotl.is_axolotl(settings):
        return _imported(axolotl.training(settings), source)
    if board.is_board(settings):
        settings = board.board_settings(settings, source.notes)
    if not settings:
        missing = [note for note in source.notes if note.code == "import-file"]
        raise Refusal(missing or problem("import-nothing"))
    if context := context_of(str(settings.get("model_name_or_path", ""))):
        settings = settings | {CONTEXT_LENGTH_KEY: context}
    return _imported(DRAFT_FUNCTIONS[spec_kind(settings, source.launch.verb)](settings), source)


def _imported(draft: Draft, source: Source) -> Imported:
    put_hardware(draft, source.launch)
    spec = draft.spec()
    return Imported(spec, (*source.notes, *draft.notes))
