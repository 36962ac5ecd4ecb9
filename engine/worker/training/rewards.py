"""Reward functions: the answers that a model generated → a number for each.

The spec of a run says which it uses, with what weights; `engine.worker.training.grpo` learns from them.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import regex

from engine.core.problems import Refusal, problem
from engine.core.reasoning import split_reasoning, without_reasoning
from engine.evaluation.numeric_answers import last_number
from engine.spec.stage_settings import COMPARING_REWARDS, Answering
from engine.worker.evaluation import metrics

PATTERN_TIMEOUT_S = 1.0  # for the pattern, per answer: on some texts, some patterns would take longer than a lifetime
REWARD_FILE_FIELD = "stage.reward_file"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, and its context.

    `text` has no special tokens except the marks of reasoning; `ids` are as generated, including the end-of-turn token,
    if there is one. `reference` is the answer in the data; `opened`: the prompt ended within reasoning.
    """

    prompt: list[dict[str, Any]]
    prompt_ids: list[int]
    text: str
    ids: list[int]
    reference: str | None
    opened: bool | None = None

    @property
    def conclusion(self) -> str:
        """The text after the reasoning; empty if the answer ended within it."""
        return split_reasoning(self.text, opened=self.opened).answer

    @property
    def expected(self) -> str | None:
        """The reference after its reasoning."""
        return None if self.reference is None else without_reasoning(self.reference)


# None: there is nothing to compare this answer with, and it is neither good nor bad.
ScoreFunction = Callable[[Sequence[Answer]], list[float | None]]


def score_function(reward: str, stage: Answering, tokenizer: Any) -> ScoreFunction:
    """The function of a reward with the settings of `stage`; its results are checked to be numbers.

    Raises Refusal if its file or its model cannot be used.
    """
    score = REWARDS[reward](stage, tokenizer)

    def checked(answers: Sequence[Answer]) -> list[float | None]:
        scores = score(answers)
        for answer, value in zip(answers, scores, strict=True):
            if value is not None and not math.isfinite(value):
                raise Refusal(
                    problem(
                        "reward-not-finite",
                        "stage.rewards",
                        reward=reward,
                        given=value,
                        row=_question_excerpt(answer),
                    )
                )
        return scores

    return checked


def _per_answer(score: Callable[[Answer], float | None]) -> ScoreFunction:
    return lambda answers: [score(answer) for answer in answers]


# --------------------------------------------------------------------------------------- from the text


def _format_reward(stage: Any, _tokenizer: Any) -> ScoreFunction:
    """1 if the whole answer matches the pattern, else 0."""
    pattern = regex.compile(stage.reward_pattern, regex.DOTALL)

    def score(answer: Answer) -> float:
        try:
            return float(pattern.fullmatch(answer.text, timeout=PATTERN_TIMEOUT_S) is not None)
        except TimeoutError:
            print(f"The pattern took longer than {PATTERN_TIMEOUT_S:g} s and counts as not matched: {answer.text!r}")
            return 0.0

    return _per_answer(score)


def _exact_match_reward(*_: Any) -> ScoreFunction:
    """1 if the answer equals the reference, ignoring whitespace and reasoning, else 0."""

    def score(answer: Answer) -> float | None:
        return None if answer.expected is None else float(answer.conclusion.split() == answer.expected.split())

    return _per_answer(score)


def _numeric_reward(*_: Any) -> ScoreFunction:
    """1 if the last number in the answer, after its reasoning, equals the last one in the reference, else 0."""

    def score(answer: Answer) -> float | None:
        reference = last_number(answer.expected or "")
        return None if reference is None else float(last_number(answer.conclusion) == reference)

    return _per_answer(score)


def _contains_reward(*_: Any) -> ScoreFunction:
    """1 if the answer contains the reference, after its reasoning, else 0."""
    return _compared(lambda answer, reference: float(reference.strip() in answer))


def _contains_ignore_case_reward(*_: Any) -> ScoreFunction:
    """The same, ignoring case."""
    return _compared(lambda answer, reference: float(reference.strip().casefold() in answer.casefold()))


def _rouge_reward(metric: str) -> Callable[..., ScoreFunction]:
    """ROUGE of the answer, after its reasoning, and the reference: 0 to 1; None if the reference is too short."""

    def score(answer: str, reference: str) -> float | None:
        value = metrics.rouge(answer, reference).get(metric)
        return None if value is None else value / 100

    return lambda *_: _compared(score)


def _bleu_reward(*_: Any) -> ScoreFunction:
    """BLEU of the answer, after its reasoning, and the reference: 0 to 1."""
    return _compared(lambda answer, reference: metrics.sentence_bleu(answer, reference) / 100)


