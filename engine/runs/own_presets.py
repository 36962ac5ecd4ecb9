"""Presets of the users: some settings under a name, each a small YAML file in the saves folder.

The file can be read, compared and copied to another server as it is. What it says is checked only when it is applied to
a spec: a setting that this version does not have is reported, and all others are used. What may be done with whose
preset is in `engine.core.rights`; those that are not shared are seen by their owner only.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from engine.core.locks import wait_for_lock
from engine.core.problems import LANGUAGES, Problem, Refusal, problem
from engine.core.regular_files import list_files, read_bytes
from engine.core.rights import OPERATOR, Person
from engine.core.rundir import stamp, write_text
from engine.launch.workspace import Workplace
from engine.runs.compare import Difference, differences
from engine.runs.plan import changed_settings
from engine.spec.run_spec import SPEC_CHOICES, RunSpec, fields, union_of
from engine.spec.yaml_text import read_yaml, write_yaml

FOLDER = ".presets"  # in the saves folder
SUFFIX = ".yaml"
MAX_BYTES = 16 << 10  # of a file; one with all settings has two thousand, and longer ones take a page's time
MAX_PER_OWNER = 100
MAX_FILES = 2000  # that are read for a list
MAX_NAME_LENGTH = 60
ID = re.compile(r"[^./\0][^/\0]{0,199}")  # the name of a file without its suffix
KEYS = {"name": str, "by": str, "shared": bool, "settings": dict}
# What is on this machine: models, data, results and devices. Part of a preset only if asked for.
PLACES = (
    "model.model_name_or_path", "model.hub", "model.model_revision", "model.adapter_path", "model.chat_template",
    "data.datasets", "data.dataset_dir", "data.eval_datasets", "stage.reward_model", "stage.reward_file",
    "hardware.devices",
)  # fmt: skip


@dataclass(frozen=True)
class OwnPreset:
    """A preset; `settings` is a part of a spec as plain data, of whatever version. `by` is "" if it is nobody's."""

    id: str
    name: str
    by: str
    shared: bool
    settings: Mapping[str, Any]

    def visible_to(self, person: Person) -> bool:
        """Without a login, everybody sees all; what belongs to nobody is left to operators."""
        if self.shared or not person.name:
            return True
        return self.by == person.name or (not self.by and person.role == OPERATOR)

    def to_yaml(self) -> str:
        """The content of its file."""
        return write_yaml({name: getattr(self, name) for name in KEYS})


@dataclass(frozen=True)
class Applied:
    """A spec with the settings of a preset: what that has changed, and what could not be used of the preset."""

    spec: RunSpec
    changes: list[Difference]
    problems: list[Problem]


# ------------------------------------------------------------------------------------------ files


def find(saves: Path, person: Person) -> tuple[list[OwnPreset], list[Problem]]:
    """The presets that the person may see, their own first, by name; and a problem for each file that is none."""
    presets, problems = [], []
    files = sorted(entry.name for entry in list_files(saves / FOLDER) if entry.name.endswith(SUFFIX))[:MAX_FILES]
    for file in files:
        outcome = _remembered(saves / FOLDER / file)
        if isinstance(outcome, OwnPreset):
            presets.append(outcome)
        else:
            problems.append(outcome)
    seen = [preset for preset in presets if preset.visible_to(person)]
    return sorted(seen, key=lambda preset: (preset.by != person.name, preset.name.casefold(), preset.id)), problems


def get(saves: Path, id: str, person: Person) -> OwnPreset:
    """Raises Refusal if there is no such preset, the person may not see it, or its file is not a preset."""
    preset = _existing(saves, id)
    if not preset.visible_to(person):
        raise Refusal(_missing(id))
    return preset


def _existing(saves: Path, id: str) -> OwnPreset:
    path = saves / FOLDER / f"{id}{SUFFIX}"
    if not ID.fullmatch(id) or not os.path.lexists(path):
        raise Refusal(_missing(id))
    return _read(path)


def _missing(name: str) -> Problem:
    return problem("preset-missing", name=name[:80])


def _remembered(path: Path) -> OwnPreset | Problem:
    """What is in a file, or why it is no preset; it is read anew only after a change, as every page lists them all."""
    return _read_once(path, stamp([path]))


@lru_cache(maxsize=MAX_FILES)
def _read_once(path: Path, _stamp: str) -> OwnPreset | Problem:
    try:
        return _read(path)
    except Refusal as refusal:
        return refusal.problems[0]


