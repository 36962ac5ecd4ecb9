"""Write a training as a script that needs only the libraries: `python -m engine.worker.write_script RUN FOLDER`.

Prints problems as JSON and exits with 1 if the run cannot be written as one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from engine.core.problems import Refusal
from engine.core.rundir import RunDir
from engine.worker.runtime.process_lifecycle import library_imports, silence_warnings


def main() -> None:
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries is not an answer
    silence_warnings()
    with library_imports():
        from engine.worker.exporting.plain_script import write
    try:
        write(RunDir(Path(sys.argv[1])), Path(sys.argv[2]))
    except Refusal as refusal:
        print(json.dumps(list(map(dataclasses.asdict, refusal.problems)), default=str), file=output, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
