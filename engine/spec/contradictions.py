"""Settings of a spec that contradict each other, on any machine."""

from __future__ import annotations

import math
from typing import get_args

import regex

from engine.core import stages
from engine.core.problems import Problem, problem
from engine.spec.explanations import shortened
from engine.spec.extra_argument_limits import limit_problems
from engine.spec.method_settings import Lora
from engine.spec.patterns import MAX_STATES, pattern_states
from engine.spec.run_spec import RunSpec
from engine.spec.schedules import schedule_problems
from engine.spec.stage_settings import LABEL_SMOOTHING_LOSSES, SETTING_BY_REWARD, Grpo, Reward
from engine.spec.steps import examples_per_step
from engine.spec.strategies import strategy_problems
from engine.spec.trainer_arguments import extra_problems


def spec_problems(spec: RunSpec) -> list[Problem]:
    """Problems of the spec in itself, on any machine: settings that contradict each other."""
    problems: list[Problem] = []
    if not spec.model.model_name_or_path.strip():
        problems.append(problem("model-not-chosen", "model.model_name_or_path"))
    if not spec.data.datasets:
        problems.append(problem("data-not-chosen", "data.datasets"))
    quantized = spec.model.quantization.kind != "none"
    if quantized and spec.method.kind != "lora":
        problems.append(
            problem("quantized-needs-lora", "method", bits=spec.model.quantization.kind, method=spec.method.kind)
        )
    if quantized and spec.method.kind == "lora" and spec.method.init_lora_weights in ("pissa", "olora"):
        problems.append(problem("quantized-svd-init", "method.init_lora_weights", init=spec.method.init_lora_weights))
    if spec.model.adapter_path and spec.method.kind != "lora":
        problems.append(problem("adapter-needs-lora", "model.adapter_path", method=spec.method.kind))
    if spec.method.kind == "lora":
        problems += _target_problems(spec.method.target_modules) + _expert_problems(spec.method)
    problems += _vision_problems(spec) + _validation_problems(spec) + schedule_problems(spec)
    if spec.training.optim.startswith(("galore", "apollo")) and not spec.extra.get("optim_target_modules"):
        problems.append(problem("optimizer-needs-targets", "training.optim", optim=spec.training.optim))
    devices = spec.hardware.devices
    if len(set(devices)) != len(devices):
        problems.append(problem("cards-twice", "hardware.devices", given=", ".join(map(str, devices))))
    if devices and len(devices) != spec.hardware.num_processes:
        problems.append(
            problem("cards-count", "hardware.devices", cards=len(devices), processes=spec.hardware.num_processes)
        )
    problems += _machine_problems(spec)
    if spec.hardware.device == "cpu" and spec.training.precision == "fp16":
        problems.append(problem("fp16-on-cpu", "training.precision"))
    problems += strategy_problems(spec)
    problems += [*_stage_problems(spec), *extra_problems(spec), *limit_problems(spec, has_validation(spec))]
    return problems


def _machine_problems(spec: RunSpec) -> list[Problem]:
    """Processes that cannot be divided among the machines."""
    processes, machines = spec.hardware.num_processes, spec.hardware.num_machines
    if processes % machines:
        return [problem("machines-uneven", "hardware.num_machines", machines=machines, processes=processes)]
    return []


