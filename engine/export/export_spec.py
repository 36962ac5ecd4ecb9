"""ExportSpec: which results are exported, in which form; and what prevents the export.

The weights are written by `engine.worker.export`; the files that Ollama and vLLM need are made by
`engine.export.ollama` and `engine.export.vllm_command`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from engine.core import hardware, regular_files
from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import RESULT_FILE, RunDir, any_run_alive
from engine.export import gguf
from engine.launch.command import on_cpu
from engine.launch.workspace import Workplace, absolute_path, is_inside
from engine.models.adapters import ADAPTER_FILES, adapter_config, adapter_has_score_head, adapter_problems
from engine.models.checks import model_problems
from engine.models.facts import inspect_model
from engine.models.quantized_weights import DEQUANTIZED
from engine.models.safetensors_headers import Tensor, read_header
from engine.preflight import checks
from engine.preflight.doctor import device_of
from engine.preflight.package_checks import bitsandbytes_problems
from engine.preflight.suitable_gpus import likely_gpus
from engine.spec.hardware_settings import Hardware
from engine.spec.model_settings import Model
from engine.spec.parts import named_weights, setting
from engine.spec.run_spec import MAX_NAME_LENGTH, Spec
from engine.spec.yaml_text import read_yaml

BASE_FIELD, ADAPTERS_FIELD = "model.model_name_or_path", "adapters"
BYTES_PER_WEIGHT = {"fp32": 4, "bf16": 2, "fp16": 2}
# Size of a quantized model as a share of two bytes per weight: the embeddings are not quantized.
QUANTIZED_SHARE = {"none": 1.0, "8bit": 0.6, "4bit": 0.4}
LIBRARIES_BYTES = 500_000_000  # bytes of memory for the libraries and a few answers
SLACK_BYTES = 50_000_000  # bytes: tokenizer, configuration, and file system overhead
EQUAL_RANK_COMBINATIONS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
PRUNING_COMBINATIONS = (
    "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
)  # fmt: skip
Combination = Literal[
    "cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


class ExportSpec(Spec):
    """Everything needed to repeat an export."""

    kind: ClassVar[str] = "export"

    name: str = setting("", "Name", "A few words to help you find it later. Optional.", max_length=MAX_NAME_LENGTH)
    model: Model = Field(default_factory=Model)
    adapters: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(named_weights)] = setting(
        {},
        "Adapters",
        "Result folders of finished runs of this base model, each with its weight. Leave empty to export the "
        "base alone.",
    )
    form: Literal["merged", "adapter"] = setting(
        "merged",
        "Form",
        "A merged model is complete. A LoRA adapter alone needs its base model wherever it is used.",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto",
        "Precision",
        "Precision of the exported weights. Auto: that of the base model; for LoRA alone fp32, as in "
        "training. The merge itself is computed in fp32.",
    )
    quantize: Literal["none", "8bit", "4bit"] = setting(
        "none", "Quantize", "Writes the merged model in fewer bits with bitsandbytes, after merging in full precision."
    )
    shard_gb: float = setting(5.0, "Shard size", "Maximum size of a weight file in gigabytes.", ge=0.0001, le=1000)
    combination: Combination = setting(
        "cat",
        "Combination",
        "How several adapters are combined. cat adds them exactly; svd compresses the sum to a single rank.",
    )
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
    )
    check_prompts: int = setting(
        8,
        "Prompts to compare",
        "Answered before and after the export; the answers are compared token by token.",
        ge=0,
        le=200,
    )
    prompts: list[Annotated[str, Field(max_length=20_000)]] = setting(
        [], "Own prompts", "Also compared, before those from the data.", max_length=200
    )
    license: str = setting("", "Licence", "Written to the model card, such as apache-2.0.", max_length=200)
    remark: str = setting("", "Remark", "Written to the model card.", max_length=20_000)
    hardware: Hardware = Field(default_factory=Hardware)


def frozen(spec: ExportSpec, workplace: Workplace) -> ExportSpec:
    """The spec with absolute paths, and a name: by default it is named after its models."""
    base = absolute_path(spec.model.model_name_or_path, workplace.model_roots, "config.json")
    adapters = {
        absolute_path(folder, workplace.model_roots, ADAPTER_FILES[0]): weight
        for folder, weight in spec.adapters.items()
    }
    spec = spec.change(BASE_FIELD, base).change(ADAPTERS_FIELD, adapters)
    spec = spec.named(" + ".join(map(model_title, adapters or [base])))
    return spec.change("precision", precision(spec)).change("model.quantization", {"kind": "none"})


def precision(spec: ExportSpec) -> str:
    """The precision of the written weights, with "auto" resolved by the base."""
    if spec.precision != "auto":
        return spec.precision
    stored = {"bfloat16": "bf16", "float16": "fp16"}.get(inspect_model(spec.model.model_name_or_path).dtype, "fp32")
    return "fp32" if spec.form == "adapter" else stored


def problems(spec: ExportSpec, workplace: Workplace, *, wait: bool = True) -> list[Problem]:
    """Everything that prevents it from running here. Without `wait`, except what is still being tried
    (`engine.preflight.doctor`)."""
    all_problems = (
        _base_problems(spec, workplace)
        + _adapter_problems(spec, workplace)
        + _form_problems(spec)
        + (checks.engine_problems(spec.hardware, workplace.saves) or _device_problems(spec))
    )
    if spec.quantize != "none" and not all_problems:
        broken = (bitsandbytes_problems(device_of(spec), wait=wait) or {}).get(spec.quantize)
        all_problems = [replace(broken, field="quantize")] if broken else []
    if all_problems:
        return all_problems
    # While another run is alive, this one waits, and the memory of the other will be free by then.
    memory = memory_problems(spec, waits=any_run_alive(workplace.saves))
    return _combination_problems(spec) + _disk_problems(spec, workplace) + memory


def _base_problems(spec: ExportSpec, workplace: Workplace) -> list[Problem]:
    base = spec.model.model_name_or_path
    if not base.strip():
        return [problem("model-not-chosen", BASE_FIELD)]
    allowed = spec.model.trust_remote_code and workplace.allows_code_of(base)
    problems = model_problems(base, workplace.model_roots, allow_remote_code=allowed, scorer=True)
    if problems:
        return problems
    if not os.path.isdir(base):
        return [problem("export-no-base", BASE_FIELD, base=base)]
    if (how := inspect_model(base).quantized) and how not in DEQUANTIZED:
        return [problem("export-base-quantized", BASE_FIELD, base=base, how=how)]
    unfinished = _unfinished(Path(base), BASE_FIELD)
    return [unfinished] if unfinished else []


def _adapter_problems(spec: ExportSpec, workplace: Workplace) -> list[Problem]:
    problems = []
    for folder in spec.adapters:
        if not is_inside(Path(folder), workplace.model_roots):
            roots = ", ".join(map(str, workplace.model_roots))
            problems.append(problem("path-outside", ADAPTERS_FIELD, path=folder, roots=roots))
        elif unfinished := _unfinished(Path(folder), ADAPTERS_FIELD):
            problems.append(unfinished)
        else:
            base = spec.model.model_name_or_path
            wrong = adapter_problems(folder, base, {}, ADAPTERS_FIELD, scorer=True)
            problems += [
                _named_problem(fault, folder, base) if fault.code == "adapter-other-base" else fault for fault in wrong
            ]
    return problems


def _named_problem(other: Problem, folder: str, base: str) -> Problem:
    """The problem that an adapter belongs to another base, with the name of its run, since there may be several
    adapters."""
    return problem("chat-other-base", ADAPTERS_FIELD, name=model_title(folder), theirs=other.values["base"], base=base)


def _unfinished(folder: Path, field: str) -> Problem | None:
    """A result is not used while its run is alive, because a resumed run writes it again."""
    run = RunDir(folder.parent)
    if not run.request.exists() or folder.name not in (run.adapter.name, run.model.name):
        return None  # not from a run: a model folder, or an adapter from elsewhere
    done = (folder / RESULT_FILE).exists() and not run.alive()
    return None if done else problem("export-unfinished", field, run=folder.parent.name)


def _form_problems(spec: ExportSpec) -> list[Problem]:
    problems = []
    if spec.form == "adapter" and not spec.adapters:
        problems.append(problem("export-nothing-to-merge", "form"))
    if spec.form == "adapter" and spec.quantize != "none":
        problems.append(problem("export-quantized-adapter", "quantize", bits=spec.quantize))
    if spec.quantize != "none" and spec.gguf != "none":
        problems.append(problem("export-quantized-gguf", "gguf", bits=spec.quantize))
    if spec.gguf != "none" and spec.form == "adapter":
        problems.append(problem("export-gguf-adapter", "gguf"))
    elif spec.gguf != "none" and gguf.converter() is None:
        problems.append(no_converter())
    return problems


def no_converter() -> Problem:
    """The problem that there is no converter, with the configured place if there is one."""
    if named := os.environ.get(gguf.CONVERTER_VARIABLE):
        return problem("export-converter-not-there", "gguf", variable=gguf.CONVERTER_VARIABLE, place=named)
    return problem("export-no-converter", "gguf", variable=gguf.CONVERTER_VARIABLE)


def _device_problems(spec: ExportSpec) -> list[Problem]:
    if failed := checks.driver_problems(spec.hardware):
        return failed
    return [] if on_cpu(spec, len(hardware.planned_gpus())) else checks.missing_gpus(spec.hardware)


def _combination_problems(spec: ExportSpec) -> list[Problem]:
    """What peft would reject only halfway, or do wrong silently."""
    configs = {folder: adapter_config(folder) for folder in spec.adapters}
    if not needs_combination(spec):
        return []
    problems = []
    names = {folder: model_title(folder) for folder in configs}
    ranks = {names[folder]: rank(config) for folder, config in configs.items()}
    if spec.combination in EQUAL_RANK_COMBINATIONS and len(configs) > 1 and len(set(ranks.values())) > 1:
        listed = ", ".join(f"{name}: {number}" for name, number in ranks.items())
        problems.append(problem("export-ranks-differ", "combination", how=spec.combination, ranks=listed))
    if dora := [names[folder] for folder, config in configs.items() if config.get("use_dora")]:
        problems.append(problem("export-dora-combined", ADAPTERS_FIELD, names=", ".join(dora)))
    # The head of a reward model is also a fully trained module.
    whole = [
        names[folder]
        for folder, config in configs.items()
        if config.get("modules_to_save") or config.get("trainable_token_indices") or adapter_has_score_head(folder)
    ]
    if whole:
        problems.append(problem("export-whole-modules", ADAPTERS_FIELD, names=", ".join(whole)))
    if not any(spec.adapters.values()):
        problems.append(problem("export-weights-zero", ADAPTERS_FIELD))
    return problems


def needs_combination(spec: ExportSpec) -> bool:
    """Whether a new adapter has to be computed: from several, or from one whose weight is not 1."""
    return list(spec.adapters.values()) not in ([], [1.0])


def rank(config: Mapping[str, Any]) -> int:
    """The largest rank of an adapter's matrices."""
    return max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])


