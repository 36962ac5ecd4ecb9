"""Training, top to bottom: `accelerate launch … --module engine.worker.train FOLDER`, one process per device."""

from __future__ import annotations

import os
import sys

from engine.rundir import COMPLETE, RunDir, read_json
from engine.spec import RunSpec
from engine.worker.edge import Report, edge


def train(run: RunDir) -> None:
    """Train the run in its folder, from the newest whole checkpoint if there is one."""
    report = Report(run)
    report("loading")

    # Imported here: the lock is held and the page told before torch has even begun to load.
    from datasets import Dataset
    from transformers import set_seed

    from engine.worker.metrics import RunCallback
    from engine.worker.model import load_model
    from engine.worker.result import save_result
    from engine.worker.tokenizer import load_tokenizer
    from engine.worker.trainers import TRAINERS, assert_effective

    spec = RunSpec.from_yaml(run.spec.read_text(encoding="utf-8"))
    set_seed(spec.training.seed)  # before the model: an adapter begins with random weights
    prepared = read_json(run.prepared / "summary.json")
    tokenizer = load_tokenizer(spec, prepared["model_path"])
    model = load_model(spec, prepared["model_path"])
    data = {split: Dataset.from_file(str(run.prepared / f"{split}.arrow")) for split in prepared["splits"]}

    callback = RunCallback(run, report, keep=spec.logging.save_total_limit)
    trainer = TRAINERS[spec.stage.kind](spec, run, model, tokenizer, data, [callback])
    assert_effective(spec, run, trainer)
    drop_torn_checkpoints(run)
    newest = run.checkpoints()[-1:]
    trainer.train(resume_from_checkpoint=str(newest[0]) if newest else None)
    report("saving")
    save_result(spec, run, trainer, tokenizer, complete=not callback.stopping)


def drop_torn_checkpoints(run: RunDir) -> None:
    """Put aside checkpoints that were cut off while being written: the trainer counts them when it prunes."""
    if int(os.environ.get("RANK", "0")):
        return
    for folder in run.path.glob("checkpoint-*"):
        if not (folder / COMPLETE).exists():
            folder.rename(folder.with_name(f"torn-{folder.name}"))


if __name__ == "__main__":
    with edge(sys.argv[1]) as here:
        train(here)
