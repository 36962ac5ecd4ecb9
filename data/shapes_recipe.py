"""Make `shapes.json`, `shapes_test.json` and the pictures in `shapes/`, each with a question and its answer.

    python data/shapes_recipe.py

A picture shows a shape in a colour, at any place, in any size, on a background that is never quite the same. Both data
sets have 60 pictures, each shape in each colour twice; those of `shapes_test` are drawn anew. So `shapes_test` shows
what was learned, on pictures that no model has ever seen: the demo model is pre-trained on others again
(`vision_model_recipe.py`). The same seed gives the same pictures. Only Pillow is needed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
SEED, SIDE = 11, 48  # pixels
COLOURS = {
    "red": (215, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 215), "yellow": (235, 205, 30),
    "purple": (140, 50, 170), "orange": (240, 130, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
QUESTION = "<image>What is in the picture?"
COPIES = 2  # pictures of each shape in each colour, in each data set
NAMES = ("shapes", "shapes_test")


def answer(colour: str, shape: str) -> str:
    return f"{'An' if colour[0] in 'aeiou' else 'A'} {colour} {shape}."


def draw_picture(colour: str, shape: str, rng: random.Random) -> Image.Image:
    """A picture of one shape. Its place, size and shade, and the background, are random."""
    ground = rng.randrange(225, 256)
    image = Image.new("RGB", (SIDE, SIDE), tuple(ground + rng.randrange(-8, 1) for _ in range(3)))
    ink = tuple(min(255, max(0, part + rng.randrange(-18, 19))) for part in COLOURS[colour])
    size = rng.randrange(28, 39)
    left, top = (rng.randrange(2, SIDE - size - 1) for _ in range(2))
    right, bottom = left + size, top + size
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=ink)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=ink)
    elif shape == "triangle":
        draw.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=ink)
    elif shape == "cross":
        third = size // 3
        draw.rectangle((left + third, top, right - third, bottom), fill=ink)
        draw.rectangle((left, top + third, right, bottom - third), fill=ink)
    else:
        draw.ellipse((left, top, right, bottom), outline=ink, width=max(4, size // 5))
    return image


def examples(name: str) -> Iterator[tuple[dict[str, object], Image.Image]]:
    """The rows of a data set, each with its picture."""
    rng = random.Random(f"{SEED} {name}")
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES] * COPIES
    rng.shuffle(kinds)
    for number, (colour, shape) in enumerate(kinds):
        file = f"shapes/{name}_{number:02}.png"
        row = {"instruction": QUESTION, "output": answer(colour, shape), "images": [file]}
        yield row, draw_picture(colour, shape, rng)


def main() -> None:
    (HERE / "shapes").mkdir(exist_ok=True)
    for name in NAMES:
        rows = []
        for row, picture in examples(name):
            picture.save(HERE / row["images"][0], optimize=True)
            rows.append(json.dumps(row))
        (HERE / f"{name}.json").write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