def model_title(folder: str | Path) -> str:
    """The title of a model: the name of the run that produced it, or its folder."""
    folder = Path(folder)
    run = RunDir(folder.parent)
    if not (folder / RESULT_FILE).exists():
        return folder.name
    try:
        return read_yaml(regular_files.read_text(run.spec))["name"] or run.path.name
    except (OSError, ValueError, TypeError, KeyError, Refusal):  # a spec edited by hand
        return run.path.name


def _disk_problems(spec: ExportSpec, workplace: Workplace) -> list[Problem]:
    if spec.form == "merged" and inspect_model(spec.model.model_name_or_path).parameters is None:
        return []  # quantized so that its weights cannot be counted; the base has already been rejected
    needed, free = disk_needed(spec), hardware.free_disk(workplace.saves)
    if needed <= free:
        return []
    sizes = {"needed": f"{needed / 1e9:.2f} GB", "free": f"{free / 1e9:.2f} GB"}
    return [problem("export-no-room", folder=workplace.saves, **sizes)]


def disk_needed(spec: ExportSpec) -> int:
    """Bytes that the export writes, from the headers of the weight files: the result, and temporary files next to it. 0
    for a base whose weights cannot be counted."""
    adapters = sum(_size(Path(folder) / ADAPTER_FILES[1]) for folder in spec.adapters)
    if spec.form == "adapter":
        return 3 * adapters + SLACK_BYTES  # fp32, and zipped once more; a combination is as large as its parts together
    whole = weights(spec) * BYTES_PER_WEIGHT[precision(spec)]
    if not whole:
        return 0
    quantized = int(whole * QUANTIZED_SHARE[spec.quantize]) if spec.quantize != "none" else 0
    file = weights(spec) * {"none": 0, "f32": 4, "f16": 2, "bf16": 2, "q8_0": 1.1}[spec.gguf]
    return whole + quantized + int(file) + SLACK_BYTES


