"""What is made of prepared rows: packs that waste little, windows that lose nothing, orders that pad little."""

import random

import numpy as np
import pyarrow as pa
import pytest

from engine.data.mixing import held_out, repeats
from engine.spec.run_spec import Data
from engine.worker.data.examples import IGNORE_INDEX, Example, examples_table
from engine.worker.data.lengths import length_grouped_order
from engine.worker.data.packing import pack, pack_examples
from engine.worker.data.splits import SplitWriter, repetitions, validation_rows


def realistic(count: int, seed: int = 0) -> np.ndarray:
    """Lengths as instruction data has them: most short, some very long, none longer than 1024."""
    return np.random.default_rng(seed).lognormal(4.4, 0.9, count).astype(int).clip(8, 1024)


def chats(lengths: np.ndarray) -> list[Example]:
    """Examples whose every token tells whose it is; the second half is trained."""
    return [
        Example((np.full(length, number, dtype=np.int32),), trained=[(length // 2, length)])
        for number, length in enumerate(lengths.tolist())
    ]


def test_packs_hold_every_row_once_and_are_nearly_full():
    chance = random.Random(0)
    lengths = np.array([chance.randint(1, 512) for _ in range(5000)])
    packs = pack(lengths, 512)
    assert sorted(row for rows in packs for row in rows) == list(range(5000))
    assert all(lengths[rows].sum() <= 512 for rows in packs)
    assert lengths.sum() / (512 * len(packs)) > 0.98
    assert pack(lengths, 512) == packs
    assert pack(np.array([3, 3, 2, 2, 2]), 6) == [[0, 1], [2, 3, 4]]
    assert pack(np.array([], dtype=int), 6) == []
    with pytest.raises(ValueError, match="row 1 has 7 tokens"):
        pack(np.array([1, 7]), 6)


def test_packed_examples_keep_their_tokens_and_labels_but_the_first():
    lengths = np.array([30, 5, 17, 40, 9, 22])
    made = pack_examples(examples_table("chat", chats(lengths)), 48).to_pylist()
    seen = []
    for row in made:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 48
        at = 0
        for length in row["seq_lengths"]:
            ids, labels = row["input_ids"][at : at + length], row["labels"][at : at + length]
            number = ids[0]
            assert ids == [number] * length
            assert labels == [IGNORE_INDEX] * (length // 2) + [number] * (length - length // 2)
            seen.append((number, length))
            at += length
    assert sorted(seen) == list(enumerate(lengths.tolist()))
    everything = [Example((np.arange(4, dtype=np.int32),), trained=[(0, 4)])] * 2
    assert pack_examples(examples_table("chat", everything), 8).to_pylist()[0]["labels"] == [IGNORE_INDEX, 1, 2, 3] * 2


def test_packing_wastes_less_than_two_percent_of_realistic_rows_also_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.worker.data.splits.TOKENS_PACKED_AT_ONCE", 300_000)
    split = SplitWriter(tmp_path / "train.arrow", "chat", 1024, packing=True)
    for seed in range(20):
        lengths = realistic(1000, seed)
        split.add(examples_table("chat", chats(lengths)), np.ones(1000, dtype=np.uint16))
    counts = split.close()
    assert counts["tokens"] / (counts["examples"] * 1024) > 0.98
    with pa.memory_map(str(tmp_path / "train.arrow")) as source:
        rows = pa.ipc.open_stream(source).read_all()
    assert rows.num_rows == counts["examples"]
    assert sum(map(len, rows["seq_lengths"].to_pylist())) == 20_000
    assert sum(map(len, rows["input_ids"])) == counts["tokens"]


def test_texts_become_windows_without_loss_and_those_left_out_are_counted(tmp_path):
    split = SplitWriter(tmp_path / "train.arrow", "text", 16, packing=False)
    examples = [
        Example((np.arange(length, dtype=np.int32),), "kept" if length <= 16 else "cut", trained=[(0, length)])
        for length in (16, 40, 3, 33)
    ]
    refused = Example((np.zeros(0, dtype=np.int32),), "refused")
    split.add(examples_table("text", [*examples, refused]), np.array([1, 2, 1, 1, 1]))
    counts = split.close()
    assert (counts["rows"], counts["rows_cut"], counts["rows_refused"]) == (6, 3, 1)
    assert (counts["examples"], counts["tokens"], counts["longest"]) == (11, 132, 16)
    with pa.memory_map(str(tmp_path / "train.arrow")) as source:
        rows = pa.ipc.open_stream(source).read_all().to_pylist()
    lengths = [len(row["input_ids"]) for row in rows]
    assert lengths == [16, 16, 16, 8, 16, 16, 8, 3, 16, 15, 2]  # nobody predicts a token that is alone
    assert [row["input_ids"][0] for row in rows] == [0, 0, 16, 32, 0, 16, 32, 0, 0, 16, 31]


def test_what_is_set_aside_depends_on_number_and_seed_alone():
    aside = validation_rows(1000, 250, seed=3)
    assert aside.sum() == 250
    assert (aside == validation_rows(1000, 250, seed=3)).all()
    assert (aside != validation_rows(1000, 250, seed=4)).any()
    often = repetitions(~aside, 2.4, seed=3)
    assert (often[aside] == 0).all()
    assert sorted(np.unique(often[~aside])) == [2, 3]
    assert often.sum() == 750 * 2 + 300


def test_an_epoch_by_length_has_every_example_once_and_pads_little():
    lengths = realistic(4003)
    first = length_grouped_order(lengths, batch=8, seed=1, epoch=0)
    assert sorted(first.tolist()) == list(range(4003))
    assert (first == length_grouped_order(lengths, 8, 1, 0)).all()
    assert (first != length_grouped_order(lengths, 8, 1, 1)).any()
    assert (first != length_grouped_order(lengths, 8, 2, 0)).any()

    def padded(numbers: np.ndarray) -> int:
        batches = lengths[numbers[:4000]].reshape(500, 8)
        return int((batches.max(axis=1) * 8).sum())

    assert padded(first) < 1.06 * lengths.sum()
    assert padded(np.random.default_rng(0).permutation(4003)) > 1.8 * lengths.sum()
    # The longest is met at once, and the batches come in no order of length.
    assert lengths[first[:8]].max() == lengths.max()
    means = lengths[first[8:4000]].reshape(-1, 8).mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15
    few = realistic(40)  # of which the same ones do not meet in each epoch
    met = {
        frozenset(some)
        for epoch in range(20)
        for some in length_grouped_order(few, 4, 0, epoch).reshape(-1, 4).tolist()
    }
    assert len(met) > 150
    assert length_grouped_order(np.array([5, 3, 9]), 8, 0, 0).tolist() == [2, 0, 1]
    assert length_grouped_order(np.array([], dtype=int), 8, 0, 0).tolist() == []


def test_a_number_of_validation_rows_is_divided_by_the_sizes_of_the_sets() -> None:
    rows = {"a": 100, "b": 300, "c": 7}
    assert held_out(Data(datasets=list(rows), validation_rows=50), rows) == {"a": 12, "b": 37, "c": 1}
    assert held_out(Data(datasets=list(rows), validation_rows=1), rows) == {"a": 0, "b": 1, "c": 0}
    assert sum(held_out(Data(datasets=list(rows), validation_rows=10_000), rows).values()) == 407
    assert held_out(Data(datasets=list(rows), validation_share=0.1), rows) == {"a": 10, "b": 30, "c": 1}
    assert held_out(Data(datasets=list(rows)), rows) == {"a": 0, "b": 0, "c": 0}


@pytest.mark.parametrize(
    ("how", "stopping"), [("interleave_under", "first_exhausted"), ("interleave_over", "all_exhausted")]
)
def test_interleaving_shows_what_the_datasets_library_draws(how: str, stopping: str) -> None:
    """The oracle is datasets.interleave_datasets itself, with its chance averaged over many seeds."""
    import datasets

    rows, chances = {"a": 400, "b": 100}, {"a": 0.7, "b": 0.3}
    sets = [datasets.Dataset.from_dict({"name": [name] * count}) for name, count in rows.items()]
    drawn = dict.fromkeys(rows, 0.0)
    for seed in range(20):
        mixed = datasets.interleave_datasets(sets, list(chances.values()), seed=seed, stopping_strategy=stopping)[
            "name"
        ]
        for name in rows:
            drawn[name] += mixed.count(name) / 20
    often = repeats(Data(datasets=chances, mix_strategy=how), rows)
    shown = {name: often[name] * count for name, count in rows.items()}
    assert shown == pytest.approx(drawn, rel=0.05)


def test_a_set_without_rows_takes_nothing_from_the_others() -> None:
    assert repeats(Data(datasets={"a": 0.5, "b": 0.5}, mix_strategy="interleave_under"), {"a": 10, "b": 0}) == {
        "a": 1,
        "b": 0,
    }
