"""What the trainer of any stage is built from; a stage's own module adds what is specific to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from engine.core.rundir import RunDir
from engine.models.vision_parts import name_in_base
from engine.spec.run_spec import RunSpec
from engine.worker.models.loading import moves_base
from engine.worker.training.sharding import plugin_arguments, prepare_sharding
from engine.worker.training.trainers import common_arguments, stage_arguments
from engine.worker.training.zero import complete_configuration

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


@dataclass(frozen=True)
class TrainingContext:
    """A run with everything loaded for it. `data`: "train", and "validation" if there is one, → a
    `datasets.Dataset`."""

    spec: RunSpec
    run: RunDir
    model: Any
    tokenizer: Any
    data: Mapping[str, Any]
    callbacks: Sequence[TrainerCallback] = ()

    def arguments(self, config: type[TrainingArguments], **changes: Any) -> TrainingArguments:
        """The configuration according to the spec, with `changes` by the stage."""
        common = common_arguments(self.spec, self.run, measured="validation" in self.data)
        # A batch without images does not use the tower, so its weights have no gradients to wait for.
        processes = {"ddp_find_unused_parameters": trains_outside_language(self.model)}
        arguments = config(**processes | common | stage_arguments(self.spec) | changes)
        arguments.fsdp_plugin_args = plugin_arguments(self.spec)
        complete_configuration(self.spec, arguments)
        return arguments

    def trainer(self, kind: Callable[..., AnyTrainer], arguments: TrainingArguments, **own: Any) -> AnyTrainer:
        """A trainer of this kind that has not started. `own`: arguments of its constructor in addition to the common
        ones."""
        patience = self.spec.logging.early_stopping_patience
        stopping = [EarlyStoppingCallback(patience)] if patience else []
        if not isinstance(self.model, PeftModel):
            pass_no_gradients_below_trained(self.model)
        elif not trains_outside_language(self.model):
            pass_no_gradients_to_towers(self.model.get_base_model())
        with exact_adapter(self.model):
            trainer = kind(
                model=self.model,
                args=arguments,
                train_dataset=self.data["train"],
                eval_dataset=self.data.get("validation"),
                processing_class=self.tokenizer,
                callbacks=[*self.callbacks, *stopping],
                optimizers=(loraplus_optimizer(self.spec, arguments, self.model), None),
                **own,
            )
        set_part_learning_rates(self.spec, trainer)
        prepare_sharding(self.spec, trainer)
        return adjust_trainer(trainer)


def trains_outside_language(model: Any) -> bool:
    """Whether any weight outside the language part is trained, chosen by the spec or as part of a continued adapter."""
    names = (name_in_base(name) for name, weight in model.named_parameters() if weight.requires_grad)
    return any(map(model.structure.is_in_tower, names))


def pass_no_gradients_below_trained(model: Any) -> None:
    """For recomputation, transformers lets the embeddings require gradients, which would then be computed through all
    frozen layers for nothing. Only recomputation with re-entry needs that, which is used with adapters alone."""
    model.enable_input_require_grads = lambda: None


def pass_no_gradients_to_towers(model: Any) -> None:
    """For recomputation below an adapter, transformers lets the embeddings of all parts require gradients: activations
    of frozen towers would be kept, and gradients computed, for nothing."""
    enable_input_gradients = model.enable_input_require_grads

    def enable_outside_towers() -> None:
        enable_input_gradients()
        for name, part in model.named_modules():
            for number, hook in list(part._forward_hooks.items()):
                if model.structure.is_in_tower(name) and getattr(hook, "__name__", "") == "make_inputs_require_grads":
                    del part._forward_hooks[number]

    model.enable_input_require_grads = enable_outside_towers


def loraplus_optimizer(spec: RunSpec, arguments: TrainingArguments, model: Any) -> torch.optim.Optimizer | None:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns `loraplus_lr_ratio` times as fast as A."""
    ratio = getattr(spec.method, "loraplus_lr_ratio", None)
    if not ratio:
        return None
    optimizer, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
    keywords.pop("lr")
    return create_loraplus_optimizer(
        model,
        optimizer,
        lr=arguments.learning_rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=arguments.weight_decay,
        **keywords,
    )


def set_part_learning_rates(spec: RunSpec, trainer: Trainer) -> None:
    """Give vision tower and projector learning rates of their own: each parameter group of the optimizer is split into
    one for each part. The schedule scales all of them alike."""
    rates = {"tower": spec.vision.tower_learning_rate, "projector": spec.vision.projector_learning_rate}
    if not any(rates.values()):
        return
    model: Any = trainer.model
    structure = model.structure
    parts = {id(weight): structure.part_of(name_in_base(name)) for name, weight in model.named_parameters()}

    def split(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for part in ("language", "tower", "projector"):
            weights = [weight for weight in group["params"] if (parts[id(weight)] or "language") == part]
            factor = (rates.get(part) or trainer.args.learning_rate) / trainer.args.learning_rate
            if weights:
                yield group | {"params": weights, "lr": group["lr"] * factor}

    create_optimizer = trainer.create_optimizer

    def create_split_optimizer(*arguments: Any) -> Any:
        optimizer = create_optimizer(*arguments)
        groups = [part for group in optimizer.param_groups for part in split(group)]
        # The first group's rate is the one that is logged.
        optimizer.param_groups[:] = sorted(groups, key=lambda group: parts[id(group["params"][0])] != "language")
        return optimizer

    trainer.create_optimizer = create_split_optimizer  # type: ignore[assignment,method-assign]


@contextlib.contextmanager
def exact_adapter(model: Any) -> Iterator[None]:
    """Undo TRL's rounding of a quantized model's adapter to bf16, which would change a continued adapter at the
    start."""
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    kept = (
        {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad} if quantized else {}
    )
    yield
    for parameter, value in kept.items():
        parameter.data = value


@contextlib.contextmanager
def reference_adapter(spec: RunSpec, model: Any) -> Iterator[None]:
    """Let TRL copy the adapter ("ref") for comparison, and keep the copy only if it is needed.

    The copy is made without changing the base again, as an initialization from it would (PiSSA). A new adapter has no
    effect yet: the reference is the model without it.
    """
    config: Any = model.peft_config["default"] if isinstance(model, PeftModel) else None
    if config is None:
        yield
        return
    kept, config.init_lora_weights = config.init_lora_weights, True
    yield
    config.init_lora_weights = kept
    if "ref" in model.peft_config and not spec.model.adapter_path and not moves_base(spec):
        model.delete_adapter("ref")


def adjust_trainer(trainer: AnyTrainer) -> AnyTrainer:
    """The trainer as Athanor needs it, whatever its constructor did."""
    assert trainer.model is not None
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # peft keeps modules_to_save in the type of the base, in which an optimizer's small steps are lost.
            parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)  # the run's callback prints
    trainer.create_model_card = lambda *_, **__: None  # type: ignore[method-assign]  # the run folder describes itself
    return trainer