def _read(path: Path) -> OwnPreset:
    try:
        plain = read_yaml(read_bytes(path, MAX_BYTES).decode("utf-8"))
    except Refusal as refusal:
        raise _broken(path, _in_each_language(refusal.problems[0])) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, getattr(error, "strerror", None) or error) from error
    values: dict[str, Any] = {"by": "", "shared": False} | plain if isinstance(plain, dict) else {}
    if values.keys() != KEYS.keys() or any(type(values[name]) is not kind for name, kind in KEYS.items()):
        raise _broken(path, _in_each_language(problem("preset-keys")))
    name = " ".join(values.pop("name").split())[:MAX_NAME_LENGTH]
    id = path.name.removesuffix(SUFFIX)
    return OwnPreset(id, name or id, **values)


def _broken(path: Path, why: Any) -> Refusal:
    return Refusal(problem("preset-broken", file=path.name, why=why))


def _in_each_language(issue: Problem) -> Mapping[str, str]:
    return {language: issue.text(language) for language in LANGUAGES}


def save(saves: Path, name: str, by: str, shared: bool, settings: Mapping[str, Any]) -> tuple[OwnPreset, bool]:
    """Write a preset; one of the same owner with the same name is replaced, which the second value says. Raises Refusal
    for an invalid name, no settings at all, too many presets, or a disk that refuses it."""
    name = _checked_name(name)
    if not settings:
        raise Refusal(problem("preset-empty"))
    with _changing(saves) as folder:
        own = [preset for preset in _all(saves) if preset.by == by]
        same = next((preset for preset in own if preset.name == name), None)
        if not same and len(own) >= MAX_PER_OWNER:
            raise Refusal(problem("preset-too-many", count=MAX_PER_OWNER))
        preset = OwnPreset(same.id if same else _free_id(folder, name), name, by, shared, settings)
        _write(folder, preset)
    return preset, same is not None


def change(saves: Path, preset: OwnPreset, *, name: str | None = None, shared: bool | None = None) -> OwnPreset:
    """Rename a preset, share it or stop sharing it; all else is as its file says by now. Raises Refusal, also if it is
    gone or has another owner, whose it was not when the right to change it was looked at."""
    name = None if name is None else _checked_name(name)
    with _changing(saves) as folder:
        now = _same(saves, preset)
        changed = replace(now, name=name or now.name, shared=now.shared if shared is None else shared)
        others = (other for other in _all(saves) if other.by == now.by and other.id != now.id)
        if name and any(other.name == name for other in others):
            raise Refusal(problem("preset-name-taken", name=name))
        _write(folder, changed)
    return changed


def delete(saves: Path, preset: OwnPreset) -> None:
    """Delete a preset. Raises Refusal, also if it is gone or has another owner by now."""
    with _changing(saves) as folder:
        (folder / f"{_same(saves, preset).id}{SUFFIX}").unlink(missing_ok=True)


def disown(saves: Path, owner: str) -> None:
    """Make the presets of a removed user nobody's, so that they do not become those of another with the same name: what
    is shared stays so, the rest is left to operators. Raises Refusal."""
    if any(preset.by == owner for preset in _all(saves)):
        with _changing(saves) as folder:
            for preset in _all(saves):
                if preset.by == owner:
                    _write(folder, replace(preset, by=""))


def _same(saves: Path, preset: OwnPreset) -> OwnPreset:
    """A preset as its file says now. Raises Refusal."""
    now = _existing(saves, preset.id)
    if now.by != preset.by:
        raise Refusal(_missing(preset.name))
    return now


def _all(saves: Path) -> list[OwnPreset]:
    return find(saves, Person(role=OPERATOR))[0]


def _checked_name(name: str) -> str:
    name = " ".join(name.split())
    if not name:
        raise Refusal(problem("preset-unnamed"))
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise Refusal(problem("preset-name", given=ascii(name[:80])[1:-1], limit=MAX_NAME_LENGTH))
    if name.casefold() in _built_in_titles():
        raise Refusal(problem("preset-built-in", name=name))
    return name


@cache
def _built_in_titles() -> frozenset[str]:
    """What the presets that come with Athanor are called in the list, in every language."""
    return frozenset(title.casefold() for about in Workplace().presets().values() for title in about["title"].values())


def _free_id(folder: Path, name: str) -> str:
    """A name for a new file that resembles that of the preset."""
    stem = re.sub(r"[^\w]+", "-", name).strip("-")[:MAX_NAME_LENGTH] or "preset"
    numbered = (f"{stem}-{number}" if number > 1 else stem for number in range(1, MAX_FILES + MAX_PER_OWNER))
    return next(id for id in numbered if not os.path.lexists(folder / f"{id}{SUFFIX}"))


