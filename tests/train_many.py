"""Prepare and train several runs one after the other in one process, without launcher and keeper.

`python -m tests.train_many FOLDER …`: the real worker code, its imports paid for once. An error of a run is left in
its error.json, as always, and the next one begins.
"""

import contextlib
import sys

from engine.worker.edge import edge
from engine.worker.prepare import prepare
from engine.worker.train import train

for folder in sys.argv[1:]:
    with contextlib.suppress(SystemExit), edge(folder) as run:
        prepare(run)
        train(run)
