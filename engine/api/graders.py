"""Graders of reinforcement jobs → rewards of GRPO, as far as there is one that gives the same order of answers.

GRPO compares the answers to one question with each other, so that a constant added to all of them changes nothing:
`ne` is `eq` with a negative weight.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.api.errors import ApiError
from engine.core.problems import NOTHING, problem, say

PARAM = "method.reinforcement.grader"
# Bounded throughout, since a run's request.json keeps the grader.
ANSWER = re.compile(r"\s{,20}\{\{\s{,20}sample\.output_text\s{,20}\}\}\s{,20}")
ITEM = re.compile(r"\s{,20}\{\{\s{,20}item\.([A-Za-z_]\w{,99})\s{,20}\}\}\s{,20}")
# Operations of string_check, and metrics of text_similarity → the reward, and its sign.
OPERATIONS = {
    "eq": ("exact", 1.0),
    "ne": ("exact", -1.0),
    "like": ("contains", 1.0),
    "ilike": ("contains_ignore_case", 1.0),
}
METRICS = {"rouge_1": "rouge_1", "rouge_2": "rouge_2", "rouge_l": "rouge_l", "bleu": "bleu"}
MAX_NAME_CHARACTERS = 100
MAX_FORMULA_CHARACTERS = 1000
MAX_GRADERS = 20


@dataclass(frozen=True)
class Rewards:
    """Weights of rewards, and the column that they compare with."""

    weights: Mapping[str, float] = field(default_factory=dict)
    column: str = ""


def rewards(grader: Mapping[str, Any]) -> Rewards:
    """The rewards of a grader. Raises ApiError with the reason if there are none like it."""
    kind, name = grader.get("type"), grader.get("name", "")
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARACTERS:
        raise _refused("api-grader-name", given=str(name)[:80], most=MAX_NAME_CHARACTERS)
    if isinstance(kind, str) and kind in REFUSED:
        raise _refused(REFUSED[kind], kind=kind)
    if not isinstance(kind, str) or kind not in KEYS:
        raise _refused("api-grader-type", kind=str(kind)[:80], known=", ".join(KEYS))
    if unknown := set(grader) - KEYS[kind] - {"type", "name"}:
        raise _refused("api-grader-key", kind=kind, key=min(unknown)[:80], known=", ".join(sorted(KEYS[kind])))
    return _weighted_sum(grader) if kind == "multi" else GRADERS[kind](grader)


def _string_check(grader: Mapping[str, Any]) -> Rewards:
    operation = grader.get("operation")
    if not isinstance(operation, str) or operation not in OPERATIONS:
        raise _refused("api-grader-operation", given=str(operation)[:80], known=", ".join(OPERATIONS))
    reward, sign = OPERATIONS[operation]
    return Rewards({reward: sign}, _compared_column(grader))


def _text_similarity(grader: Mapping[str, Any]) -> Rewards:
    metric = grader.get("evaluation_metric")
    if not isinstance(metric, str) or metric not in METRICS:
        raise _refused("api-grader-metric", given=str(metric)[:80], known=", ".join(METRICS))
    return Rewards({METRICS[metric]: 1.0}, _compared_column(grader))


GRADERS = {"string_check": _string_check, "text_similarity": _text_similarity}
KEYS = {
    "string_check": {"input", "reference", "operation"},
    "text_similarity": {"input", "reference", "evaluation_metric"},
    "multi": {"graders", "calculate_output"},
}
# Graders that OpenAI has and that are not offered, with the reason.
REFUSED = {"python": "api-grader-python", **dict.fromkeys(("score_model", "label_model"), "api-grader-model")}


def grader_of(weights: Mapping[str, float], column: str) -> dict[str, Any]:
    """The grader of a run whose rewards have these weights, and compare with this column of its rows. OpenAI has none
    like a pattern, a length, a reward model or a reward file: each of these is a grader of the type `python` whose
    source is a comment that says so."""
    parts = {name: _grader_like(name, column) for name in weights}
    if list(weights.values()) == [1.0]:
        return next(iter(parts.values()))
    formula = " + ".join(f"{weight:g} * {name}" for name, weight in weights.items()).replace("+ -", "- ")
    return {"type": "multi", "name": "rewards", "graders": parts, "calculate_output": formula}


def _grader_like(reward: str, column: str) -> dict[str, Any]:
    compares = {"name": reward, "input": "{{sample.output_text}}", "reference": f"{{{{item.{column}}}}}"}
    if reward in METRICS:
        return {"type": "text_similarity", "evaluation_metric": METRICS[reward], **compares}
    operation = next((name for name, (same, sign) in OPERATIONS.items() if same == reward and sign > 0), None)
    if operation:
        return {"type": "string_check", "operation": operation, **compares}
    note = say("api-grader-ours", reward=reward)
    return {"type": "python", "name": reward, "source": f"# {note}"}


def _compared_column(grader: Mapping[str, Any]) -> str:
    """The column of the rows that is compared with the whole answer."""
    answer, reference = grader.get("input"), grader.get("reference")
    column = ITEM.fullmatch(reference) if isinstance(reference, str) else None
    if not isinstance(answer, str) or not ANSWER.fullmatch(answer) or not column:
        raise _refused("api-grader-template", input=str(answer)[:80], reference=str(reference)[:80])
    return column[1]


def _weighted_sum(grader: Mapping[str, Any]) -> Rewards:
    """The rewards of several graders that a formula adds up: `0.7 * correct + 0.3 * short`."""
    graders, formula = grader.get("graders"), grader.get("calculate_output")
    if not isinstance(graders, dict) or not 0 < len(graders) <= MAX_GRADERS or not isinstance(formula, str):
        raise _refused("api-grader-multi")
    nested = any(isinstance(inner, dict) and inner.get("type") == "multi" for inner in graders.values())
    if nested or any(len(name) > MAX_NAME_CHARACTERS for name in graders):
        raise _refused("api-grader-multi")
    factors = _factors(formula, set(graders))
    parts = {name: rewards(inner if isinstance(inner, dict) else {}) for name, inner in graders.items()}
    columns = {part.column for part in parts.values()}
    if len(columns) > 1:
        raise _refused("api-grader-columns", columns=", ".join(sorted(columns)))
    weights: dict[str, float] = {}
    for name, part in parts.items():
        for reward, weight in part.weights.items():
            weights[reward] = weights.get(reward, 0.0) + weight * factors.get(name, 0.0)
    return Rewards(weights, columns.pop())


def _factors(formula: str, names: set[str]) -> dict[str, float]:
    """The factor of each name in a weighted sum. Raises ApiError for any other formula."""
    try:
        if len(formula) > MAX_FORMULA_CHARACTERS:
            raise ValueError
        factors = _linear(ast.parse(formula.strip(), mode="eval").body, names)
    except (ValueError, SyntaxError, RecursionError, MemoryError, OverflowError):
        raise _refused("api-grader-formula", given=formula[:80], names=", ".join(sorted(names)) or NOTHING) from None
    return {name: factor for name, factor in factors.items() if name}


def _linear(node: ast.expr, names: set[str]) -> dict[str, float]:
    """The factors of a sum; that of "" is its constant. Raises ValueError if it is not linear in the names."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and abs(value) <= 1000:
            return {"": float(value)}
        case ast.Name(id=name) if name in names:
            return {name: 1.0}
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _scaled(_linear(operand, names), -1.0)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as sign, right=right):
            first = _linear(left, names)
            second = _scaled(_linear(right, names), 1.0 if isinstance(sign, ast.Add) else -1.0)
            return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in first | second}
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            first, second = _linear(left, names), _linear(right, names)
            if set(first) == {""}:
                return _scaled(second, first[""])
            if set(second) == {""}:
                return _scaled(first, second[""])
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            first, second = _linear(left, names), _linear(right, names)
            if set(second) == {""} and second[""]:
                return _scaled(first, 1 / second[""])
    raise ValueError("not a weighted sum")


def _scaled(factors: Mapping[str, float], by: float) -> dict[str, float]:
    return {name: factor * by for name, factor in factors.items()}


def _refused(code: str, **values: Any) -> ApiError:
    return ApiError(400, problem(code, **values), PARAM, "invalid_grader")
