"""Do several runs one after the other in one process, without launcher and keeper: trainings, exports, evaluations.

`python -m tests.train_many FOLDER …`: the real worker code, its imports paid for once. An error of a run is left in
its error.json, as always, and the next one begins.
"""

import contextlib
import sys

from engine.core.rundir import RunDir, write_json, write_text
from engine.runs import kinds
from engine.spec.run_spec import Spec
from tests.forked import fork_programs, run_forking


def lay_out(run: RunDir, spec: Spec) -> RunDir:
    """A run that has been submitted and nothing more."""
    run.path.mkdir(parents=True)
    write_text(run.spec, spec.to_yaml())
    kind = {} if spec.kind == "training" else {"kind": spec.kind}
    write_json(run.request, kind | {"by": "", "submitted": 0, "queued": 0, "attempt": 1, "stop": None})
    return run


def train_many(*runs: RunDir) -> str:
    """Do them in one child process; what it prints."""
    return run_forking("-m", "tests.train_many", *(run.path for run in runs))


def main() -> None:
    fork_programs()
    from engine.evaluation import probe
    from engine.worker.evaluate import evaluate
    from engine.worker.export import export
    from engine.worker.prepare import prepare
    from engine.worker.runtime.process_lifecycle import run_lifecycle
    from engine.worker.train import train

    probe.budget = lambda _trained_s: probe.MAX_BUDGET_S  # on a busy machine, nothing is left out for lack of time
    steps = {"training": (prepare, train), "export": (export,), "evaluation": (evaluate,)}
    for folder in sys.argv[1:]:
        with contextlib.suppress(SystemExit), run_lifecycle(folder) as run:
            for step in steps[kinds.read(run.spec.read_text(encoding="utf-8")).kind]:
                step(run)


if __name__ == "__main__":
    main()
