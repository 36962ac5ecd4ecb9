"""Fetch the model of the spec in a run's folder, as its preparation does first: `python -m tests.fetch FOLDER`.

Prints where it is; leaves progress.json, and error.json if it cannot be had.
"""

import sys

from engine.spec.run_spec import RunSpec
from engine.worker.models.fetch import fetch_model
from engine.worker.runtime.process_lifecycle import ProgressReport, run_lifecycle

if __name__ == "__main__":
    with run_lifecycle(sys.argv[1]) as run:
        print(fetch_model(RunSpec.from_yaml(run.spec.read_text(encoding="utf-8")), ProgressReport(run)))
