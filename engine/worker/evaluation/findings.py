"""What an evaluation has found, from the answers: a summary with intervals and verdicts, and every row with its scores.

summary.json   voices, rows, measures with intervals, differences to the base with verdicts; of reward models histograms
rows.jsonl     for each row the question, the reference, and each voice's answer with its scores
rows.csv       the same as a table
result.json    last, of which attempt they are
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.core.csvtext import as_csv
from engine.core.problems import Refusal, problem
from engine.core.rundir import RESULT, RunDir, distinct, write_json, write_text
from engine.evaluation.evaluation_spec import EvaluationSpec, Left
from engine.runs.lineage import learned
from engine.worker.evaluation import measures
from engine.worker.evaluation.bootstrap import FEWEST, RESAMPLES, difference, interval, resampled
from engine.worker.evaluation.harness import told
from engine.worker.evaluation.measures import Measure, Said
from engine.worker.evaluation.questions import Question

Lines = Mapping[tuple[str, int], Mapping[str, Any]]


def write_findings(
    run: RunDir, spec: EvaluationSpec, form: str, voices: Sequence[Left | str], asked: Sequence[Question], known: Lines,
    tasks: Mapping[tuple[str, str], Mapping[str, Any]],
) -> None:  # fmt: skip
    """Everything that is in the report. Raises Refusal if there is nothing to report of."""
    named = [_voice(spec, one) for one in voices]
    titles = distinct({one["id"]: one["title"] for one in named})
    named = [one | {"title": titles[one["id"]]} for one in named]
    names = [one["id"] for one in named]
    kept = [one for one in asked if all(_counts(known[name, one.row]) for name in names)]
    if not kept and not spec.harness.tasks:
        raise Refusal(_nothing(asked, names, known))
    rows, found, more = FORMS[form](names, asked, kept, known) if kept else ([], {}, {})
    print(f"{len(kept)} rows measured, {len(asked) - len(kept)} left out", flush=True)
    summary = {
        "form": form, "voices": named, "rows": len(kept), "left_out": len(asked) - len(kept),
        "references": sum(one.reference is not None for one in kept), "resamples": RESAMPLES, "fewest": FEWEST,
        **_told(names, found), **more, "tasks": told(spec.harness.tasks, names, tasks),
    }  # fmt: skip
    write_text(run.report / "rows.jsonl", "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
    write_text(run.report / "rows.csv", as_csv(table(rows, named)))
    write_json(run.report / "summary.json", summary)
    write_json(run.report / RESULT, {
        "attempt": run.attempt(), "complete": True, "saved": time.time(), "base": spec.model.model_name_or_path,
    })  # fmt: skip


def _voice(spec: EvaluationSpec, one: Left | str) -> dict[str, Any]:
    if isinstance(one, Left):
        return {"id": one.id, "title": one.title, "base": False, "trained_on": _trained_on(spec, one.folder)}
    base = Path(spec.model.model_name_or_path)
    return {"id": one, "title": base.name, "base": True, "trained_on": _trained_on(spec, base)}


def _trained_on(spec: EvaluationSpec, folder: Path) -> list[str]:
    """The sets of this evaluation that the weights in `folder` were trained on, too: there they may only remember."""
    place, known = os.path.realpath(spec.data.dataset_dir), learned([folder])
    return [name for name in spec.data.datasets if (place, name) in known]


def _counts(line: Mapping[str, Any]) -> bool:
    """Whether the row was asked, or scored: only rows of which all voices have an answer can be compared."""
    return line.get("margin", 0.0) is not None and "problem" not in line


def _nothing(asked: Sequence[Question], names: Sequence[str], known: Lines) -> Any:
    codes = [known[name, one.row].get("problem", {}).get("code") for name in names for one in asked]
    values = {"too_long": codes.count("chat-too-long"), "rows": len(asked)}
    refused = len([one for one in codes if one]) - values["too_long"]
    return problem("evaluate-nothing-left", "data.datasets", refused=refused, bad=0, **values)


# ---------------------------------------------------------------------------------- answers, and pairs


def _of_answers(
    names: Sequence[str], asked: Sequence[Question], kept: Sequence[Question], known: Lines
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Measure]], dict[str, Any]]:
    references = [one.reference for one in kept]
    labels = None
    if all(one is not None for one in references):
        labels = measures.labels_of([one for one in references if one is not None])
    found = {
        name: measures.of_answers([_said(known[name, one.row]) for one in kept], references, labels)
        for name in names
    }
    rows = [
        _row(one) | {"reference": one.reference, "answers": {
            name: _answer(known[name, one.row], one.reference, labels) for name in names
        }}
        for one in asked
    ]  # fmt: skip
    return rows, found, {"labels": labels}


def _row(one: Question) -> dict[str, Any]:
    return {"row": one.row + 1, "set": one.set, "place": one.place, "messages": one.messages}


def _said(line: Mapping[str, Any]) -> Said:
    return Said(
        line["answer"], line["tokens"], line["ended"], line.get("loss", 0.0), line.get("loss_tokens", 0)
    )


def _answer(line: Mapping[str, Any], reference: str | None, labels: Sequence[str] | None) -> dict[str, Any]:
    if "problem" in line:
        return {"text": "", "scores": {}, "problem": line["problem"]}
    return {"text": line["answer"], "scores": measures.row_scores(_said(line), reference, labels)}


def _of_pairs(
    names: Sequence[str], asked: Sequence[Question], kept: Sequence[Question], known: Lines
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Measure]], dict[str, Any]]:
    margins = {name: [known[name, one.row]["margin"] for one in kept] for name in names}
    rows = []
    for one in asked:
        lines = {name: known[name, one.row] for name in names}
        answers = {
            name: {"text": "", "scores": {key: line[key] for key in ("margin", "chosen_score", "rejected_score")}}
            for name, line in lines.items() if line["margin"] is not None
        }  # fmt: skip
        rows.append(_row(one) | {"chosen": one.chosen, "rejected": one.rejected, "answers": answers})
    found = {name: measures.of_margins(margins[name]) for name in names}
    return rows, found, {"histograms": {name: measures.histogram(margins[name]) for name in names}}


FORMS = {"answers": _of_answers, "pairs": _of_pairs}


def _told(names: Sequence[str], found: Mapping[str, Mapping[str, Measure]]) -> dict[str, Any]:
    """Intervals of every measure, and each voice's differences to the first, if that is the base."""
    base = names[0] if names[0] == "base" else None
    told: dict[str, Any] = {
        "measures": {},
        "differences": {name: {} for name in names if base and name != base},
    }
    for what, one in found.get(names[0], {}).items():
        draws = {name: resampled(found[name][what]) for name in names}
        told["measures"][what] = {
            "better": one.better,
            "values": {name: interval(found[name][what], draws[name])._asdict() for name in names},
        }
        for name in told["differences"]:
            apart = difference(found[name][what], found[base][what], draws[name], draws[base])
            told["differences"][name][what] = apart._asdict()
    return told


# ------------------------------------------------------------------------------------------- as a table


def table(rows: Sequence[Mapping[str, Any]], voices: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """A line of cells for each row, after that of their names."""
    pairs = bool(rows) and "chosen" in rows[0]
    texts = ["chosen", "rejected"] if pairs else ["reference"]
    scores = list(dict.fromkeys(
        name for row in rows for answer in row["answers"].values() for name in answer["scores"]
    ))  # fmt: skip
    heads = [f"{one['title']}: {name}" for one in voices for name in ([] if pairs else ["answer"]) + scores]
    lines: list[list[Any]] = [["row", "set", "place", "prompt", *texts, *heads]]
    for row in rows:
        cells: list[Any] = [row["row"], row["set"], row["place"], prompt(row["messages"])]
        cells += [row[name] or "" for name in texts]
        for one in voices:
            answer = row["answers"].get(one["id"], {"text": "", "scores": {}})
            cells += [] if pairs else [answer["text"]]
            cells += [answer["scores"].get(name, "") for name in scores]
        lines.append(cells)
    return lines


def prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    """A question as text; who speaks is named where there is more than one turn."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{one['role']}: {one['content']}" for one in messages)
