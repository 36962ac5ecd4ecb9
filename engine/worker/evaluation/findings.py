"""The findings of an evaluation: a summary with intervals and verdicts, and every row with its scores.

summary.json   models ("voices"), rows, metrics with intervals, differences from the base with verdicts;
               for reward models, histograms; the judge, if there is one
rows.jsonl     for each row the question, the reference, and each model's answer with its scores
rows.csv       the same as a table
result.json    written last: the attempt that they belong to
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
from engine.core.reasoning import without_reasoning
from engine.core.rundir import RESULT_FILE, RunDir, distinct_titles, write_json, write_text
from engine.data.row_images import readable
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.evaluation.trained_results import TrainedResult
from engine.runs.lineage import learned
from engine.worker.evaluation import judgements, metrics
from engine.worker.evaluation.bootstrap import MIN_ROWS, RESAMPLES, difference, interval, resampled
from engine.worker.evaluation.harness import task_comparisons
from engine.worker.evaluation.judging import Judgements
from engine.worker.evaluation.metrics import Metric, ModelAnswer, answer_parts
from engine.worker.evaluation.questions import Question, prompt_text

Outputs = Mapping[tuple[str, int], Mapping[str, Any]]


def write_findings(
    run: RunDir,
    spec: EvaluationSpec,
    form: str,
    models: Sequence[TrainedResult | str],
    questions: Sequence[Question],
    outputs: Outputs,
    tasks: Mapping[tuple[str, str], Mapping[str, Any]],
    judged: Judgements | None,
) -> None:
    """The whole content of the report. Raises Refusal if there is nothing to report."""
    entries = [_model_entry(spec, model) for model in models]
    titles = distinct_titles({entry["id"]: entry["title"] for entry in entries})
    entries = [entry | {"title": titles[entry["id"]]} for entry in entries]
    names = [entry["id"] for entry in entries]
    comparable = comparable_rows(names, questions, outputs)
    if not comparable and not spec.harness.tasks and not spec.only_compares_judge:
        raise Refusal(_nothing_measured(questions, names, outputs))
    rows, model_metrics, extra = FORMS[form](names, questions, comparable, outputs) if comparable else ([], {}, {})
    if judged:
        for name, metric in judgements.score_metrics(judged, names, comparable).items():
            model_metrics.setdefault(name, {})[judgements.METRIC] = metric
        judgements.add_to_rows(judged, names, rows)
        extra = {**extra, "judge": judgements.summary(spec, judged, names, comparable)}
        judgements.write_agreement(run, extra["judge"]["agreement"])
    print(f"{len(comparable)} rows evaluated, {len(questions) - len(comparable)} left out", flush=True)
    summary = {
        "form": form,
        "voices": entries,
        "rows": len(comparable),
        "left_out": len(questions) - len(comparable),
        "references": sum(question.reference is not None for question in comparable),
        "resamples": RESAMPLES,
        "fewest": MIN_ROWS,
        **_metric_comparisons(names, model_metrics),
        **extra,
        "tasks": task_comparisons(spec.harness.tasks, names, tasks),
    }
    write_text(run.report / "rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(run.report / "rows.csv", as_csv(csv_rows(rows, entries)))
    write_json(run.report / "summary.json", summary)
    write_json(
        run.report / RESULT_FILE,
        {"attempt": run.attempt(), "complete": True, "saved": time.time(), "base": spec.model.model_name_or_path},
    )


def _model_entry(spec: EvaluationSpec, model: TrainedResult | str) -> dict[str, Any]:
    if isinstance(model, TrainedResult):
        return {
            "id": model.id,
            "title": model.title,
            "base": False,
            "trained_on": _trained_on(spec, model.folder),
        }
    base = Path(spec.model.model_name_or_path)
    return {"id": model, "title": base.name, "base": True, "trained_on": _trained_on(spec, base)}


def _trained_on(spec: EvaluationSpec, folder: Path) -> list[str]:
    """The sets of this evaluation that the weights in `folder` were also trained on, whose scores may reflect
    memorization."""
    place, known = os.path.realpath(spec.data.dataset_dir), learned([folder])
    return [name for name in spec.data.datasets if (place, name) in known]


def comparable_rows(names: Sequence[str], questions: Sequence[Question], outputs: Outputs) -> list[Question]:
    """The rows that every model has answered, or scored."""
    return [question for question in questions if all(_is_comparable(outputs[name, question.row]) for name in names)]


def _is_comparable(line: Mapping[str, Any]) -> bool:
    """Whether the row was answered, or scored: only rows with answers from all models can be compared."""
    return line.get("margin", 0.0) is not None and "problem" not in line


def _nothing_measured(questions: Sequence[Question], names: Sequence[str], outputs: Outputs) -> Any:
    codes = [outputs[name, question.row].get("problem", {}).get("code") for name in names for question in questions]
    values = {"too_long": codes.count("chat-too-long"), "rows": len(questions)}
    refused = len([code for code in codes if code]) - values["too_long"]
    return problem("evaluate-nothing-left", "data.datasets", refused=refused, bad=0, **values)


# ---------------------------------------------------------------------------------- answers, and pairs


def _answer_report(
    names: Sequence[str], questions: Sequence[Question], comparable: Sequence[Question], outputs: Outputs
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Metric]], dict[str, Any]]:
    references = [_reference(question) for question in comparable]
    labels = None
    if all(reference is not None for reference in references):
        labels = metrics.labels_of([reference for reference in references if reference is not None])
    model_metrics = {
        name: metrics.answer_metrics(
            [_model_answer(outputs[name, question.row]) for question in comparable], references, labels
        )
        for name in names
    }
    rows = [
        _row(question)
        | {
            "reference": _reference(question),
            "answers": {name: _answer(outputs[name, question.row], _reference(question), labels) for name in names},
        }
        for question in questions
    ]
    counts = {name: _reasoning_counts([outputs[name, question.row] for question in comparable]) for name in names}
    thinking = {name: count for name, count in counts.items() if count["rows"]}
    return rows, model_metrics, {"labels": labels} | ({"reasoning": thinking} if thinking else {})


def _reference(question: Question) -> str | None:
    """The expected answer, without reasoning that is written before it."""
    return None if question.reference is None else without_reasoning(question.reference)


def _row(question: Question) -> dict[str, Any]:
    return {
        "row": question.row + 1,
        "set": question.set,
        "place": question.place,
        "messages": readable(question.messages),
    }


def _reasoning_counts(lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """In how many answers there is reasoning, and how many of these ended before it did."""
    parts = [answer_parts(line) for line in lines]
    thinking = [part for part in parts if part.unfinished or part.reasoning.strip()]
    return {"rows": len(thinking), "unfinished": sum(part.unfinished for part in thinking)}


def _model_answer(line: Mapping[str, Any]) -> ModelAnswer:
    text = answer_parts(line).answer.strip("\n")
    return ModelAnswer(text, line["tokens"], line["ended"], line.get("loss", 0.0), line.get("loss_tokens", 0))


def _answer(line: Mapping[str, Any], reference: str | None, labels: Sequence[str] | None) -> dict[str, Any]:
    if "problem" in line:
        return {"text": "", "scores": {}, "problem": line["problem"]}
    answer, reasoning = _model_answer(line), answer_parts(line).reasoning.strip()
    scores = metrics.row_scores(answer, reference, labels)
    samples = [_answer(more, reference, labels) for more in line.get("more", {}).values()]
    result = {"text": answer.text, "scores": scores} | ({"reasoning": reasoning} if reasoning else {})
    return result | ({"samples": samples} if samples else {})


def _pair_report(
    names: Sequence[str], questions: Sequence[Question], comparable: Sequence[Question], outputs: Outputs
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Metric]], dict[str, Any]]:
    margins = {name: [outputs[name, question.row]["margin"] for question in comparable] for name in names}
    rows = []
    for question in questions:
        lines = {name: outputs[name, question.row] for name in names}
        answers = {
            name: {"text": "", "scores": {key: line[key] for key in ("margin", "chosen_score", "rejected_score")}}
            for name, line in lines.items()
            if line["margin"] is not None
        }
        rows.append(_row(question) | {"chosen": question.chosen, "rejected": question.rejected, "answers": answers})
    model_metrics = {name: metrics.margin_metrics(margins[name]) for name in names}
    return rows, model_metrics, {"histograms": {name: metrics.histogram(margins[name]) for name in names}}


FORMS = {"answers": _answer_report, "pairs": _pair_report}


def _metric_comparisons(names: Sequence[str], model_metrics: Mapping[str, Mapping[str, Metric]]) -> dict[str, Any]:
    """Intervals of every metric, and each model's differences from the first, if that is the base."""
    base = "base" if "base" in names[:1] else ""
    comparisons: dict[str, Any] = {
        "measures": {},
        "differences": {name: {} for name in names if base and name != base},
    }
    for metric_name, metric in model_metrics[names[0]].items() if model_metrics else ():
        draws = {name: resampled(model_metrics[name][metric_name]) for name in names}
        comparisons["measures"][metric_name] = {
            "better": metric.better,
            "values": {name: interval(model_metrics[name][metric_name], draws[name])._asdict() for name in names},
        }
        for name in comparisons["differences"]:
            delta = difference(
                model_metrics[name][metric_name], model_metrics[base][metric_name], draws[name], draws[base]
            )
            comparisons["differences"][name][metric_name] = delta._asdict()
    return comparisons


