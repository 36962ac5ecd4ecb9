"""ExportSpec: which weights are made of which results, in which form; and what stands in the way of making them.

The weights themselves are `engine.worker.export`'s; what other programs need to run them is `engine.export.deployment`'s.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from engine.core import hardware
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import RESULT, RunDir, busy
from engine.export import gguf
from engine.launch.command import on_cpu
from engine.launch.workspace import Workplace, absolute, inside
from engine.models.adapters import ADAPTER_FILES, adapter_config, adapter_problems, adapter_scores
from engine.models.checks import model_problems
from engine.models.facts import inspect
from engine.models.safetensors_headers import Tensor, header
from engine.preflight.checks import unusable
from engine.preflight.doctor import device_of
from engine.spec.model_settings import Model
from engine.spec.parts import named_weights, setting
from engine.spec.run_spec import LONGEST_NAME, Hardware, Spec
from engine.spec.yaml_text import read_yaml

BASE, ADAPTERS = "model.model_name_or_path", "adapters"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# What remains of a full-precision model of two bytes a weight: the embeddings stay as they are.
SHRUNK = {"none": 1.0, "8bit": 0.6, "4bit": 0.4}
ALONE = 500_000_000  # bytes of memory that the libraries take, and a few answers
SLACK = 50_000_000  # bytes: tokenizer, configuration, and the file system's own
EQUAL_RANKS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd", "dare_linear_svd", "dare_ties_svd",
           "magnitude_prune_svd")  # fmt: skip
Combination = Literal[
    "cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


class ExportSpec(Spec):
    """Everything needed to repeat an export."""

    kind: ClassVar[str] = "export"

    name: str = setting(
        "", "Name", "A few words to help you find it later. Optional.", max_length=LONGEST_NAME
    )
    model: Model = Field(default_factory=Model)
    adapters: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(named_weights)
    ] = setting(
        {}, "Adapters",
        "Result folders of finished runs of this base model, each with its weight. Leave empty to export the "
        "base alone."
    )  # fmt: skip
    form: Literal["merged", "adapter"] = setting(
        "merged",
        "Form",
        "A merged model is complete. A LoRA adapter alone needs its base model wherever it is used.",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "Precision",
        "Precision of the exported weights. Auto: that of the base model; for LoRA alone fp32, as in "
        "training. The merge itself is computed in fp32.",
    )  # fmt: skip
    quantize: Literal["none", "8bit", "4bit"] = setting(
        "none", "Quantize", "Writes the merged model in fewer bits with bitsandbytes, after merging in full precision."
    )  # fmt: skip
    shard_gb: float = setting(
        5.0, "Shard size", "Maximum size of a weight file in gigabytes.", ge=0.0001, le=1000
    )
    combination: Combination = setting(
        "cat", "Combination",
        "How several adapters are combined. cat adds them exactly; svd compresses the sum to a single rank."
    )  # fmt: skip
    density: float = setting(
        0.5, "Density", "Share of the weights that ties, dare and magnitude_prune keep.", gt=0, le=1
    )
    svd_rank: int | None = setting(
        None,
        "Rank",
        "Rank of the combined adapter, for svd. Leave empty for the largest of its adapters.",
        ge=1,
        le=4096,
    )
    gguf: Literal["none", "f32", "f16", "bf16", "q8_0"] = setting(
        "none", "GGUF", "Also writes a GGUF file for llama.cpp and Ollama. Run `make gguf` once beforehand."
    )  # fmt: skip
    check_prompts: int = setting(
        8, "Prompts to compare", "Answered before and after the export; the answers are compared token by token.", ge=0, le=200
    )  # fmt: skip
    prompts: list[Annotated[str, Field(max_length=20_000)]] = setting(
        [], "Own prompts", "Also compared, before those from the data.", max_length=200
    )
    license: str = setting("", "Licence", "Written to the model card, such as apache-2.0.", max_length=200)
    remark: str = setting("", "Remark", "Written to the model card.", max_length=20_000)
    hardware: Hardware = Field(default_factory=Hardware)


def frozen(spec: ExportSpec, workplace: Workplace) -> ExportSpec:
    """The spec with every path absolute, and a name: without one it is called as what it is made of."""
    base = absolute(spec.model.model_name_or_path, workplace.model_roots, "config.json")
    adapters = {
        absolute(folder, workplace.model_roots, ADAPTER_FILES[0]): weight
        for folder, weight in spec.adapters.items()
    }
    spec = spec.change(BASE, base).change(ADAPTERS, adapters)
    spec = spec.named(" + ".join(map(called, adapters or [base])))
    return spec.change("precision", precision(spec)).change("model.quantization", {"kind": "none"})


def precision(spec: ExportSpec) -> str:
    """The precision of the weights that are written, with "auto" decided by the base."""
    if spec.precision != "auto":
        return spec.precision
    stored = {"bfloat16": "bf16", "float16": "fp16"}.get(inspect(spec.model.model_name_or_path).dtype, "fp32")
    return "fp32" if spec.form == "adapter" else stored


def problems(spec: ExportSpec, workplace: Workplace, *, wait: bool = True) -> list[Problem]:
    """Everything that would keep it from running here. Without `wait`, not what is still being tried (`engine.preflight.doctor`)."""
    found = _of_base(spec, workplace) + _of_adapters(spec, workplace) + _of_form(spec) + _of_device(spec)
    if spec.quantize != "none" and not found:
        broken = (unusable(device_of(spec), wait=wait) or {}).get(spec.quantize)
        found = [replace(broken, field="quantize")] if broken else []
    if found:
        return found
    # While another run is alive this one waits, and what that holds is free by then.
    memory = of_memory(spec, waits=busy(workplace.saves))
    return _of_combination(spec) + _of_disk(spec, workplace) + memory


def _of_base(spec: ExportSpec, workplace: Workplace) -> list[Problem]:
    base = spec.model.model_name_or_path
    if not base.strip():
        return [problem("model-not-chosen", BASE)]
    allowed = spec.model.trust_remote_code and workplace.allows_code_of(base)
    found = model_problems(base, workplace.model_roots, allow_remote_code=allowed, scorer=True)
    if found:
        return found
    if not os.path.isdir(base):
        return [problem("export-no-base", BASE, base=base)]
    if how := inspect(base).quantized:
        return [problem("export-base-quantized", BASE, base=base, how=how)]
    return [_unfinished(Path(base), BASE)] if _unfinished(Path(base), BASE) else []


def _of_adapters(spec: ExportSpec, workplace: Workplace) -> list[Problem]:
    found = []
    for folder in spec.adapters:
        if not inside(Path(folder), workplace.model_roots):
            roots = ", ".join(map(str, workplace.model_roots))
            found.append(problem("path-outside", ADAPTERS, path=folder, roots=roots))
        elif unfinished := _unfinished(Path(folder), ADAPTERS):
            found.append(unfinished)
        else:
            base = spec.model.model_name_or_path
            wrong = adapter_problems(folder, base, {}, ADAPTERS, scorer=True)
            found += [_named(one, folder, base) if one.code == "adapter-other-base" else one for one in wrong]
    return found


def _named(other: Problem, folder: str, base: str) -> Problem:
    """That an adapter is of another base, with the name of its run: there may be several adapters."""
    return problem("chat-other-base", ADAPTERS, name=called(folder), theirs=other.values["base"], base=base)


def _unfinished(folder: Path, field: str) -> Problem | None:
    """A result is not taken while its run is alive: a resumed one writes it anew."""
    run = RunDir(folder.parent)
    if not run.request.exists() or folder.name not in (run.adapter.name, run.model.name):
        return None  # not a run's: a model folder, or an adapter that was brought here
    done = (folder / RESULT).exists() and not run.alive()
    return None if done else problem("export-unfinished", field, run=folder.parent.name)


def _of_form(spec: ExportSpec) -> list[Problem]:
    found = []
    if spec.form == "adapter" and not spec.adapters:
        found.append(problem("export-nothing-to-merge", "form"))
    if spec.form == "adapter" and spec.quantize != "none":
        found.append(problem("export-quantized-adapter", "quantize", bits=spec.quantize))
    if spec.quantize != "none" and spec.gguf != "none":
        found.append(problem("export-quantized-gguf", "gguf", bits=spec.quantize))
    if spec.gguf != "none" and spec.form == "adapter":
        found.append(problem("export-gguf-adapter", "gguf"))
    elif spec.gguf != "none" and gguf.converter() is None:
        found.append(no_converter())
    return found


def no_converter() -> Problem:
    """That there is no converter, with the place where none is if one was named."""
    if named := os.environ.get(gguf.VARIABLE):
        return problem("export-converter-not-there", "gguf", variable=gguf.VARIABLE, place=named)
    return problem("export-no-converter", "gguf", variable=gguf.VARIABLE)


def _of_device(spec: ExportSpec) -> list[Problem]:
    cards = hardware.gpus()
    if spec.hardware.device == "cuda" and not cards:
        return [problem("no-cards", "hardware.device")]
    unknown = [index for index in spec.hardware.devices if index >= len(cards)]
    if unknown and spec.hardware.device != "cpu":
        return [problem("card-unknown", "hardware.devices", given=unknown[0], last=len(cards) - 1)]
    return []


def _of_combination(spec: ExportSpec) -> list[Problem]:
    """What peft would only say in the middle, or would do wrongly without a word."""
    configs = {folder: adapter_config(folder) for folder in spec.adapters}
    if not combined(spec):
        return []
    found = []
    names = {folder: called(folder) for folder in configs}
    ranks = {names[folder]: rank(config) for folder, config in configs.items()}
    if spec.combination in EQUAL_RANKS and len(configs) > 1 and len(set(ranks.values())) > 1:
        told = ", ".join(f"{name}: {number}" for name, number in ranks.items())
        found.append(problem("export-ranks-differ", "combination", how=spec.combination, ranks=told))
    if dora := [names[folder] for folder, config in configs.items() if config.get("use_dora")]:
        found.append(problem("export-dora-combined", ADAPTERS, names=", ".join(dora)))
    # The head of a reward model is one, too.
    whole = [
        names[folder]
        for folder, one in configs.items()
        if one.get("modules_to_save") or adapter_scores(folder)
    ]
    if whole:
        found.append(problem("export-whole-modules", ADAPTERS, names=", ".join(whole)))
    if not any(spec.adapters.values()):
        found.append(problem("export-weights-zero", ADAPTERS))
    return found


def combined(spec: ExportSpec) -> bool:
    """Whether a new adapter has to be computed: of several, or of one whose weight is not 1."""
    return list(spec.adapters.values()) not in ([], [1.0])


def rank(config: Mapping[str, Any]) -> int:
    """The largest rank of an adapter's matrices."""
    return max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])


