"""The one mapping between the fields of a RunSpec and the controls of the page, both ways.

A setting gets its control from its type, so a new field of `engine/spec/run_spec.py` appears on the page because it
exists. What a control holds is text, a tick or a list; whether that is a good value is decided by RunSpec alone:
nothing is clamped or guessed here, and whatever cannot be read comes back as a Problem at its field.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape
from typing import Any, Literal, Union, get_args, get_origin

import gradio as gr

from engine.core.problems import Problem, Refusal, problem
from engine.spec.run_spec import SPEC_CHOICES, RunSpec, fields
from engine.spec.yaml_text import read_yaml, write_yaml
from webui import boxes
from webui.words import Words

DATASETS, MODEL = "data.datasets", "model.model_name_or_path"
# Names are picked, their weights are typed: one setting, two controls.
WEIGHTS = {f"{path}:weights": path for path in (DATASETS, "stage.rewards")}
DATASET_NAMES = (DATASETS, "data.eval_datasets")
ADAPTER = "model.adapter_path"
RESULT_SETTINGS = (ADAPTER, "stage.reward_model")  # what a finished run left
# Names of modules of the chosen model.
TARGET_MODULES, SAVED_MODULES = "method.target_modules", "method.modules_to_save"


# ------------------------------------------------------------------------------------------ types


@cache
def control_kind(path: str) -> str:
    """What kind of control the setting at `path` needs: a key of CONTROLS, PARSERS and FORMATTERS."""
    if path in SPEC_CHOICES:
        return "union"
    if path in WEIGHTS:
        return "weights"
    if path == MODEL:
        return "model"
    if path in RESULT_SETTINGS:
        return "result"
    if path in (*DATASET_NAMES, TARGET_MODULES, SAVED_MODULES):
        return "names" if path in DATASET_NAMES else "modules"
    kind = _plain_type(fields()[path].annotation)
    if get_origin(kind) is Literal:
        return "choice"
    if get_origin(kind) is list:
        return "choices" if get_origin(get_args(kind)[0]) is Literal else "list"
    if get_origin(kind) is dict or kind is dict:
        return "choices" if path in WEIGHTS.values() else "yaml"
    return {bool: "tick", int: "number", float: "number", str: "text"}[kind]


def _plain_type(annotation: Any) -> Any:
    """The type without `| None` and without Annotated."""
    if hasattr(annotation, "__metadata__"):
        return _plain_type(annotation.__origin__)
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain_type(next(member for member in get_args(annotation) if member is not type(None)))
    return annotation


def optional(path: str) -> bool:
    """Whether an empty control means "not set"."""
    return path in fields() and type(None) in get_args(fields()[path].annotation)


def choices(path: str) -> tuple[str, ...]:
    """The values that the setting at `path` may have, if there is a list of them; else ()."""
    if path in SPEC_CHOICES:
        return tuple(SPEC_CHOICES[path])
    kind = _plain_type(fields()[path].annotation)
    kind = get_args(kind)[0] if get_origin(kind) in (list, dict) else kind
    return get_args(kind) if get_origin(kind) is Literal else ()


@cache
def union_of(path: str) -> str | None:
    """The union whose kinds the setting belongs to: "method.r" → "method"."""
    return next((union for union in SPEC_CHOICES if path.startswith(f"{union}.")), None)


@cache
def kinds_of(path: str) -> tuple[str, ...]:
    """The kinds of its union that have the setting; () for a setting that is always there."""
    union = union_of(path)
    if not union:
        return ()
    name = WEIGHTS.get(path, path).rsplit(".", 1)[-1]
    return tuple(kind for kind, part in SPEC_CHOICES[union].items() if name in part.model_fields)


def essential(path: str) -> bool:
    return bool((fields()[path].json_schema_extra or {}).get("essential"))


def setting_of(path: str) -> str:
    """The setting that a path is of: "data.datasets.identity" → "data.datasets"; "" if it is of none."""
    steps = path.split(".")
    prefixes = (".".join(steps[:count]) for count in range(len(steps), 0, -1))
    return next((prefix for prefix in prefixes if prefix in fields()), "")


def part_of(path: str) -> str:
    """The part of the page that a setting is on."""
    return path.split(".")[0]


def element_id(path: str) -> str:
    return "f-" + path.replace(".", "-").replace(":", "--")


def part_id(path: str) -> str:
    return f"part-{part_of(path)}"


# ------------------------------------------------------------------------------------------ controls


def _attributes(path: str, words: Words, value: Any) -> dict[str, Any]:
    classes = ["field", f"field-{control_kind(path)}"]
    if kinds := kinds_of(path):
        union = element_id(union_of(path))
        classes += [f"of-{union}", *(f"of-{union}-{kind}" for kind in kinds)]
    return {
        "label": words("weights-of", what=words.label(WEIGHTS[path]))
        if path in WEIGHTS
        else words.label(path),
        "info": words("weights-help") if path in WEIGHTS else words.help(path),
        "elem_id": element_id(path),
        "elem_classes": classes,
        "interactive": True,
        "value": value,
    }


def _text(path: str, words: Words, value: Any) -> gr.Textbox:
    return gr.Textbox(**_attributes(path, words, value), lines=1, max_lines=1, min_width=120)


def _number(path: str, words: Words, value: Any) -> gr.Textbox:
    return boxes.number(**_attributes(path, words, value))


def _checkbox(path: str, words: Words, value: Any) -> gr.Checkbox:
    return gr.Checkbox(**_attributes(path, words, value), min_width=120)


def _labelled(path: str, words: Words) -> list[tuple[str, str]]:
    return [(words.choice(path, value), value) for value in choices(path)]


def _choice(path: str, words: Words, value: Any) -> gr.Dropdown:
    return gr.Dropdown(_labelled(path, words), **_attributes(path, words, value), min_width=120)


def _choices(path: str, words: Words, value: Any) -> gr.Dropdown:
    return gr.Dropdown(
        _labelled(path, words), multiselect=True, **_attributes(path, words, value), min_width=120
    )


def _names(path: str, words: Words, value: Any) -> gr.Dropdown:
    # Any name is let through here: a clone may name what is gone, and engine says so in a sentence. The choices
    # are what is on disk, and the page fills them in.
    return gr.Dropdown(
        [], multiselect=True, allow_custom_value=True, **_attributes(path, words, value), min_width=120
    )


def _model(path: str, words: Words, value: Any) -> gr.Dropdown:
    return gr.Dropdown([], allow_custom_value=True, **_attributes(path, words, value), min_width=120)


def _union(path: str, words: Words, value: Any) -> gr.Radio:
    # No general help: the sentence of the chosen kind stands below.
    return gr.Radio(_labelled(path, words), **_attributes(path, words, value) | {"info": None}, min_width=120)


def _yaml(path: str, words: Words, value: Any) -> gr.Textbox:
    about = _attributes(path, words, value)
    return gr.Textbox(**about | {"elem_classes": [*about["elem_classes"], "mono"]}, lines=3, max_lines=12)


CONTROLS: dict[str, Callable[[str, Words, Any], Any]] = {
    "text": _text, "number": _number, "tick": _checkbox, "choice": _choice, "choices": _choices, "list": _text,
    "names": _names, "modules": _names, "weights": _text, "model": _model, "result": _model, "union": _union,
    "yaml": _yaml,
}  # fmt: skip


# ------------------------------------------------------------------------------------------ control → value


def _read_text(path: str, raw: Any) -> Any:
    text = "" if raw is None else str(raw).strip()
    return None if optional(path) and not text else text


def _read_number(path: str, raw: Any) -> Any:
    text = boxes.typed(raw)
    return None if optional(path) and not text else text


def _read_list(path: str, raw: Any) -> list[str]:
    return [part for part in re.split(r"[,，、;；\s]+", boxes.typed(raw)) if part]


def _read_several(path: str, raw: Any) -> list[Any]:
    return list(raw or []) if isinstance(raw, (list, tuple, type(None))) else [raw]


def _read_modules(path: str, raw: Any) -> list[str]:
    # One of them may be a whole list that was pasted.
    return [name for part in _read_several(path, raw) for name in _read_list(path, part)]


def _read_yaml(path: str, raw: Any) -> Any:
    """Raises Refusal at the field if the text is no YAML."""
    value = read_yaml("" if raw is None else str(raw), path.split(":")[0])
    return {} if value is None else value


def _read_weights(path: str, raw: Any) -> Any:
    text = boxes.typed(raw)
    return _read_yaml(path, text if "\n" in text or text.startswith("{") else f"{{{text}}}")


PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "text": _read_text, "number": _read_number, "tick": lambda path, raw: raw, "choice": lambda path, raw: raw,
    "choices": _read_several, "list": _read_list, "names": _read_several, "modules": _read_modules,
    "weights": _read_weights,
    "model": _read_text, "result": _read_text, "union": lambda path, raw: raw, "yaml": _read_yaml,
}  # fmt: skip


def read(values: Mapping[str, Any]) -> tuple[RunSpec, list[Problem]]:
    """The spec that the controls say, and everything that is wrong with them, each at its field.

    Where a value cannot be read, the spec has the default instead, so that the rest can still be judged.
    """
    plain, problems = _plain(values)
    while True:
        try:
            return RunSpec.read(plain), problems
        except Refusal as refusal:
            problems += refusal.problems
            if not all(_drop(plain, setting_of(problem.field)) for problem in refusal.problems):
                return RunSpec(), problems


def _plain(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Nested plain data of the settings that apply, and what could not even be split into values."""

    def applies(path: str) -> bool:
        union = union_of(path)
        return not union or values.get(union) in kinds_of(path)

    plain: dict[str, Any] = {}
    problems: list[Problem] = []
    read_values: dict[str, Any] = {}
    for path, raw in values.items():
        try:
            read_values[path] = PARSERS[control_kind(path)](path, raw)
        except Refusal as refusal:
            problems += refusal.problems
    read_values = {path: value for path, value in read_values.items() if applies(path)}
    for typed, path in WEIGHTS.items():
        weights = read_values.pop(typed, {})
        if not isinstance(weights, dict):
            problems.append(problem("spec-type-dict", path, given=str(weights)[:60]))
            weights = {}
        if path in read_values:
            chosen = [str(name) for name in read_values[path]]
            problems += [
                problem("weight-without-set", path, name=str(name)[:60], chosen=", ".join(chosen) or "—")
                for name in weights
                if str(name) not in chosen
            ]
            read_values[path] = {name: weights.get(name, 1.0) for name in chosen}
    for path, value in read_values.items():
        *parents, last = path.split(".")
        inner = plain
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if path in SPEC_CHOICES:
            inner.setdefault(last, {})["kind"] = value
        else:
            inner[last] = value
    return plain, problems


