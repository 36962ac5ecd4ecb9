"""What has to be known about a judge's scores, as sentences for the page and the command line. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.core.problems import NOTHING, Problem, problem, sentences

LOW_SHARE = 0.5  # of the judge's probability on the scores: with less, it mostly writes something else
MOSTLY_INCONSISTENT = 50.0  # percent of verdicts that change with the order
PLACES_NAMED = 5  # of rated rows that cannot be used
CHANCE = {"auc": 0.5, "agreement": 50.0}  # what guessing gives
# Sentences that say that a score is to be doubted.
CAUTIONS = (
    "judge-by-text", "judge-left-out", "judge-low-share", "judge-itself", "judge-inconsistent", "judge-images",
    "judge-never-compared", "judge-few-ratings", "judge-alike-thumbs", "judge-chance", "judge-rating-unscored",
    "judge-compared-none", "judge-compared-none-in-text", "judge-rating-unusable", "judge-without-reference",
)  # fmt: skip


def judge_notes(summary: Mapping[str, Any], known: Mapping[str, Any] | None) -> list[Problem]:
    """Everything about the judge of a finished evaluation; none without a judge. `known`: its last known agreement with
    a person's ratings."""
    judge = summary.get("judge")
    if not judge:
        return []
    titles = {model["id"]: model["title"] for model in summary["voices"]}
    return [*_reading(judge, titles), *_comparisons(judge, titles), *agreement_notes(judge["agreement"] or known)]


def _reading(judge: Mapping[str, Any], titles: Mapping[str, str]) -> Iterator[Problem]:
    if why := judge["why"]:
        yield problem("judge-by-text", name=judge["title"], why=sentences()[why["code"]])
    else:
        yield problem("judge-by-probabilities", name=judge["title"])
    if judge["left_out"]:
        answers = ", ".join(f"{titles[id]}: {count}" for id, count in judge["unscored"].items())
        yield problem("judge-left-out", count=judge["left_out"], answers=answers)
    if judge["cut"]:
        yield problem("judge-cut", count=judge["cut"])
    if judge["images"]:
        yield problem("judge-images", count=judge["images"])
    if judge["share"] is not None and judge["share"] < LOW_SHARE:
        yield problem("judge-low-share", share=f"{100 * judge['share']:.2g}")
    if judge["judges_itself"]:
        yield problem("judge-itself")


def _comparisons(judge: Mapping[str, Any], titles: Mapping[str, str]) -> Iterator[Problem]:
    for id, comparison in judge["comparisons"].items():
        if not comparison["rate"]:
            code = "judge-compared-none-in-text" if judge["why"] else "judge-compared-none"
            yield problem(code, count=comparison["none"], name=titles[id], against=titles[comparison["against"]])
            continue
        counts = {name: comparison[name] for name in ("win", "loss", "same", "inconsistent")}
        none = comparison["none"] or NOTHING
        total = sum(counts.values()) + comparison["none"]
        values = {"name": titles[id], "against": titles[comparison["against"]], "none": none, "count": total}
        yield problem("judge-comparison", rate=_with_interval(comparison["rate"], ".1f", " %"), **values, **counts)
        if (share := comparison["inconsistent_share"]) is not None and share > MOSTLY_INCONSISTENT:
            yield problem("judge-inconsistent", name=titles[id], share=f"{share:.0f}")


def agreement_notes(known: Mapping[str, Any] | None) -> Iterator[Problem]:
    """How far a judge agrees with a person; that this is not known, if it is None."""
    if not known:
        yield problem("judge-never-compared")
        return
    thumbs, pairs = known["thumbs"], known["preferences"]
    if max(thumbs["ratings"], pairs["ratings"]) < known["fewest"]:
        yield problem("judge-few-ratings", thumbs=thumbs["ratings"], pairs=pairs["ratings"], fewest=known["fewest"])
    elif thumbs["ratings"] and "auc" not in thumbs:
        yield problem("judge-alike-thumbs", count=thumbs["ratings"])
    if "auc" in thumbs and thumbs["ratings"] >= known["fewest"]:
        auc, kappa = (_with_interval(value, ".2f") for value in (thumbs["auc"], thumbs["best"]["kappa"]))
        best = _with_interval(thumbs["best"]["agreement"], ".0f")
        yield problem("judge-thumbs", count=thumbs["ratings"], auc=auc, best=best, kappa=kappa)
    if pairs["ratings"] >= known["fewest"]:
        yield problem("judge-preferences", count=pairs["ratings"], share=_with_interval(pairs["agreement"], ".0f"))
    if max(thumbs["ratings"], pairs["ratings"]) >= known["fewest"]:
        yield problem("judge-without-reference")
    if _may_be_chance(known):
        yield problem("judge-chance")
    if unscored := thumbs["unscored"] + pairs["unscored"]:
        yield problem("judge-rating-unscored", count=unscored)
    if unusable := known.get("unusable"):  # not kept by the first versions
        more = len(unusable) - PLACES_NAMED
        places = ", ".join(unusable[:PLACES_NAMED])
        yield problem("judge-rating-unusable", count=len(unusable), places=places, more=more if more > 0 else NOTHING)


def _may_be_chance(known: Mapping[str, Any]) -> bool:
    """Whether an interval with enough ratings contains what guessing gives, or lies below it."""
    measured = (("auc", known["thumbs"]), ("agreement", known["preferences"]))
    return any(
        own["ratings"] >= known["fewest"] and name in own and (own[name]["low"] or 0.0) <= CHANCE[name]
        for name, own in measured
    )


def _with_interval(value: Mapping[str, Any], digits: str, unit: str = "") -> str:
    shown = f"{value['value']:{digits}}{unit}"
    if value["low"] is None:
        return shown
    return f"{shown} [{value['low']:{digits}}, {value['high']:{digits}}]"
