"""The probe at the end of an SFT run: what its verdicts mean, and how its file is read. Pure.

A few training prompts and a few general prompts are answered greedily by the model before and after the run;
`engine.worker.evaluation.probe` does this. Three things are measured, each with its own verdict: whether the answer to
a training prompt is the one in the data; how likely that one is (its loss in nats per token); and whether the model
still answers general prompts as before. The verdict is what a person reading the answers would say: a lower loss is
never called "learned" if no answer is right. General prompts have a separate verdict. The limits were chosen with
`python -m bench.probe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from engine.core.rundir import RunDir, read_json

LossVerdict = Literal["lower", "same", "higher", "forgot"]
TrainingVerdict = Literal["learned", "knew", "closer", "likelier", "changed", "unchanged", "forgot", "unasked"]
GeneralVerdict = Literal["same", "changed", "forgot"]

MAX_TRAINING_PROMPTS = 8  # training prompts; as many of them as there is time for
MAX_ANSWER_TOKENS = 48  # of an answer
MAX_REFERENCE_TOKENS = 256  # of a reference whose loss is computed
MAX_PROMPT_TOKENS = 1024  # longer ones are not used
BUDGET_SHARE, MIN_BUDGET_S, MAX_BUDGET_S = 0.1, 3.0, 30.0

# A tenth of a nat: on average every token of the reference is a tenth more likely than before (e^0.1 = 1.105). The
# effect of one training step on a text that it did not see is far smaller; that of an epoch on a text that it saw is
# mostly larger.
CHANGED_LOSS_NATS = 0.1
# Two nats: on average every token of the answer that the model would have given is seven times less likely than before
# (e^2 = 7.4). A new tone or a new length costs a few tenths; a model that lost its language costs five and more, since
# guessing among V tokens costs ln V, about 12 for a vocabulary of 150,000.
FORGOTTEN_LOSS_NATS = 2.0


def budget(trained_s: float) -> float:
    """Seconds that the probe may take after a training of this length: a tenth of it, at least three, at most thirty.
    After that no prompt is started, and an answer in progress is cut off."""
    return min(max(BUDGET_SHARE * trained_s, MIN_BUDGET_S), MAX_BUDGET_S)


def general_prompts() -> list[str]:
    """The prompts that come with Athanor."""
    return yaml.safe_load((Path(__file__).parent / "probe.yaml").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------ one prompt


def matches(reference: str, answer: str | None, *, cut: bool = False, full: bool = False) -> bool | None:
    """Whether an answer equals the reference, ignoring whitespace. If the answer is `full`, as long as a probe's answer
    may be, the reference only has to begin with it. None if that is unknown: it was not asked, or `cut` off while it
    was still right."""
    if answer is None:
        return None
    written, expected = " ".join(answer.split()), " ".join(reference.split())
    if written == expected:
        return True
    begins = expected.startswith(written.rstrip("\ufffd"))  # it may end with half a character
    if begins and cut:
        return None
    return bool(written) and begins and full


def same(before: str | None, after: str | None, *, cut: bool = False) -> bool | None:
    """Whether two answers are the same, as far as there was time to generate them; None if one was not asked."""
    if before is None or after is None:
        return None
    if cut:
        shorter, longer = sorted((before, after), key=len)
        return longer.startswith(shorter.rstrip("\ufffd"))
    return before == after


def loss_verdict(before: float | None, after: float | None) -> LossVerdict | None:
    """The verdict on the loss of one text, in nats per token; None if it was not computed. NaN and infinity are the
    worst."""
    if before is None:
        return None
    rise = float("inf") if after is None else after - before
    if rise >= FORGOTTEN_LOSS_NATS:
        return "forgot"
    return "lower" if rise <= -CHANGED_LOSS_NATS else "higher" if rise >= CHANGED_LOSS_NATS else "same"


# ------------------------------------------------------------------------------------------ the run


def summary(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The verdicts and the counts they are based on: {"verdict": on the training prompts, "general_verdict",
    "training": {…}, "general": {…}}."""
    kinds = {kind: [prompt for prompt in prompts if prompt["kind"] == kind] for kind in ("training", "general")}
    training, general = kinds["training"], kinds["general"]
    counts: dict[str, Any] = {
        "training": {
            "prompts": len(training),
            "answered": sum(prompt["right"] is not None for prompt in training),
            "right": sum(prompt["right"] is True for prompt in training),
            "right_before": sum(prompt["right_before"] is True for prompt in training),
            **{name: _mean(training, name) for name in ("loss_before", "loss_after")},
            **_loss_counts(training),
        },
        "general": {
            "prompts": len(general),
            "compared": sum(prompt["same"] is not None for prompt in general),
            "same": sum(prompt["same"] is True for prompt in general),
            **_loss_counts(general),
        },
    }
    verdicts = {
        "verdict": training_verdict(counts["training"]),
        "general_verdict": general_verdict(counts["general"]),
    }
    return verdicts | counts


