"""A training as a script that needs only the libraries: settings become literals, and what we add to the libraries is
written out by its own source (`own_source`), so that both always compute the same.

What cannot be written so is rejected (`engine.export.plain_script`, and here for what only the model's classes show).
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from transformers import GenerationConfig

from engine.core.problems import Refusal, problem
from engine.core.rundir import RunDir, read_json, write_text
from engine.export.plain_script import decided_precision, ran_on_cpu
from engine.models.adapters import ADAPTER_FILES
from engine.preflight.package_checks import PACKAGE_NAMES, required_packages
from engine.spec.run_spec import RunSpec
from engine.worker.data.cache import SUMMARY_FILE
from engine.worker.data.images_column import IMAGES_COLUMN
from engine.worker.exporting.own_source import OwnSource, import_lines, names_of
from engine.worker.exporting.python_text import literal
from engine.worker.exporting.script_parts import model_code, stage_code, training_code
from engine.worker.models.loading import is_reward_model, model_config
from engine.worker.models.structure import expose_backbone, model_class, structure_of
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.models.training_forward import enable_text_training
from engine.worker.training.result import generation_config

# Where the names in the template come from; what our own code uses is read from its imports.
NAMES = {
    "transformers": (
        "AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer",
        "BitsAndBytesConfig", "EarlyStoppingCallback", "GenerationConfig", "Trainer", "TrainingArguments", "set_seed",
    ),
    "trl": ("DPOConfig", "KTOConfig", "RewardConfig", "SFTConfig", "SFTTrainer"),
    "trl.trainer.dpo_trainer": ("DataCollatorForPreference",),
    "trl.trainer.sft_trainer": ("DataCollatorForLanguageModeling",),
    "peft": ("LoraConfig", "PeftConfig", "PeftModel", "get_peft_model"),
    "peft.optimizers": ("create_loraplus_optimizer",),
    "datasets": ("Dataset",),
    "itertools": ("islice",),
    "pathlib": ("Path",),
    "types": ("SimpleNamespace",),
}  # fmt: skip
MODULES = ("os", "torch")
ADAPTER_FOLDER = "adapter"
STAGE_NAMES = {
    "pt": "Pre-training",
    "sft": "Supervised fine-tuning",
    "rm": "Reward modelling",
    "dpo": "DPO",
    "kto": "KTO",
    "orpo": "ORPO",
    "simpo": "SimPO",
}
METHOD_NAMES = {"lora": "with LoRA", "freeze": "in some of its layers", "full": "with all its weights"}
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets")


def write(run: RunDir, folder: Path) -> None:
    """Write the script with its rows, tokenizer, requirements and a README into `folder`, which exists and is empty.
    Raises Refusal."""
    spec = RunSpec.from_yaml(run.spec.read_text(encoding="utf-8"))
    spec = spec.change("training.precision", decided_precision(run, spec))
    prepared = read_json(run.prepared / SUMMARY_FILE)
    tokenizer = load_tokenizer(spec, prepared["model_path"])
    write_text(folder / "train.py", script(spec, run, prepared, tokenizer))
    (folder / "rows").mkdir()
    for split in prepared["splits"]:
        shutil.copyfile(run.prepared / f"{split}.arrow", folder / "rows" / f"{split}.arrow")
    tokenizer.save_pretrained(folder / "tokenizer")
    if spec.model.adapter_path:
        (folder / ADAPTER_FOLDER).mkdir()
        for name in ADAPTER_FILES:
            if (file := Path(spec.model.adapter_path) / name).is_file():
                shutil.copyfile(file, folder / ADAPTER_FOLDER / name)
    write_text(folder / "requirements.txt", requirements(spec))
    write_text(folder / "README.md", readme(spec, run))


def script(spec: RunSpec, run: RunDir, prepared: Mapping[str, Any], tokenizer: Any) -> str:
    """The text of train.py. Raises Refusal for rows and models that it cannot have."""
    path = prepared["model_path"]
    rows = Dataset.from_file(str(run.prepared / "train.arrow"))
    if IMAGES_COLUMN in rows.column_names:
        raise Refusal(problem("script-images"))
    model = plain_model(spec, path)
    own, measured, on_cpu = OwnSource(), "validation" in prepared["splits"], ran_on_cpu(run, spec)
    stage = stage_code(spec, own, rows.column_names)
    name = Path(spec.model.model_name_or_path).name
    values = {
        "title": f"{STAGE_NAMES[spec.stage.kind]} of {name} {METHOD_NAMES[spec.method.kind]}",
        "run": run.path.name,
        "command": command(spec),
        "revision": revision(spec, path),
        "learned": "labels" in rows.column_names,
        "model": spec.model.model_name_or_path,
        "seed": spec.training.seed,
        "splits": prepared["splits"],
        **model_code(spec, path, model, own, on_cpu=on_cpu, pinned=bool(revision(spec, path))),
        **training_code(spec, run, stage, own, measured=measured, on_cpu=on_cpu),
        "ends": None if is_reward_model(spec) else _ends(spec, model, path, tokenizer),
    }
    template = _template("train.py.jinja")
    sources = list(own.definitions.values())
    body = template.render(values, sources=sources, imports="")
    return template.render(values, sources=sources, imports=import_lines(own.imports | _imports_of(body, own))) + "\n"


def _template(name: str) -> Template:
    """A template beside this module; it knows the filters `literal` and `in_docstring`."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"literal": literal, "in_docstring": in_docstring}
    return environment.get_template(name)


