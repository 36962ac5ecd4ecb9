"""What a person types, or a program sends, is judged in bounded time and memory."""

from __future__ import annotations

import difflib
import time

import pytest

from engine.core.problems import Refusal
from engine.spec import contradictions
from engine.spec.contradictions import spec_problems
from engine.spec.patterns import MAX_STATES, pattern_states
from engine.spec.run_spec import RunSpec


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("abc", 3), ("a{5}", 5), ("a{2,7}", 7), ("a{3,}", 3), ("a*b+c?", 3), ("(ab){4}c", 9), ("(?:a{10}){10}", 100),
        ("(?P<x>ab){3}", 6), ("(?i)ab", 2), ("[a-z]{20}", 20), (r"\{5\}", 3), (r"[{5}]{2}", 2), ("(a|b){3}", 9),
        (r"\(x\){2}", 4), ("[]a]{3}", 3), ("", 0), ("{7}", 0), ("a{", 2), ("((a{9}", 9),
    ],
)  # fmt: skip
def test_states_are_counted_with_their_repeats(pattern: str, states: int) -> None:
    assert pattern_states(pattern) == states


def grpo(**stage: object) -> RunSpec:
    settings = {"kind": "grpo", "rewards": {"format": 1}, "reward_pattern": ".*"} | stage
    return RunSpec.read({"stage": settings, "model": {"model_name_or_path": "x"}, "data": {"datasets": ["y"]}})


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:(?:(?:[a-z]{500}){500}){500})",
        "(?:a{1000}){1000}",
        "a{999999999}",
        "((((a{99}){99}){99}){99})",
        "(?:" * 90 + "a{9}" + "){9}" * 90,
    ],
)
def test_a_pattern_that_would_take_all_memory_is_refused_before_it_is_compiled(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = grpo(reward_pattern=pattern)
    monkeypatch.setattr(contradictions.regex, "compile", lambda text: pytest.fail(f"{text} is compiled"))
    assert "pattern-too-large" in [problem.code for problem in spec_problems(spec)]


@pytest.mark.parametrize(
    "pattern", [".*Answer: [0-9]+", "[一-鿿]{5,}", r"(?:\d{1,3}(?:,\d{3})*){1,50}", "(a|b){100}x{400}"]
)
def test_patterns_that_people_write_are_taken(pattern: str) -> None:
    assert pattern_states(pattern) < MAX_STATES
    assert not [
        problem for problem in spec_problems(grpo(reward_pattern=pattern)) if problem.code.startswith("pattern")
    ]


@pytest.mark.parametrize(("batch", "accumulation", "group"), [(4, 2, 3), (1, 1, 2), (7, 5, 4), (12, 1, 8), (6, 1, 4)])
def test_the_sizes_that_are_offered_fit_and_none_is_nearer(batch: int, accumulation: int, group: int) -> None:
    spec = grpo(num_generations=group)
    spec = spec.change("training.per_device_train_batch_size", batch)
    spec = spec.change("training.gradient_accumulation_steps", accumulation)
    (refused,) = [problem for problem in spec_problems(spec) if problem.code == "group-does-not-divide"]
    answers = batch * accumulation
    divisors = [size for size in range(2, answers + 1) if answers % size == 0]
    offered = refused.values["nearest"]
    assert (offered == "—") == (not divisors)
    assert not divisors or abs(offered - group) == min(abs(size - group) for size in divisors)
    fitting = next(steps for steps in range(accumulation, 10_000) if steps * batch % group == 0)
    assert refused.values["accumulation"] == fitting


def test_sizes_of_billions_are_judged_at_once() -> None:
    begun = time.process_time()
    try:
        spec = grpo(num_generations=64)
        spec = spec.change("training.per_device_train_batch_size", 65_521)
        spec = spec.change("training.gradient_accumulation_steps", 65_521)
        spec_problems(spec)
    except Refusal:
        pass  # limits of the numbers themselves
    assert time.process_time() - begun < 20  # a hundredth of a second; if every divisor were tried, many minutes


def test_ten_thousand_unknown_keys_are_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: set[str] = set()  # keys with the names that they may mean: what takes the time
    closest = difflib.get_close_matches
    monkeypatch.setattr(difflib, "get_close_matches", lambda key, *others: compared.add(key) or closest(key, *others))
    with pytest.raises(Refusal) as refused:
        RunSpec.read({f"learning_rat{number}": 1 for number in range(10_000)})
    with pytest.raises(Refusal, match="too many entries"):
        grpo().change("extra", {f"adam_bet{number}": 1 for number in range(10_000)})
    spec = grpo().change("extra", {f"adam_bet{number}": 1 for number in range(1_000)})
    extra = [problem for problem in spec_problems(spec) if problem.field.startswith("extra")]
    assert 0 < len(compared) <= 100  # those that are named
    for problems, more in ((list(refused.value.problems), 9_950), (extra, 950)):
        assert len(problems) == 51
        assert (problems[-1].code, problems[-1].values["count"]) == ("spec-more-problems", more)
