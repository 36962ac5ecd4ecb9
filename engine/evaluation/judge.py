"""A judge: which model it is, what it is asked, how its written replies are read, and whether it is the same as before.

Scores are expected values over the judge's own probabilities (G-Eval: Liu et al. 2023, arXiv:2303.16634, section 2.3);
two answers are compared in both orders (Zheng et al. 2023, arXiv:2306.05685, section 3.4). The model itself is asked by
`engine.worker.evaluation.judging`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from engine.core.reasoning import split_reasoning
from engine.core.rundir import RunDir, read_json
from engine.evaluation.evaluation_settings import Judge
from engine.evaluation.trained_results import model_part_of_base, model_part_of_whole, trained_result
from engine.models.discovery import identity
from engine.spec.model_settings import Model

SCORES = ("1", "2", "3", "4", "5")
SIDES = ("A", "B")
MIN_SHARE = 0.01  # of the judge's probability on all scores together; with less, it has given none
MIN_RATINGS = 20  # with fewer, agreement with a person is a matter of chance
AGREEMENT_FILE = "agreement.json"  # in the report of an evaluation that compared its judge with a person's ratings

Verdict = Literal["win", "loss", "inconsistent", "same", "none"]


@dataclass(frozen=True)
class JudgeModel:
    """The model of a judge: how it is loaded, and the folder of its adapter, if it is one. `is_reward_model`: it writes
    nothing, so it cannot judge in words."""

    title: str
    model: Model
    adapter: str | None = None
    is_reward_model: bool = False

    @property
    def folder(self) -> str:
        """The folder that contains what makes this model different from others."""
        return self.adapter or self.model.model_name_or_path


def judge_model(settings: Judge) -> JudgeModel:
    """The model of a judge whose path is absolute: the result of a run, or a model folder."""
    if result := trained_result(settings.model):
        part = model_part_of_base(result) if result.adapter else model_part_of_whole(result)
        return JudgeModel(result.title, part, str(result.folder) if result.adapter else None, result.is_reward_model)
    part = Model.read({"model_name_or_path": settings.model, "quantization": {"kind": settings.quantization}})
    return JudgeModel(Path(settings.model).name, part)


def same_judge(settings: Judge) -> dict[str, Any]:
    """What makes a judge the same: the model, and everything that it is asked."""
    names = ("quantization", "language", "reason", "max_input_tokens", "max_reason_tokens")
    own = {name: getattr(settings, name) for name in names}
    return {"model": identity(settings.model), "criterion": criterion(settings), **own}


def agreement(run: RunDir, settings: Judge) -> Mapping[str, Any] | None:
    """How far this judge agreed with a person's ratings in an evaluation; None if that did not compare them."""
    known = read_json(run.report / AGREEMENT_FILE)
    return known if known and known.get("judge") == same_judge(settings) else None


# ------------------------------------------------------------------------------------------ what it is asked


@cache
def texts(language: str) -> Mapping[str, Any]:
    """The prompts of a language."""
    return yaml.safe_load((Path(__file__).parent / "judge.yaml").read_text(encoding="utf-8"))[language]


def criterion(settings: Judge) -> str:
    """The criterion of a judge; the default of its language if it has none of its own."""
    return settings.criterion.strip() or texts(settings.language)["criterion"]


def score_prompt(settings: Judge, question: str, reference: str | None, answer: str) -> str:
    """The prompt for the score of one answer."""
    own = texts(settings.language)
    ending = own["with_reason" if settings.reason else "without_reason"]
    prompt = _filled(settings, "score", question, reference, answer=answer)
    return f"{prompt} {ending}" if settings.language == "en" else prompt + ending


def compare_prompt(settings: Judge, question: str, reference: str | None, first: str, second: str) -> str:
    """The prompt for the better of two answers."""
    return _filled(settings, "compare", question, reference, first=first, second=second)


