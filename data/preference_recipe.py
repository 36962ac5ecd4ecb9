"""Make the sample data of the stages that learn from preferences, out of `alpaca_translate_zh.json`.

    python data/preference_recipe.py

translate_pairs_zh.json    each name three times: the right Chinese name beside another organisation's of the same
                           kind, beside one that breaks off, and beside one that is no name any more
translate_thumbs_zh.json   each name twice: the right one with a thumb up, one of these with a thumb down

Nothing is random. Only the standard library is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STRIDE = 3  # the names are in groups of a kind; this far away there is most often one more of it


def read_names() -> list[dict[str, str]]:
    return json.loads((HERE / "alpaca_translate_zh.json").read_text(encoding="utf-8"))


def flawed(rows: list[dict[str, str]], index: int) -> list[str]:
    """Three answers to the question of a row that are worse than its own: wrong, not whole, and not only the name."""
    right = rows[index]["output"]
    name = rows[index]["instruction"].removeprefix("将").removesuffix("翻译成中文。")
    return [rows[(index + STRIDE) % len(rows)]["output"], right[:-1], f"{name}的中文是{right}"]


def pairs() -> list[dict[str, Any]]:
    rows = read_names()
    return [
        {"instruction": row["instruction"], "input": "", "chosen": row["output"], "rejected": worse}
        for index, row in enumerate(rows)
        for worse in flawed(rows, index)
    ]


def thumbs() -> list[dict[str, Any]]:
    rows = read_names()
    return [
        {"instruction": row["instruction"], "input": "", "output": answer, "kto_tag": good}
        for index, row in enumerate(rows)
        for answer, good in ((row["output"], True), (flawed(rows, index)[index % 3], False))
    ]


FILES = {"translate_pairs_zh.json": pairs, "translate_thumbs_zh.json": thumbs}

if __name__ == "__main__":
    for file, make in FILES.items():
        (HERE / file).write_text(json.dumps(make(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
