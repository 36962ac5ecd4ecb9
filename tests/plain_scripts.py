"""Train runs, write each as a plain script and run it, in one process: `python -m tests.plain_scripts RUN …`.

Each script is written into `script/` in its run's folder. Prints JSON: for each run the losses of both trainings, and
how far the weights of both results are from each other; or the problems for which there is no script.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_lines
from tests.forked import fork_programs

CURVES = ("loss", "eval_loss")


def main() -> None:
    fork_programs()
    print(json.dumps([_compared(RunDir(Path(folder))) for folder in sys.argv[1:]]))


def _compared(run: RunDir) -> dict[str, Any]:
    from engine.worker.exporting.plain_script import write
    from engine.worker.prepare import prepare
    from engine.worker.train import train

    prepare(run)
    script = run.path / "script"
    script.mkdir()
    try:
        write(run, script)
    except Refusal as refusal:
        return {"problems": [reason.code for reason in refusal.problems]}
    train(run)
    runpy.run_path(str(script / "train.py"), run_name="__main__")
    history = json.loads((script / "result" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {
        "run": _curves(list(read_lines(run.metrics))),
        "script": _curves(history),
        "furthest": _furthest(run, script / "result"),
    }


def _curves(lines: list[dict[str, Any]]) -> list[tuple[int, str, float]]:
    """(step, curve, value), in order."""
    return sorted((line["step"], curve, line[curve]) for line in lines for curve in CURVES if curve in line)


def _furthest(run: RunDir, result: Path) -> float:
    """The largest difference of a weight in the two results; raises KeyError if one is missing."""
    from safetensors.torch import load_file

    ours = next(path for path in (run.adapter, run.model) if path.exists())
    (file,) = (path.name for path in ours.glob("*.safetensors"))
    theirs, own = load_file(result / file), load_file(ours / file)
    assert theirs.keys() == own.keys()
    return max((theirs[name] - own[name]).abs().max().item() for name in own)


if __name__ == "__main__":
    main()
