"""A studio without a page, for tests that kill it: offers a standby for the spec in a file, and submits that spec, with
another name, when a line is written to its standard input. `python -m tests.offering SPEC MODELS DATA SAVES`."""

from __future__ import annotations

import sys
from pathlib import Path

from engine.launch.workspace import Workplace
from engine.runs import kinds, runs, standby


def main() -> None:
    text, models, data, saves = Path(sys.argv[1]).read_text(encoding="utf-8"), *map(Path, sys.argv[2:])
    spec, workplace = kinds.read(text), Workplace(models=(models,), data=data, saves=saves)
    standby.enable()
    standby.offer(spec, workplace)
    print(standby._standby._reported().pid, flush=True)
    for _ in sys.stdin:
        # What is not the launcher's business may still change.
        print(runs.submit(spec.change("name", "other"), workplace).id, flush=True)


if __name__ == "__main__":
    main()