def _imports_of(body: str, own: OwnSource) -> dict[str, tuple[str, str]]:
    """The imports that the template's own lines need."""
    known = {name: (module, name) for module, names in NAMES.items() for name in names}
    known |= {module: (module, "") for module in MODULES}
    return {name: known[name] for name in names_of(ast.parse(body)) if name in known and name not in own.imports}


def plain_model(spec: RunSpec, path: str) -> Any:
    """The model without memory for its weights. Raises Refusal if its training needs more than the libraries do."""
    config = model_config(spec, path)
    with contextlib.suppress(AttributeError):
        del config.quantization_config  # how weights are stored does not change the names of modules
    with torch.device("meta"):
        loader = model_class(config, scorer=is_reward_model(spec))
        model = loader.from_config(config, trust_remote_code=spec.model.trust_remote_code)
    own_class, structure = type(model), structure_of(model)
    enable_text_training(model)
    expose_backbone(model)
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    routed = hasattr(config.get_text_config(), "output_router_logits")
    if structure.towers or structure.experts or routed or hooked or type(model) is not own_class:
        raise Refusal(problem("script-model", "model.model_name_or_path", architecture=own_class.__name__))
    return model


def _ends(spec: RunSpec, model: Any, path: str, tokenizer: Any) -> str:
    """The ids of the tokens that end an answer, as the result of the run has them."""
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path)
    return literal(generation_config(spec, model, tokenizer).eos_token_id)


def command(spec: RunSpec) -> str:
    """The command that starts the script with as many processes as the run has. Unlike `accelerate launch`, it reads no
    configuration of a user."""
    processes = spec.hardware.num_processes
    return f"torchrun --standalone --nproc_per_node {processes} train.py" if processes > 1 else "python train.py"


def revision(spec: RunSpec, path: str) -> str:
    """The commit of a hub's model that the run trained, by the folder in the hub's cache; "" for a local model."""
    match = re.search(r"/snapshots/(\w+)/?$", path)
    return match[1] if match and not os.path.isdir(spec.model.model_name_or_path) else ""


def in_docstring(text: str) -> str:
    """The text as it can stand in a docstring."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable.replace("\\", "/").replace('"', "'")


def requirements(spec: RunSpec) -> str:
    """The libraries that the script imports, and those that its settings need, as they are installed here."""
    names = [*LIBRARIES, *(["peft"] if spec.method.kind == "lora" else [])]
    names += [PACKAGE_NAMES.get(module, module) for _, module, _ in required_packages(spec)]
    lines = []
    for name in dict.fromkeys(names):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{name}=={importlib.metadata.version(name).partition('+')[0]}\n")
    return "".join(lines)


def readme(spec: RunSpec, run: RunDir) -> str:
    """What is in the folder, and how to start it."""
    values = {
        "run": run.path.name,
        "model": spec.model.model_name_or_path,
        "command": command(spec),
        "gpu": not ran_on_cpu(run, spec),
        "continues": bool(spec.model.adapter_path),
    }
    return _template("script_readme.md.jinja").render(values) + "\n"
