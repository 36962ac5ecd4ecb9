"""A keeper whose run is another program, given as Python source: `python -m tests.stand_in FOLDER SOURCE`.

Everything else about it is real: the detached keeper, the lock, the log, the marker, the end of it. So what a
program can do to its keeper is tested in a second instead of a training's twenty.
"""

import dataclasses
import sys
from pathlib import Path

from engine.launch.command import Step
from engine.runs import kinds, queue, supervisor
from engine.spec.run_spec import Spec

# What a training leaves when all goes well; SOURCE may call it.
FINISH = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
def finish():
    attempt = json.loads((folder / "request.json").read_text())["attempt"]
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "result.json").write_text(json.dumps({"attempt": attempt, "complete": True}))
"""


def supervisor_command(folder: Path, source: str) -> list[str]:
    """In place of `queue.supervisor_command`: a supervisor with `source` for its program."""
    return [sys.executable, "-m", "tests.stand_in", str(folder), source]


def stand_in(source: str) -> None:
    """In this process, runs are started with `source` as their program from now on."""
    program = [sys.executable, "-c", FINISH + source]

    def steps(spec: Spec, folder: Path, _port: int, _cards: int) -> list[Step]:
        return [Step([*program, str(folder)], saves=spec.kind == "training")]

    for name, kind in kinds.KINDS.items():
        kinds.KINDS[name] = dataclasses.replace(kind, steps=steps)
    queue.supervisor_command = lambda folder: supervisor_command(folder, source)


if __name__ == "__main__":
    stand_in(sys.argv[2])
    sys.exit(supervisor.become_supervisor(Path(sys.argv[1])))
