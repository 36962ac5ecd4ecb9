"""The images of a row: which parts and marks refer to one, and where each of them is.

Supported are LLaMA-Factory's `images` column with `<image>` in the texts; OpenAI's `image_url` with a data URL or a
path; `{"type": "image", "image": path}`; parts without a reference next to a column, as in TRL; and Parquet's
`{"bytes", "path"}`. In a canonical message, IMAGE_MARK represents an image, and `images` lists them. Nothing is ever
fetched from an address, and no file outside of the data folder is opened, not even through links.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.core.problems import Problem, Refusal
from engine.core.stages import Form
from engine.data.images import IMAGE_MARK, ImageSource, decoding_problem, image_in_bytes, image_in_file, image_in_url
from engine.data.row_values import Row

TEXT_MARK = "<image>"
FORMS_WITHOUT_IMAGES: tuple[Form, ...] = ("text",)
IMAGE_COLUMNS = frozenset(("images", "image"))
PART_TYPES = ("image", "image_url", "input_image")
REFERENCE_KEYS = ("image", "image_url", "url", "path", "data", "base64", "source")
NAMED_MARK = re.compile(f"({IMAGE_MARK}|{TEXT_MARK})")
ANY_MARK = re.compile(f"({IMAGE_MARK})")
ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def part_reference(part: dict[str, Any]) -> Any:
    """The reference to an image in a part of a content; None without one, in which case a column has to have it."""
    value = next((part[key] for key in REFERENCE_KEYS if part.get(key) is not None), None)
    if isinstance(value, dict) and "bytes" not in value:
        return next((value[key] for key in ("url", "path", "data") if value.get(key) is not None), value)
    return value


def image_column(row: Row) -> str | None:
    """The column with the row's images: the mapped one, or one with such a name that is not used for anything else."""
    if mapped := row.dataset.columns.get("images"):
        return mapped
    names = (
        name for name in sorted(IMAGE_COLUMNS, reverse=True) if row.values.get(name) and name not in row.dataset.used
    )
    column = next(names, None)
    if column is None:
        return None
    # A text in such a column may be a description, not an image of the row.
    plain = isinstance(row.values[column], (str, int, float))
    return None if plain and TEXT_MARK not in str(row.values) and not row.pictured else column


def attach_images(row: Row, example: dict[str, Any], form: Form) -> None:
    """Adds the checked images to each message. Raises Refusal for a row whose images cannot be used."""
    column = image_column(row)
    if not row.pictured and column is None:
        return
    value = row.values.get(column) if column else None
    in_column = [] if value in (None, "", []) else value if isinstance(value, list) else [row.parsed(value)]
    if len(in_column) == 1 and isinstance(in_column[0], list):  # the text of a table cell
        in_column = in_column[0]
    if not row.pictured and not in_column and (not column or TEXT_MARK not in str(row.values)):
        return
    if form in FORMS_WITHOUT_IMAGES:
        raise row.bad("row-images-stage")
    marks = NAMED_MARK if column else ANY_MARK
    _refuse_images_of_answers(row, example, marks)
    waiting, used = iter(in_column), 0
    for message in example["messages"]:
        references = iter(message.pop("images", ()))
        pieces = marks.split(message["content"])
        images: list[ImageSource] = []
        for number, mark in enumerate(pieces[1::2]):
            reference = next(references, None) if mark == IMAGE_MARK else None
            if reference is None:
                reference, used = next(waiting, None), used + 1
            if message["role"] != "user":
                raise row.bad("row-image-role", role=message["role"])
            if used > len(in_column) or reference is None:
                raise _uneven(row, example, marks, len(in_column))
            images.append(_image(row, reference))
            pieces[2 * number + 1] = IMAGE_MARK
        if images:
            message["content"] = "".join(pieces)
            message["images"] = images
    if used != len(in_column):
        raise _uneven(row, example, marks, len(in_column))


def _refuse_images_of_answers(row: Row, example: dict[str, Any], marks: re.Pattern[str]) -> None:
    """Raises Refusal for an image after the point where the two answers of a pair begin to differ, since the images of
    a row are those of its prompt."""
    for message in [*example.get("chosen", ()), *example.get("rejected", ())]:
        if marks.search(message["content"]):
            role = message["role"]
            raise row.bad("row-image-answer") if role == "user" else row.bad("row-image-role", role=role)


def _uneven(row: Row, example: dict[str, Any], marks: re.Pattern[str], images: int) -> Refusal:
    count = sum(len(marks.findall(message["content"])) for message in example["messages"])
    return row.bad("row-image-marks", marks=count, images=images)


def images_of(example: Mapping[str, Any]) -> Iterator[ImageSource]:
    """All images of a canonical row, in order."""
    for message in example.get("messages", ()):
        yield from message.get("images", ())


def broken_image(example: Mapping[str, Any]) -> Problem | None:
    """What is wrong with the first image of a row that cannot be decoded, without a place."""
    return next(filter(None, map(decoding_problem, images_of(example))), None)


def readable(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for display and for JSON: `<image>` represents an image."""
    made = []
    for message in messages:
        rest = {key: value for key, value in message.items() if key != "images"}
        content = message["content"].replace(IMAGE_MARK, TEXT_MARK) if message.get("images") else message["content"]
        made.append(rest | {"content": content})
    return made


def _image(row: Row, reference: Any) -> ImageSource:
    """The image for a reference. Raises Refusal with the place of the row."""
    try:
        if isinstance(reference, dict):
            content, path = reference.get("bytes"), reference.get("path")
            reference = content if content else path
        if isinstance(reference, (bytes, bytearray)):
            return image_in_bytes(bytes(reference), "bytes")
        if not isinstance(reference, str) or not reference:
            raise row.wrong_type("image", "path, data URL or bytes", reference)
        if reference.startswith("data:"):
            return image_in_url(reference)
        return image_in_file(_path(row, reference))
    except Refusal as refusal:
        known = "place" in refusal.problems[0].values
        raise refusal if known else Refusal(refusal.problems[0].at(row.place)) from None


def _path(row: Row, reference: str) -> Path:
    """The referenced file: in the data folder, or next to the file of the row."""
    root = row.dataset.root
    if reference.startswith("file://"):
        reference = urlsplit(reference).path
    if ADDRESS.match(reference):
        raise row.bad("row-image-address", image=reference[:80])
    if "\0" in reference or root is None:
        raise row.bad("row-image-missing", image=reference, folder=root or "?")
    try:
        meant = [(folder / reference).resolve() for folder in (root, row.place.file.parent)]
        # The answer must not reveal whether there is a file elsewhere.
        inside = [path for path in meant if path.is_relative_to(root.resolve())]
        existing = next((path for path in inside if path.is_file()), None)
    except (OSError, ValueError, RuntimeError):  # too long a name; circular links
        raise row.bad("row-image-missing", image=reference[:200], folder=root) from None
    if existing is None:
        raise row.bad("row-image-missing" if inside else "row-image-outside", image=reference, folder=root)
    return existing