def _drop(plain: dict[str, Any], path: str) -> bool:
    """Take the value at `path` out. Returns whether there was one."""
    *parents, last = path.split(".")
    inner = plain
    for parent in parents:
        inner = inner.get(parent, {})
    return inner.pop(last, ...) is not ...


# ------------------------------------------------------------------------------------------ value → control


def number_text(value: float | None) -> str:
    """A number as people write it: 3.0 → "3", 1e-05 → "1e-5"; none → ""."""
    if value is None:
        return ""
    return re.sub(r"e([+-])0*", lambda match: "e" + match[1].replace("+", ""), repr(value)).removesuffix(".0")


FORMATTERS: dict[str, Callable[[Any], Any]] = {
    "text": lambda value: value or "", "number": number_text, "tick": bool, "choice": str, "choices": list,
    "list": lambda value: ", ".join(map(str, value)), "names": list, "modules": list, "model": str, "union": str, "result": lambda value: value or "",
    "yaml": lambda value: write_yaml(value) if value else "",
    "weights": lambda value: ", ".join(f"{name}: {number_text(w)}" for name, w in value.items() if w != 1),
}  # fmt: skip


def control_values(spec: RunSpec) -> dict[str, Any]:
    """What every control holds for `spec`, by path."""
    return defaults() | chosen_values(spec)