def _write(folder: Path, preset: OwnPreset) -> None:
    text = preset.to_yaml()
    if len(text.encode()) > MAX_BYTES:
        raise Refusal(problem("preset-too-large", limit=MAX_BYTES >> 10))
    write_text(folder / f"{preset.id}{SUFFIX}", text)


@contextlib.contextmanager
def _changing(saves: Path) -> Iterator[Path]:
    """The folder of the presets, for one change at a time. Raises Refusal if the system refuses the change."""
    folder = saves / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        lock = wait_for_lock(folder / "lock")
        try:
            yield folder
        finally:
            os.close(lock)
    except OSError as error:
        raise Refusal(problem("preset-unwritten", folder=folder, why=error.strerror or error)) from error


# ------------------------------------------------------------------------------------------ settings


def settings_of(spec: RunSpec, start: RunSpec | None = None, places: bool = False) -> dict[str, Any]:
    """The settings of a spec that a preset of it has: all, or those that differ from `start`; what is on this machine
    only with `places`. The name of a run is never among them."""
    changed = None if start is None else {change.path for change in changed_settings(spec, start)}
    if changed is not None and places:
        changed |= {change.path for change in differences([start, spec]) if change.path in PLACES}
    plain = spec.model_dump(mode="json")
    settings: dict[str, Any] = {}
    for path in fields():
        belongs = path != "name" and (places or path not in PLACES) and (changed is None or path in changed)
        value = _value_at(plain, path)
        if belongs and value is not ...:
            union = path if path in SPEC_CHOICES else union_of(path)
            if union:  # whatever it is a setting of has to be chosen, too
                _put(settings, f"{union}.kind", _value_at(plain, f"{union}.kind"))
            if path != union:
                _put(settings, path, value)
    return settings


def applied(preset: OwnPreset, spec: RunSpec) -> Applied:
    """The spec with the settings of a preset, as far as this version has them and their values are valid."""
    before = spec.model_dump()
    plain, problems = _overlaid(before, preset.settings, ""), []
    plain["name"] = spec.name
    while True:
        try:
            result = RunSpec.read(plain)
        except Refusal as refusal:
            fresh = [issue for issue in refusal.problems if _take_back(plain, before, issue.field)]
            problems += fresh
            if not fresh:  # nothing that could be left out
                return Applied(spec, [], problems + refusal.problems)
            continue
        return Applied(result, differences([spec, result]), problems)


def paths_of(preset: OwnPreset, outcome: Applied) -> set[str]:
    """The settings that applying a preset determines: those that it has, and those that it changes."""
    stated = {path for path in fields() if _value_at(preset.settings, path) is not ...}
    return stated | {change.path for change in outcome.changes}


def _overlaid(plain: Mapping[str, Any], settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The plain data of a spec with these settings in place of its own."""
    result = dict(plain)
    for name, value in ((str(name), value) for name, value in settings.items()):
        path, inner = f"{prefix}{name}", result.get(name)
        if path in SPEC_CHOICES and isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or not isinstance(inner, Mapping) or path in _LEAVES:
            result[name] = value
        elif path in SPEC_CHOICES and value.get("kind", inner["kind"]) != inner["kind"]:
            result[name] = dict(value)
        else:
            result[name] = _overlaid(inner, value, f"{path}.")
    return result


_LEAVES = frozenset(path for path in fields() if path not in SPEC_CHOICES)  # some are mappings themselves


def _take_back(plain: dict[str, Any], before: Mapping[str, Any], field: str) -> bool:
    """Undo what a preset has done to the setting that a problem belongs to. Returns whether it had done anything."""
    steps = field.split(".")
    prefixes = [".".join(steps[:count]) for count in range(len(steps), 0, -1)]
    path = next((prefix for prefix in prefixes if prefix in fields()), field)
    now, then = _value_at(plain, path), _value_at(before, path)
    if (union := union_of(path)) and _value_at(plain, f"{union}.kind") != _value_at(before, f"{union}.kind"):
        then = ...  # the other kind had a setting with this name
    if now is ... or now == then:
        return False
    *parents, last = path.split(".")
    inner = plain
    for parent in parents:
        inner = inner[parent]
    if then is ...:
        del inner[last]
    else:
        inner[last] = then
    return True


def _value_at(plain: Any, path: str) -> Any:
    """The value at a path; ... if there is none."""
    for step in path.split("."):
        plain = plain.get(step, ...) if isinstance(plain, Mapping) else ...
    return plain


def _put(plain: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        plain = plain.setdefault(parent, {})
    plain[last] = value
