"""Batches of examples of similar length, to reduce computation on padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Sampler
from transformers import Trainer

from engine.core.rundir import RunDir, read_object
from engine.spec.run_spec import RunSpec

# Batches whose examples are sorted together: more batches mean less padding, but also less randomness. Few examples are
# divided into several pools, because otherwise the same ones would meet in each epoch.
BATCHES_PER_POOL, MIN_POOLS = 100, 4


class LengthGroupedSampler(Sampler[int]):
    """The order of an epoch. Every example once; determined by seed and epoch alone, so that a resumed run finds its
    place.

    Each `batch` of examples, those of all processes together, has similar lengths. The batches come in random order,
    except that the one with the longest example is first: if something does not fit into memory, it shows at once.

    `epoch` returns the epoch that begins. A `set_epoch` would not work, because accelerate's does not reach a sampler
    from which several processes skip the batches trained on before a resume.
    """

    def __init__(self, lengths: np.ndarray, batch: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(length_grouped_order(self.lengths, self.batch, self.seed, self.epoch()).tolist())


def length_grouped_order(lengths: np.ndarray, batch: int, seed: int, epoch: int) -> np.ndarray:
    """Indices of all examples; those that do not fill a batch are at the end."""
    chance = np.random.default_rng([seed, epoch])
    shuffled = chance.permutation(len(lengths))
    whole = len(lengths) // batch
    pool = np.arange(len(lengths)) // (batch * max(min(BATCHES_PER_POOL, whole // MIN_POOLS), 1))
    ordered = shuffled[np.lexsort((-lengths[shuffled], pool))]
    batches = ordered[: whole * batch].reshape(whole, batch)[chance.permutation(whole)]
    if whole:
        longest = lengths[batches].max(axis=1).argmax()
        batches[[0, longest]] = batches[[longest, 0]]
    return np.concatenate([batches.ravel(), ordered[whole * batch :]])


def lengths_of(dataset: Any) -> np.ndarray:
    """Tokens of each example; with several answers, of the longer one. Read from the offsets, not the tokens."""
    names = [name for name in dataset.column_names if name.endswith("_ids")]
    first, *others = (pc.list_value_length(dataset.data.column(name)).to_numpy() for name in names)
    return first + np.max(others, axis=0) if others else first


def group_by_length(spec: RunSpec, run: RunDir, trainer: Trainer) -> None:
    """Let the trainer order its examples by length, if the spec says so and the trainer has no order of its own. A run
    that was resumed with another number of processes keeps its order."""
    arguments = trainer.args
    own_order = (
        type(trainer)._get_train_sampler is not Trainer._get_train_sampler
        or arguments.train_sampling_strategy != "random"
    )
    if not spec.data.group_by_length or spec.data.packing or own_order:
        return
    processes = read_object(run.request).get("processes", arguments.world_size)
    batch = arguments.per_device_train_batch_size * processes
    lengths = lengths_of(trainer.train_dataset)
    sampler = LengthGroupedSampler(lengths, batch, spec.training.seed, lambda: int(trainer.state.epoch or 0))
    trainer._get_train_sampler = lambda *_: sampler  # type: ignore[method-assign]  # no argument sets it