# ------------------------------------------------------------------------------------------- as a table


def csv_rows(rows: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """A line of cells for each row, after the header."""
    pairs = bool(rows) and "chosen" in rows[0]
    texts = ["chosen", "rejected"] if pairs else ["reference"]
    scores = list(
        dict.fromkeys(name for row in rows for answer in row["answers"].values() for name in answer["scores"])
    )
    thinking = any("reasoning" in answer for row in rows for answer in row["answers"].values())
    judged = any("reason" in answer.get("judgement", ()) for row in rows for answer in row["answers"].values())
    answer_heads = [] if pairs else [*(["reasoning"] if thinking else []), "answer", *(["judge: reason"] * judged)]
    heads = [f"{model['title']}: {name}" for model in models for name in answer_heads + scores]
    lines: list[list[Any]] = [["row", "set", "place", "prompt", *texts, *heads]]
    for row in rows:
        cells: list[Any] = [row["row"], row["set"], row["place"], prompt_text(row["messages"])]
        cells += [row[name] or "" for name in texts]
        for model in models:
            answer = row["answers"].get(model["id"], {"text": "", "scores": {}})
            texts_of_answer = answer | {"answer": answer["text"], "judge: reason": _reason(answer)}
            cells += [texts_of_answer.get(name, "") for name in answer_heads]
            cells += [answer["scores"].get(name, "") for name in scores]
        lines.append(cells)
    return lines


def _reason(answer: Mapping[str, Any]) -> str:
    return answer.get("judgement", {}).get("reason", "")
