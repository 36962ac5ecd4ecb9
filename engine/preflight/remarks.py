"""What a person should know about a spec's data before the start, although it does not keep the run from starting.

Obstacles are in `engine.preflight.checks`. Each remark is about a data set and covers all rows of a kind: its place is
that of the first such row, with the number of such rows among those that were checked.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.core.problems import Problem, problem
from engine.data.dataset_info import read_dataset_info
from engine.data.validation import ValidationReport
from engine.preflight.data_checks import check_first_rows
from engine.spec.run_spec import RunSpec

# Kinds of rows that a training treats differently than their author may expect. Oddities of a text itself, such as
# duplicate rows, are reported by the data check.
REMARK_CODES = (
    "row-mark-elsewhere", "row-mark-partial", "row-marks-unused", "row-weight-unclear",
    "row-weighted", "row-pair-turns", "row-answer-first", "row-same-speaker", "row-open-question",
    "row-answers-joined", "row-scores-disagree", "scores-unread", "labels-unread", "columns-unread",
    "entry-keys-unread", "guess-uneven", "table-separator-unsure", "table-header-data",
)  # fmt: skip


def remarks(spec: RunSpec) -> list[Problem]:
    """All remarks; [] also if the data cannot be read, which `engine.preflight.data_checks` reports."""
    folder = Path(spec.data.dataset_dir)
    if not folder.is_dir():
        return []
    remarks: list[Problem] = []
    known = {dataset.name: dataset for dataset in read_dataset_info(folder)[0]}
    for name in dict.fromkeys([*spec.data.datasets, *spec.data.eval_datasets]):
        if name in known and not known[name].problem and known[name].files:
            report = check_first_rows(folder, known[name], spec.stage.kind)
            remarks += _dataset_remarks(report)
            if spec.stage.kind == "sft" and report.counts.get("row-weighted") and spec.stage.train_on != "answers":
                values = {
                    "name": name,
                    "rows": report.counts["row-weighted"],
                    "train_on": spec.stage.train_on,
                }
                remarks.append(problem("marks-beside-train-on", "stage.train_on", **values))
    return remarks


def _dataset_remarks(report: ValidationReport) -> list[Problem]:
    rows, remarks = report.good + report.bad, []
    for code in REMARK_CODES:
        first = next((warning for warning in report.warnings if warning.code == code), None)
        if first is not None:
            values = dict(first.values)
            if "place" in values:
                values["place"] = f"{values['place']} ({report.counts[code]:,}/{rows:,})"
            remarks.append(replace(first, field="data.datasets", values=values))
    return remarks