def called(folder: str | Path) -> str:
    """What a model is called: as the run that left it, or as its folder."""
    folder = Path(folder)
    run = RunDir(folder.parent)
    if not (folder / RESULT).exists():
        return folder.name
    try:
        return read_yaml(run.spec.read_text(encoding="utf-8"))["name"] or run.path.name
    except (OSError, ValueError, TypeError, KeyError, Refusal):  # a spec that somebody has edited
        return run.path.name


def _of_disk(spec: ExportSpec, workplace: Workplace) -> list[Problem]:
    if spec.form == "merged" and inspect(spec.model.model_name_or_path).parameters is None:
        return []  # quantized in a way whose weights cannot be counted; the base has been refused for it
    needed, free = disk_needed(spec), hardware.free_disk(workplace.saves)
    if needed <= free:
        return []
    sizes = {"needed": f"{needed / 1e9:.2f} GB", "free": f"{free / 1e9:.2f} GB"}
    return [problem("export-no-room", folder=workplace.saves, **sizes)]


def disk_needed(spec: ExportSpec) -> int:
    """Bytes that the export writes, from the headers of the weight files: what it leaves, and what lies beside it
    meanwhile. 0 for a base that cannot be counted."""
    adapters = sum(_size(Path(folder) / ADAPTER_FILES[1]) for folder in spec.adapters)
    if spec.form == "adapter":
        return (
            3 * adapters + SLACK
        )  # of fp32, zipped once more; a combination is as large as its parts together
    whole = weights(spec) * BYTES[precision(spec)]
    if not whole:
        return 0
    quantized = int(whole * SHRUNK[spec.quantize]) if spec.quantize != "none" else 0
    file = weights(spec) * {"none": 0, "f32": 4, "f16": 2, "bf16": 2, "q8_0": 1.1}[spec.gguf]
    return whole + quantized + int(file) + SLACK


