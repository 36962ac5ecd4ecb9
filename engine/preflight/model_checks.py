"""Settings of a spec that do not fit the model on this machine, and how much of the model the spec trains."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, problem
from engine.launch.workspace import Workplace, template_file
from engine.models.adapters import adapter_has_score_head, adapter_parameters, adapter_problems, adapts_experts
from engine.models.chat_templates import TEMPLATE_FOLDER, template_file_problem, template_problem
from engine.models.checks import model_problems
from engine.models.discovery import is_hub_id
from engine.models.facts import ModelFacts, chat_template, has_reward_model, inspect_model
from engine.models.quantized_weights import DEQUANTIZED
from engine.models.safetensors_headers import tensors_of
from engine.models.structure import structure_of, structure_problems
from engine.models.trainable_modules import (
    adapter_targets,
    freeze_problems,
    lora_problems,
    saved_part_problems,
    trainable_parameters,
)
from engine.models.vision_parts import vision_plan, vision_problems
from engine.models.vocabulary import (
    embedding_rows,
    new_rows,
    new_tokens,
    special_token_problems,
    trains_rows_alone,
    vocabulary,
    vocabulary_modules,
    vocabulary_problems,
)
from engine.preflight.division import model_problems as division_problems
from engine.spec.method_settings import Lora
from engine.spec.run_spec import RunSpec

STORED_PRECISION = {"bf16": "BF16", "fp16": "F16"}  # their names in safetensors headers
MODEL_FIELDS = ("model.model_name_or_path", "model.adapter_path")
# Settings that a continued adapter already has.
ADAPTER_SETTINGS = ("r", "lora_alpha", "use_dora", "use_rslora")


def model_is_readable(wrong: set[str]) -> bool:
    """Whether the model and the adapter may be read, if these fields have problems."""
    return wrong.isdisjoint(MODEL_FIELDS)


def chosen_model_problems(spec: RunSpec, workplace: Workplace, outside: set[str]) -> list[Problem]:
    """What prevents using the chosen model and adapter; the fields `outside` are not checked."""
    chosen = spec.model.model_name_or_path
    if not chosen.strip():
        return []  # reported by engine.spec.contradictions.spec_problems
    allowed = spec.model.trust_remote_code and workplace.allows_code_of(chosen)
    is_reward_model = spec.stage.kind == "rm"
    if problems := model_problems(chosen, workplace.model_roots, allow_remote_code=allowed, scorer=is_reward_model):
        return problems
    problems = []
    if spec.model.trust_remote_code and not allowed:
        problems.append(problem("remote-code-not-allowed", "model.trust_remote_code", model=chosen))
    if "model.chat_template" not in outside:
        problems += chosen_template_problems(spec)
    if spec.method.kind == "lora" and spec.model.adapter_path and "model.adapter_path" not in outside:
        settings = {name: getattr(spec.method, name) for name in ADAPTER_SETTINGS}
        problems += adapter_problems(spec.model.adapter_path, chosen, settings, scorer=is_reward_model)
        if spec.method.lora_dropout and adapts_experts(spec.model.adapter_path):
            problems.append(problem("adapter-on-experts", "method.lora_dropout"))
    if is_hub_id(chosen) and not os.path.isdir(chosen):
        return problems  # its files are not here yet; the worker checks them after the download
    return problems + model_setting_problems(spec, inspect_model(chosen))


def chosen_template_problems(spec: RunSpec) -> list[Problem]:
    """What prevents using the chosen chat template; [] also for the model's own."""
    template, file = spec.model.chat_template, template_file(spec)
    if template and not os.path.isfile(file or TEMPLATE_FOLDER / f"{template}.jinja"):
        known = ", ".join(sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja")))
        return [problem("template-missing", "model.chat_template", given=template, known=known)]
    broken = template_file_problem(Path(file)) if file else None
    return [replace(broken, field="model.chat_template")] if broken else []


def model_setting_problems(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """Settings that do not fit a model that is sound in itself."""
    if problems := structure_problems(model, "model.model_name_or_path"):
        return problems
    problems, template = stored_weights_problems(spec, model), spec.model.chat_template
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
        if spec.method.expert_r and not structure_of(model).experts:
            problems.append(
                problem("no-experts", "method.expert_r", architecture=model.architecture or model.model_type)
            )
        problems += [] if problems else rank_problems(spec, model)
    if spec.training.gradient_checkpointing and not structure_of(model).recomputes:
        values = {"architecture": model.architecture or model.model_type}
        problems.append(problem("checkpointing-unsupported", "training.gradient_checkpointing", **values))
    if spec.method.kind == "freeze":
        problems += freeze_problems(model, spec.method.trainable_modules)
    problems += vision_problems(model, spec.vision, spec.method.kind)
    problems += division_problems(spec, model, spec.hardware.strategy.kind)
    if spec.method.kind == "lora":
        problems += saved_part_problems(model, spec.vision, spec.method.modules_to_save)
    resized, adapter = spec.model.makes_rows, spec.model.adapter_path
    problems += vocabulary_problems(model, resized=resized, adapter=adapter)
    problems += special_token_problems(model, spec.stage.kind) + _continued_token_problems(spec, model)
    return problems + _context_problems(spec, model)


def quantizes_experts(spec: RunSpec, adapters: Iterable[str] = ()) -> bool:
    """Whether experts are loaded in as few bits as the other weights, where that is possible: not below an adapter on
    them, neither the spec's nor one in a folder of `adapters`."""
    method, continued = spec.method, spec.model.adapter_path
    if spec.model.quantization.kind == "none" or (method.kind == "lora" and method.expert_r and not continued):
        return False
    return not any(map(adapts_experts, filter(None, [continued, *adapters])))


def frozen_weights_stay_in(spec: RunSpec, model: ModelFacts, precision: str) -> bool:
    """Whether the weights that freeze or full training leaves frozen are kept in 16 bits ("bf16" or "fp16") next to
    trained ones in fp32: if that is how the files have them, so that they are saved again unchanged."""
    if spec.method.kind == "lora" or model.quantized or not model.parameters:
        return False
    stored = {tensor.dtype for tensor in tensors_of(model.path)[0].values()}
    return stored == {STORED_PRECISION.get(precision)} and (trained_parameters(spec) or 0) < model.parameters


def stored_weights_problems(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """Settings that are incompatible with weights quantized on disk."""
    chosen, how = spec.model.quantization.kind, model.quantized
    if how in DEQUANTIZED and chosen != "none":
        return [problem("dequantized-not-again", "model.quantization", how=how, kind=chosen, path=model.path)]
    if how != "bitsandbytes":
        return []
    problems, kind = [], model.stored_kind
    if chosen not in ("none", kind):
        problems.append(problem("quantized-otherwise", "model.quantization", stored=kind, kind=chosen))
    if spec.method.kind != "lora":
        problems.append(problem("quantized-needs-lora", "method", bits=kind, method=spec.method.kind))
    elif spec.method.init_lora_weights in ("pissa", "olora"):
        problems.append(problem("quantized-svd-init", "method.init_lora_weights", init=spec.method.init_lora_weights))
    return problems


def _continued_token_problems(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """A problem if the adapter to continue was trained with other added tokens than the spec's."""
    adapter = spec.model.adapter_path
    if spec.method.kind != "lora" or not adapter or not vocabulary(Path(adapter)).rows:
        return []
    theirs = new_tokens(model, [token for _, token in vocabulary(Path(adapter)).added])
    ours = new_tokens(model, spec.model.added_tokens)
    if theirs == ours:
        return []
    values = {"theirs": " ".join(theirs) or "—", "ours": " ".join(ours) or "—"}
    return [problem("adapter-other-tokens", "model.add_tokens", **values)]


def rank_problems(spec: RunSpec, model: ModelFacts) -> list[Problem]:
    """A rank beyond the number of singular vectors that an initialization starts from; none if an adapter is
    continued."""
    assert isinstance(spec.method, Lora)
    init, rank, adapter = spec.method.init_lora_weights, spec.method.r, spec.model.adapter_path
    shapes = adapter_matrices(spec, model).values()
    largest = min((min(shape) for shape in shapes), default=rank)
    if init not in ("pissa", "olora") or rank <= largest or adapter:
        return []
    return [problem("rank-beyond-matrix", "method.r", init=init, given=rank, largest=largest)]


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


def adapted_modules(spec: RunSpec) -> dict[str, int]:
    """Short names of the modules that get a new adapter, with their numbers; experts count as tensors."""
    if spec.method.kind != "lora" or spec.model.adapter_path:
        return {}
    model = inspect_model(spec.model.model_name_or_path)
    names = [*adapter_matrices(spec, model)]
    names += structure_of(model).experts if spec.method.expert_r and spec.vision.language_part == "method" else ()
    return dict(Counter(name.rpartition(".")[2] for name in names))


def adapter_matrices(spec: RunSpec, model: ModelFacts) -> dict[str, tuple[int, ...]]:
    """The matrices that get a LoRA adapter."""
    assert isinstance(spec.method, Lora)
    vision = vision_plan(structure_of(model), spec.vision)
    return adapter_targets(model, spec.method.target_modules, spec.method.modules_to_save, vision)


def trained_parameters(spec: RunSpec) -> int | None:
    """The number of parameters that the run trains; None if the model is not here yet."""
    model, is_reward_model = inspect_model(spec.model.model_name_or_path), spec.stage.kind == "rm"
    if spec.method.kind == "lora" and (adapter := spec.model.adapter_path):
        head = (model.hidden_size or 0) if is_reward_model and not adapter_has_score_head(adapter) else 0
        return adapter_parameters(adapter) + head or None
    chosen = spec.method.model_dump()
    names = (
        "r",
        "target_modules",
        "modules_to_save",
        "use_dora",
        "expert_r",
        "trainable_layers",
        "trainable_modules",
    )
    chosen = {name: chosen[name] for name in names if name in chosen}
    if spec.model.added_tokens and not vocabulary(model.path).rows:
        return None  # the new ones among them are known once the tokenizer is loaded
    grown = _grown_parameters(spec, model, chosen)
    vision = vision_plan(structure_of(model), spec.vision)
    counted = trainable_parameters(model, spec.method.kind, scorer=is_reward_model, vision=vision, **chosen)
    return counted + grown if counted else None


def _grown_parameters(spec: RunSpec, model: ModelFacts, chosen: dict[str, Any]) -> int:
    """Parameters of rows for tokens that are new to the model; modules trained in full for them are added to
    `chosen`."""
    trained, made = new_rows(model, spec.model.added_tokens, resized=spec.model.resize_embeddings)
    if not trained:
        return 0
    whole, width = vocabulary_modules(model, scorer=spec.stage.kind == "rm"), model.hidden_size or 0
    # A tied head is the embedding, except under LoRA if it is trained in full: then there is a copy of each.
    copies = 1 if model.tied else len(whole)
    if spec.method.kind == "lora":
        saved = chosen["modules_to_save"]
        if trains_rows_alone(model):
            left = [name for name in whole if not any(name.endswith(end) for end in saved)]
            return trained * width * (min(len(left), copies)) + made * width * (len(whole) - len(left))
        chosen["modules_to_save"] = list(dict.fromkeys([*saved, *whole]))
        return made * width * len(whole)
    rows = made + (embedding_rows(model) or 0) * (spec.method.kind == "freeze")
    return rows * width * copies
