"""A spec being imported: which of the other program's keys set what, and what could not be imported. One key never
affects the others."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.importer.table import Entry, reasons
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import SPEC_CHOICES, RunSpec, Spec, fields

# What is wrong with an extra argument by itself, regardless of the others.
VALUE_PROBLEM_CODES = (
    "extra-unknown",
    "extra-has-a-field",
    "extra-type",
    "extra-limit",
    "spec-type-finite",
    "spec-choice",
)


class Draft:
    """Our settings as plain data. `settings` are all of the other program's; `kind` is the stage, or the kind of
    spec."""

    def __init__(self, spec_type: type[Spec], kind: str, settings: Mapping[str, Any]):
        self.spec_type, self.kind, self.settings = spec_type, kind, settings
        self.values: dict[str, Any] = {}
        self.origins: dict[str, tuple[str, Any]] = {}  # our path → their key and value; defaults have none
        self.defaults: dict[str, Any] = {}  # our path → the other program's default
        self.notes: list[Problem] = []

    # -------------------------------------------------------------------------------- put in

    def put(self, path: str, value: Any, name: str = "", *, beside: bool = False) -> None:
        """Set the setting at `path`; `name` is the key that sets it. If another key has set it before, the later one
        wins and this is noted, unless they are meant to be used together (`beside`)."""
        before = self.origins.get(path)
        if name and before and before[0] != name and not beside:
            if self.get(path) == value:
                self.needless(*before, "said-by-both")
            else:
                self.notes.append(problem("import-overruled", name=before[0], value=shortened(before[1]), by=name))
        *parents, last = path.split(".")
        place = self.values
        for step in parents:
            if not isinstance(place.get(step), dict):
                place[step] = {}
            place = place[step]
        info = fields(self.spec_type).get(path)
        listed = info is not None and str(info.annotation).startswith("list")
        place[last] = as_list(value) if listed else value
        if name:
            self.origins[path] = (name, self.settings.get(name, value))
        else:
            self.defaults.setdefault(path, value)

    def get(self, path: str) -> Any:
        place: Any = self.values
        for step in path.split("."):
            place = place.get(step) if isinstance(place, dict) else None
        return place

    def drop(self, path: str) -> None:
        *parents, last = path.split(".")
        place: Any = self.values
        for step in parents:
            place = place.get(step) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(last, None)
        for key in [key for key in self.origins if key == path or key.startswith(f"{path}.")]:
            del self.origins[key]

    # -------------------------------------------------------------------------------- notes

    def note(self, code: str, name: str, value: Any, why: str | Mapping[str, str] = "", **more: Any) -> None:
        """Note the outcome of a key: `why` is the name of a reason, or the reason in both languages."""
        reason = (reasons()[why] if isinstance(why, str) else why) if why else ""
        self.notes.append(problem(code, name=name, value=shortened(value), why=reason, **more))

    def needless(self, name: str, value: Any, why: str) -> None:
        self.note("import-needless", name, value, why)

    def missing(self, name: str, value: Any, why: str) -> None:
        self.note("import-none", name, value, why)

    def differs(self, name: str, value: Any, why: Mapping[str, str]) -> None:
        self.note("import-differs", name, value, why)

    def note_unused(self, name: str, value: Any, entry: Entry) -> None:
        """Note a key that has no counterpart here, or needs none."""
        shown = "…" if entry.secret and value else value
        if entry.none and not entry.asks_nothing(value):
            self.missing(name, shown, entry.none)
        else:
            self.needless(name, shown, entry.same or "nothing-asked")

    # -------------------------------------------------------------------------------- finish

    def spec(self) -> Spec:
        """The spec. What it does not accept is left out, with one note each. Raises Refusal only if something is wrong
        that no key has set."""
        self._drop_other_kinds()
        while True:
            try:
                spec = self.spec_type.read(self.values)
                # Contradictions between settings are kept: the form reports them and lets the user choose.
                contradictions = spec_problems(spec) if isinstance(spec, RunSpec) else []
                wrong = [
                    issue
                    for issue in contradictions
                    if issue.field.startswith("extra") and issue.code in VALUE_PROBLEM_CODES
                ]
            except Refusal as refusal:
                wrong = refusal.problems
            if not wrong:
                return spec
            for issue in wrong:
                self._leave_out(issue)

    def _drop_other_kinds(self) -> None:
        """Leave out settings of another kind than the chosen one, such as LoRA's in full training."""
        for union, kinds in SPEC_CHOICES.items():
            if union == "stage":
                continue
            held = self.get(union)
            if not isinstance(held, dict):
                continue
            default = fields(self.spec_type)[union].default.kind if union in fields(self.spec_type) else ""
            kind = held.setdefault("kind", default)
            if kind not in list(kinds):
                continue
            for key in [key for key in held if key != "kind" and key not in kinds[kind].model_fields]:
                origin = self.origins.get(f"{union}.{key}")
                self.drop(f"{union}.{key}")
                if origin:
                    self.note("import-needless", *origin, "other-kind")

    def _leave_out(self, wrong: Problem) -> None:
        """Remove what a problem is about. Raises Refusal if no key has set it."""
        field = f"extra.{wrong.values['name']}" if wrong.field == "extra" else wrong.field
        steps = field.split(".")
        prefixes = [".".join(steps[:count]) for count in range(len(steps), 0, -1)]
        path = next((prefix for prefix in prefixes if prefix in self.origins), None)
        path = path or next((prefix for prefix in prefixes if self.get(prefix) is not None), None)
        if path is None:
            raise Refusal(wrong)
        name, value = self.origins.get(path, (path, self.get(path)))
        self.drop(path)
        if path in self.defaults and self.defaults[path] != value:
            self.put(path, self.defaults.pop(path))
        self.note("import-value", name, value, {language: wrong.text(language) for language in ("en", "zh")})


def as_list(value: Any) -> list[Any]:
    """Lists are written as `a,b` on the command line; in YAML they can be lists."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return [] if value is None else [value]


def shortened(value: Any) -> str:
    """A value as it is shown in a sentence."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, list) and all(isinstance(element, (str, int, float)) for element in value):
        value = ",".join(map(str, value))
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "…"


Converter = Callable[
    [Draft, str, Any], None
]  # (draft, name, value): puts what it can into the draft, and notes what it cannot


def converters_by_name(*converters: Converter) -> dict[str, Converter]:
    """Name → converter, with the names used in the tables."""
    return {converter.__name__: converter for converter in converters}
