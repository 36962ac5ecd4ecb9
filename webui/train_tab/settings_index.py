"""What the search box of the Train tab looks in: the words of every setting, in both languages and under the names that
other programs have for it. The page's script fetches it once, and browsers keep it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from engine.importer.table import Entry, entries, reasons
from engine.spec.run_spec import SPEC_CHOICES, fields, union_of
from webui.form.settings import MODEL, RUN_NAME, choices, element_id, essential, kinds_of, part_id, part_of
from webui.words import LANGUAGES, Words

PROGRAMS = {"llamafactory": "LLaMA-Factory", "axolotl": "Axolotl"}
OTHER_PURPOSES = frozenset({"evaluation", "export"})  # in the tables, besides the stages of a training
# Settings that `model_html.hidden_parts_css` hides: part or path → the text that says why, and what decides.
HIDDEN = {"vision": ("search-no-vision", MODEL), "hardware.num_machines": ("search-one-machine", "")}


@cache
def index_file(language: str) -> tuple[str, str]:
    """The name of the file, which changes with its content, and the content: JSON."""
    words = Words(language)
    settings = [*(_entry(path, words) for path in fields()), *_without_counterpart(words)]
    content = json.dumps(settings, ensure_ascii=False, separators=(",", ":"))
    return f"settings-{language}-{hashlib.sha1(content.encode()).hexdigest()[:12]}.json", content


def _entry(path: str, words: Words) -> dict[str, Any]:
    """One setting: its `id` on the page, the `part` that holds it, if that is closed at first, what is shown of it, and
    what is searched: `names`, from the most to the least like a name, and `text`."""
    both = [Words(language) for language in LANGUAGES]
    labels = [words.label(path), *(each.label(path) for each in both)]
    listed = [each.choice(path, value) for value in choices(path) for each in both]
    entry: dict[str, Any] = {
        "id": element_id(path),
        "path": path,
        "label": words.label(path),
        "where": words.part(part_of(path)) if path != RUN_NAME else "",
        "names": list(dict.fromkeys([*labels, path.rpartition(".")[2], path])),
        "theirs": list(other_names().get(path, ())),
        "text": " ".join(dict.fromkeys([*(each.help(path) for each in both), *listed, *choices(path)])),
    }
    if not essential(path) and path != RUN_NAME:
        entry["part"] = part_id(path)
    return entry | _hidden(path, words)


def _hidden(path: str, words: Words) -> dict[str, Any]:
    """When the setting is not shown: `kinds` of the `union` that have it, or never for a reason of this machine. `why`
    says so, and `instead` is the control that decides."""
    if union := union_of(path):
        kinds = kinds_of(path)
        names = words("list-separator").join(words.choice(union, kind) for kind in kinds)
        if len(kinds) == len(SPEC_CHOICES[union]):
            return {}
        why = words("search-only-with", what=words.label(union), kinds=names)
        part = {} if essential(union) else {"insteadPart": part_id(union)}
        return {"union": element_id(union), "kinds": kinds, "why": why, "instead": element_id(union)} | part
    code, decided_by = HIDDEN.get(path) or HIDDEN.get(part_of(path)) or ("", "")
    return {"why": words(code), "instead": element_id(decided_by) if decided_by else ""} if code else {}


def _without_counterpart(words: Words) -> list[dict[str, Any]]:
    """What other programs can set and this form cannot, or need not: found by its name, and `why` tells the reason."""
    known = {path.rpartition(".")[2] for path in fields()}.union(*other_names().values())
    listed: dict[str, dict[str, Any]] = {}
    for program, title in PROGRAMS.items():
        for key, counterpart in entries(program).items():
            if key in known or key in listed or not (reason := _reason(counterpart, words)):
                continue
            hints = reasons().get(counterpart.none or counterpart.same, {})
            listed[key] = {"id": "", "path": key, "label": key, "where": title, "names": [key], "theirs": []} | {
                "text": " ".join(hints.values()),
                "why": reason,
            }
    return list(listed.values())


def _reason(counterpart: Entry, words: Words) -> str:
    """Why the form has no setting for a key of another program; "" if it has."""
    if counterpart.paths:
        return words("search-elsewhere") if OTHER_PURPOSES.issuperset(counterpart.paths) else ""
    if counterpart.none:
        return words("search-not-here", why=reasons()[counterpart.none][words.language])
    return words("search-not-needed", why=reasons()[counterpart.same][words.language]) if counterpart.same else ""


@cache
def other_names() -> Mapping[str, tuple[str, ...]]:
    """Path of a setting → what other programs call it, if the name differs."""
    names: dict[str, dict[str, None]] = {}
    for program in PROGRAMS:
        for key, counterpart in entries(program).items():
            for purpose, target in counterpart.paths.items():
                path = target.removesuffix(".kind")
                if purpose in OTHER_PURPOSES:  # a setting of another form that has the same name
                    continue
                if path in fields() and key != path.rpartition(".")[2]:
                    names.setdefault(path, {})[key] = None
    return {path: tuple(keys) for path, keys in names.items()}