def chosen_values(spec: RunSpec) -> dict[str, Any]:
    """What each control holds for `spec`. Settings of kinds that were not chosen are not mentioned."""
    plain = spec.model_dump(mode="json")
    shown = {}
    for path in paths():
        value: Any = plain
        for step in path.split(":")[0].split("."):
            value = value.get(step, ...) if isinstance(value, dict) else ...
            if value is ...:
                break
        if value is not ...:
            shown[path] = FORMATTERS[control_kind(path)](value["kind"] if path in SPEC_CHOICES else value)
    return shown


def paths() -> list[str]:
    """Every control by the path of its setting, in the order of declaration."""
    control_paths = list(fields())
    for typed, path in WEIGHTS.items():
        control_paths.insert(control_paths.index(path) + 1, typed)
    return control_paths


def defaults() -> dict[str, Any]:
    """What the controls of kinds that are not chosen hold: the declared defaults."""
    shown = {}
    for path in paths():
        if path not in SPEC_CHOICES and (union := union_of(path)):
            part, name = SPEC_CHOICES[union][kinds_of(path)[0]], WEIGHTS.get(path, path).rsplit(".", 1)[-1]
            shown[path] = FORMATTERS[control_kind(path)](part().model_dump(mode="json")[name])
    return shown


# ------------------------------------------------------------------------------------------ the form


