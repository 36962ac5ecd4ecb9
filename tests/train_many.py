"""Prepare and train several runs one after the other in one process, without launcher and keeper.

`python -m tests.train_many FOLDER …`: the real worker code, its imports paid for once. An error of a run is left in
its error.json, as always, and the next one begins.
"""

import contextlib
import sys

from engine.core.rundir import RunDir, write_json, write_text
from engine.spec.run_spec import Spec
from tests.preloaded import run_python


def lay_out(run: RunDir, spec: Spec) -> RunDir:
    """A run that has been submitted and nothing more."""
    run.path.mkdir(parents=True)
    write_text(run.spec, spec.to_yaml())
    write_json(run.request, {"by": "", "submitted": 0, "queued": 0, "attempt": 1, "stop": None})
    return run


def train_many(*runs: RunDir) -> str:
    """Train them in one child process; what it prints."""
    return run_python("-m", "tests.train_many", *(run.path for run in runs))


def main() -> None:
    from engine.worker.prepare import prepare
    from engine.worker.runtime.process_lifecycle import run_lifecycle
    from engine.worker.train import train

    for folder in sys.argv[1:]:
        with contextlib.suppress(SystemExit), run_lifecycle(folder) as run:
            prepare(run)
            train(run)


if __name__ == "__main__":
    main()
