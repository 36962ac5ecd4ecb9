"""What is worth knowing of a spec's data is told before the start, counted, and keeps nobody from starting."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from engine.launch.workspace import Workplace
from engine.preflight.remarks import remarks
from engine.runs.plan import summary
from engine.spec.run_spec import RunSpec
from tests.conftest import engine

pytestmark = pytest.mark.usefixtures("forked")


def test_what_rows_ask_for_and_do_not_get_is_told_with_how_many_they_are(
    workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    rows = [{"messages": [question | {"train": True}, answer | {"weight": 0.5}]}] * 2 + [
        {"messages": [question, answer]}
    ]
    (workplace.data / "marked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (workplace.data / "dataset_info.json").write_text('{"marked": {"file_name": "marked.jsonl", "author": "me"}}')
    spec = make_spec(data__datasets={"marked": 1})
    told = {remark.code: remark for remark in remarks(spec)}
    assert set(told) == {"row-mark-elsewhere", "row-weighted", "entry-keys-unread"}
    assert told["row-mark-elsewhere"].values["place"] == "marked.jsonl:1 (2/3)"
    assert [remark.code for remark in summary(spec, workplace).remarks] == list(told)
    last = make_spec(data__datasets={"marked": 1}, stage={"kind": "sft", "train_on": "last_answer"})
    assert "2 rows of 'marked' specify which answers to train on" in remarks(last)[-1].text()
    (workplace.data / "spec.yaml").write_text(spec.to_yaml())
    checked = engine(workplace, "check", str(workplace.data / "spec.yaml"))
    assert checked.stderr.count("marked.jsonl:") == 2
    assert checked.stdout.endswith("ready to start\n")


def test_rows_in_an_unusual_order_are_counted_and_keep_nobody_from_starting(
    workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    orders = [
        [question, answer],
        [answer, question, answer],
        [question, question, answer],
        [answer, question, answer, answer],
    ]
    rows = [{"messages": order} for order in orders]
    (workplace.data / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (workplace.data / "dataset_info.json").write_text('{"talks": {"file_name": "talks.jsonl"}}')
    planned = summary(make_spec(data__datasets={"talks": 1}), workplace)
    places = {remark.code: remark.values["place"] for remark in planned.remarks}
    assert places == {"row-answer-first": "talks.jsonl:2 (2/4)", "row-same-speaker": "talks.jsonl:3 (2/4)"}
    assert not planned.problems


def test_plain_rows_have_no_remarks_and_neither_has_a_folder_that_is_not_there(
    workplace: Workplace, make_spec: Callable[..., RunSpec]
) -> None:
    assert remarks(make_spec()) == []
    assert remarks(make_spec(data__dataset_dir="/nowhere")) == []
