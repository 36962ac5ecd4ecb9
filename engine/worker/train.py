"""Training, top to bottom: `accelerate launch … --module engine.worker.train FOLDER`, one process per device."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from engine.core.problems import Refusal, problem
from engine.core.rundir import COMPLETE_FILE, RunDir, read_json, read_object
from engine.models.adapters import adapter_config
from engine.preflight.package_checks import trains_quantized
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.optional_packages import hide_unused_packages
from engine.worker.runtime.process_lifecycle import ProgressReport, library_imports, rank, run_lifecycle
from engine.worker.runtime.sharding import allow_sharding_on_cpu
from engine.worker.training.preload import import_libraries


def train(run: RunDir) -> None:
    """Train the run in its folder, from the newest complete checkpoint if there is one."""
    report = ProgressReport(run)
    report("loading")
    allow_sharding_on_cpu()

    # Imported here: the lock is held before torch begins to load.
    with library_imports():
        from datasets import Dataset
        from transformers import set_seed

        from engine.worker.data.lengths import group_by_length
        from engine.worker.evaluation import probe
        from engine.worker.models.loading import keep_initial, load_model
        from engine.worker.models.tokenizer import load_tokenizer
        from engine.worker.training.callbacks import RunCallback, loss_watch, save_where_there_is_space
        from engine.worker.training.context import TrainingContext
        from engine.worker.training.result import save_result
        from engine.worker.training.trainers import assert_effective, trainer_of

    spec = spec_of(run)
    set_seed(spec.training.seed)  # before the model: an adapter starts with random weights
    prepared = read_json(run.prepared / "summary.json")
    tokenizer = load_tokenizer(spec, prepared["model_path"])
    model = load_model(spec, prepared["model_path"])
    if rank() == 0:
        keep_initial(spec, model, run.initial)
    data = {split: Dataset.from_file(str(run.prepared / f"{split}.arrow")) for split in prepared["splits"]}
    probing = probe.begin(spec, run, model, tokenizer, data)

    callback = RunCallback(run, report, keep=spec.logging.save_total_limit)
    context = TrainingContext(spec, run, model, tokenizer, data, [callback, *loss_watch(spec, run)])
    trainer = trainer_of(spec.stage.kind)(context)
    group_by_length(spec, run, trainer)
    save_where_there_is_space(spec, trainer, callback)
    assert_effective(spec, run, trainer)
    resume_or_begin(run, trainer)
    report("saving", trainer.state.global_step, trainer.state.max_steps, "step")
    save_result(spec, run, trainer, tokenizer, complete=not callback.stopping)
    if not callback.stopping:
        probe.finish(probing, trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))


def spec_of(run: RunDir) -> RunSpec:
    return RunSpec.from_yaml(run.spec.read_text(encoding="utf-8"))


def _refuse_other_rows(checkpoint: Path, model: Any) -> None:
    """Raises Refusal for a checkpoint of an adapter that was trained with the whole embeddings, as versions before 0.2
    did where tokens were missing: what is loaded of it would not be what was trained."""
    config = getattr(model, "peft_config", {}).get("default")
    if config and config.trainable_token_indices and not adapter_config(checkpoint).get("trainable_token_indices"):
        raise Refusal(problem("resume-other-rows", "model.resize_embeddings"))


def resume_or_begin(run: RunDir, trainer: Any) -> None:
    """Train to the end: from the newest complete checkpoint, or from the beginning if there is none."""
    if rank() == 0:
        for folder in run.path.glob("checkpoint-*"):
            if not (folder / COMPLETE_FILE).exists():
                shutil.rmtree(folder)  # interrupted while it was being written
    trainer.accelerator.wait_for_everyone()
    newest = next(reversed(run.checkpoints()), None)
    if newest:
        _refuse_other_rows(newest, trainer.model)
        if "processes" in read_object(run.request):
            from engine.worker.training.callbacks import SameSteps

            trainer.add_callback(SameSteps(read_json(newest / "trainer_state.json")["max_steps"]))
    if newest and read_json(newest / COMPLETE_FILE)["done"]:
        # Only the result was missing. The trainer would take one more step before it checks the count.
        trainer.state = trainer.state.load_from_json(str(newest / "trainer_state.json"))
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        trainer._load_from_checkpoint(best or str(newest))
    else:
        trainer.args.eval_on_start &= newest is None  # a trained model is not a start
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)


if __name__ == "__main__":
    with run_lifecycle(sys.argv[1]) as training_run:
        hide_unused_packages(trains_quantized(spec_of(training_run)))
        with library_imports():  # for ranks of a launcher in a separate process
            import_libraries(spec_of(training_run).stage.kind)
        train(training_run)
