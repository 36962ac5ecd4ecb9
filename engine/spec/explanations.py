"""pydantic's errors as problems at their fields, with the most similar valid key or value."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from engine.core.problems import Problem, problem
from engine.spec.fields import choices_of, fields_of

MAX_PROBLEMS_SAID = 50  # per spec; nobody reads more, and finding suggestions takes time
NO_VALUE = "(nothing)"  # translated by engine/core/reasons.yaml
MAX_CHOICES_LISTED, MAX_NEAREST_LISTED = 12, 5  # a longer list is shortened to this many
UNKNOWN_KEY_CODES = ("spec-other-kind", "spec-unknown-key", "spec-key-for-extra", "spec-no-such-key")
UNKNOWN_CODES = (*UNKNOWN_KEY_CODES, "extra-unknown", "spec-more-problems")
WEIGHTED_FIELDS = ("data.datasets", "stage.rewards")  # mappings for which a list is a short form


def unknown_last(problems: Iterable[Problem]) -> list[Problem]:
    """The problems in their order, except that settings that do not exist come last: many may be left over from another
    program, and they would hide the others."""
    return sorted(problems, key=lambda problem: problem.code in UNKNOWN_CODES)


def problem_from_error(error: Any, whole: type[BaseModel]) -> Problem:
    """One of pydantic's errors about a `whole` as one of our problems."""
    # A union's location contains the chosen kind ("method.lora.r"); our path does not ("method.r").
    location = [str(step) for step in error["loc"]]
    if location[-1:] == ["[key]"]:  # of a mapping whose keys are a choice: the problem is at the mapping
        location = location[:-2]
    unions = {path.rpartition(".")[2]: kinds for path, kinds in choices_of(whole).items()}
    steps = [
        step for before, step in zip(["", *location], location, strict=False) if step not in unions.get(before, {})
    ]
    path, kind, context = ".".join(steps), error["type"], error.get("ctx", {})
    value = shortened(error.get("input"))
    if kind == "extra_forbidden":
        if path in fields_of(whole):  # belongs to another kind than the chosen one
            union = next(step for step in location if step in unions)
            chosen = next(step for step in location if step in unions[union])
            owners = [name for name, part in unions[union].items() if steps[-1] in part.model_fields]
            return problem("spec-other-kind", path, key=path, what=union, chosen=chosen, kinds=", ".join(owners))
        if hint := _did_you_mean(path, whole):
            return problem("spec-unknown-key", path, key=path, hint=hint)
        if "extra" in fields_of(whole):
            return problem("spec-key-for-extra", path, key=path)
        return problem("spec-no-such-key", path, key=path, known=", ".join(whole.model_fields))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = context.get("expected_tags") or ", ".join(map(repr, unions[steps[-1]]))
        tag = context.get("tag", error.get("input"))
        return _choice_problem(path, shortened(None if tag == "None" else tag), tags)
    if kind == "literal_error":
        return _choice_problem(path, value, context["expected"].replace(" or ", ", "))
    if error.get("input") is None and path in choices_of(whole):
        return _choice_problem(path, value, ", ".join(choices_of(whole)[path]))
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        sign = {"greater_than": ">", "greater_than_equal": "≥", "less_than": "<", "less_than_equal": "≤"}[kind]
        limit = next(iter(context.values()))
        return problem("spec-limit", path, given=value, limit=f"{sign} {limit:.12g}")
    if kind == "string_too_long":
        return problem("spec-too-long", path, limit=context["max_length"])
    if kind == "too_long":
        return problem("spec-too-many", path, limit=context["max_length"])
    type_names = ("int", "float", "finite", "bool", "string", "list", "dict")
    kind = "dict" if kind.startswith("model") else kind  # a part of the spec
    expected = next((word for word in type_names if kind.startswith(word)), "value")
    if path in WEIGHTED_FIELDS and expected == "dict":
        expected = "names"
    return problem(f"spec-type-{expected}", path, given=value)


def shortened(value: Any) -> str:
    if value is None:
        return NO_VALUE
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _choice_problem(path: str, value: str, choices: str) -> Problem:
    """The valid values: all choices or, of a long list, those similar to the given value."""
    options = [choice.strip().strip("'") for choice in choices.split(",")]
    value = "(empty)" if value == NO_VALUE else value
    if len(options) <= MAX_CHOICES_LISTED:
        return problem("spec-choice", path, given=value, choices=", ".join(options))
    if nearest := _nearest(value, options):
        return problem("spec-choice-near", path, given=value, choices=", ".join(nearest))
    return problem("spec-choice-many", path, given=value, choices=", ".join(options[:MAX_NEAREST_LISTED]))


def _nearest(value: str, options: list[str]) -> list[str]:
    """Those that begin with the given text, otherwise those that contain it, otherwise similar ones."""
    if not (text := value.casefold().strip()):
        return []
    begin = [choice for choice in options if choice.startswith(text)]
    inside = [choice for choice in options if text in choice]
    return (begin or inside)[:MAX_NEAREST_LISTED] or difflib.get_close_matches(text, options, MAX_NEAREST_LISTED, 0.6)


def _did_you_mean(path: str, whole: type[BaseModel]) -> str:
    """The known path most similar to a misspelt one; "" if none is similar. A known key at the wrong place is found by
    its last step, and keys of the same part take precedence."""
    known = list(fields_of(whole))
    parent, _, last = path.rpartition(".")
    beside = {field.rpartition(".")[2]: field for field in known if field.rpartition(".")[0] == parent}
    anywhere = {field.rpartition(".")[2]: field for field in reversed(known)}
    if last in anywhere:
        return anywhere[last]
    if not parent and (parts := difflib.get_close_matches(last, whole.model_fields, 1, 0.85)):
        return parts[0]
    for names in (beside, anywhere):
        short_for = [name for name in names if len(last) > 1 and _initials(name) == last]
        holding = [name for name in names if len(last) > 3 and f"_{last}_" in f"_{name}_"]
        nearest, near = (difflib.get_close_matches(last, names, 1, least) for least in (0.85, 0.6))
        if meant := short_for or nearest or holding or near:
            return names[meant[0]]
    return next(iter(difflib.get_close_matches(path, known, 1, 0.8)), "")


def _initials(name: str) -> str:
    """`lr` of `learning_rate`."""
    return "".join(word[:1] for word in name.split("_"))