def _loss_counts(prompts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The numbers of prompts with a loss, with each verdict on it, and with a different answer than before."""
    losses = [prompt["loss"] for prompt in prompts if prompt["loss"]]
    verdicts = {name: losses.count(name) for name in ("lower", "higher", "forgot")}
    return {"losses": len(losses), "changed": sum(prompt["same"] is False for prompt in prompts), **verdicts}


def _mean(prompts: Sequence[Mapping[str, Any]], name: str) -> float | None:
    known = [
        prompt[name] for prompt in prompts if prompt["loss_before"] is not None and prompt["loss_after"] is not None
    ]
    return sum(known) / len(known) if known else None


def training_verdict(counts: Mapping[str, Any]) -> TrainingVerdict:
    """What a person reading the answers to training prompts would say. The first that applies:

    "forgot": at least half of the answers in the data have become very unlikely: the training went wrong.
    "learned", "knew": at least half of the answers are right now; more than before, or not more.
    "likelier": at least half of the answers in the data are more likely now, and no answer is known.
    "closer": the same, and fewer than half of the answers are right.
    "unasked": there is neither an answer nor a loss: there was no time, or no row that can be asked, as those with
    images.
    "changed": anything else that is not "unchanged".
    """
    if not (counts["answered"] or counts["losses"] or counts["changed"]):
        return "unasked"
    if counts["losses"] and 2 * counts["forgot"] >= counts["losses"]:
        return "forgot"
    if counts["answered"] and 2 * counts["right"] >= counts["answered"]:
        return "learned" if counts["right"] > counts["right_before"] else "knew"
    if counts["losses"] and 2 * counts["lower"] >= counts["losses"]:
        return "closer" if counts["answered"] else "likelier"
    moved = any(counts[name] for name in ("changed", "lower", "higher", "forgot"))
    return "changed" if moved else "unchanged"


def general_verdict(counts: Mapping[str, Any]) -> GeneralVerdict | None:
    """The verdict on the general prompts: "forgot" if at least half of the earlier answers have become very unlikely,
    "same" if all are answered as before, otherwise "changed". None if there was no time for any."""
    if counts["losses"] and 2 * counts["forgot"] >= counts["losses"]:
        return "forgot"
    if not counts["compared"]:
        return None
    return "same" if counts["same"] == counts["compared"] else "changed"


def read(run: RunDir) -> dict[str, Any] | None:
    """The results of a run's probe; None if there are none. Results of an earlier version are judged again from the
    stored values."""
    result = read_json(run.probe)
    if not isinstance(result, dict) or not isinstance(result.get("prompts"), list):
        return None
    if "general_verdict" in result:
        return result
    prompts = [with_verdicts(prompt) for prompt in result["prompts"]]
    return result | summary(prompts) | {"prompts": prompts}


def with_verdicts(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt with its verdicts: `right` and `right_before` for a training prompt, `same`, and `loss`."""
    # An earlier version stored only that one of the two was cut off, not that one was as long as it may be.
    usual = "cancelled" if prompt.get("cut") else "length"
    finish = {when: prompt.get(f"finish_{when}") or usual for when in ("before", "after")}
    cut = {when: how == "cancelled" for when, how in finish.items()}
    right: dict[str, bool | None] = {"right": None, "right_before": None}
    if prompt["kind"] == "training":
        for name, when in (("right", "after"), ("right_before", "before")):
            reference, full = prompt["reference"] or "", finish[when] == "length"
            right[name] = matches(reference, prompt[when], cut=cut[when], full=full)
    return {
        **prompt,
        **right,
        "same": same(prompt["before"], prompt["after"], cut=any(cut.values())),
        "loss": loss_verdict(prompt["loss_before"], prompt["loss_after"]),
    }