def of_memory(spec: ExportSpec, waits: bool = False) -> list[Problem]:
    """Whether the model fits into the memory of the device: into what is free now, or, for an export that waits, into
    all of it."""
    cards = hardware.gpus()
    if on_cpu(spec, len(cards)):
        (free, whole), code = hardware.memory(), "export-no-memory"
    else:
        card = cards[(spec.hardware.devices or [0])[0]]
        free, whole, code = card.free, card.memory, "export-no-card-memory"
    needed, has = memory_needed(spec), whole if waits else free
    if needed <= has or not whole:  # a card that shares the machine's memory tells none
        return []
    return [problem(code, needed=f"{needed / 1e9:.2f} GB", free=f"{has / 1e9:.2f} GB")]


def memory_needed(spec: ExportSpec) -> int:
    """The most bytes that the export has in memory: the base once, as it is loaded, its adapters, and one layer merged in
    fp32. 0 for a base that cannot be counted."""
    if not (count := weights(spec)):
        return 0
    base = inspect(spec.model.model_name_or_path)
    wide = precision(spec) == "fp32" or base.dtype not in ("bfloat16", "float16")
    found = [
        one
        for folder in spec.adapters
        if not isinstance(one := header(Path(folder) / ADAPTER_FILES[1]), Problem)
    ]
    # Merged, as it was, and the difference of the two.
    layer = 3 * max(map(_largest_layer, found), default=0) if spec.form == "merged" else 0
    parts = sum(math.prod(one.shape) for tensors in found for one in tensors.values())
    beside = BYTES["fp32"] * (layer + parts * (2 if combined(spec) else 1))
    return count * BYTES["fp32" if wide else "bf16"] + beside + ALONE


def _largest_layer(adapter: Mapping[str, Tensor]) -> int:
    """Weights of the largest layer that the adapter's matrices belong to: B has its rows, A its columns."""
    pairs = ((name, name.replace("lora_A", "lora_B")) for name in adapter if name.endswith("lora_A.weight"))
    sizes = (
        adapter[b].shape[0] * adapter[a].shape[1]
        for a, b in pairs
        if b in adapter and len(adapter[a].shape) == 2
    )
    return max(sizes, default=0)


def weights(spec: ExportSpec) -> int:
    """How many weights the merged model has; 0 where that cannot be known."""
    base = inspect(spec.model.model_name_or_path)
    untied = 0  # embeddings that were trained in full no longer are the output head
    for folder in spec.adapters if base.tied else ():
        found = header(Path(folder) / ADAPTER_FILES[1])
        if not isinstance(found, Problem):
            sizes = [math.prod(one.shape) for name, one in found.items() if "embed_tokens.weight" in name]
            untied = max([untied, *sizes])
    return (base.parameters or 0) + untied


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
