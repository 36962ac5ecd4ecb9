"""What happens at each step besides learning: curves, progress, stop requests, markers of complete checkpoints."""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from engine.core.problems import Problem, Refusal, problem
from engine.core.run_warnings import write_warning
from engine.core.rundir import (
    COMPLETE_FILE,
    RunDir,
    append_lines,
    read_lines,
    read_object,
    write_json,
)
from engine.core.stages import STAGES
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.gpu_sampler import GpuSampler
from engine.worker.runtime.process_lifecycle import ProgressReport, rank
from engine.worker.training.disk_space import CheckpointSpace, checkpoint_bytes, remove_checkpoint
from engine.worker.training.loss_watch import LossWatch
from engine.worker.training.sharding import local_part

NOT_PLOTTED = re.compile(
    r".*(_runtime|_per_second)|eval_num_tokens|total_flos|step_time"
    r"|eval_frac_reward_zero_std|(eval_)?(completions|clip_ratio)/.*|.*/std"
)
# TRL's names for what the stages share → ours.
CURVE_NAMES = {
    "completions/mean_length": "answer_length",
    "completions/clipped_ratio": "cut_answers",
    "clip_ratio/region_mean": "clip_fraction",
    "cispo_clip_ratio": "clip_fraction",
}


def curve_name(name: str) -> str:
    """A curve's name in metrics.jsonl, with the prefix of a validation if it has one."""
    prefix = "eval_" if name.startswith("eval_") else ""
    bare = name.removeprefix(prefix)
    if bare.startswith("rewards/"):
        bare = bare.removesuffix("/mean")
    return prefix + CURVE_NAMES.get(bare, bare)


class LoggingRules(TrainerCallback):
    """When it is saved and logged in addition to what the arguments say."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if args.load_best_model_at_end and control.should_evaluate:
            control.should_save = True  # the best checkpoint must exist to be loaded
        if control.should_training_stop:
            control.should_log = True  # the curves end with the training
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """The last step is also logged if a validation ends the training, which is known only after it.

        The trainer does not log a step again that has already been logged.
        """
        if control.should_training_stop or control.should_evaluate:
            control.should_log = True
        return control


class RunCallback(LoggingRules):
    """Rank 0 writes metrics.jsonl, progress.json and the checkpoints' markers; all ranks stop at the same step."""

    def __init__(self, run: RunDir, report: ProgressReport, keep: int | None):
        self.run, self.report, self.keep = run, report, keep
        self.request_mtime = 0  # of the request file when it was last read, ns
        self.stopping = False
        self.began, self.time_before, self.tokens_before = time.monotonic(), 0.0, 0.0
        self.gpus = GpuSampler()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run continues from its checkpoint: in steps, in seconds and in tokens."""
        self.began = time.monotonic()
        for line in read_lines(self.run.metrics):
            if line["step"] <= state.global_step:
                self.time_before = line["time"]
                self.tokens_before = line.get("num_tokens", self.tokens_before)
        if state.num_input_tokens_seen:  # a trainer that counts in its state continues counting by itself
            self.tokens_before = 0.0
        self.report("training", state.global_step, state.max_steps, "steps")
        if state.is_world_process_zero:
            self.gpus.start()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.gpus.stop()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        values = {
            name: value
            for name, value in ((curve_name(theirs), value) for theirs, value in (logs or {}).items())
            if isinstance(value, (int, float)) and not NOT_PLOTTED.fullmatch(name) and name != "epoch"
        }
        if "num_tokens" in values:
            values["num_tokens"] += self.tokens_before
        if "train_loss" not in values:  # the summary at the end is not a point of a curve
            now = round(self.time_before + time.monotonic() - self.began, 3)
            own = values if any(name.startswith("eval_") for name in values) else values | self.gpus.take()
            line = {"step": state.global_step, "epoch": state.epoch or 0.0, "time": now, **own}
            with contextlib.suppress(OSError):
                append_lines(self.run.metrics, [line])
            print(" · ".join(f"{name} {_formatted(value)}" for name, value in line.items()), flush=True)
        if not _is_finite(values.get("loss", 0.0)):
            raise Refusal(_not_finite_problem(state.global_step, values["loss"]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.report("training", state.global_step, state.max_steps, "steps")
        if self.stop_is_requested(args) and not control.should_training_stop:
            self.stopping = True
            control.should_save = control.should_training_stop = True
        return super().on_step_end(args, state, control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.report("evaluating", state.global_step, state.max_steps, "steps")

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Mark the checkpoint as complete once every rank has written its part; only then remove older ones.

        Raises Refusal for weights that are NaN or infinite, which the loss may not show yet.
        """
        assert model is not None  # the Trainer's
        trained = (local_part(weight) for weight in model.parameters() if weight.requires_grad)
        if not all(weight.isfinite().all() for weight in trained):
            raise Refusal(_not_finite_problem(state.global_step, math.nan))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        folder = self.run.path / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            # "done": there is nothing left to train, whether by steps or by early stopping.
            done = control.should_training_stop and not self.stopping
            write_json(folder / COMPLETE_FILE, {"step": state.global_step, "done": done})
            self._prune(best=Path(state.best_model_checkpoint or ""))

    def _prune(self, best: Path) -> None:
        old = self.run.checkpoints()[: -self.keep] if self.keep else []
        for folder in old:
            if folder.name != best.name:
                remove_checkpoint(folder)

    def stop_is_requested(self, args: TrainingArguments) -> bool:
        """Whether rank 0 has seen a stop request. The others are told, so that none of them waits for a step that never
        comes."""
        return agreed(rank() == 0 and self._read_request(), args)

    def _read_request(self) -> bool:
        if os.path.lexists(self.run.pause):
            return True
        changed = self.run.request.stat().st_mtime_ns
        if changed != self.request_mtime:
            self.request_mtime = changed
            self.stop_requested = bool(read_object(self.run.request).get("stop"))
        return self.stop_requested


