"""The tensors of a model by name, type and shape, from the headers of its safetensors files.

Weights are never read. Nothing in a header is trusted: the size it claims is checked against the file before memory is
allocated.

Why not `safetensors.safe_open`, which needs only numpy? The engine does without the packages of the training stack.
Also, safe_open reports "header too large" for a Git LFS pointer (`git lfs pull` was never run) and "file not fully
covered" for a truncated file, while a person has to be told which of the two it is and how many bytes are missing. And
it does not know types newer than itself.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from engine.core import regular_files
from engine.core.problems import Problem, problem
from engine.models.json_objects import MAX_JSON_BYTES, files_in, read_json_object

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
PACKED_WEIGHT = re.compile(r"(.+\.weight)\.quant_state\.bitsandbytes__\w+")
AUXILIARY_TENSOR = re.compile(
    r".+\.(weight\..+|SCB|weight_format|rotary_emb\.inv_freq|weight_(scale\w*|zero_point|global_scale|g_idx)"
    r"|(input|output|activation|[kqv])_(scale|zero_point|global_scale))"
)
GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # of a model in several files
SHAPE = "SHAPE"  # type of an entry that contains a shape: that of the packed weights next to it
STORED_SHAPE = {"I64": struct.Struct("<2q"), "I32": struct.Struct("<2i")}
VALUES_PER_BYTE = 2  # of MXFP4: the last two axes are the groups of a row, and 16 bytes in each


class Tensor(NamedTuple):
    """One entry of a safetensors header. `shape` is the true one if bitsandbytes packed two values per byte."""

    dtype: str
    shape: tuple[int, ...]


def _weight_files(folder: Path) -> tuple[list[Path], list[Problem]]:
    """The safetensors files that transformers would load, and the problems of the set."""
    single = folder / "model.safetensors"
    if os.path.isfile(single):
        return [single], []
    index = folder / "model.safetensors.index.json"
    if not os.path.exists(index):
        return [], [_no_weights(folder)]
    content = read_json_object(index)
    if isinstance(content, Problem):
        return [], [content]
    places = content.get("weight_map")
    shards = sorted(set(places.values())) if _is_weight_map(places) else []
    if not shards:
        return [], [problem("model-index-broken", file=index.name)]
    present = [folder / shard for shard in shards if (folder / shard).is_file()]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if not missing:
        return present, []
    return present, [
        problem("model-shards-missing", count=len(missing), of=len(shards), missing=names_in_line(missing))
    ]


def _is_weight_map(places: Any) -> TypeGuard[dict[str, str]]:
    """A shard must be a plain file name: an index must not make us open ../../something."""
    return isinstance(places, dict) and all(
        isinstance(shard, str) and re.fullmatch(r"[\w.-]+\.safetensors", shard) for shard in places.values()
    )


def _no_weights(folder: Path) -> Problem:
    if packed := gguf_problem(folder):
        return packed
    pickles = [name for name, _ in files_in(folder) if name.endswith(PICKLE_SUFFIXES) and name not in NOT_WEIGHTS]
    if pickles:
        return problem("model-pickled", file=pickles[0], path=folder)
    return problem("model-no-weights", folder=folder)


def gguf_files(folder: Path) -> list[str]:
    """GGUF files with a model that writes: what sees for it lies beside it, in a file that is called so. Of a model in
    several files, the first that is there."""
    names = [name for name, _ in files_in(folder) if name.endswith(".gguf") and not name.startswith("mmproj")]
    first: dict[str, str] = {}
    for name in sorted(names):
        first.setdefault(GGUF_PART.sub(r"\1-\3", name), name)
    return [name for name in names if name in first.values()]


def gguf_parts(file: Path) -> list[Path]:
    """The files of the model that a GGUF file is a part of, in order, whether they are there or not; the file itself if
    it is a whole model."""
    part = GGUF_PART.fullmatch(file.name)
    if not part or int(part[3]) < 2:
        return [file]
    return [file.with_name(f"{part[1]}-{number:05}-of-{part[3]}.gguf") for number in range(1, int(part[3]) + 1)]


def gguf_problem(folder: Path) -> Problem | None:
    """That a folder has GGUF files: one to convert, or several to choose from."""
    files = gguf_files(folder)
    if len(files) > 1:
        return problem("convert-choose", folder=folder, files=names_in_line(files, 12))
    return problem("model-gguf", file=files[0], path=folder) if files else None


def tensors_of(folder: Path) -> tuple[dict[str, Tensor], list[Problem]]:
    """All tensors of a model by name, and the problems of its weight files."""
    files, problems = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        file_tensors = read_header(file)
        if isinstance(file_tensors, Problem):
            problems.append(file_tensors)
        else:
            tensors.update(file_tensors)
    return _unpacked(tensors), problems


def read_header(path: Path) -> Mapping[str, Tensor] | Problem:
    """The tensors of one safetensors file, or the problem with it. Reads only the header and trusts nothing in it: the
    size it claims is checked against the file before memory is allocated."""
    try:
        stat = path.stat()
        return _read_header(path, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        return problem("model-file-unreadable", file=path.name, what=error.strerror)


@lru_cache(maxsize=4096)
def _read_header(path: Path, modified: int, size: int) -> Mapping[str, Tensor] | Problem:
    with regular_files.open_regular(path) as file:
        start = file.read(8)
        if start == b"version ":  # a pointer of Git LFS, if `git lfs pull` was never run
            return problem("model-lfs-pointer", file=path.name)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_JSON_BYTES:
            return problem("model-header-broken", file=path.name)
        if 8 + length > size:
            return problem("model-file-size", file=path.name, size=size, expected=8 + length)
        try:
            entries = json.loads(file.read(length))
            if not all(map(str.isprintable, entries)):  # names are shown on the page
                raise ValueError(path)
            tensors = {name: _parse_tensor(entry) for name, entry in entries.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for name, entry in entries.items() if name in tensors), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return problem("model-header-broken", file=path.name)
        if 8 + length + end != size:
            return problem("model-file-size", file=path.name, size=size, expected=8 + length + end)
        for name in tensors.copy():
            if packed := PACKED_WEIGHT.fullmatch(name):
                file.seek(8 + length + entries[name]["data_offsets"][0])
                true_shape = _packed_shape(file.read(min(math.prod(tensors[name].shape), 4096)))
                if true_shape and packed[1] in tensors:
                    tensors[packed[1]] = tensors[packed[1]]._replace(shape=true_shape)
            dtype, shape = tensors[name]
            if name.endswith(".weight_shape") and dtype in STORED_SHAPE and shape == (2,):
                file.seek(8 + length + entries[name]["data_offsets"][0])
                stored = STORED_SHAPE[dtype]
                values = stored.unpack(file.read(stored.size))
                tensors[name] = Tensor(SHAPE if min(values) > 0 else dtype, values if min(values) > 0 else shape)
    return {name: tensor for name, tensor in tensors.items() if not AUXILIARY_TENSOR.fullmatch(name)}


def _unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Packed weights with the names and shapes that they have in memory, without the tensors for unpacking."""
    unpacked: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        stored, blocks = tensors.get(f"{module}.weight_shape"), name.removesuffix("_blocks")
        if kind == "weight_packed" and stored and stored.dtype == SHAPE:  # compressed-tensors
            unpacked[f"{module}.weight"] = Tensor(tensor.dtype, stored.shape)
        elif blocks != name and f"{blocks}_scales" in tensors and len(tensor.shape) > 2:  # MXFP4
            *outer, groups, width = tensor.shape
            unpacked[blocks] = Tensor(tensor.dtype, (*outer, groups * width * VALUES_PER_BYTE))
        elif kind != "weight_shape" and f"{name.removesuffix('_scales')}_blocks" not in tensors:
            unpacked[name] = tensor
    return unpacked


def _parse_tensor(entry: Any) -> Tensor:
    """Raises ValueError, TypeError or KeyError if a header entry contradicts itself."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    sane = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= 16
    if not sane or not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)):
        raise ValueError(entry)
    bits = DTYPE_BITS.get(dtype)  # a type newer than this table is accepted as it is
    if end < begin or (bits and math.prod(shape) * bits != (end - begin) * 8):
        raise ValueError(entry)
    return Tensor(dtype, tuple(shape))


def _packed_shape(state: bytes) -> tuple[int, ...] | None:
    """The true shape of a weight that bitsandbytes stored packed: it is stored as JSON next to the weight."""
    try:
        shape = json.loads(state)["shape"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    sane = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
    return tuple(shape) if sane else None


def names_in_line(names: Any, most: int = 5) -> str:
    """Names in one line, shortened by an ellipsis."""
    names = list(names)
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")
