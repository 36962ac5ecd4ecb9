"""The tokens that stand for an image: the model's processor is asked for an image of each size, and the result is
checked on the first rows. Pixels are not needed for that, since a processor writes the same for all images of one size.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from engine.core.problems import Refusal, problem
from engine.data.images import ImageSource, Size, decode

ROWS_PROVED = 8  # first rows with images that are compared with the processor's result
PROBE_SIZES = ((64, 48), (48, 96))  # pixels
TEXT_KEYS = ("input_ids", "attention_mask")
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # the names that model families use for the marks of image tokens
MAX_REASON_CHARACTERS = 200
MAX_SIZES_REMEMBERED = 4096  # each with the text of its tokens, which may be 20 KB
Span = tuple[int, int]


class ImageTokens:
    """Image tokens of one processor. Raises Refusal if it does not show what it writes for an image."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.token: str = getattr(processor, "image_token", None) or ""
        self.expansions: dict[Size, str] = {}
        self.left_to_prove = ROWS_PROVED
        self.lock = threading.Lock()  # a processor's tokenizer is not thread-safe
        if not self.token:
            raise _unfit(processor, "no image_token")
        self.type_keys = self._type_keys()
        try:
            self.pixels([[Image.new("RGB", size)] for size in PROBE_SIZES], "np")
        except Exception as error:  # images of two conversations cannot be in one batch
            raise _unfit(processor, str(error) or type(error).__name__) from error

    def _type_keys(self) -> list[str]:
        """The names under which the model receives the marks of image tokens."""
        made = self._process([Image.new("RGB", PROBE_SIZES[0])], self.token)
        if not any(key in made for key in TOKEN_TYPES):
            return []
        try:
            marks = self.processor.create_mm_token_type_ids(made["input_ids"])
        except Exception as error:  # some processors need more than the tokens
            raise _unfit(self.processor, str(error) or type(error).__name__) from error
        # If there are both, one may be the tokenizer's own, which has nothing to do with images.
        keys = [key for key in TOKEN_TYPES if key in made and list(made[key][0]) == list(marks[0])]
        if TOKEN_TYPES[0] in made and TOKEN_TYPES[0] not in keys:
            raise _unfit(self.processor, f"{TOKEN_TYPES[0]} does not follow from the tokens")
        return keys

    def expansion(self, size: Size) -> str:
        """The text that stands for an image of `size` (width, height). Raises Refusal if the processor rejects it."""
        if size not in self.expansions:
            made = self._process([Image.new("RGB", size)], self.token)
            replaced = made["text_replacement_offsets"][0]
            if len(replaced) != 1 or not replaced[0]["replacement"]:
                raise _unfit(self.processor, "an image is not replaced by tokens")
            if len(self.expansions) >= MAX_SIZES_REMEMBERED:
                self.expansions.clear()
            self.expansions[size] = replaced[0]["replacement"]
        return self.expansions[size]

    def expand(
        self, text: str, spans: Sequence[Span], images: Sequence[ImageSource]
    ) -> tuple[str, list[Span], list[Span]]:
        """A rendered conversation with its images expanded; the `spans` of characters moved accordingly, and the spans
        of the images. Raises Refusal if the template has not written exactly one place for each image."""
        places = [match.span() for match in re.finditer(re.escape(self.token), text)]
        if len(places) != len(images):
            raise Refusal(problem("images-left-out", places=len(places), images=len(images)))
        pieces: list[str] = []
        written: list[Span] = []
        at = length = 0
        for (begin, end), image in zip(places, images, strict=True):
            expansion = self.expansion(image.size)
            length += begin - at
            pieces += [text[at:begin], expansion]
            written.append((length, length + len(expansion)))
            length, at = length + len(expansion), end
        grown = [after[1] - before[1] for before, after in zip(places, written, strict=True)]

        def moved(place: int) -> int:
            before = sum(end <= place for _, end in places)
            return place + (grown[before - 1] if before else 0)

        return "".join([*pieces, text[at:]]), [(moved(begin), moved(end)) for begin, end in spans], written

    def prove(self, text: str, images: Sequence[ImageSource], ids: Sequence[int]) -> None:
        """Raises Refusal unless the processor produces these ids from the rendered text and the images themselves. Only
        the first rows are compared."""
        if self.left_to_prove <= 0:
            return
        made = self._process([decode(image) for image in images], text)
        if list(made["input_ids"][0]) != list(ids):
            raise Refusal(problem("images-unproven"))
        self.left_to_prove -= 1

    def token_types(self, ids: Any) -> dict[str, Any]:
        """The marks of image tokens, under the names that the model expects; `ids` are (batch, length)."""
        marks = self.processor.create_mm_token_type_ids(ids.tolist()) if self.type_keys else None
        return {key: ids.new_tensor(marks) for key in self.type_keys}

    def pixels(self, images: Sequence[Sequence[Image.Image]], tensors: str = "pt") -> dict[str, Any]:
        """The image arguments of the forward pass for several conversations, as tensors."""
        texts = [self.token * len(own) for own in images]
        with self.lock:
            made = self.processor(images=list(map(list, images)), text=texts, return_tensors=tensors, padding=True)
        return {key: value for key, value in made.items() if key not in (*TEXT_KEYS, *self.type_keys)}

    def _process(self, images: list[Image.Image], text: str) -> Any:
        try:
            with self.lock:
                return self.processor(
                    images=images, text=[text], add_special_tokens=False, return_text_replacement_offsets=True
                )
        except Exception as error:  # a processor may reject an image in any way: because it is too flat, for example
            raise _unfit(self.processor, str(error) or type(error).__name__) from error


def placed_inputs(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Arguments of a forward pass on the model's device, pixels in its precision."""
    placed = {name: value.to(model.device) for name, value in inputs.items()}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in placed.items()}


def _unfit(processor: Any, reason: str) -> Refusal:
    return Refusal(problem("images-not-processed", processor=type(processor).__name__, reason=first_words(reason)))


def first_words(reason: str) -> str:
    """The beginning of an error in one line."""
    return " ".join(reason.split())[:MAX_REASON_CHARACTERS]


def media_token_ids(*sources: Any) -> list[int]:
    """The tokens that stand for images, videos or sound in a prompt, according to a processor and a configuration."""
    ids: set[int] = set()
    for kind in ("image", "video", "audio"):
        for name in (f"{kind}_token_id", f"{kind}_token_ids", f"{kind}_token_index"):
            for value in (getattr(source, name, None) for source in sources):
                values = value if isinstance(value, (list, tuple)) else [value]
                ids.update(number for number in values if isinstance(number, int))
    return sorted(ids)
