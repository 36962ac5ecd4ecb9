"""The settings of the answers as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.spec.generation_settings import GenerationSettings
from webui import boxes

# The label of each of GenerationSettings in page.yaml, which is also the id of its box.
SETTING_LABELS = {
    "temperature": "chat-temperature",
    "top_p": "chat-top-p",
    "top_k": "chat-top-k",
    "seed": "chat-seed",
    "max_tokens": "chat-longest",
    "repetition_penalty": "chat-penalty",
}
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "seed")  # not used for greedy answers


@dataclass(frozen=True)
class ChatSettings:
    """The values of the controls. `numbers` are the texts in the boxes, by the names in SETTING_LABELS."""

    numbers: Mapping[str, Any]
    greedy: bool
    thinking: bool
    remember: bool  # whether the models are sent the earlier turns
    system: str
    tools: str  # as JSON
    reward_model: str  # the id of the run; "" = none

    def generation(self) -> dict[str, Any]:
        """The settings that the server takes. For an empty box the model's own setting applies. Raises Refusal."""
        numbers = dict(self.numbers)
        if self.greedy:  # the boxes that are hidden then are ignored
            numbers = {name: value for name, value in numbers.items() if name not in SAMPLING_SETTINGS}
            numbers["temperature"] = 0
        settings = GenerationSettings.read(boxes.typed_values(numbers))
        return settings.model_dump(exclude_unset=True) | {"thinking": self.thinking}
