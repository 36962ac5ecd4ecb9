"""The result of a run: weights, tokenizer, chat template, and the loss curve as a file."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Trainer

from engine.core.permissions import apply_umask
from engine.core.rundir import RESULT_FILE, RunDir, read_lines, write_json
from engine.models.processor_files import copy_processor_files, set_pixel_limits
from engine.spec.run_spec import RunSpec
from engine.worker.models.loading import is_reward_model, save_weights
from engine.worker.templates.conversations import end_of_turn_ids
from engine.worker.training.sharding import weights_for_file


def save_result(spec: RunSpec, run: RunDir, trainer: Trainer, tokenizer: Any, *, complete: bool) -> None:
    """Rank 0 writes adapter/ or model/ completely, then records the attempt in it."""
    trainer.accelerator.wait_for_everyone()
    whole = weights_for_file(spec, trainer)
    if not trainer.is_world_process_zero():
        return
    folder = run.adapter if spec.method.kind == "lora" else run.model
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "policy", model)  # PPO also trains a critic
    save_weights(spec, model, partial, run.initial, whole)
    tokenizer.save_pretrained(partial)
    copy_processor_files(Path(model.name_or_path), partial)
    if spec.data.image_min_pixels or spec.data.image_max_pixels:
        set_pixel_limits(partial, spec.data.image_min_pixels, spec.data.image_max_pixels)
    if is_reward_model(spec):
        from engine.worker.training.reward import write_evaluation

        write_evaluation(trainer, partial)
    else:
        generation_config(spec, model, tokenizer).save_pretrained(partial)
    write_json(
        partial / RESULT_FILE,
        {
            "attempt": run.attempt(),
            "complete": complete,
            "step": trainer.state.global_step,
            "saved": time.time(),
            "base": spec.model.model_name_or_path,
            "stage": spec.stage.kind,
            "peak_device_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        },
    )
    for file in partial.iterdir():
        apply_umask(file)  # safetensors writes files readable by the owner only
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    if spec.logging.plot_loss and run.metrics.exists():
        from engine.worker.training.loss_plot import (
            plot_loss,
        )  # matplotlib: a quarter of a second that the first step need not wait for

        plot_loss(read_lines(run.metrics), run.plot)


def generation_config(spec: RunSpec, model: Any, tokenizer: Any) -> GenerationConfig:
    """The base model's generation config, with the end-of-turn token of this run's template among those that end an
    answer."""
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    known = config.eos_token_id
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    turn_ends = end_of_turn_ids(tokenizer) if tokenizer.chat_template and spec.stage.kind != "pt" else []
    config.eos_token_id = list(dict.fromkeys([*turn_ends, *ends])) or tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config
