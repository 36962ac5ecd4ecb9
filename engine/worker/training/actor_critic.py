"""The three models of PPO (policy, critic, reference) with as few weights in memory as possible.

The active adapter decides which of them is used. Their training is left to `engine.worker.training.ppo`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from engine.worker.training import ppo_math


class ActorCritic(nn.Module):
    """The policy and the critic, which learn, and the reference, which stays the initial policy.

    With LoRA all three are one model with different active adapters: "default", "critic" and none. If the policy starts
    with a trained adapter, the reference is a frozen copy of that, and the critic starts as one. Otherwise the
    reference is a frozen copy of the whole model, and the critic is that copy with an adapter. Values are read from the
    critic's last hidden state by a linear head, which starts at zero.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel):
        super().__init__()
        self.policy = policy
        self.copy: PeftModel | None
        self.active_adapter: str | None
        adapted: PeftModel
        roles: dict[str, tuple[PreTrainedModel | PeftModel, str | None]]
        if isinstance(policy, PeftModel):
            self.copy = None
            adapted, config = policy, policy.peft_config["default"]
            begun = any(weight.any() for name, weight in policy.named_parameters() if "lora_B" in name)
            reference = "reference" if begun else None
            if begun:
                _add_adapter_copy(policy, "reference", config)
            # No whole modules: an output head in the critic would have no use.
            _add_adapter_copy(policy, "critic", config, modules_to_save=None, trainable_token_indices=None)
            self.learning, roles = ["default", "critic"], {"policy": (policy, "default")}
        else:
            frozen = copy.deepcopy(policy).requires_grad_(False)
            adapted = self.copy = get_peft_model(
                frozen, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), adapter_name="critic"
            )
            reference = None
            self.learning, roles = ["critic"], {"policy": (policy, None)}
        self.roles = roles | {"critic": (adapted, "critic"), "reference": (adapted, reference)}
        self.role = self.active_adapter = ""  # the role activated last, and the active adapter
        self.head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        for module in self.modules():
            # The ratio of new to old probability has to start at 1.
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                attending: Any = module
                attending.attention_dropout = 0.0
        adapted.set_requires_grad("reference", False)
        self.activate("critic")

    def activate(self, role: str) -> PreTrainedModel:
        """The language model with the adapter of `role` active."""
        model, adapter = self.roles[role]
        self.role = role
        if not isinstance(model, PeftModel):
            return model
        if self.active_adapter != adapter:
            tuner: Any = model.base_model
            if adapter:
                tuner.enable_adapter_layers()
                model.set_adapter(adapter, inference_mode=True)
            else:
                tuner.disable_adapter_layers()
            model.set_requires_grad(self.learning, True)  # peft freezes inactive adapters
            self.active_adapter = adapter
        base: Any = model.get_base_model()
        return base

    def forward(self, texts: Tensor, attention: Tensor, length: int, temperature: float) -> tuple[Tensor, ...]:
        """Of the last `length` tokens of texts (B, L): log-probabilities, entropies and values, each (B, length)."""
        log_probs, entropy = self.log_probs_and_entropy("policy", texts, attention, length, temperature)
        backbone = self.activate("critic").base_model
        hidden = backbone(**_model_inputs(texts, attention)).last_hidden_state[:, -length - 1 : -1]
        with torch.autocast(hidden.device.type, enabled=False):
            return log_probs, entropy, self.head(hidden.float()).squeeze(-1)

    def log_probs_and_entropy(
        self, role: str, texts: Tensor, attention: Tensor, length: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (B, length) of the last tokens, for "policy" or "reference"."""
        model = self.activate(role)
        logits = model(**_model_inputs(texts, attention), logits_to_keep=length + 1).logits[:, :-1]
        return ppo_math.log_probs_and_entropy(logits / temperature, texts[:, -length:])

    def generate_answers(self, prompts: Tensor, attention: Tensor, config: GenerationConfig) -> Tensor:
        """Sampled answers (B, at most max_new_tokens) to prompts that are padded on the left."""
        model: Any = self.activate("policy")  # also a GenerationMixin
        # Settings for chatting in the model's own config (a repetition penalty, top-k) would change the distribution
        # that is trained.
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            texts = model.generate(prompts, attention_mask=attention, generation_config=config)
        finally:
            model.generation_config = own
        return texts[:, prompts.shape[1] :]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """As in transformers, but what is recomputed in the backward pass uses the role of the forward pass."""

        def again() -> tuple[Any, Any]:
            role = self.role
            return contextlib.nullcontext(), _RunOnEnter(lambda: self.activate(role))

        arguments = (activation_checkpointing_kwargs or {}) | {"use_reentrant": False, "context_fn": again}
        for role in ("policy", "critic"):
            self.activate(role).activation_checkpointing_enable(arguments, **options)


class _RunOnEnter(contextlib.AbstractContextManager):
    """A context that does something when it is entered, and leaves it done."""

    def __init__(self, do: Callable[[], Any]):
        self.do = do

    def __enter__(self) -> None:
        self.do()

    def __exit__(self, *_: object) -> None:
        pass


def _add_adapter_copy(model: PeftModel, name: str, config: PeftConfig, **changes: Any) -> None:
    """Add an adapter that is a copy of the current "default"."""
    twin = copy.deepcopy(config)
    for key, value in {"init_lora_weights": True, "lora_dropout": 0.0, **changes}.items():
        setattr(twin, key, value)
    model.add_adapter(name, twin)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for path, weight in weights.items():
            if f".{name}" in path and (source := weights.get(path.replace(f".{name}", ".default"))) is not None:
                weight.copy_(source)


def _model_inputs(texts: Tensor, attention: Tensor) -> dict[str, Any]:
    places = (attention.cumsum(1) - 1).clamp(min=0)  # positions begin at 0 whatever the padding
    return {"input_ids": texts, "attention_mask": attention, "position_ids": places, "use_cache": False}
