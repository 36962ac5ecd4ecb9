"""Optional packages that a spec needs: whether they are installed, and work on the device of the run."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

from engine.core.problems import NOTHING, Problem, problem
from engine.models.facts import inspect_model, may_need_bitsandbytes
from engine.models.quantized_weights import READERS
from engine.preflight import doctor
from engine.spec.model_settings import Model
from engine.spec.run_spec import RunSpec
from engine.spec.strategies import NAMES, ZERO_STAGES

# Part of an optimizer's name → the modules it imports. The first match counts.
OPTIMIZER_MODULES = {
    "adamw_torch_4bit": ("torchao",),
    "adamw_torch_8bit": ("torchao",),
    "adamw_torch_xla": ("torch_xla",),
    "adamw_torch_npu_fused": ("torch_npu",),
    "adamw_anyprecision": ("torchdistx",),
    "galore_adamw_8bit": ("galore_torch", "bitsandbytes"),
    "galore": ("galore_torch",),
    "apollo": ("apollo_torch",),
    "lomo": ("lomo_optim",),
    "grokadamw": ("grokadamw",),
    "schedule_free": ("schedulefree",),
    "stable_adamw": ("optimi",),
    "8bit": ("bitsandbytes",),
    "paged": ("bitsandbytes",),
    "lion": ("bitsandbytes",),
    "bnb": ("bitsandbytes",),
    "ademamix": ("bitsandbytes",),
}
PACKAGE_NAMES = {
    "optimi": "torch-optimi",
    "flash_attn": "flash-attn",
    "modelscope_hub": "modelscope-hub",
    "compressed_tensors": "compressed-tensors",
    "liger_kernel": "liger-kernel",
}  # the package to install, if it has another name
QUANTIZER, DEEPSPEED = "bitsandbytes", "deepspeed"


def required_packages(spec: RunSpec) -> list[tuple[str, str, str]]:
    """Optional packages that the spec needs: (what needs it, module, field)."""
    requirements: list[tuple[str, str, str]] = [
        (tracker, tracker, "logging.report_to") for tracker in spec.logging.report_to
    ]
    optimizer = spec.training.optim
    requirements += [(optimizer, module, "training.optim") for module in optimizer_modules(optimizer)]
    if spec.model.attn_implementation == "flash_attention_2" and doctor.device_of(spec).kind == "cuda":
        requirements.append(("flash_attention_2", "flash_attn", "model.attn_implementation"))
    if spec.model.quantization.kind != "none":
        requirements.append((spec.model.quantization.kind, QUANTIZER, "model.quantization"))
    if os.path.isdir(spec.model.model_name_or_path):
        how = inspect_model(spec.model.model_name_or_path).quantized or ""
        requirements += [(how, module, "model.model_name_or_path") for module in READERS.get(how, ())]
    if spec.extra.get("use_liger_kernel") is True:
        requirements.append(("use_liger_kernel", "liger_kernel", "extra"))
    if spec.model.hub == "modelscope" and not os.path.isdir(spec.model.model_name_or_path):
        requirements.append(("modelscope", "modelscope_hub", "model.hub"))
    if spec.hardware.strategy.kind in ZERO_STAGES:
        requirements.append((spec.hardware.strategy.kind, DEEPSPEED, "hardware.strategy"))
    return requirements


def deepspeed_installed() -> bool:
    """Whether its strategies can be offered."""
    return importlib.util.find_spec(DEEPSPEED) is not None


def trains_quantized(spec: RunSpec) -> bool:
    """Whether a training may use quantized weights, including those of a reward model."""
    modules = {module for _, module, _ in required_packages(spec)}
    return QUANTIZER in modules or bool(getattr(spec.stage, "reward_model", "")) or quantized(spec.model)


def quantized(model: Model) -> bool:
    return may_need_bitsandbytes(model.model_name_or_path, model.quantization.kind)


def optimizer_modules(optimizer: str) -> tuple[str, ...]:
    """The modules that an optimizer imports."""
    return next((modules for part, modules in OPTIMIZER_MODULES.items() if part in optimizer), ())


def package_problems(spec: RunSpec, wait: bool) -> list[Problem]:
    """Packages that are not installed, and those that do not work on the device of the run."""
    device, problems = doctor.device_of(spec), []
    for what, module, field in required_packages(spec):
        if importlib.util.find_spec(module) is None and module == DEEPSPEED:
            problems.append(problem("deepspeed-missing", field, what=NAMES[what]))
        elif importlib.util.find_spec(module) is None:
            problems.append(problem("package-missing", field, what=what, package=PACKAGE_NAMES.get(module, module)))
        elif module == QUANTIZER:
            check = "optimizer" if field == "training.optim" else what
            broken = (bitsandbytes_problems(device, wait=wait) or {}).get(check)
            problems += [replace(broken, field=field, values={**broken.values, "what": what})] if broken else []
        elif (finding := doctor.trial_result(module, device, wait=wait)) and finding.certain and finding.failed:
            problems.append(doctor.import_problem(finding, field, what, PACKAGE_NAMES.get(module, module)))
    return problems


def package_doubts(spec: RunSpec) -> list[Problem]:
    """Packages of which nobody knows whether they work on the device of the run, because it is in use. Never waits."""
    device, doubts = doctor.device_of(spec), []
    for what, module, field in required_packages(spec):
        if module == DEEPSPEED or importlib.util.find_spec(module) is None:
            continue
        finding = doctor.trial_result(module, device, wait=False)
        if finding and doctor.BUSY in finding.failed:
            values = {"package": PACKAGE_NAMES.get(module, module), "device": device.name}
            who = finding.failed[doctor.BUSY] or NOTHING
            doubts.append(problem("package-untested", field, what=what, who=who, **values))
    return doubts


def bitsandbytes_problems(device: doctor.Device, *, wait: bool) -> dict[str, Problem] | None:
    """Parts of bitsandbytes ("4bit", "8bit", "optimizer") that cannot be used on the device, and why; None while this
    is being tried, unless `wait`."""
    checks = {"4bit": "model.quantization", "8bit": "model.quantization", "optimizer": "training.optim"}
    if importlib.util.find_spec(QUANTIZER) is None:
        return {
            check: problem("package-missing", field, what=check, package=QUANTIZER) for check, field in checks.items()
        }
    finding = doctor.trial_result(QUANTIZER, device, wait=wait)
    if finding is None or not finding.certain:
        return None if finding is None else {}
    whole = next((finding.failed[name] for name in ("import", "library") if name in finding.failed), "")
    failed = dict.fromkeys(checks, whole) if whole else finding.failed
    return {
        check: doctor.bitsandbytes_problem(finding, why, device, checks[check], check) for check, why in failed.items()
    }
