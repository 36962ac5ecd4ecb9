"""What the page shows as tokens is what a run trains on, told by a child that may come and go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine.core.problems import Refusal
from engine.data import preview_client
from engine.launch.workspace import Workplace
from engine.runs import runs
from engine.spec.run_spec import RunSpec
from tests.conftest import wait_until
from webui.data_tab import tokens_html
from webui.words import Words

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    yield
    preview_client._end_child()


@pytest.fixture
def look(workplace: Workplace, make_spec: Callable[..., RunSpec]) -> Callable[..., dict[str, Any]]:
    """Ask about a set of the workplace; keywords change the spec."""

    def ask(what: str, name: str, first: int = 1, size: int = 5, **changes: Any) -> dict[str, Any]:
        spec = make_spec(**changes)
        return preview_client.ask(what, spec, workplace.data, name, first=first, size=size)

    return ask


def add(data: Path, name: str, rows: list[Any], **entry: Any) -> None:
    (data / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    info = json.loads((data / "dataset_info.json").read_text())
    info[name] = {"file_name": f"{name}.json", **entry}
    (data / "dataset_info.json").write_text(json.dumps(info))


def shown(row: dict[str, Any]) -> list[tuple[int, bool]]:
    (side,) = row["sides"]
    return [(token, trained) for token, _, trained, _ in side["pieces"]]


@pytest.mark.slow
def test_the_tokens_shown_are_those_that_a_real_run_has_prepared(workplace, make_spec, look):
    add(
        workplace.data,
        "odd",
        [
            {
                "instruction": "Hi 猫 <|im_end|>",
                "output": "🎉 <|im_start|>",
                "history": [["a", "b"]],
                "system": "Be brief.",
            },
            {"instruction": "long", "output": "word " * 200},
        ],
    )
    changes = {"data__datasets": {"odd": 1}, "data__max_length": 96}
    run = runs.submit(make_spec(**changes), workplace)
    wait_until(lambda: runs.get(workplace.saves, run.id).final)
    told = look("page", "odd", **changes)
    with pa.memory_map(str(run.dir.prepared / "train.arrow")) as source:
        prepared = pa.ipc.open_stream(source).read_all().to_pylist()
    as_shown = [
        (
            tuple(token for token, _ in shown(row)),
            tuple(token if trained else -100 for token, trained in shown(row)),
        )
        for row in told["rows"]
    ]
    assert sorted(as_shown) == sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in prepared)
    numbers, summary = (
        look("statistics", "odd", **changes),
        json.loads((run.dir.prepared / "summary.json").read_text()),
    )
    assert numbers["examples"] == summary["train"]["examples"] == 2
    assert numbers["tokens"] == summary["train"]["tokens"]
    assert numbers["trained"] == summary["train"]["trained_tokens"]
    assert numbers["fates"] == {"kept": 1, "cut": 1}


@pytest.mark.parametrize("changed", ["the rows", "the columns", "the template", "a setting"])
def test_statistics_are_remembered_until_something_changes(look, workplace, tiny, tmp_path, changed):
    model = shutil.copytree(tiny, tmp_path / "model")
    settings = {"model__model_name_or_path": str(model), "data__max_length": 64}
    add(workplace.data, "odd", [{"instruction": "one", "output": "two"}])
    before = look("statistics", "odd", **settings)
    assert look("statistics", "odd", **settings) == before
    if changed == "the rows":
        (workplace.data / "odd.json").write_text(json.dumps([{"instruction": "one", "output": "two three four"}]))
    elif changed == "the columns":
        add(workplace.data, "odd", [{"instruction": "one", "output": "two"}], columns={"prompt": "output"})
    elif changed == "the template":
        template = model / "chat_template.jinja"
        template.write_text(template.read_text(encoding="utf-8") + "{{ '!' }}", encoding="utf-8")
    else:
        settings["data__max_length"] = 8
    assert look("statistics", "odd", **settings) != before


def test_the_pieces_put_together_are_the_conversation(look, workplace):
    add(workplace.data, "odd", [{"instruction": "猫 and 🎉\n  x", "output": "你好"}])
    (row,) = look("page", "odd")["rows"]
    text = "".join(piece for _, piece, _, _ in row["sides"][0]["pieces"])
    assert text == "<|im_start|>user\n猫 and 🎉\n  x<|im_end|>\n<|im_start|>assistant\n你好<|im_end|>\n"
    special = [piece for _, piece, _, is_special in row["sides"][0]["pieces"] if is_special]
    assert special == ["<|im_start|>", "<|im_end|>"] * 2
    trained = "".join(piece for _, piece, is_trained, _ in row["sides"][0]["pieces"] if is_trained)
    assert trained == "你好<|im_end|>"


def test_tokens_of_a_weighted_answer_show_their_weight_and_those_of_nought_are_not_trained(look, workplace):
    turns = [("user", "a", None), ("assistant", "b", 0), ("user", "c", None), ("assistant", "d", 0.5)]
    messages = [{"role": role, "content": text, "weight": weight} for role, text, weight in turns]
    add(workplace.data, "weighed", [{"messages": messages}])
    (row,) = look("page", "weighed")["rows"]
    assert {weight for _, weight in shown(row) if weight} == {0.5}
    html = tokens_html.tokens({"rows": [row]}, Words("en"))
    assert "× 0.5" in html
    assert "trained on with a weight" in html


def test_a_row_that_does_not_fit_is_shown_with_what_becomes_of_it(look, workplace):
    add(workplace.data, "long", [{"instruction": "x", "output": "word " * 100}, {"instruction": "x"}])
    cut, bad = look("page", "long", data__max_length=32)["rows"]
    assert (cut["fate"], cut["sides"][0]["tokens"]) == ("cut", 32)
    assert cut["whole"] > 100
    assert (bad["fate"], bad["sides"], bad["reason"]["code"]) == ("bad", [], "row-without-column")
    dropped = look("page", "long", data__max_length=32, data__too_long="drop")["rows"][0]
    assert dropped["fate"] == "too_long"
    assert dropped["sides"][0]["tokens"] == cut["whole"]


def test_both_sides_of_a_pair_are_shown_and_of_a_prompt_its_question(look, workplace):
    pairs = [{"instruction": "Which?", "chosen": "This one.", "rejected": "That."}]
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    add(workplace.data, "pairs", pairs, ranking=True, columns=columns)
    (row,) = look("page", "pairs", stage={"kind": "dpo"})["rows"]
    trained = {
        side["name"]: "".join(piece for _, piece, is_trained, _ in side["pieces"] if is_trained)
        for side in row["sides"]
    }
    assert trained == {"chosen": "This one.<|im_end|>", "rejected": "That.<|im_end|>"}
    (row,) = look("page", "pairs", stage={"kind": "grpo"})["rows"]
    (side,) = row["sides"]
    assert side["trained"] == 0
    assert "".join(piece for _, piece, _, _ in side["pieces"]).endswith("<|im_start|>assistant\n")


def test_numbers_of_a_set_count_every_row_once(look, workplace):
    add(
        workplace.data,
        "mixed",
        [*[{"instruction": "x", "output": "word " * n} for n in range(1, 60)], {"instruction": "x"}, "no row"],
    )
    told = look("statistics", "mixed", data__max_length=40)
    assert told["total"] == told["seen"] == 61
    assert sum(told["fates"].values()) == 61
    assert told["fates"]["bad"] == 2
    assert sum(told["counts"]) == 59
    assert len(told["edges"]) == len(told["counts"]) + 1
    assert told["fates"]["cut"] == sum(
        1 for row in look("page", "mixed", 1, 59, data__max_length=40)["rows"] if row["fate"] == "cut"
    )


def test_a_long_text_becomes_several_examples(look):
    told = look("statistics", "text", stage={"kind": "pt"}, data__max_length=16)
    assert told["examples"] > 20
    assert told["trained"] == told["tokens"]
    row = look("page", "text", stage={"kind": "pt"}, data__max_length=16)["rows"][0]
    assert (row["fate"], row["sides"][0]["tokens"]) == ("spread", row["whole"])


def test_a_child_that_was_killed_is_replaced_and_one_that_fails_says_so(look, workplace):
    look("page", "chat")
    first = preview_client._child.pid
    preview_client._child.kill()
    assert len(look("page", "chat")["rows"]) == 5
    assert preview_client._child.pid != first
    with pytest.raises(Refusal, match="no model folder"):
        look("page", "chat", model__model_name_or_path="org/far-away")
    with pytest.raises(Refusal, match="no data set"):
        look("page", "../../etc/passwd")
    assert len(look("page", "chat", first=39)["rows"]) == 2


def test_the_child_ends_with_its_parent(look):
    look("page", "chat")
    child = preview_client._child
    child.stdin.close()
    assert child.wait(120) == 0


@pytest.mark.usefixtures("not_forked")
def test_the_child_holds_no_torch(look):
    look("page", "chat")
    maps = Path(f"/proc/{preview_client._child.pid}/maps").read_text()
    assert "libtorch" not in maps


def test_a_template_that_raises_is_told_at_its_field_and_in_one_sentence(look, tmp_path):
    file = tmp_path / "raises.jinja"
    file.write_text("{{ raise_exception('Not today.') }}")
    with pytest.raises(Refusal) as refused:
        look("page", "chat", model__chat_template=str(file))
    assert str(refused.value) == (
        "model.chat_template: The chat template cannot render a plain "
        "conversation: Not today. Choose another template, such as chatml."
    )