def _filled(settings: Judge, name: str, question: str, reference: str | None, **answers: str) -> str:
    own = texts(settings.language)
    mark = _mark(own[name] + own["reference_block"], [question, reference or "", *answers.values()])
    block = "" if reference is None else own["reference_block"].format(reference=reference, mark=mark)
    return own[name].format(criterion=criterion(settings), question=question, reference=block, mark=mark, **answers)


def _mark(template: str, judged: Sequence[str]) -> str:
    """What is added to the marks around the texts, so that no text contains any of them, whatever its case and spaces:
    an answer with "</answer>" in it must not end before its end. Mostly nothing."""
    names = re.findall(r"</([^<>]+)\{mark\}>", template)
    text = "".join("".join(judged).casefold().split())
    tried = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(mark for mark in tried if not any(f"{name}{mark}>".casefold() in text for name in names))


def room_of_each(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens each of several texts may have, so that together they have at most `room`: short ones are kept
    whole, and the long ones share what is left equally."""
    allowed, left = [0] * len(lengths), room
    for rest, at in zip(range(len(lengths), 0, -1), sorted(range(len(lengths)), key=lengths.__getitem__), strict=True):
        allowed[at] = min(lengths[at], left // rest)
        left -= allowed[at]
    return allowed


# ------------------------------------------------------------------------------------------ what it has replied


def written_score(text: str, settings: Judge, *, opened: bool = False) -> float | None:
    """The score in a written reply: the last one after its label, or a reply that is nothing else. `opened`: the reply
    begins within reasoning."""
    score = _written(text, settings, "score_begun", "[1-5]", opened)
    return None if score is None else float(score)


def written_side(text: str, settings: Judge, *, opened: bool = False) -> str | None:
    """The better side in a written reply, "A" or "B"."""
    return _written(text, settings, "compare_begun", "[AB]", opened)


def _written(text: str, settings: Judge, label: str, choice: str, opened: bool) -> str | None:
    parts = split_reasoning(text, opened=opened)
    reply = "" if parts.unfinished else parts.answer.strip().strip("*_`")
    named = re.escape(texts(settings.language)[label].rstrip(":："))
    after_label = [match["choice"] for match in after_labels(reply, named, choice)]
    alone = re.fullmatch(rf"({choice})[.。]?", reply)
    return after_label[-1] if after_label else alone[1] if alone else None


def after_labels(reply: str, label: str, choice: str) -> list[re.Match[str]]:
    """Where the reply has a choice after the label, both as patterns, such as "Score (1-5): 4"; "choice" is the group
    with the choice. A digit that is part of a larger number, or of a range, is none."""
    scale = r"(?:\s*[(（][^()（）]*[)）])?"
    value = rf"(?P<choice>{choice})(?![\w.,–-]*\d)(?!(?!分)\w)"
    return list(re.finditer(rf"(?:{label}){scale}[*_`]*\s*[:：][*_`\s]*{value}", reply))


def expected_score(probabilities: Sequence[float]) -> float | None:
    """Σ s·p(s) ÷ Σ p(s) over the scores 1 to 5; None if the judge gives all of them together next to nothing."""
    share = sum(probabilities)
    if not share >= MIN_SHARE:
        return None
    return sum(int(score) * p for score, p in zip(SCORES, probabilities, strict=True)) / share


def preferred(probabilities: Sequence[float]) -> str | None:
    """The more likely of "A" and "B"; None if neither is."""
    first, second = probabilities
    if not first + second >= MIN_SHARE or first == second:
        return None
    return SIDES[second > first]


def verdict(ours_first: str | None, ours_second: str | None) -> Verdict:
    """What two replies say of our answer: it was A in the first and B in the second. A judge that changes its mind with
    the order has decided by the order."""
    if ours_first is None or ours_second is None:
        return "none"
    if ours_first == ours_second:
        return "inconsistent"
    return "win" if ours_first == "A" else "loss"


POINTS: Mapping[str, float] = {"win": 1.0, "loss": 0.0, "inconsistent": 0.5, "same": 0.5}  # of a verdict, for us
