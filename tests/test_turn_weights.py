"""A row's weights decide what of it is trained and how much: in the tokens, on
disk, and in the steps of a real training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.core.rundir import RunDir
from engine.spec.run_spec import RunSpec
from engine.worker.data.examples import IGNORE_INDEX, Encoder, Example, examples_table
from engine.worker.data.packing import pack_examples
from engine.worker.data.splits import SplitWriter, read_tables
from tests.families import answer, tokenizer, user
from tests.train_many import lay_out, train_many

TURNS = [user("Two plus two?"), answer("Five, I guess."), user("Sure?"), answer("No: four.")]


def encoded(rows: list[dict[str, Any]], **settings: Any) -> tuple[list[Example], list[dict[str, Any]]]:
    examples = Encoder(tokenizer("chatml"), "chat", **{"max_length": 1000, **settings}).examples(rows)
    return examples, examples_table("chat", examples).to_pylist()


def trained_text(row: dict[str, Any]) -> str:
    return tokenizer("chatml").decode([label for label in row["labels"] if label != IGNORE_INDEX])


def row(*weights: float, turns: list[dict[str, Any]] = TURNS) -> dict[str, Any]:
    return {"messages": turns, "tools": None, "weights": list(weights)}


def test_an_answer_of_weight_nought_is_not_trained_and_costs_no_column():
    _, (columns,) = encoded([row(0, 1)])
    assert trained_text(columns) == "No: four.</s>"
    assert "weights" not in columns


def test_each_token_of_an_answer_has_the_answers_weight_and_plain_rows_beside_it_one():
    _, (weighed, plain) = encoded([row(0.25, 2), {"messages": TURNS, "tools": None}])
    for columns, weights in ((weighed, [0.25, 2]), (plain, [1, 1])):
        runs = "".join("x" if label == IGNORE_INDEX else "t" for label in columns["labels"]).split("x")
        lengths = [len(run) for run in runs if run]
        expected = [weight for weight, length in zip(weights, lengths, strict=True) for _ in range(length)]
        found = zip(columns["labels"], columns["weights"], strict=True)
        assert [weight for label, weight in found if label != IGNORE_INDEX] == expected
        assert not any(
            w for label, w in zip(columns["labels"], columns["weights"], strict=True) if label == IGNORE_INDEX
        )


def test_a_row_whose_every_answer_has_weight_nought_is_left_out_and_counted():
    (example,), _ = encoded([row(0, 0)])
    assert example.status == "untrained"


@pytest.mark.parametrize(
    ("train_on", "weights", "text"),
    [
        ("last_answer", (1, 0), None),
        ("last_answer", (0, 1), "No: four.</s>"),
        ("everything", (0, 1), None),
    ],
)
def test_a_weight_of_nought_stands_whatever_turns_are_chosen(train_on, weights, text):
    (example,), (columns,) = encoded([row(*weights)], train_on=train_on)
    if train_on == "everything":
        assert "Five, I guess." not in trained_text(columns)
        assert "Two plus two?" in trained_text(columns)
        assert "No: four." in trained_text(columns)
    elif text is None:
        assert example.status == "untrained"
    else:
        assert trained_text(columns) == text


def test_a_row_cut_at_either_end_keeps_the_weights_of_the_answers_it_keeps():
    turns = [*TURNS, user("Thanks."), answer("You are welcome.")]
    length = len(encoded([row(1, 1, 1, turns=turns)])[1][0]["input_ids"])
    (example,), _ = encoded([row(0.5, 0.25, 2, turns=turns)], max_length=length - 4, too_long="cut_end")
    assert (example.status, example.weights) == ("cut", [0.5, 0.25])
    (example,), (columns,) = encoded([row(0.5, 0.25, 2, turns=turns)], max_length=length - 4, too_long="cut_start")
    assert (example.status, example.weights) == ("cut", [0.25, 2])
    assert trained_text(columns).startswith("No: four.")


def test_weights_that_do_not_fit_the_answers_are_refused():
    (example,), _ = encoded([row(1, 0, 1)])
    assert example.reason.code == "weights-beside-answers"


def test_packed_tokens_keep_their_weights_and_so_do_texts_in_windows(tmp_path):
    lengths = [5, 3, 7]
    examples = [
        Example((np.full(n, number, dtype=np.int32),), trained=[(0, n)], weights=[number + 0.5])
        for number, n in enumerate(lengths)
    ]
    (pack,) = pack_examples(examples_table("chat", examples).select(["input_ids", "labels", "weights"]), 20).to_pylist()
    assert pack["weights"] == [token + 0.5 for token in pack["input_ids"]]

    split = SplitWriter(tmp_path / "text.arrow", "text", 4, packing=False, weighted=True)
    split.add(examples_table("text", examples), np.array([1, 1, 1]))
    split.add(examples_table("text", [Example((np.full(6, 9, dtype=np.int32),), trained=[(0, 6)])]), np.array([1]))
    split.close()
    for window in pa.Table.from_batches(read_tables(tmp_path / "text.arrow")).to_pylist():
        assert window["weights"] == [1.0 if token == 9 else token + 0.5 for token in window["input_ids"]]


# ------------------------------------------------------------------------------------------- a training


ROWS = [
    {"messages": [user("one"), answer("uno", weight=0), user("two"), answer("dos", weight=0.25)]},
    {"messages": [user("three and more"), answer("tres y mas", weight=2)]},
    {"messages": [user("four"), answer("cuatro")]},
    {"messages": [user("five five"), answer("cinco", weight=0.5), user("six"), answer("seis")]},
]


def descent(folder: Path, tiny: Path, **data: Any) -> RunSpec:
    """One step of plain gradient descent on all of ROWS."""
    packing = data.get("packing", False)
    return RunSpec.read(
        {
            "model": {"model_name_or_path": str(tiny)},
            "method": {"kind": "full"},
            "data": {"datasets": ["rows"], "dataset_dir": str(folder), "max_length": 256, **data},
            "training": {
                "max_steps": 1,
                "learning_rate": 0.1,
                "optim": "sgd",
                "max_grad_norm": 0.0,
                "warmup_steps": 0,
                "per_device_train_batch_size": 1 if packing else 2,
                "gradient_accumulation_steps": 1 if packing else 2,
                "gradient_checkpointing": False,
            },
            "logging": {"logging_steps": 1, "save_steps": 5, "probe": False, "plot_loss": False},
            "hardware": {"device": "cpu"},
        }
    )


@pytest.fixture(scope="module")
def stepped(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """A run on two batches that are accumulated, and one on a single pack: prepared and trained as any other."""
    folder = tmp_path_factory.mktemp("weighted")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json", "formatting": "openai"}}')
    runs = {
        name: lay_out(
            RunDir(folder / "saves" / "tiny" / "full" / name), descent(folder, tiny, packing=name == "packed")
        )
        for name in ("plain", "packed")
    }
    train_many(*runs.values())
    return runs


def step_by_hand(model_path: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and weights after one step, by a loop of its own: row by row, token
    by token, from the chat template alone."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_path).train()
    tok = AutoTokenizer.from_pretrained(model_path)
    total, count = torch.zeros(()), 0
    for example in ROWS:
        for at, message in enumerate(example["messages"]):
            weight = message.get("weight", 1)
            if message["role"] != "assistant" or weight == 0:
                continue
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in example["messages"][: at + 1]]
            ask = tok.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
            text = tok.apply_chat_template(turns, tokenize=False).rstrip("\n")
            before = len(tok(ask, add_special_tokens=False).input_ids)
            ids = tok(text, add_special_tokens=False, return_tensors="pt").input_ids
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            for place in range(before, ids.shape[1]):
                total = total - weight * log_p[place - 1, ids[0, place]]
                count += 1
    (total / count).backward()
    after = {name: (value - 0.1 * value.grad).detach() for name, value in model.named_parameters()}
    return (total / count).item(), after


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "packed"])
def test_a_step_on_weighted_rows_is_that_of_the_formula(stepped, tiny, name):
    run = stepped[name]
    loss, weights = step_by_hand(tiny)
    logged = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert next(line["loss"] for line in logged if "loss" in line) == pytest.approx(loss, abs=2e-4)
    trained = AutoModelForCausalLM.from_pretrained(run.path / "model").state_dict()
    for parameter, value in weights.items():
        assert torch.allclose(trained[parameter].float(), value, atol=2e-6), parameter
