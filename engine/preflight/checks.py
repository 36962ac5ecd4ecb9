"""What stands in the way of a spec on this machine: files, cards, disk, packages. All of it at once, before start.

`engine.spec.contradictions.spec_problems` is its pure counterpart, about the spec alone.
"""

from __future__ import annotations

import errno
import importlib.util
import os
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

from engine.core import hardware
from engine.core.problems import Problem, problem
from engine.core.stages import KINDS_BY_FORM, STAGES
from engine.data.datasets import INFO_FILE, Dataset, examples, read_dataset_info
from engine.data.row_files import version
from engine.data.soundness import sound_names
from engine.data.validation import ValidationReport, check
from engine.launch import command
from engine.launch.workspace import Workplace, template_file
from engine.models.adapters import adapter_has_score_head, adapter_parameters, adapter_problems
from engine.models.chat_templates import TEMPLATE_FOLDER, template_file_problem, template_problem
from engine.models.checks import model_problems
from engine.models.discovery import is_hub_id
from engine.models.facts import ModelFacts, chat_template, has_reward_model, inspect_model
from engine.models.reward_models import reward_model_problems
from engine.models.trainable_modules import (
    freeze_problems,
    lora_problems,
    targeted_shapes,
    trainable_parameters,
)
from engine.models.vocabulary import (
    embedding_rows,
    missing_rows,
    special_token_problems,
    vocabulary_modules,
    vocabulary_problems,
)
from engine.preflight import doctor
from engine.spec.run_spec import RunSpec

ROWS_CHECKED = 20_000  # rows of a data set that are checked before start; preparation checks all
MAX_BAD_ROWS_LISTED = 5  # bad rows told in full
Stamps = tuple[tuple[Path, int, int], ...]
# What an optimizer's name holds → the modules it imports. The first that fits is the one.
OPTIMIZER_MODULES = {
    "adamw_torch_4bit": ("torchao",), "adamw_torch_8bit": ("torchao",), "adamw_torch_xla": ("torch_xla",),
    "adamw_torch_npu_fused": ("torch_npu",), "adamw_anyprecision": ("torchdistx",),
    "galore_adamw_8bit": ("galore_torch", "bitsandbytes"), "galore": ("galore_torch",), "apollo": ("apollo_torch",),
    "lomo": ("lomo_optim",), "grokadamw": ("grokadamw",), "schedule_free": ("schedulefree",),
    "stable_adamw": ("optimi",), "8bit": ("bitsandbytes",), "paged": ("bitsandbytes",), "lion": ("bitsandbytes",),
    "bnb": ("bitsandbytes",), "ademamix": ("bitsandbytes",),
}  # fmt: skip
PACKAGE_NAMES = {
    "optimi": "torch-optimi",
    "flash_attn": "flash-attn",
    "modelscope_hub": "modelscope-hub",
    "liger_kernel": "liger-kernel",
}  # what to install, if it has another name
QUANTIZER = "bitsandbytes"
NO_GRADIENT_CODE = "attention-not-trained-on-cpu"
MODEL_FIELDS = ("model.model_name_or_path", "model.adapter_path")
ADAPTER_SETTINGS = (
    "r",
    "lora_alpha",
    "use_dora",
    "use_rslora",
)  # settings that a continued adapter has already


def preflight_problems(spec: RunSpec, workplace: Workplace, *, wait: bool = True) -> list[Problem]:
    """Everything on this machine that would keep `spec` from running. Empty: it can start. Without `wait`, what a package
    does on this machine is not told while it is still being tried (`engine.preflight.doctor`)."""
    problems = workplace.problems(spec)
    outside = {problem.field for problem in problems}  # not looked at, not even whether it is there
    problems += _model_problems(spec, workplace, outside)
    if "data.dataset_dir" not in outside:
        problems += _data_problems(spec)
    problems += _reward_problems(spec, workplace, outside)
    problems += _gpu_problems(spec) + _package_problems(spec, wait)
    weights = trained_parameters(spec) if model_is_readable({problem.field for problem in problems}) else 0
    return problems + _disk_problems(spec, workplace, weights or 0)


def model_is_readable(wrong: set[str]) -> bool:
    """Whether the model and the adapter may be looked into, if these fields have problems."""
    return wrong.isdisjoint(MODEL_FIELDS)


