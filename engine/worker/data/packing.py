"""Pack examples into sequences with little padding."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import pyarrow as pa

from engine.worker.data.examples import IDS_TYPE, IGNORE_INDEX
from engine.worker.data.turn_weights import WEIGHTS_TYPE
from engine.worker.templates.template_shapes import gather_ranges

PACKED_SCHEMA = pa.schema([("input_ids", IDS_TYPE), ("labels", IDS_TYPE), ("seq_lengths", IDS_TYPE)])


def pack(lengths: np.ndarray, max_length: int) -> list[list[int]]:
    """Best-fit decreasing: the row numbers that go together into each pack of at most `max_length` tokens.

    Deterministic. Raises ValueError for a row longer than a pack. Rows are taken longest first, each into the fullest
    pack it fits; open packs are found by their remaining room, which has at most `max_length` values.
    """
    packs: list[list[int]] = []
    packs_with: dict[int, list[list[int]]] = {}  # remaining room → packs with just that room
    rooms: list[int] = []  # the keys of packs_with, sorted
    order = np.argsort(-lengths, kind="stable")
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length > max_length:
            raise ValueError(f"row {row} has {length} tokens, a pack holds {max_length}")
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room = max_length
            chosen: list[int] = []
            packs.append(chosen)
        else:
            room = rooms[at]
            chosen = packs_with[room].pop()
            if not packs_with[room]:
                del packs_with[room], rooms[at]
        chosen.append(row)
        if left := room - length:
            if left not in packs_with:
                packs_with[left] = []
                insort(rooms, left)
            packs_with[left].append(chosen)
    return packs


def pack_examples(batch: pa.RecordBatch, max_length: int) -> pa.RecordBatch:
    """Examples (input_ids, labels, weights if there are any) → packs of them, with `seq_lengths`, the lengths of the
    examples in each."""
    offsets = batch.column("input_ids").offsets.to_numpy()
    lengths = np.diff(offsets)
    packs = pack(lengths, max_length)
    order = np.array([row for rows in packs for row in rows], dtype=np.int64)
    ids, labels = (
        gather_ranges(batch.column(name).values.to_numpy(), offsets[order], lengths[order])
        for name in ("input_ids", "labels")
    )
    # The first token of an example must not be predicted from the end of the previous one.
    labels[np.cumsum(lengths[order]) - lengths[order]] = IGNORE_INDEX
    examples = _offsets([len(rows) for rows in packs])
    tokens = _offsets(lengths[order])[examples]
    columns = [
        pa.ListArray.from_arrays(pa.array(tokens), pa.array(ids)),
        pa.ListArray.from_arrays(pa.array(tokens), pa.array(labels)),
        pa.ListArray.from_arrays(pa.array(examples), pa.array(lengths[order].astype(np.int32))),
    ]
    if "weights" not in batch.schema.names:
        return pa.RecordBatch.from_arrays(columns, schema=PACKED_SCHEMA)
    weights = gather_ranges(batch.column("weights").values.to_numpy(), offsets[order], lengths[order])
    columns.append(pa.ListArray.from_arrays(pa.array(tokens), pa.array(weights)))
    return pa.RecordBatch.from_arrays(columns, schema=PACKED_SCHEMA.append(pa.field("weights", WEIGHTS_TYPE)))


def _offsets(lengths: np.ndarray | list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