def memory_problems(spec: ExportSpec, waits: bool = False) -> list[Problem]:
    """Whether the model fits into the memory of the device: into what is free now or, for an export that waits, into
    all of it."""
    if on_cpu(spec, len(hardware.planned_gpus())):
        (free, whole), code = _main_memory(), "export-no-memory"
    else:
        gpu = next(iter(likely_gpus(spec, memory_needed(spec))), None)
        if gpu is None:  # reported by `_device_problems`
            return []
        free, whole, code = gpu.free, gpu.memory, "export-no-card-memory"
    needed, has = memory_needed(spec), whole if waits else free
    if needed <= has or not whole:  # unknown: a GPU that shares the machine's memory reports none
        return []
    return [problem(code, needed=f"{needed / 1e9:.2f} GB", free=f"{has / 1e9:.2f} GB")]


def _main_memory() -> tuple[int, int]:
    """Bytes that are free and in total on the machine that exports; of a cluster's, all of it is free once the job has
    begun, and 0 means that it is unknown."""
    whole = hardware.planned_memory() or 0
    return (whole, whole) if hardware.plans_elsewhere() else hardware.memory()


def memory_needed(spec: ExportSpec) -> int:
    """The peak memory of the export in bytes: the base once, as it is loaded, its adapters, and one layer merged in
    fp32. 0 for a base whose weights cannot be counted."""
    if not (count := weights(spec)):
        return 0
    base = inspect_model(spec.model.model_name_or_path)
    wide = precision(spec) == "fp32" or base.dtype not in ("bfloat16", "float16")
    headers = [
        tensors
        for folder in spec.adapters
        if not isinstance(tensors := read_header(Path(folder) / ADAPTER_FILES[1]), Problem)
    ]
    # Merged, original, and their difference.
    layer = 3 * max(map(_largest_layer, headers), default=0) if spec.form == "merged" else 0
    parts = sum(math.prod(tensor.shape) for tensors in headers for tensor in tensors.values())
    beside = BYTES_PER_WEIGHT["fp32"] * (layer + parts * (2 if needs_combination(spec) else 1))
    return count * BYTES_PER_WEIGHT["fp32" if wide else "bf16"] + beside + LIBRARIES_BYTES


def _largest_layer(adapter: Mapping[str, Tensor]) -> int:
    """The number of weights of the largest layer with adapter matrices: B has its rows, A its columns."""
    pairs = ((name, name.replace("lora_A", "lora_B")) for name in adapter if name.endswith("lora_A.weight"))
    sizes = (adapter[b].shape[0] * adapter[a].shape[1] for a, b in pairs if b in adapter and len(adapter[a].shape) == 2)
    return max(sizes, default=0)


def weights(spec: ExportSpec) -> int:
    """The number of weights of the merged model; 0 if that is unknown."""
    base = inspect_model(spec.model.model_name_or_path)
    untied = 0  # fully trained embeddings are no longer tied to the output head
    for folder in spec.adapters if base.tied else ():
        tensors = read_header(Path(folder) / ADAPTER_FILES[1])
        if not isinstance(tensors, Problem):
            sizes = [math.prod(tensor.shape) for name, tensor in tensors.items() if "embed_tokens.weight" in name]
            untied = max([untied, *sizes])
    return (base.parameters or 0) + untied


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
