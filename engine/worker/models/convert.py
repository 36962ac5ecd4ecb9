"""Convert GGUF, pickled or quantized weights to plain safetensors: python -m engine.worker.models.convert FOLDER

A job (engine.data.data_jobs) whose process may take only so much memory, time and disk. Pickles are opened as weights
alone: whatever else one holds is refused before it does anything. What was written is loaded once more before it gets
its name.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.core import hardware
from engine.core.problems import Refusal, problem
from engine.core.rundir import write_json
from engine.data.data_jobs import ReportProgress, job_process
from engine.models.checks import model_problems
from engine.models.conversion import INDEX, MODEL_FIELD, Convertible
from engine.models.facts import inspect_model
from engine.models.json_objects import json_object_or_empty
from engine.models.quantized_weights import FILES, quantization_config
from engine.models.safetensors_headers import gguf_parts, names_in_line
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.process_lifecycle import silence_warnings

MAX_SECONDS = 6 * 3600  # of processor time
LIBRARY_BYTES = 16 << 30  # of address space that the libraries take, most of which is never used
BYTES_PER_WEIGHT = 12  # that may be in memory while it is read: in fp32, dequantized, and in its own type
SPARE_BYTES = 1 << 30
CALLED = re.compile(r"GLOBAL ([\w.]+)")  # what a pickle would have called
FILES_FOR_PEOPLE = ("README*", "LICENSE*", "NOTICE*")
OTHER_FILES = (*FILES_FOR_PEOPLE, "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
SOURCE_FILE = "converted_from.json"  # in the result: the files that it was made of
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # under which training scripts save their weights


def convert(file: Path, target: Path, report: ReportProgress) -> dict[str, Any]:
    """Write the model of `file` into the folder `target`, unless it was made of the same weights before. Raises
    Refusal, also if the folder is not the result of a conversion: it is never written over."""
    kind = Convertible(file, target).kind
    source = _source(file, kind)
    if os.path.lexists(target):
        made_of = json_object_or_empty(target / SOURCE_FILE)
        if not made_of:
            raise Refusal(problem("convert-taken", MODEL_FIELD, folder=target))
        if made_of == source and not model_problems(target, [target.parent], scorer=True):
            return {"folder": str(target), "made": False}
    _limit(file, WEIGHTS_OF[kind](file), joined=_joined_bytes(file))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        report(0, 3, "steps")
        whole = _whole(file, partial)
        model, tokenizer = READERS_OF[kind](whole)
        if whole != file:
            whole.unlink()
        report(1, 3, "steps")
        model.save_pretrained(partial)
        if tokenizer:
            tokenizer.save_pretrained(partial)
        _forget_origin(partial / "config.json")
        _copy_others(file, partial)
        del model
        report(2, 3, "steps")
        _verify(partial)
        write_json(partial / SOURCE_FILE, source)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"folder": str(target), "made": True}


def _source(file: Path, kind: str) -> dict[str, Any]:
    """What tells other weights apart: the name, size and time of each file with weights. Raises Refusal."""
    parts = {
        "gguf": lambda: _present_parts(file),
        "pickle": lambda: _pickled_files(file),
        "quantized": lambda: sorted(file.parent.glob("*.safetensors")),
        "packed": lambda: sorted(file.parent.glob("*.safetensors")),
    }[kind]()
    return {part.name: [part.stat().st_size, part.stat().st_mtime_ns] for part in parts}


# ------------------------------------------------------------------------------------------ what it may take


def _gguf_weights(file: Path) -> int:
    """How many weights a GGUF model has, by the headers of its files."""
    from transformers.integrations.gguf.reader import GgufHeader

    from engine.worker.models.gguf_parts import count_weights

    first, *others = gguf_parts(file)
    try:
        header = GgufHeader.from_file(str(first))
        return sum(math.prod(tensor.shape) for tensor in header.tensors) + count_weights(others)
    except Exception as error:  # a file of another kind, cut off, or made to mislead
        raise Refusal(problem("convert-broken", MODEL_FIELD, file=file.name, why=_reason(error))) from error


def _present_parts(file: Path) -> list[Path]:
    """The files of a GGUF model. Raises Refusal if some are missing."""
    parts = gguf_parts(file)
    if missing := [part.name for part in parts if not part.is_file()]:
        values = {"count": len(missing), "of": len(parts), "missing": names_in_line(missing)}
        raise Refusal(problem("model-shards-missing", MODEL_FIELD, **values))
    return parts


def _joined_bytes(file: Path) -> int:
    """The size of the single file that a GGUF model in several is joined into; 0 for all other models."""
    parts = gguf_parts(file)
    return sum(part.stat().st_size for part in parts) if len(parts) > 1 else 0


def _whole(file: Path, folder: Path) -> Path:
    """The file of a model; of a GGUF model in several, one with all of them, in `folder`."""
    from engine.worker.models.gguf_parts import join

    parts = gguf_parts(file)
    if len(parts) == 1:
        return file
    folder.mkdir()
    whole = folder / file.name
    try:
        join(parts, whole)
    except Exception as error:  # see above
        raise Refusal(problem("convert-broken", MODEL_FIELD, file=file.name, why=_reason(error))) from error
    return whole


def _pickled_files(file: Path) -> list[Path]:
    if file.name != INDEX:
        return [file]
    content = json.loads(file.read_text(encoding="utf-8"))
    names = {str(name) for name in content.get("weight_map", {}).values()}
    missing = [name for name in names if Path(name).name != name or not (file.parent / name).is_file()]
    if missing or not names:
        why = ", ".join(sorted(missing)) or "weight_map"
        raise Refusal(problem("convert-broken", MODEL_FIELD, file=file.name, why=why))
    return [file.parent / name for name in sorted(names)]


def _pickled_bytes(file: Path) -> int:
    """The size of the weights on disk, unpacked: torch does not pack them, and whoever does wants no good."""
    size = 0
    for part in _pickled_files(file):
        size += part.stat().st_size
        if zipfile.is_zipfile(part):
            with zipfile.ZipFile(part) as archive:
                size = max(size, sum(entry.file_size for entry in archive.infolist()))
    return size


def _limit(file: Path, count: int, joined: int) -> None:
    """Raises Refusal where there is no room for so many weights, and a file of `joined` bytes meanwhile; else limits
    this process to what they take."""
    free, _ = hardware.memory()
    disk = hardware.free_disk(file.parent)
    needed, written = BYTES_PER_WEIGHT // 2 * count, 4 * count + joined + SPARE_BYTES
    for there, least, code in ((free, needed, "convert-no-memory"), (disk, 2 * count + joined, "convert-no-room")):
        if least > there:
            sizes = {"needed": f"{least / 1e9:.1f} GB", "free": f"{there / 1e9:.1f} GB"}
            raise Refusal(problem(code, MODEL_FIELD, **sizes))
    memory = LIBRARY_BYTES + BYTES_PER_WEIGHT * count + joined
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, MAX_SECONDS),
        (resource.RLIMIT_FSIZE, written),
    ):
        resource.setrlimit(kind, (most, most))


# ------------------------------------------------------------------------------------------ read


def _read_gguf(file: Path) -> tuple[Any, Any]:
    """Model and tokenizer, the weights in bf16 unless the file has them in a type of their own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.integrations.gguf.reader import GgufHeader

    family: Any = AutoModelForCausalLM
    dtype = GgufHeader.from_file(str(file)).dtype or torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model, report = family.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except Exception as error:  # an architecture that it does not read, a file that is damaged
        raise Refusal(problem("convert-gguf", MODEL_FIELD, file=file.name, why=_reason(error))) from error
    _refuse_missing(report["missing_keys"], file)
    model._weight_conversions = None  # those of the architecture itself are found again when it is saved
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    return model, tokenizer


