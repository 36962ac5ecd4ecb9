"""The verb of the command line for the presets of users. Who works in a shell of this machine sees and changes all."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.core import audit
from engine.core.problems import Problem, Refusal, problem, say, shell_language
from engine.core.rights import Person
from engine.following import sentence, text_of, user_name
from engine.launch.workspace import Workplace
from engine.runs import kinds, own_presets
from engine.runs.compare import ABSENT, format_value
from engine.runs.own_presets import OwnPreset
from engine.spec.run_spec import RunSpec

NEED_NAME, NEED_SPEC = ("show", "save", "apply", "rename", "share", "keep", "delete"), ("save", "apply")


def add_options(verb: argparse.ArgumentParser) -> None:
    """What to do, with which preset."""
    verb.add_argument("what", choices=("list", *NEED_NAME), help="share: show it to everybody; keep: to its owner only")
    verb.add_argument("name", nargs="?", default="", help="of the preset, or of its file")
    verb.add_argument(
        "spec", nargs="?", default="", help="a spec file, or -; with rename, the new name", metavar="SPEC"
    )
    verb.add_argument("--changed", action="store_true", help="save: only settings that differ from their defaults")
    verb.add_argument("--places", action="store_true", help="save: with model, data, paths and devices")
    verb.add_argument("--private", action="store_true", help="save: do not share it")


def presets(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """List, show, save, apply, rename, share or delete presets of users. apply prints the spec with the settings of the
    preset, and on standard error what that has changed, and what could not be used."""
    what, saves = arguments.what, workplace.saves
    if (what in NEED_NAME and not arguments.name) or (what in (*NEED_SPEC, "rename") and not arguments.spec):
        raise Refusal(problem("preset-which"))
    if what == "list":
        _list(saves)
    elif what == "show":
        print(_named(saves, arguments.name).to_yaml(), end="")
    elif what == "save":
        start = RunSpec() if arguments.changed else None
        settings = own_presets.settings_of(_spec(arguments.spec), start, arguments.places)
        with audit.recorded(saves, audit.shell(user_name()), "save-preset", arguments.name):
            print(own_presets.save(saves, arguments.name, user_name(), not arguments.private, settings)[0].id)
    elif what == "apply":
        _apply(_named(saves, arguments.name), _spec(arguments.spec))
    else:
        preset = _named(saves, arguments.name)
        with audit.recorded(saves, audit.shell(user_name()), "change-preset", f"{preset.name}: {what}"):
            if what == "delete":
                own_presets.delete(saves, preset)
            elif what == "rename":
                own_presets.change(saves, preset, name=arguments.spec)
            else:
                own_presets.change(saves, preset, shared=what == "share")
    return 0


def _list(saves: Path) -> None:
    known, broken = _known(saves)
    for preset in known:
        print(f"{preset.id}\t{preset.by or '—'}\t{'shared' if preset.shared else 'private'}\t{preset.name}")
    for issue in broken:
        print(sentence(issue), file=sys.stderr)


def _known(saves: Path) -> tuple[list[OwnPreset], list[Problem]]:
    """All presets, first those of who asks; and what is wrong with files that are none."""
    known, broken = own_presets.find(saves, Person())
    return sorted(known, key=lambda preset: preset.by != user_name()), broken


def _named(saves: Path, name: str) -> OwnPreset:
    """The preset with this name or file; of several, one's own. Raises Refusal."""
    matching = [preset for preset in _known(saves)[0] if name in (preset.name, preset.id)]
    return matching[0] if matching else own_presets.get(saves, name, Person())


def _spec(file: str) -> RunSpec:
    spec = kinds.read(text_of(file))
    if not isinstance(spec, RunSpec):
        raise Refusal(problem("preset-kind", kind=spec.kind))
    return spec


def _apply(preset: OwnPreset, spec: RunSpec) -> None:
    applied = own_presets.applied(preset, spec)
    print(applied.spec.to_yaml(brief=True), end="")
    language = shell_language()
    for change in applied.changes:
        before, now = ("—" if value is ABSENT else format_value(value) for value in change.values)
        print(say("preset-changed", language, path=change.path, before=before, now=now), file=sys.stderr)
    for issue in applied.problems:
        print(say("preset-left-out", language, why=sentence(issue)), file=sys.stderr)
