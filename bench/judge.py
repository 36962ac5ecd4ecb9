"""What a judge is worth on answers known to be right or wrong: `python -m bench.judge MODEL`.

Forty questions about capitals and sums, each with a right answer and the right answer to another question, as thumbs
and as preferences. Prints how far the judge agrees with them, asked with and without a reason.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from engine.core.rundir import append_lines, write_json
from engine.evaluation import report
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.launch.workspace import Workplace
from engine.runs import evaluations, failures, runs
from tests.conftest import wait_until

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw", "Cuba": "Havana",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Hungary": "Budapest",
    "Kenya": "Nairobi", "Peru": "Lima", "Thailand": "Bangkok",
}  # fmt: skip
COLUMNS = {"thumbs": ("messages", "kto_tag"), "pairs": ("messages", "chosen", "rejected")}


def questions() -> list[tuple[str, str, str]]:
    """Question, right answer, wrong answer."""
    cities = list(CAPITALS.values())
    shifted = [*cities[7:], *cities[:7]]
    about_capitals = [
        (f"What is the capital of {country}?", *(f"The capital of {country} is {name}." for name in (city, other)))
        for (country, city), other in zip(CAPITALS.items(), shifted, strict=True)
    ]
    sums = [(n, 3 * n + 4) for n in range(2, 22)]
    return about_capitals + [
        (f"What is {a} + {b}?", f"{a} + {b} = {a + b}.", f"{a} + {b} = {a + b + 3}.") for a, b in sums
    ]


def lay_out(data: Path) -> None:
    """The data sets of thumbs and of preferences."""
    rows: dict[str, list[dict[str, object]]] = {"thumbs": [], "pairs": []}
    for question, right, wrong in questions():
        prompt = [{"role": "user", "content": question}]
        good, bad = ({"role": "assistant", "content": text} for text in (right, wrong))
        rows["thumbs"] += [
            {"messages": [*prompt, good], "kto_tag": True},
            {"messages": [*prompt, bad], "kto_tag": False},
        ]
        rows["pairs"].append({"messages": prompt, "chosen": good, "rejected": bad})
    info = {
        name: {
            "file_name": f"{name}.jsonl",
            "formatting": "openai",
            "ranking": name == "pairs",
            "columns": {column: column for column in columns},
        }
        for name, columns in COLUMNS.items()
    }
    for name, content in rows.items():
        append_lines(data / f"{name}.jsonl", content)
    write_json(data / "dataset_info.json", info)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a model folder")
    model = parser.parse_args().model.resolve()
    with tempfile.TemporaryDirectory() as folder:
        workplace = Workplace(models=(model.parent,), data=Path(folder) / "data", saves=Path(folder) / "saves")
        for place in (workplace.data, workplace.saves):
            place.mkdir()
        lay_out(workplace.data)
        for reason in (False, True):
            judge = {"model": str(model), "ratings": list(COLUMNS), "reason": reason, "max_reason_tokens": 48}
            began = time.monotonic()
            run = runs.submit(EvaluationSpec.read({"judge": judge}), workplace)
            run = wait_until(lambda id=run.id: (now := runs.get(workplace.saves, id)).final and now, seconds=3600)
            if run.state != "finished":
                raise SystemExit(str(failures.explain(run)))
            print(f"{'with' if reason else 'without'} a reason, {time.monotonic() - began:.0f} s")
            summary = report.summary(run.dir)
            for note in evaluations.notes_of(run, summary or {}):
                print("  " + note.text())
            print(json.dumps((summary or {})["judge"]["agreement"]))


if __name__ == "__main__":
    main()