def _read_packed(file: Path) -> tuple[Any, Any]:
    """The model whose weights GPTQ or AWQ have packed, in the type of their scales."""
    from safetensors.torch import load_file

    from engine.worker.models.packed_weights import dequantized

    how = quantization_config(json.loads(file.read_text(encoding="utf-8")))
    tensors: dict[str, Any] = {}
    for part in sorted(file.parent.glob("*.safetensors")):
        tensors |= load_file(part)
    try:
        weights = dequantized(tensors, how or {})
    except (RuntimeError, KeyError, IndexError) as error:
        raise Refusal(problem("convert-broken", MODEL_FIELD, file=file.parent.name, why=_reason(error))) from error
    return _model_of(weights, file), None


def _read_pickled(file: Path) -> tuple[Any, Any]:
    """The model, its weights in the type of the largest; its tokenizer is in files already, which say more than what
    transformers would make of them."""
    weights: dict[str, Any] = {}
    for part in _pickled_files(file):
        weights |= _weights_in(part)
    return _model_of(weights, file), None


def _model_of(weights: dict[str, Any], file: Path) -> Any:
    """The model of the configuration beside `file`, with these weights."""
    from transformers import AutoConfig

    from engine.worker.models.structure import model_class

    if not weights:
        raise Refusal(problem("convert-broken", MODEL_FIELD, file=file.name, why="no tensors"))
    largest = max(weights.values(), key=lambda tensor: tensor.numel() * tensor.is_floating_point())
    config = AutoConfig.from_pretrained(file.parent)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        family = model_class(config)._model_mapping[type(config)]
        model, report = family.from_pretrained(
            None, config=config, state_dict=weights, dtype=largest.dtype, output_loading_info=True
        )
    except (RuntimeError, ValueError, KeyError) as error:  # shapes of another model, a family that it does not know
        raise Refusal(problem("convert-broken", MODEL_FIELD, file=file.name, why=_reason(error))) from error
    _refuse_missing(report["missing_keys"], file)
    return model


