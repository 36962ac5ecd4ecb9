"""How answers are asked for: the settings beside the conversation as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.spec.generation_settings import GenerationSettings
from webui import boxes

# The label of each of GenerationSettings here, which is the id of its box, too.
SETTING_LABELS = {
    "temperature": "chat-temperature", "top_p": "chat-top-p", "top_k": "chat-top-k", "seed": "chat-seed",
    "max_tokens": "chat-longest", "repetition_penalty": "chat-penalty",
}  # fmt: skip
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "seed")  # of no meaning for greedy answers


@dataclass(frozen=True)
class ChatSettings:
    """What the controls hold. `numbers` are as they were typed, by the names of SETTING_LABELS."""

    numbers: Mapping[str, Any]
    greedy: bool
    thinking: bool
    remember: bool  # whether a question is asked with what came before it
    system: str
    tools: str  # as JSON
    reward_model: str  # the id of the run; "" = none

    def generation(self) -> dict[str, Any]:
        """The settings as the server takes them. An empty box is left to the model's own settings. Raises Refusal."""
        numbers = dict(self.numbers)
        if self.greedy:  # what greedy hides is not looked at
            numbers = {name: value for name, value in numbers.items() if name not in SAMPLING_SETTINGS}
            numbers["temperature"] = 0
        settings = GenerationSettings.read(boxes.typed_values(numbers))
        return settings.model_dump(exclude_unset=True) | {"thinking": self.thinking}
