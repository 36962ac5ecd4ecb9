"""Checkpoints are written only if they fit on the disk: older ones are deleted first, then the training waits."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.core import hardware
from engine.core.problems import problem
from engine.core.run_warnings import write_warning
from engine.core.rundir import COMPLETE_FILE, WAITING_FOR_SPACE, RunDir
from engine.worker.runtime.process_lifecycle import ProgressReport, rank

POLL_SECONDS = 1.0
MARGIN_BYTES = 4 << 20  # for the log, the curves and the file system's overhead
TOKENIZER_BYTES = 32 << 20  # of a large tokenizer, such as Gemma's
MARGIN_SHARE = 0.05  # of a checkpoint, for possible growth


class CheckpointSpace:
    """Disk space for the checkpoints of one run.

    `agree` distributes the result of rank 0, which alone checks the disk; `stop_requested` says, on all ranks alike,
    whether the run is to stop.
    """

    def __init__(
        self,
        run: RunDir,
        report: ProgressReport,
        agree: Callable[[bool], bool],
        stop_requested: Callable[[], bool],
    ):
        self.run, self.report, self.agree, self.stop_requested = run, report, agree, stop_requested

    def wait(self, estimate: Callable[[], int], step: int, max_steps: int, best: str) -> bool:
        """Return once there is space for a checkpoint: True; False if the run is to stop before.

        `estimate`: bytes of the first checkpoint; later ones are as large as the last. `best`: name of a checkpoint
        that is always kept.
        """
        needed = self._needed(estimate) if rank() == 0 else 0
        waits = False
        while not self.agree(rank() == 0 and self._fits(needed, step, best)):
            if self.stop_requested():
                self._tell("checkpoint-skipped", step, needed)
                return False
            if not waits:
                self._tell("checkpoint-waits", step, needed)
            waits = True
            self.report(
                WAITING_FOR_SPACE,
                step,
                max_steps,
                "steps",
                needed=needed,
                free=hardware.free_disk(self.run.path),
            )
            time.sleep(POLL_SECONDS)
        return True

    def _needed(self, estimate: Callable[[], int]) -> int:
        newest = self.run.checkpoints()[-1:]
        size = _folder_bytes(newest[0]) if newest else estimate()
        return int(size * (1 + MARGIN_SHARE)) + MARGIN_BYTES

    def _fits(self, needed: int, step: int, best: str) -> bool:
        """Whether the disk has space, after removing as few older checkpoints as necessary, but never the newest."""
        removed = []
        for folder in self.run.checkpoints()[:-1]:
            if hardware.free_disk(self.run.path) >= needed:
                break
            if folder.name != best:
                remove_checkpoint(folder)
                removed.append(folder.name)
        if removed:
            names = ", ".join(removed)
            write_warning(self.run, problem("checkpoints-removed", names=names, needed=_size(needed)), step)
        return hardware.free_disk(self.run.path) >= needed

    def _tell(self, code: str, step: int, needed: int) -> None:
        """For readers of the log; the page shows it while it lasts."""
        if rank() == 0:
            free = _size(hardware.free_disk(self.run.path))
            with contextlib.suppress(OSError):  # the disk may be full
                print(problem(code, step=step, needed=_size(needed), free=free).text(), flush=True)


def remove_checkpoint(folder: Path) -> None:
    """Its marker is removed first, so that a half-removed checkpoint never counts as complete."""
    (folder / COMPLETE_FILE).unlink()
    shutil.rmtree(folder)


def checkpoint_bytes(trainer: Any, *, adapter: bool) -> int:
    """The approximate size of a checkpoint: the trained weights of an adapter, otherwise all weights, the optimizer's
    state, and the tokenizer. With FSDP, transformers writes the trained weights twice; with DeepSpeed, it does so too,
    and the optimizer's state includes a copy of them in fp32, of which every process has its part."""
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad or not adapter]
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights += [weight for weight in weights if weight.requires_grad]
    states = _bytes(_tensors(getattr(trainer.optimizer, "state", {}).values()))
    if trainer.is_deepspeed_enabled:
        trained = _bytes(weight for weight in weights if weight.requires_grad) // 2
        states = trained + states * trainer.args.world_size
    return _bytes(weights) + states + TOKENIZER_BYTES


def _tensors(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, dict):
            yield from _tensors(value.values())
        elif hasattr(value, "element_size"):
            yield value


def _bytes(tensors: Any) -> int:
    """`ds_numel` is the whole number of elements of a weight that ZeRO-3 has divided."""
    return sum(getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size() for tensor in tensors)


def _folder_bytes(folder: Path) -> int:
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(folder) for name in names)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
