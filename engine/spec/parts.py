"""Building blocks of every spec: parts with settings, choices between parts, and rejection of texts that no file can
store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from engine.core.problems import Problem, Refusal, problem
from engine.spec.explanations import MAX_PROBLEMS_SAID, problem_from_error, shortened, unknown_last
from engine.spec.fields import fields_of

# Half characters, cut off by some program, and NUL.
UNWRITABLE = re.compile("[\ud800-\udfff\0]")


class Part(BaseModel):
    """A group of settings. Unknown keys are rejected; numbers must be finite; a spec is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def read(cls, plain: Any) -> Self:
        """The settings from plain data. Raises Refusal with every problem, each at its field."""
        if not isinstance(plain, dict):
            raise Refusal(problem("spec-not-a-mapping"))
        if broken := list(_unwritable_texts(plain, "", set())):
            raise Refusal(broken)
        problems = list(_booleans_as_numbers(plain, cls))
        try:
            part = cls.model_validate(plain)
        except ValidationError as error:
            known = {wrong.field for wrong in problems}
            errors = sorted(error.errors(), key=lambda details: details["type"] == "extra_forbidden")
            explained = (problem_from_error(details, cls) for details in errors[:MAX_PROBLEMS_SAID])
            problems += [wrong for wrong in explained if wrong.field not in known]
            if more := len(errors[MAX_PROBLEMS_SAID:]):
                problems.append(problem("spec-more-problems", count=more))
        if problems:
            raise Refusal(unknown_last(problems))
        return part


def _booleans_as_numbers(plain: dict[str, Any], whole: type[Part]) -> Iterator[Problem]:
    """Every number given as true or false, which Python, and so pydantic, treats as 1 or 0."""
    for path, steps, code in _numbers_of(whole):
        value: Any = plain
        for step in steps:
            value = value.get(step) if isinstance(value, dict) else None
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else (value,)
        if any(isinstance(number, bool) for number in values):
            yield problem(code, path, given=shortened(value))


@cache
def _numbers_of(whole: type[Part]) -> list[tuple[str, list[str], str]]:
    """Every setting of a whole that is a number, or contains numbers: its path, the steps of it, and the code of the
    problem if it is something else."""
    numbers = ((path, _plain_types(info.annotation) & {int, float}) for path, info in fields_of(whole).items())
    return [
        (path, path.split("."), "spec-type-int" if int in types else "spec-type-float")
        for path, types in numbers
        if types
    ]


def _plain_types(annotation: Any) -> set[type]:
    """The types in an annotation, without containers: int and NoneType for `list[int] | None`."""
    if parts := get_args(annotation):
        return set().union(*map(_plain_types, parts))
    return {annotation} if isinstance(annotation, type) else set()


def _unwritable_texts(value: Any, path: str, seen: set[int]) -> Iterator[Problem]:
    """Every text in plain data, key or value, that cannot be stored in a file, or would cut a file name short. Shared
    objects are visited once."""
    if isinstance(value, str):
        if broken := UNWRITABLE.search(value):
            yield problem("spec-unwritable", path, found=ascii(broken[0])[1:-1])
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for key, inner in value.items() if isinstance(value, dict) else (("", element) for element in value):
            yield from _unwritable_texts(key, path, seen)
            named = isinstance(key, str) and key and not UNWRITABLE.search(key)
            yield from _unwritable_texts(inner, f"{path}.{key}".lstrip(".") if named else path, seen)


MAX_ENTRIES = 1000  # data sets, modules, rewards: each is looked up before the start


def setting(default: Any, label: str, help: str, *, essential: bool = False, **limits: Any) -> Any:
    """Declare one setting. `essential` shows it directly on the page; others are in collapsed groups. A list or a
    mapping has at most `MAX_ENTRIES` unless its limits say otherwise."""
    if isinstance(default, (list, dict)):
        limits = {"max_length": MAX_ENTRIES} | limits
        return Field(
            default_factory=lambda: default.copy(),
            title=label,
            description=help,
            json_schema_extra={"essential": essential},
            **limits,
        )
    return Field(default, title=label, description=help, json_schema_extra={"essential": essential}, **limits)


def _expand_kind(value: Any) -> Any:
    """`method: lora` in a file is short for `method: {kind: lora}`."""
    return {"kind": value} if isinstance(value, str) else value


Parts = TypeVar("Parts")
# A choice between parts by their `kind`: `OneOf[Lora | Full]`.
OneOf = Annotated[Parts, Field(discriminator="kind"), BeforeValidator(_expand_kind)]


def named_weights(value: Any) -> Any:
    """`datasets: [a, b]` in a file is short for `{a: 1, b: 1}`."""
    names = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    return dict.fromkeys(value, 1.0) if names else value