def _model_problems(spec: RunSpec, workplace: Workplace, outside: set[str]) -> list[Problem]:
    chosen = spec.model.model_name_or_path
    if not chosen.strip():
        return []  # engine.spec.contradictions.spec_problems has said so
    allowed = spec.model.trust_remote_code and workplace.allows_code_of(chosen)
    is_reward_model = spec.stage.kind == "rm"
    if problems := model_problems(
        chosen, workplace.model_roots, allow_remote_code=allowed, scorer=is_reward_model
    ):
        return problems
    problems = []
    if spec.model.trust_remote_code and not allowed:
        problems.append(problem("remote-code-not-allowed", "model.trust_remote_code", model=chosen))
    if "model.chat_template" not in outside:
        problems += chosen_template_problems(spec)
    if spec.method.kind == "lora" and spec.model.adapter_path and "model.adapter_path" not in outside:
        settings = {name: getattr(spec.method, name) for name in ADAPTER_SETTINGS}
        problems += adapter_problems(spec.model.adapter_path, chosen, settings, scorer=is_reward_model)
    if is_hub_id(chosen) and not os.path.isdir(chosen):
        return problems  # its files are not here yet; once they are, the worker asks the same
    return problems + model_setting_problems(spec, inspect_model(chosen))


def chosen_template_problems(spec: RunSpec) -> list[Problem]:
    """What keeps the chat template that was chosen from being used; [] also where the model's own is."""
    template, file = spec.model.chat_template, template_file(spec)
    if template and not os.path.isfile(file or TEMPLATE_FOLDER / f"{template}.jinja"):
        known = ", ".join(sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja")))
        return [problem("template-missing", "model.chat_template", given=template, known=known)]
    broken = template_file_problem(Path(file)) if file else None
    return [replace(broken, field="model.chat_template")] if broken else []


def model_setting_problems(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """What of the settings does not go with a model that is sound in itself."""
    problems, template = [], spec.model.chat_template
    known = ", ".join(sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja")))
    if spec.stage.kind == "rm" and not has_reward_model(model.model_type):
        problems.append(problem("no-score-head", "stage", model_type=model.model_type))
    if spec.stage.kind != "pt" and not template:
        own = chat_template(model.path)
        if not model.has_chat_template:
            problems.append(problem("no-template", "model.chat_template", model=model.name, known=known))
        elif own and (broken := template_problem(*own)):
            problems.append(replace(broken, field="model.chat_template"))
    if model.rope and spec.model.rope_scaling.kind != "none":
        context = model.context_length or "?"
        problems.append(problem("model-has-rope", "model.rope_scaling", own=model.rope, context=context))
    if spec.method.kind == "lora":
        problems += lora_problems(model, spec.method.target_modules, spec.method.modules_to_save)
        problems += [] if problems else rank_problems(spec, model)
    if spec.method.kind == "freeze":
        problems += freeze_problems(model, spec.method.trainable_modules)
    resized, adapter = spec.model.resize_embeddings, spec.model.adapter_path
    problems += vocabulary_problems(model, resized=resized, adapter=adapter)
    problems += special_token_problems(model, spec.stage.kind)
    return problems + _context_problems(spec, model)


def rank_problems(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """A rank beyond the number of singular vectors that an initialization begins with."""
    init, rank = spec.method.init_lora_weights, spec.method.r
    shapes = targeted_shapes(model, spec.method.target_modules, spec.method.modules_to_save)
    largest = min((min(shape) for shape in shapes), default=rank)
    if init not in ("pissa", "olora") or rank <= largest or spec.model.adapter_path:
        return []
    return [problem("rank-beyond-matrix", "method.r", init=init, given=rank, largest=largest)]


def trained_parameters(spec: RunSpec) -> int | None:
    """How many parameters the run trains; None while the model is not here to be counted."""
    model, is_reward_model = inspect_model(spec.model.model_name_or_path), spec.stage.kind == "rm"
    if spec.method.kind == "lora" and (adapter := spec.model.adapter_path):
        head = (model.hidden_size or 0) if is_reward_model and not adapter_has_score_head(adapter) else 0
        return adapter_parameters(adapter) + head or None
    chosen = spec.method.model_dump()
    names = ("r", "target_modules", "modules_to_save", "use_dora", "trainable_layers", "trainable_modules")
    chosen = {name: chosen[name] for name in names if name in chosen}
    grown = 0
    if spec.model.resize_embeddings and (missing := missing_rows(model)):
        whole = vocabulary_modules(model, scorer=is_reward_model)
        if "modules_to_save" in chosen:
            chosen["modules_to_save"] = list(dict.fromkeys([*chosen["modules_to_save"], *whole]))
        # A tied head is the embedding, except under LoRA, which trains a copy of each.
        copies = len(whole) if spec.method.kind == "lora" or not model.tied else 1
        rows = missing + (embedding_rows(model) or 0) * (spec.method.kind == "freeze")
        grown = rows * (model.hidden_size or 0) * copies
    counted = trainable_parameters(model, spec.method.kind, scorer=is_reward_model, **chosen)
    return counted + grown if counted else None


def _context_problems(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    context = int((model.context_length or 0) * getattr(spec.model.rope_scaling, "factor", 1))
    if context and spec.data.max_length > context:
        return [problem("context-too-short", "data.max_length", given=spec.data.max_length, context=context)]
    answer = getattr(spec.stage, "max_new_tokens", 0)
    if context and spec.data.max_length + answer > context:
        values = {
            "given": spec.data.max_length,
            "answer": answer,
            "context": context,
            "room": max(context - answer, 1),
        }
        return [problem("context-without-answer", "data.max_length", **values)]
    return []


def _reward_problems(spec: RunSpec, workplace: Workplace, outside: set[str]) -> list[Problem]:
    """A reward model that is none, a reward file that is not there, nothing in the data to compare answers with."""
    stage, problems = spec.stage, []
    model, file = getattr(stage, "reward_model", "").strip(), getattr(stage, "reward_file", None)
    if model and "stage.reward_model" not in outside:
        problems += reward_model_problems(Path(model))
    if file and "stage.reward_file" not in outside and not os.path.isfile(file):
        roots = ", ".join(map(str, workplace.reward_files))
        problems.append(problem("reward-file-missing", "stage.reward_file", path=file, roots=roots))
    comparing = [reward for reward in getattr(stage, "rewards", ()) if reward in ("exact", "numeric")]
    if comparing and "data.dataset_dir" not in outside and not _any_dataset_has_answers(spec):
        names = ", ".join(spec.data.datasets)
        problems.append(problem("references-not-there", "stage.rewards", reward=comparing[0], names=names))
    return problems


def _any_dataset_has_answers(spec: RunSpec) -> bool:
    """Whether any of the data sets has an answer; True, too, where that cannot be told, which others say."""
    folder = Path(spec.data.dataset_dir)
    catalogue = {dataset.name: dataset for dataset in read_dataset_info(folder)[0]}
    chosen = [catalogue[name] for name in spec.data.datasets if name in catalogue]
    usable = [
        dataset for dataset in chosen if dataset.problem is None and dataset.kind in KINDS_BY_FORM["prompts"]
    ]
    return not usable or any(
        _has_answers(folder, dataset.name, _dataset_stamps(folder, dataset)) for dataset in usable
    )


@lru_cache(maxsize=256)
def _has_answers(folder: Path, name: str, _of: Stamps) -> bool:
    """Whether one of the first rows has an answer, remembered as `_looked_at` is."""
    dataset = next(dataset for dataset in read_dataset_info(folder)[0] if dataset.name == name)
    rows = examples(dataset, lambda _bad: None, "prompts")
    return any(row["answer"] is not None for row in islice(rows, ROWS_CHECKED))


def _dataset_stamps(folder: Path, dataset: Dataset) -> Stamps:
    """Changes when one of its files does, or the catalogue, which says how they are read."""
    return tuple((file, *version(file)) for file in (folder / INFO_FILE, *dataset.files))


def _data_problems(spec: RunSpec) -> list[Problem]:
    """Unknown, broken or unsuitable data sets, and bad rows among their first ones."""
    folder = Path(spec.data.dataset_dir)
    if not os.path.isdir(folder):
        return [problem("data-folder-missing", "data.dataset_dir", folder=folder)]
    catalogue, broken = read_dataset_info(folder)
    known = {dataset.name: dataset for dataset in catalogue}
    problems = [replace(problem, field="data.datasets") for problem in broken]
    for field, names in (
        ("data.datasets", spec.data.datasets),
        ("data.eval_datasets", spec.data.eval_datasets),
    ):
        for name in names if not broken else ():
            if name not in known:
                names_known = ", ".join(sound_names(catalogue)) or "—"
                problems.append(problem("data-unknown", field, name=name, folder=folder, known=names_known))
                continue
            report = _check_first_rows(folder, name, spec.stage.kind, _dataset_stamps(folder, known[name]))
            if report.bad and report.usable and not spec.data.skip_bad_rows:
                problems.append(problem("bad-rows", field, name=name, bad=report.bad))
            problems += [
                replace(problem, field=field)
                for problem in report.warnings
                if problem.code == "encoding-unsure"
            ]
            if not report.usable or not spec.data.skip_bad_rows:
                problems += [
                    replace(problem, field=field) for problem in report.problems[:MAX_BAD_ROWS_LISTED]
                ]
    if spec.stage.kind == "kto" and not problems:
        marks = sum(
            (
                _label_counts(folder, name, _dataset_stamps(folder, known[name]))
                for name in spec.data.datasets
            ),
            Counter(),
        )
        # Of more rows than these, all are looked at when the run begins.
        if len(marks) == 1 and marks.total() < ROWS_CHECKED:
            problems.append(single_label_problem(True in marks, marks.total()))
    return problems


@lru_cache(maxsize=256)
def _label_counts(folder: Path, name: str, _of: Stamps) -> Counter[bool]:
    """How many answers of a data set are marked good and bad, counted until there is one of each."""
    dataset = next(dataset for dataset in read_dataset_info(folder)[0] if dataset.name == name)
    marks: Counter[bool] = Counter()
    for row in islice(examples(dataset, lambda _: None, "thumbs"), ROWS_CHECKED):
        marks[row["label"]] += 1
        if len(marks) == 2:
            break
    return marks


def single_label_problem(good: bool, rows: int) -> Problem:
    """KTO has nothing to tell apart."""
    return problem("thumbs-all-good" if good else "thumbs-all-bad", "data.datasets", rows=rows)


def check_first_rows(folder: Path, dataset: Dataset, stage: str) -> ValidationReport:
    """What `check` says of the first rows of a data set for a stage; remembered until one of the files changes."""
    return _check_first_rows(folder, dataset.name, stage, _dataset_stamps(folder, dataset))


@lru_cache(maxsize=256)
def _check_first_rows(folder: Path, name: str, stage: str, _of: Stamps) -> ValidationReport:
    """`check`, remembered until one of the files changes: the page asks at every key press."""
    catalogue, _ = read_dataset_info(folder)
    dataset = next(dataset for dataset in catalogue if dataset.name == name)
    if dataset.problem:
        return ValidationReport(0, 0, (dataset.problem,))
    return check(dataset, STAGES[stage].form, limit=ROWS_CHECKED, datasets=catalogue)


def _gpu_problems(spec: RunSpec) -> list[Problem]:
    chosen, gpus = spec.hardware, hardware.gpus()
    attention, cpu = spec.model.attn_implementation, command.on_cpu(spec, len(gpus))
    if cpu and attention == "flash_attention_2":
        return [problem("attention-needs-card", "model.attn_implementation", name=attention)]
    if cpu and attention == "flex_attention":
        return [problem(NO_GRADIENT_CODE, "model.attn_implementation", name=attention)]
    if attention == "flash_attention_2" and spec.training.precision == "fp32":
        return [problem("attention-needs-half", "model.attn_implementation")]
    if spec.extra.get("tf32") is True and cpu:
        return [problem("tf32-needs-card", "extra")]
    if chosen.device == "auto" and not gpus and spec.training.precision == "fp16":
        return [problem("fp16-on-cpu", "training.precision")]
    if chosen.device == "cpu" or (chosen.device == "auto" and not gpus):
        return []
    if not gpus:
        return [problem("no-cards", "hardware.device")]
    unknown = [index for index in chosen.devices if index >= len(gpus)]
    if unknown:
        return [problem("card-unknown", "hardware.devices", given=unknown[0], last=len(gpus) - 1)]
    if chosen.num_processes > len(gpus):
        return [
            problem("too-few-cards", "hardware.num_processes", wanted=chosen.num_processes, there=len(gpus))
        ]
    first = gpus[chosen.devices[0] if chosen.devices else 0]
    if doctor.torch_cuda() == "":
        return [problem("torch-without-cuda", "hardware.device", name=first.name)]
    if spec.training.precision == "bf16" and 0 < first.capability < 8:
        return [problem("bf16-not-there", "training.precision", name=first.name, capability=first.capability)]
    return []


def required_packages(spec: RunSpec) -> list[tuple[str, str, str]]:
    """What the spec needs that not every installation has: (what needs it, module, field)."""
    requirements = [(tracker, tracker, "logging.report_to") for tracker in spec.logging.report_to]
    optimizer = spec.training.optim
    requirements += [(optimizer, module, "training.optim") for module in optimizer_modules(optimizer)]
    if spec.model.attn_implementation == "flash_attention_2":
        requirements.append(("flash_attention_2", "flash_attn", "model.attn_implementation"))
    if spec.model.quantization.kind != "none":
        requirements.append((spec.model.quantization.kind, QUANTIZER, "model.quantization"))
    if spec.extra.get("use_liger_kernel") is True:
        requirements.append(("use_liger_kernel", "liger_kernel", "extra"))
    if spec.model.hub == "modelscope" and not os.path.isdir(spec.model.model_name_or_path):
        requirements.append(("modelscope", "modelscope_hub", "model.hub"))
    return requirements


def optimizer_modules(optimizer: str) -> tuple[str, ...]:
    """The modules that an optimizer imports."""
    return next((modules for part, modules in OPTIMIZER_MODULES.items() if part in optimizer), ())


def _package_problems(spec: RunSpec, wait: bool) -> list[Problem]:
    """Packages that are not installed, and those that are and do not work on the device of the run."""
    device, problems = doctor.device_of(spec), []
    for what, module, field in required_packages(spec):
        if importlib.util.find_spec(module) is None:
            problems.append(
                problem("package-missing", field, what=what, package=PACKAGE_NAMES.get(module, module))
            )
        elif module == QUANTIZER:
            check = "optimizer" if field == "training.optim" else what
            broken = (bitsandbytes_problems(device, wait=wait) or {}).get(check)
            problems += (
                [replace(broken, field=field, values={**broken.values, "what": what})] if broken else []
            )
        elif (
            (finding := doctor.trial_result(module, device, wait=wait)) and finding.certain and finding.failed
        ):
            problems.append(doctor.import_problem(finding, field, what, PACKAGE_NAMES.get(module, module)))
    return problems


def bitsandbytes_problems(device: doctor.Device, *, wait: bool) -> dict[str, Problem] | None:
    """What of bitsandbytes ("4bit", "8bit", "optimizer") cannot be used on the device, and why; None while that is tried
    and nobody wants to `wait`."""
    checks = {"4bit": "model.quantization", "8bit": "model.quantization", "optimizer": "training.optim"}
    if importlib.util.find_spec(QUANTIZER) is None:
        return {
            check: problem("package-missing", field, what=check, package=QUANTIZER)
            for check, field in checks.items()
        }
    finding = doctor.trial_result(QUANTIZER, device, wait=wait)
    if finding is None or not finding.certain:
        return None if finding is None else {}
    whole = next((finding.failed[name] for name in ("import", "library") if name in finding.failed), "")
    failed = dict.fromkeys(checks, whole) if whole else finding.failed
    return {
        check: doctor.bitsandbytes_problem(finding, why, device, checks[check], check)
        for check, why in failed.items()
    }


def _disk_problems(spec: RunSpec, workplace: Workplace, trained: int) -> list[Problem]:
    saves = workplace.saves
    # A folder that is not there yet will be made.
    existing = next(folder for folder in (saves, *saves.parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return [problem("saves-not-writable", folder=saves, why=os.strerror(errno.EACCES))]
    needed, free = disk_needed(spec, trained), hardware.free_disk(saves)
    if needed > free:
        return [
            problem("disk-full", folder=saves, needed=f"{needed / 1e9:.2f} GB", free=f"{free / 1e9:.2f} GB")
        ]
    return []


def disk_needed(spec: RunSpec, trained: int) -> int:
    """Bytes that a run of `trained` weights writes, at the least, all in fp32: checkpoints with Adam's two moments,
    and the result.

    A run that keeps all its checkpoints is counted with three.
    """
    checkpoints = (spec.logging.save_total_limit or 2) + 1
    return 4 * trained * (3 * checkpoints + 1) + 20_000_000