class Form:
    """The controls of one page, holding `spec`. `place` puts one where it is called; every setting must be placed once."""

    def __init__(self, words: Words, spec: RunSpec):
        self.words = words
        self.built = control_values(spec)
        self.controls: dict[str, Any] = {}

    def place(self, path: str) -> Any:
        control = CONTROLS[control_kind(path)](path, self.words, self.built[path])
        self.controls[path] = control
        if path in SPEC_CHOICES:
            self._kinds(path)
        return control

    def _kinds(self, path: str) -> None:
        """One sentence for each kind; the style sheet shows that of the chosen one."""
        union = element_id(path)
        sentences = (
            f'<p class="of-{union} of-{union}-{kind}">{escape(self.words.kind(path, kind))}</p>'
            for kind in SPEC_CHOICES[path]
        )
        gr.HTML("".join(sentences), elem_classes=["kinds"])

    @property
    def inputs(self) -> list[Any]:
        return list(self.controls.values())

    def values(self, held: Sequence[Any]) -> dict[str, Any]:
        """What the controls hold, by path, from the arguments of a handler."""
        return dict(zip(self.controls, held, strict=True))

    def updates(self, spec: RunSpec) -> list[Any]:
        """New values for every control, in the order of `inputs`."""
        now = control_values(spec)
        return [now[path] for path in self.controls]

    def first(self, spec: RunSpec) -> list[Any]:
        """The same for a page that has just been opened: each value costs the browser some milliseconds, so only those
        that the page was not built with are sent."""
        now = control_values(spec)
        return [gr.skip() if now[path] == self.built[path] else now[path] for path in self.controls]


def kinds_css() -> str:
    """Rules that show a setting only while its kind is chosen: at once, without asking the server."""
    rules = []
    for path, kinds in SPEC_CHOICES.items():
        union = element_id(path)
        for kind in kinds:
            chosen = f'.gradio-container:has(#{union} input[value="{kind}"]:checked)'
            rules.append(f"{chosen} .of-{union}:not(.of-{union}-{kind}){{display:none!important}}")
    return "\n".join(rules)
