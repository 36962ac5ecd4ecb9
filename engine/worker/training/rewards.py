"""What makes an answer good: reward functions, from answers that a model wrote to a number for each.

Which of them a run uses, and with what weight, is in its spec; what is learned from them, in `engine.worker.training.grpo`.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import regex

from engine.core.problems import Refusal, problem
from engine.spec.stage_settings import Answering

PATIENCE_S = 1.0  # for the pattern, per answer: some patterns take longer than anybody lives on some texts
FILE = "stage.reward_file"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, and what it is an answer to.

    `text` has no special tokens; `ids` are as they were written, the token that ends the turn included, if there is
    one. `reference` is the answer in the data.
    """

    prompt: list[dict[str, Any]]
    prompt_ids: list[int]
    text: str
    ids: list[int]
    reference: str | None


# None: there is nothing to compare this answer with, and it is neither good nor bad.
Score = Callable[[Sequence[Answer]], list[float | None]]


def score_of(reward: str, stage: Answering, tokenizer: Any) -> Score:
    """The function of a reward with the settings of `stage`, its answers checked to be numbers.

    Raises Refusal if its file or its model cannot be used.
    """
    score = REWARDS[reward](stage, tokenizer)

    def checked(answers: Sequence[Answer]) -> list[float | None]:
        scores = score(answers)
        for answer, value in zip(answers, scores, strict=True):
            if value is not None and not math.isfinite(value):
                raise Refusal(
                    problem(
                        "reward-not-finite", "stage.rewards", reward=reward, given=value, row=_named(answer)
                    )
                )
        return scores

    return checked


def _each(score: Callable[[Answer], float | None]) -> Score:
    return lambda answers: [score(answer) for answer in answers]


# --------------------------------------------------------------------------------------- from the text


def _format(stage: Any, _tokenizer: Any) -> Score:
    """1 if the whole answer matches the pattern, else 0."""
    pattern = regex.compile(stage.reward_pattern, regex.DOTALL)

    def score(answer: Answer) -> float:
        try:
            return float(pattern.fullmatch(answer.text, timeout=PATIENCE_S) is not None)
        except TimeoutError:
            print(f"The pattern took longer than {PATIENCE_S:g} s and counts as not matched: {answer.text!r}")
            return 0.0

    return _each(score)


def _exact(*_: Any) -> Score:
    """1 if the answer equals the reference but for white space, else 0."""

    def score(answer: Answer) -> float | None:
        return None if answer.reference is None else float(answer.text.split() == answer.reference.split())

    return _each(score)


def _numeric(*_: Any) -> Score:
    """1 if the last number in the answer equals the last one in the reference, else 0."""

    def score(answer: Answer) -> float | None:
        reference = last_number(answer.reference or "")
        return None if reference is None else float(last_number(answer.text) == reference)

    return _each(score)


# 7 · -3 · 1,234.5 · .5 · 2e-3; a minus sign behind a digit is a dash, as in 3-5.
NUMBER = re.compile(
    r"(?<![\d.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4})?"
)
SIGNS = str.maketrans("−－＋．", "--+.")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators and all; a unit or a % behind it is not looked at."""
    matches = NUMBER.findall(text.translate(SIGNS))
    return Decimal(matches[-1].replace(",", "")) if matches else None


def _length(stage: Any, _tokenizer: Any) -> Score:
    """exp(-|n - target| / target) of an answer of n tokens: smooth, so that every token nearer counts."""
    target = stage.reward_length
    return _each(lambda answer: math.exp(-abs(len(answer.ids) - target) / target))


# --------------------------------------------------------------------------------------- from a model


def _reward_model(stage: Answering, tokenizer: Any) -> Score:
    """The score of a reward model run for prompt and answer together."""
    from engine.worker.training.reward_scorer import reward_of  # with torch, which the others do without

    judge = reward_of(Path(stage.reward_model), tokenizer)
    return lambda answers: judge(
        [answer.prompt_ids for answer in answers], [answer.ids for answer in answers]
    ).tolist()


# --------------------------------------------------------------------------------------- from a file


def _file(stage: Any, _tokenizer: Any) -> Score:
    """What `reward(prompt, completion, answer)` of the operator's file says."""
    path = Path(stage.reward_file)
    module = _run_file(path)
    function = getattr(module, "reward", None)
    if not callable(function):
        known = ", ".join(name for name, value in vars(module).items() if callable(value)) or "—"
        raise Refusal(problem("reward-file-without-function", FILE, file=path, known=known))

    def score(answer: Answer) -> float:
        try:
            value = function(answer.prompt, answer.text, answer.reference)
        except (Exception, SystemExit) as error:  # a file of somebody else's may raise anything
            raise Refusal(
                problem("reward-file-raises", FILE, file=path, line=_line_in(path, error), why=_why(error), row=_named(answer))
            ) from error  # fmt: skip
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise Refusal(
                problem("reward-file-value", FILE, file=path, given=repr(value)[:60], row=_named(answer))
            )
        return float(value)

    return _each(score)


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("reward_file", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise Refusal(
            problem("reward-file-broken", FILE, file=path, line=_line_in(path, error), why=_why(error))
        ) from error
    return module


def _line_in(path: Path, error: BaseException) -> int | str:
    """The last line of the file that was under way when the error came up."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno or "—"
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), "—")


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _named(answer: Answer) -> str:
    """The question in a few words, so that the row can be found again."""
    question = " ".join(str(answer.prompt[-1].get("content") or "").split()) if answer.prompt else ""
    return question if len(question) <= 80 else f"{question[:79]}…"


REWARDS: dict[str, Callable[[Any, Any], Score]] = {
    "format": _format, "exact": _exact, "numeric": _numeric, "length": _length, "reward_model": _reward_model,
    "file": _file,
}  # fmt: skip

# Whether an answer in the data is one that the reward can compare with.
COMPARABLE: dict[str, Callable[[str | None], bool]] = {
    "exact": lambda reference: reference is not None,
    "numeric": lambda reference: last_number(reference or "") is not None,
}


def check_references(rewards: Sequence[str], references: Sequence[str | None]) -> None:
    """Refuse data in which a reward finds nothing to compare with; say how many rows have nothing."""
    for reward in rewards:
        if reward in COMPARABLE:
            there = sum(map(COMPARABLE[reward], references))
            if not there:
                raise Refusal(
                    problem("references-missing", "stage.rewards", reward=reward, rows=len(references))
                )
            if there < len(references):
                print(
                    f"{reward}: {len(references) - there} of {len(references)} rows have no answer to compare with",
                    flush=True,
                )