def _read_quantized(file: Path) -> tuple[Any, Any]:
    """The dequantized model, in the type of its configuration, or bf16."""
    import torch

    from engine.worker.models.loading import load_base

    if problems := model_problems(file.parent, [file.parent], scorer=True):
        raise Refusal(problems)
    dtype = getattr(torch, inspect_model(file.parent).dtype, torch.bfloat16)
    spec = RunSpec.read({"model": {"model_name_or_path": str(file.parent)}})
    return load_base(spec, str(file.parent), dtype), None


def _weights_in(file: Path) -> dict[str, Any]:
    """The tensors of one pickle by name. Raises Refusal where it holds anything that is no weight."""
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a pickle that holds more than weights, or is cut off, or something else altogether
        if match := CALLED.search(str(error)):
            raise Refusal(problem("convert-hostile", MODEL_FIELD, file=file.name, what=match[1])) from error
        raise Refusal(problem("convert-broken", MODEL_FIELD, file=file.name, why=_reason(error))) from error
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise Refusal(problem("convert-broken", MODEL_FIELD, file=file.name, why=type(content).__name__))
    tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    prefix = "module." if tensors and all(name.startswith("module.") for name in tensors) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


WEIGHTS_OF: dict[str, Callable[[Path], int]] = {
    "gguf": _gguf_weights,
    "pickle": lambda file: _pickled_bytes(file) // 2,
    "quantized": lambda file: inspect_model(file.parent).parameters or 0,
    "packed": lambda file: 2 * sum(part.stat().st_size for part in file.parent.glob("*.safetensors")),  # of 4 bits each
}  # the number of weights of each kind
READERS_OF: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "gguf": _read_gguf,
    "pickle": _read_pickled,
    "quantized": _read_quantized,
    "packed": _read_packed,
}  # the model, and its tokenizer unless that is in files of its own


def _refuse_missing(names: set[str], file: Path) -> None:
    if missing := sorted(names):
        raise Refusal(problem("weights-missing", MODEL_FIELD, count=len(missing), name=missing[0]))


def _reason(error: Exception) -> str:
    """The first line of what a library says; of PyTorch's advice on weights alone, what it is about."""
    text = str(error).strip()
    if match := re.search(r"WeightsUnpickler error:\s*(\S[^\n]*)", text):
        text = match[1]
    return text.split("\n")[0][:300].rstrip(". ") or type(error).__name__


# ------------------------------------------------------------------------------------------ written


def _forget_origin(file: Path) -> None:
    """Leave out of config.json what only the file was called that it was made of."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for name in ("_model_name_or_path", "_name_or_path"):
        config.pop(name, None)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_others(file: Path, folder: Path) -> None:
    """What a model folder has besides: tokenizer, license, card. From beside a GGUF file, which has its tokenizer in
    it, only what is for people."""
    patterns = OTHER_FILES if file.suffix != ".gguf" else FILES_FOR_PEOPLE
    for source in sorted({path for pattern in patterns for path in file.parent.glob(pattern)}):
        # Some say how the weights of the source are stored, which those of the result are not.
        of_weights = source.name.endswith(".index.json") or source.name in FILES
        if source.is_file() and not of_weights and not (folder / source.name).exists():
            shutil.copyfile(source, folder / source.name)


def _verify(folder: Path) -> None:
    """Raises Refusal where what was written is not a model that can be trained."""
    import torch
    from transformers import AutoConfig

    from engine.worker.models.structure import model_class

    if problems := model_problems(folder, [folder.parent]):
        raise Refusal(problems)
    config = AutoConfig.from_pretrained(folder)
    model, report = model_class(config).from_pretrained(folder, dtype="auto", output_loading_info=True)
    _refuse_missing(report["missing_keys"], folder)
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise Refusal(problem("convert-not-finite", MODEL_FIELD, name=name))


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    silence_warnings()
    with job_process(sys.argv[1]) as (folder, arguments, report):
        result = convert(Path(arguments["file"]), Path(arguments["target"]), report)
        write_json(folder / "result.json", result)