class SameSteps(TrainerCallback):
    """Ends a run that was resumed with another number of processes if it would have another number of steps than before
    (`steps`): then its place in the data would be another, too."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raises Refusal."""
        if state.max_steps != self.steps:
            values = {"before": self.steps, "now": state.max_steps}
            raise Refusal(problem("resume-other-steps", "hardware.num_processes", **values))


class LossWatchCallback(TrainerCallback):
    """Records in warnings.jsonl that the loss has gone wrong; if this should stop the run, a checkpoint is saved first.

    Runs after `RunCallback`, which marks that checkpoint as complete.
    """

    def __init__(self, run: RunDir, stops: bool):
        self.run, self.stops = run, stops
        self.reason: Problem | None = None  # the problem for which the run is to stop

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run remembers its losses; what was recorded then is not recorded again."""
        self.watch = LossWatch(args.get_warmup_steps(state.max_steps))
        for line in read_lines(self.run.metrics):
            if line["step"] <= state.global_step and line.get("loss") is not None:
                self.watch.add(line["step"], line["loss"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """The loss is the mean of all ranks, so all of them decide alike."""
        loss = (logs or {}).get("loss")
        problem = self.watch.add(state.global_step, loss) if loss is not None else None
        if problem and state.is_world_process_zero:
            write_warning(self.run, problem, state.global_step)
            print(problem.text(), flush=True)
        if problem and self.stops:
            self.reason, control.should_save = problem, True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raises Refusal if the run is to stop."""
        if self.reason:
            raise Refusal(self.reason)


def loss_watch(spec: RunSpec, run: RunDir) -> list[LossWatchCallback]:
    """The watch of a run's loss, if it has one; the loss of a stage that learns from its own answers means nothing."""
    watched = spec.logging.watch != "off" and not STAGES[spec.stage.kind].answers
    return [LossWatchCallback(run, stops=spec.logging.watch == "stop")] if watched else []


def agreed(flag: bool, args: TrainingArguments) -> bool:
    """Rank 0's result, on every rank."""
    if args.world_size == 1:
        return flag
    shared = torch.tensor([float(flag)], device=args.device)
    torch.distributed.broadcast(shared, src=0)
    return bool(shared.item())


def save_where_there_is_space(spec: RunSpec, trainer: Trainer, callback: RunCallback) -> None:
    """Let the trainer wait for disk space before each checkpoint; if it is to stop meanwhile, it stops without one."""
    save, args = trainer._save_checkpoint, trainer.args
    space = CheckpointSpace(
        callback.run,
        callback.report,
        lambda flag: agreed(flag, args),
        lambda: callback.stop_is_requested(args),
    )

    def save_checkpoint(model: torch.nn.Module, trial: Any) -> None:
        state, best = trainer.state, Path(trainer.state.best_model_checkpoint or "").name
        size = partial(checkpoint_bytes, trainer, adapter=spec.method.kind == "lora")
        if space.wait(size, state.global_step, state.max_steps, best):
            callback.report("training", state.global_step, state.max_steps, "steps")
            save(model, trial)
        else:
            callback.stopping = trainer.control.should_training_stop = True

    trainer._save_checkpoint = save_checkpoint  # type: ignore[method-assign]  # it is asked before it saves


def _formatted(value: float) -> str:
    """Four digits, or the whole integer part of a large number: nobody looks for step 1.235e+04."""
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _not_finite_problem(step: int, loss: float) -> Problem:
    return problem("loss-not-finite", "training.learning_rate", step=step, loss=loss)
