"""What other programs train with → a spec of ours, and what could not be carried over, each with the reason.

A command line, a YAML file or a saved LLaMA Board form of LLaMA-Factory, or an axolotl YAML. The keys and what
becomes of them stand in tables beside this module; a key that cannot be taken never keeps the others from it.
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
    """A spec, and what of the original it leaves out, or takes otherwise."""

    spec: Spec
    left_out: tuple[Problem, ...]

    @property
    def lost(self) -> tuple[Problem, ...]:
        """What a reader has to know of: not what was not needed."""
        return tuple(note for note in self.left_out if note.code != "import-needless")


def decoded(content: bytes, name: str = "") -> str:
    """The text of a file: UTF-8, UTF-16 as PowerShell writes it, or the GB18030
    of a Chinese Windows. Raises Refusal."""
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
    """No file can be reached from a page: what is pasted is all there is."""


def read_any(text: str, context_of: Callable[[str], int | None] = lambda _: None) -> Imported:
    """A spec of ours as it is, or theirs translated: for a box into which either may be pasted. Raises Refusal."""
    text = normalized(text)
    if is_spec_yaml(text):
        return Imported(kinds.read(text), ())
    return read(text, context_of=context_of)


def is_spec_yaml(text: str) -> bool:
    """Whether the text is, or is meant to be, YAML of a spec of ours."""
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
    """A pasted command, YAML file or both as a spec of the kind that it is for.

    `reader` answers the text of a file that a command names; `context_of` how many tokens a model takes, if it can be
    looked into. Raises Refusal if there is nothing that could be a setting, or nothing that a spec could stand for.
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
