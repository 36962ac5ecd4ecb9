"""Try the tiny models of all architectures, or of those named: `python -m tests.zoo [FAMILY …]`."""

from __future__ import annotations

import sys

from tests import zoo
from tests.zoo.trial import Trial, trials


def line(trial: Trial) -> str:
    steps = {"build": trial.build, "load": trial.load, "train": trial.train}
    outcome = "; ".join(f"{step}: {text}" for step, text in steps.items() if text) or "ok"
    return f"{trial.family:26} {trial.class_name:44} {trial.parameters:>9,}  {outcome}"


def main(families: list[str]) -> None:
    rows = []
    for trial in trials(families or zoo.families()):
        rows.append(trial)
        print(line(trial), flush=True)
    counts = [sum(getattr(row, step) == "" for row in rows) for step in ("build", "load", "train")]
    print(f"of {len(rows)} families {counts[0]} built, {counts[1]} loaded again, {counts[2]} trained on text")


if __name__ == "__main__":
    main(sys.argv[1:])