def _vision_problems(spec: RunSpec) -> list[Problem]:
    """Choices for the parts of a vision model that contradict others, whatever the model is."""
    vision, method = spec.vision, spec.method.kind
    if not vision.first_change:
        return []
    field = f"vision.{vision.first_change}"
    chosen = {"vision.tower": vision.tower, "vision.projector": vision.projector}
    frozen = vision.language_part == "frozen"
    if spec.stage.kind != "sft":
        return [problem("vision-not-here", field)]
    if spec.model.adapter_path:
        return [problem("vision-continued", field)]
    problems = []
    if frozen and not vision.trains_beside_language:
        problems.append(problem("vision-all-frozen", "vision.language_part"))
    elif frozen and method == "lora" and not vision.has_adapter:
        problems.append(problem("vision-without-adapter", "method"))
    if frozen and getattr(spec.method, "modules_to_save", None):
        problems.append(problem("vision-saved-frozen", "method.modules_to_save"))
    if frozen and spec.model.makes_rows:
        problems.append(problem("vision-new-rows", "vision.language_part"))
    for path, training in chosen.items():
        if training == "adapter" and method != "lora":
            problems.append(problem("vision-adapter-needs-lora", path))
        if training == "trained" and spec.model.quantization.kind != "none":
            problems.append(problem("vision-quantized", path))
        if training == "adapter" and spec.model.quantization.kind == "8bit" and spec.training.gradient_checkpointing:
            problems.append(problem("vision-8bit", path))
    for name in ("tower", "projector"):
        if getattr(vision, f"{name}_learning_rate") is not None:
            path = f"vision.{name}_learning_rate"
            if chosen[f"vision.{name}"] == "frozen":
                problems.append(problem("vision-rate-unused", path))
            if spec.training.optim.endswith("_layerwise") or "lomo" in spec.training.optim:
                problems.append(problem("vision-rate-optimizer", path, optim=spec.training.optim))
    return problems


def _expert_problems(method: Lora) -> list[Problem]:
    """What peft cannot do with adapters on experts stored in one tensor."""
    if method.expert_r is None:
        return []
    exclusive = {
        "method.lora_dropout": method.lora_dropout > 0,
        "method.use_dora": method.use_dora,
        "method.init_lora_weights": method.init_lora_weights in ("pissa", "olora"),
    }
    return [problem("experts-exclude", field) for field, chosen in exclusive.items() if chosen]


def has_validation(spec: RunSpec) -> bool:
    """Whether there are validation rows."""
    return spec.data.validation_share > 0 or bool(spec.data.validation_rows or spec.data.eval_datasets)


def _validation_problems(spec: RunSpec) -> list[Problem]:
    data, logging, problems = spec.data, spec.logging, []
    if (data.validation_share or data.validation_rows) and data.eval_datasets:
        problems.append(problem("two-validations", "data.validation_share"))
    if data.validation_share and data.validation_rows:
        problems.append(problem("two-shares", "data.validation_rows"))
    if shared := sorted(set(data.eval_datasets) & set(data.datasets)):
        problems.append(problem("validation-is-training", "data.eval_datasets", names=", ".join(shared)))
    for path in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(logging, path) and not has_validation(spec):
            problems.append(problem("needs-validation", f"logging.{path}"))
    if logging.load_best_model_at_end:
        if logging.save_strategy != logging.eval_strategy:
            strategies = {"save": logging.save_strategy, "eval": logging.eval_strategy}
            problems.append(problem("best-needs-same", "logging.save_strategy", **strategies))
        elif logging.save_strategy == "steps" and logging.save_steps % logging.eval_steps:
            steps = {"save": logging.save_steps, "eval": logging.eval_steps}
            problems.append(problem("best-needs-multiple", "logging.save_steps", **steps))
    if spec.training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") and not has_validation(spec):
        problems.append(problem("needs-validation", "training.lr_scheduler_type"))
    return problems


