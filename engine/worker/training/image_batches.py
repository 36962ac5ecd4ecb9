"""Rows with images in training: batches with the model's inputs for them, and what a trainer needs to pass them on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

from transformers import Trainer

from engine.core.rundir import read_json
from engine.data.images import ImageSource, decode
from engine.worker.data.cache import SUMMARY_FILE
from engine.worker.data.images_column import IMAGES_COLUMN
from engine.worker.models.processor import image_options, load_image_tokens
from engine.worker.templates.image_tokens import ImageTokens
from engine.worker.training.context import TrainingContext

IMAGE_PROCESSES = 2  # per training process; they decode images
KL_PREFIX = "KL_"  # of the inputs with which KTO measures the drift
AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


class ImageBatches:
    """The batches of another collator with the inputs for the images: pixels, and marks of image tokens. Images are
    decoded here, in the data loader's processes, in parallel with training.

    `answers`: sequences of each example in a batch; the first of all examples come first, then the second.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], images: ImageTokens, answers: int):
        self.collator, self.images, self.answers = collator, images, answers

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        sources = [example[IMAGES_COLUMN] for example in examples]
        batch = self.collator([without_images(example) for example in examples])
        for prefix in ("", KL_PREFIX):
            if (name := f"{prefix}input_ids") in batch:
                marks = self.images.token_types(batch[name])
                batch |= {f"{prefix}{key}": value for key, value in marks.items()}
        return batch | pixel_inputs(self.images, sources, self.answers)


def without_images(example: Mapping[str, Any]) -> dict[str, Any]:
    """A prepared row without its images."""
    return {name: value for name, value in example.items() if name != IMAGES_COLUMN}


def pixel_inputs(images: ImageTokens, rows: Sequence[Sequence[Mapping[str, Any]]], answers: int = 1) -> dict[str, Any]:
    """The pixels for a batch of prepared rows, each with its images as records of IMAGES_COLUMN; all of them `answers`
    times. Empty if no row has an image."""
    sources = [[ImageSource(**image) for image in row] for row in rows if row]
    decoded = {source: decode(source) for source in set(chain.from_iterable(sources))}
    return images.pixels([[decoded[source] for source in row] for row in sources] * answers) if sources else {}


def has_images(context: TrainingContext) -> bool:
    """Whether any row of the run has an image."""
    return IMAGES_COLUMN in context.data["train"].column_names


def passing(kind: type[AnyTrainer], column: str) -> type[AnyTrainer]:
    """A trainer that passes one more column to its collator."""

    class Passing(kind):  # type: ignore[misc,valid-type]
        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    return Passing


def with_images(
    context: TrainingContext, kind: type[AnyTrainer], collator: Any, answers: int = 1
) -> tuple[type[AnyTrainer], Any, dict[str, Any]]:
    """Trainer, collator and arguments for the rows of a run: as they are, or for rows with images."""
    if not has_images(context):
        return kind, collator, {}
    # The tokenizer's threads do not survive in the processes that decode images.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    name = "dataloader_num_workers"
    batches = ImageBatches(collator, images_of_model(context), answers)
    return passing(kind, IMAGES_COLUMN), batches, {name: context.spec.extra.get(name, IMAGE_PROCESSES)}


def images_of_model(context: TrainingContext) -> ImageTokens:
    """The image tokens of the model that is trained."""
    path = read_json(context.run.prepared / SUMMARY_FILE)["model_path"]
    return load_image_tokens(path, context.tokenizer, **image_options(context.spec))