def _compared(score: Callable[[str, str], float | None]) -> ScoreFunction:
    """The score of the answer without its reasoning and the reference; None without a reference."""

    def checked(answer: Answer) -> float | None:
        reference = answer.expected or ""
        return score(answer.conclusion, reference) if reference.strip() else None

    return _per_answer(checked)


def _length_reward(stage: Any, _tokenizer: Any) -> ScoreFunction:
    """exp(-|n - target| / target) for an answer of n tokens: smooth, so that every token nearer counts."""
    target = stage.reward_length
    return _per_answer(lambda answer: math.exp(-abs(len(answer.ids) - target) / target))


# --------------------------------------------------------------------------------------- from a model


def _reward_model_score(stage: Answering, tokenizer: Any) -> ScoreFunction:
    """The score of a reward model run for prompt and answer together."""
    from engine.worker.training.reward_scorer import (
        load_reward_function,  # needs torch, which the others do not
    )

    score = load_reward_function(Path(stage.reward_model), tokenizer)
    return lambda answers: score([answer.prompt_ids for answer in answers], [answer.ids for answer in answers]).tolist()


# --------------------------------------------------------------------------------------- from a file


def _file_reward(stage: Any, _tokenizer: Any) -> ScoreFunction:
    """The result of `reward(prompt, completion, answer)` in the operator's file."""
    path = Path(stage.reward_file)
    module = _run_file(path)
    function = getattr(module, "reward", None)
    if not callable(function):
        known = ", ".join(name for name, value in vars(module).items() if callable(value)) or "—"
        raise Refusal(problem("reward-file-without-function", REWARD_FILE_FIELD, file=path, known=known))

    def score(answer: Answer) -> float:
        try:
            value = function(answer.prompt, answer.text, answer.reference)
        except (Exception, SystemExit) as error:  # someone else's file may raise anything
            raise Refusal(
                problem(
                    "reward-file-raises",
                    REWARD_FILE_FIELD,
                    file=path,
                    line=_line_in(path, error),
                    why=_error_text(error),
                    row=_question_excerpt(answer),
                )
            ) from error
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise Refusal(
                problem(
                    "reward-file-value",
                    REWARD_FILE_FIELD,
                    file=path,
                    given=repr(value)[:60],
                    row=_question_excerpt(answer),
                )
            )
        return float(value)

    return _per_answer(score)


def _run_file(path: Path) -> ModuleType:
    loader = SourceFileLoader("reward_file", str(path))  # Python, whatever its file name ends in
    spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
    assert spec is not None  # as the loader is given
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise Refusal(
            problem(
                "reward-file-broken",
                REWARD_FILE_FIELD,
                file=path,
                line=_line_in(path, error),
                why=_error_text(error),
            )
        ) from error
    return module


def _line_in(path: Path, error: BaseException) -> int | str:
    """The last executed line of the file when the error occurred."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno or "—"
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno or "—" for frame in reversed(frames) if frame.filename == str(path)), "—")


def _error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _question_excerpt(answer: Answer) -> str:
    """The question, shortened, so that the row can be found."""
    question = " ".join(str(answer.prompt[-1].get("content") or "").split()) if answer.prompt else ""
    return question if len(question) <= 80 else f"{question[:79]}…"


REWARDS: dict[str, Callable[[Any, Any], ScoreFunction]] = {
    "format": _format_reward,
    "exact": _exact_match_reward,
    "numeric": _numeric_reward,
    "contains": _contains_reward,
    "contains_ignore_case": _contains_ignore_case_reward,
    "rouge_1": _rouge_reward("rouge1"),
    "rouge_2": _rouge_reward("rouge2"),
    "rouge_l": _rouge_reward("rougeL"),
    "bleu": _bleu_reward,
    "length": _length_reward,
    "reward_model": _reward_model_score,
    "file": _file_reward,
}

# Whether the reward can compare with an answer in the data.
HAS_REFERENCE: dict[str, Callable[[str | None], bool]] = {
    **dict.fromkeys(COMPARING_REWARDS, lambda reference: bool((reference or "").strip())),
    "exact": lambda reference: reference is not None,
    "numeric": lambda reference: last_number(reference or "") is not None,
}


def check_references(rewards: Sequence[str], references: Sequence[str | None]) -> None:
    """Reject data without anything that a reward can compare with; report how many rows have nothing."""
    for reward in rewards:
        if reward in HAS_REFERENCE:
            there = sum(map(HAS_REFERENCE[reward], references))
            if not there:
                raise Refusal(problem("references-missing", "stage.rewards", reward=reward, rows=len(references)))
            if there < len(references):
                print(
                    f"{reward}: {len(references) - there} of {len(references)} rows have no answer to compare with",
                    flush=True,
                )