def _stage_problems(spec: RunSpec) -> list[Problem]:
    problems: list[Problem] = []
    stage = spec.stage
    if spec.data.packing and stages.STAGES[stage.kind].form not in ("text", "chat"):
        problems.append(problem("packing-not-here", "data.packing", stage=stage.kind))
    if stage.kind == "dpo":
        smoothed = stage.loss_type in LABEL_SMOOTHING_LOSSES
        if stage.label_smoothing and not smoothed:
            problems.append(
                problem(
                    "smoothing-not-here",
                    "stage.label_smoothing",
                    loss=stage.loss_type,
                    known=", ".join(LABEL_SMOOTHING_LOSSES),
                )
            )
        if stage.loss_type == "exo_pair" and not stage.label_smoothing:
            problems.append(problem("smoothing-needed", "stage.label_smoothing", loss=stage.loss_type))
        if stage.loss_type == "bco_pair" and (
            odd := [name for name in ("ld_alpha", "use_weighting") if spec.extra.get(name)]
        ):
            problems.append(problem("bco-pair-alone", "extra", names=", ".join(odd)))
    if stage.kind == "ppo":
        if not stage.reward_model.strip():
            problems.append(problem("reward-not-chosen", "stage.reward_model"))
        # A new answer must be as likely as when it was generated: nothing may be random in between.
        if getattr(spec.method, "lora_dropout", 0):
            problems.append(problem("ppo-no-noise", "method.lora_dropout"))
        if spec.training.neftune_noise_alpha:
            problems.append(problem("ppo-no-noise", "training.neftune_noise_alpha"))
    if stage.kind == "kto" and spec.training.per_device_train_batch_size < 2:
        problems.append(problem("kto-batch", "training.per_device_train_batch_size"))
    if stage.kind == "grpo":
        problems += _grpo_problems(spec, stage)
    return problems


def _grpo_problems(spec: RunSpec, stage: Grpo) -> list[Problem]:
    problems: list[Problem] = []
    if not any(stage.rewards.values()):
        problems.append(problem("rewards-not-chosen", "stage.rewards", known=", ".join(get_args(Reward))))
    for reward in stage.rewards:
        needed = SETTING_BY_REWARD.get(reward)
        if needed and not getattr(stage, needed):
            problems.append(problem("reward-needs", f"stage.{needed}", reward=reward, needed=needed))
    if "format" in stage.rewards and stage.reward_pattern:
        problems += _pattern_problems(stage.reward_pattern)
    if "length" in stage.rewards and (stage.reward_length or 0) > stage.max_new_tokens:
        problems.append(
            problem(
                "length-unreachable", "stage.reward_length", given=stage.reward_length, longest=stage.max_new_tokens
            )
        )
    answers, group = examples_per_step(spec), stage.num_generations
    if answers % group:
        accumulation = spec.training.gradient_accumulation_steps
        step = group // math.gcd(group, answers // accumulation)  # every multiple of it fits
        problems.append(
            problem(
                "group-does-not-divide",
                "stage.num_generations",
                group=group,
                answers=answers,
                nearest=_nearest_divisor(answers, group) or "—",
                accumulation=-(-accumulation // step) * step,
            )
        )
    if stage.grpo_loss == "cispo" and (stage.epsilon_high or 0) < 1:
        problems.append(problem("cispo-clips-all", "stage.epsilon_high", given=stage.epsilon_high or stage.epsilon))
    if stage.grpo_loss == "luspo" and stage.importance_sampling_level != "sequence":
        problems.append(problem("luspo-needs-sequence", "stage.importance_sampling_level"))
    return problems


def _pattern_problems(pattern: str) -> list[Problem]:
    field, shown = "stage.reward_pattern", shortened(pattern)
    if (states := pattern_states(pattern)) > MAX_STATES:
        return [problem("pattern-too-large", field, pattern=shown, states=states, limit=MAX_STATES)]
    try:
        regex.compile(pattern)
    except (regex.error, ValueError, OverflowError, RecursionError) as error:
        return [problem("pattern-broken", field, pattern=shown, why=error)]
    return []


def _nearest_divisor(number: int, size_sought: int) -> int | None:
    """The divisor of `number`, from 2 on, that is nearest to a size; None if none is within ten thousand of it."""
    for distance in range(10_000):
        for size in (size_sought - distance, size_sought + distance):
            if 2 <= size <= number and number % size == 0:
                return size
    return None


def _target_problems(targets: list[str]) -> list[Problem]:
    if not targets:
        return [problem("no-targets", "method.target_modules")]
    if "all-linear" in targets and len(targets) > 1:
        others = ", ".join(target for target in targets if target != "all-linear")
        return [problem("all-linear-alone", "method.target_modules", others=others)]
    heads = [target for target in targets if target.rpartition(".")[2] == "lm_head"]
    return [problem("lora-on-head", "method.target_modules", given=head) for head in heads]
