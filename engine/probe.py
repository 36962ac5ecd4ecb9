"""The small probe at the end of an SFT run: what the verdicts mean, and how its file is read. Pure.

A few prompts of the training and a few general ones are answered greedily by the model as it was before the run and as
it is after it; and the loss of a fixed text is compared, in nats per token: of a training prompt that of the reference,
of a general one that of the answer which the model gave before. `engine.worker.probe` does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from engine.rundir import RunDir, read_json

Verdict = Literal["learned", "changed", "unchanged", "forgot"]

PROMPTS = 4  # of the training, and as many general ones
TOKENS = 48  # of an answer
REFERENCE_TOKENS = 256  # of a reference, of which the loss is taken
PROMPT_TOKENS = 1024  # a longer one is not taken
SHARE, LEAST_S, MOST_S = 0.1, 1.0, 30.0

# A tenth of a nat: on average every token of the reference is a tenth likelier than it was (e^0.1 = 1.105). What one step
# of training does to a text that it did not see is far less; what an epoch does to one that it saw is mostly more.
LEARNED = 0.1
# Two nats: on average every token of the answer that the model would have given is seven times less likely than it was
# (e^2 = 7.4). A new tone or a new length costs some tenths; a model that lost its language costs five and more, as
# guessing among V tokens costs ln V, about 12 for a vocabulary of 150,000.
FORGOT = 2.0


def budget(trained_s: float) -> float:
    """Seconds that the probe may take, of a run that trained so long: a tenth of it, at least one, at most thirty. No
    prompt is begun after that, and an answer that is being written is cut."""
    return min(max(SHARE * trained_s, LEAST_S), MOST_S)


def general_prompts() -> list[str]:
    """The prompts that come with Athanor."""
    return yaml.safe_load((Path(__file__).parent / "probe.yaml").read_text(encoding="utf-8"))


def of_training(before: float | None, after: float | None, same: bool) -> Verdict:
    """About one prompt of the training, by the loss of its reference before and after, and whether the answer is the
    same. A loss that is not a number any more is the worst there is."""
    if before is not None:
        rise = _rise(before, after)
        if rise <= -LEARNED:
            return "learned"
        if rise >= FORGOT:
            return "forgot"
    return "unchanged" if same else "changed"


def of_general(before: float | None, after: float | None, same: bool) -> Verdict:
    """About one general prompt, by the loss of the answer that the model gave before."""
    if before is not None and _rise(before, after) >= FORGOT:
        return "forgot"
    return "unchanged" if same else "changed"


def _rise(before: float, after: float | None) -> float:
    return float("inf") if after is None else after - before


def of_run(verdicts: Mapping[str, Sequence[Verdict]]) -> Verdict:
    """About the run, from the verdicts on its "training" and its "general" prompts: "forgot" if at least half of
    either are; else "learned" if at least half of the training prompts are; else "changed" if anything is."""
    for verdict, kinds in (("forgot", ("training", "general")), ("learned", ("training",))):
        for kind in kinds:
            there = verdicts.get(kind, ())
            if there and 2 * list(there).count(verdict) >= len(there):
                return verdict
    every = [one for there in verdicts.values() for one in there]
    return "unchanged" if set(every) <= {"unchanged"} else "changed"


def read(run: RunDir) -> dict[str, Any] | None:
    """What the probe of a run has found; None while there is none."""
    found = read_json(run.probe)
    return found if isinstance(found, dict) and "verdict" in found else None
