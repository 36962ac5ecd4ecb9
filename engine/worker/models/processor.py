"""The processor of a model that reads images: tokenizer and image processor, without those of videos and audio, which
require packages that are not needed here. Does not import torch.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from engine.core.problems import Problem, Refusal, problem
from engine.models.processor_files import has_image_processor, pixel_limits
from engine.spec.run_spec import RunSpec
from engine.worker.templates.image_tokens import ImageTokens, first_words

PixelLimits = tuple[int | None, int | None]  # least and most; None is the model's own


def load_image_tokens(
    path: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    remote_code: bool = False,
    files: str = "",
    pixels: PixelLimits = (None, None),
) -> ImageTokens:
    """The image tokens of the model in `path`. Raises Refusal if it reads no images, or its processor cannot be
    loaded. `files`: the folder of the processor's files, if it is not that of the model."""
    if not has_image_processor(Path(path)):
        raise Refusal(problem("model-without-images", "model.model_name_or_path"))
    try:
        # A copy, because tokenizing with padding leaves padding switched on in the tokenizer.
        processor = _processor(path, files or path, copy.deepcopy(tokenizer), remote_code)
    except Exception as error:  # a folder can make transformers raise anything
        reason = first_words(str(error)) or type(error).__name__
        raise Refusal(problem("images-not-processed", processor=Path(path).name, reason=reason)) from error
    if any(pixels):
        limits = pixel_limits(Path(files or path))
        if limits is None:
            raise Refusal(problem("image-size-fixed", "data.image_max_pixels", processor=type(processor).__name__))
        least, most = (limit or own for limit, own in zip(pixels, limits, strict=True))
        processor.image_processor.size = {"shortest_edge": least, "longest_edge": most}
    return ImageTokens(processor)


def image_tokens_or_problem(path: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> ImageTokens | Problem:
    """The same, with the problem as a value: it only matters for rows with images."""
    try:
        return load_image_tokens(path, tokenizer, **options)
    except Refusal as refusal:
        return refusal.problems[0]


def image_options(spec: RunSpec) -> dict[str, Any]:
    """What a spec says of the images of its rows, as options of `load_image_tokens`."""
    pixels = spec.data.image_min_pixels, spec.data.image_max_pixels
    return {"remote_code": spec.model.trust_remote_code, "pixels": pixels}


def _processor(path: str, files: str, tokenizer: PreTrainedTokenizerFast, remote_code: bool) -> Any:
    # Imported here: most models read no images.
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = AutoConfig.from_pretrained(path, trust_remote_code=remote_code)
    cls = PROCESSOR_MAPPING.get(type(config), None)
    if cls is None:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=remote_code)
    else:
        processor = _without_other_inputs(cls, tokenizer).from_pretrained(files)
    if getattr(processor, "image_processor", None) is None:
        raise ValueError("no image processor")
    return processor


def _without_other_inputs(cls: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The class of a processor of text and images alone, with this tokenizer."""
    from transformers import AutoImageProcessor

    def parts(_cls: Any, path: str, _dictionary: Any = None, **_options: Any) -> list[Any]:
        own = {"tokenizer": lambda: tokenizer, "image_processor": lambda: AutoImageProcessor.from_pretrained(path)}
        return [own[name]() if name in own else None for name in cls.get_attributes()]

    def check(self: Any, name: str, part: Any) -> Any:
        return type(None) if part is None else cls.check_argument_for_proper_class(self, name, part)

    own_methods = {
        "_get_arguments_from_pretrained": classmethod(parts),
        "check_argument_for_proper_class": check,
        "get_attributes": classmethod(lambda _cls: cls.get_attributes()),
    }
    return type(cls.__name__, (cls,), own_methods)
