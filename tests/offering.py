"""A studio without a page, for tests that kill it: offers a standby for the spec in a file, and submits that spec, with
another name, when a line is written to its standard input. Where trainings can be held (`tests.hold`), that one is held
at its second step. `python -m tests.offering SPEC MODELS DATA SAVES`."""

from __future__ import annotations

import sys
from pathlib import Path

from engine.core import hardware
from engine.launch.workspace import Workplace
from engine.runs import engines, kinds, runs, standby
from tests.hold import hold_at


def main() -> None:
    text, models, data, saves = Path(sys.argv[1]).read_text(encoding="utf-8"), *map(Path, sys.argv[2:])
    spec, workplace = kinds.read(text), Workplace(models=(models,), data=data, saves=saves)
    hardware.memory = lambda: (16 << 30, 64 << 30)  # with little, there is no standby
    standby.enable()
    standby.offer(spec, workplace)
    print(standby._standby._reported().pid, flush=True)
    for _ in sys.stdin:
        # What is not the launcher's business may still change.
        run = runs.submit(spec.change("name", "other"), workplace, start=False)
        hold_at(run.dir, 2)
        engines.advance(workplace.saves, standby.hand_over)
        print(run.id, flush=True)


if __name__ == "__main__":
    main()
