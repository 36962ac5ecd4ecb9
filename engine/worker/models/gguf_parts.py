"""Join a GGUF model in several files, as llama.cpp's gguf-split writes them and transformers does not read them: the
first has the metadata, and each has some of the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf

SPLIT_KEYS = "split."  # metadata about the parts
WRITTEN_KEYS = ("GGUF.", "general.architecture")  # by the writer itself


def count_weights(parts: Sequence[Path]) -> int:
    """How many weights these files have together, by their headers. Raises whatever the reader raises."""
    return sum(int(tensor.n_elements) for part in parts for tensor in gguf.GGUFReader(part).tensors)


def join(parts: Sequence[Path], file: Path) -> None:
    """Write one GGUF file with the metadata of the first part and the tensors of all. Raises whatever reader and writer
    raise."""
    readers = [gguf.GGUFReader(part) for part in parts]
    fields: Any = readers[0].fields
    writer = gguf.GGUFWriter(file, fields["general.architecture"].contents(), endianess=readers[0].endianess)
    for name, field in fields.items():
        if name.startswith((SPLIT_KEYS, *WRITTEN_KEYS)):
            continue
        of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=of_items)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data, tensor_endianess=readers[0].endianess)
    writer.close()
