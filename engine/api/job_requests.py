"""The body of POST /v1/fine_tuning/jobs, as OpenAI's clients send it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MethodName = Literal["supervised", "dpo", "reinforcement"]
STAGE_OF: dict[MethodName, str] = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}
METHOD_OF: Mapping[str, MethodName] = {stage: name for name, stage in STAGE_OF.items()}
AUTO = "auto"
Epochs = Literal["auto"] | Annotated[int, Field(ge=1, le=1000, strict=True)]
BatchSize = Literal["auto"] | Annotated[int, Field(ge=1, le=65536, strict=True)]
Multiplier = Literal["auto"] | Annotated[float, Field(gt=0, le=10**4, allow_inf_nan=False, strict=True)]
Count = Literal["auto"] | Annotated[int, Field(ge=1, le=10**6, strict=True)]


def name_part(suffix: str) -> str:
    """A suffix as part of the name of a model: letters and digits of any script, and dashes."""
    return re.sub(r"[^\w.]+", "-", suffix).strip("-._").lower()


class _Strict(BaseModel):
    """An argument that is not known here would be ignored, and is refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """null means that an argument is absent."""
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Hyperparameters(_Strict):
    n_epochs: Epochs = "auto"
    batch_size: BatchSize = "auto"
    learning_rate_multiplier: Multiplier = "auto"


class DpoHyperparameters(Hyperparameters):
    beta: Literal["auto"] | Annotated[float, Field(gt=0, le=100, allow_inf_nan=False, strict=True)] = "auto"


class ReinforcementHyperparameters(Hyperparameters):
    """`compute_multiplier` multiplies the group size, the answers per question; `eval_interval` is in steps."""

    compute_multiplier: Multiplier = "auto"
    eval_interval: Count = "auto"
    eval_samples: Literal["auto"] = "auto"
    reasoning_effort: Literal["default"] = "default"


class Supervised(_Strict):
    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(_Strict):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Reinforcement(_Strict):
    grader: dict[str, Any]
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class Method(_Strict):
    type: MethodName
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None

    @model_validator(mode="after")
    def _only_its_own(self) -> Method:
        others = [name for name in STAGE_OF if name != self.type and getattr(self, name) is not None]
        if others:
            raise ValueError(f"{others[0]} does not belong to the method {self.type}")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise ValueError("reinforcement needs a grader")
        return self


class JobRequest(_Strict):
    model: str = Field(min_length=1, max_length=200)
    training_file: str = Field(min_length=1, max_length=200)
    validation_file: str | None = Field(None, min_length=1, max_length=200)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None  # deprecated by OpenAI, and still sent by many scripts
    suffix: str | None = Field(None, max_length=64)
    seed: Annotated[int, Field(ge=0, le=2**32 - 1, strict=True)] | None = None
    metadata: dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]] | None = (
        Field(None, max_length=16)
    )
    integrations: list[Any] | None = Field(None, max_length=0)

    @field_validator("suffix")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text and not name_part(text):
            raise ValueError("it needs a letter or a digit")
        return text or None

    @property
    def method_name(self) -> MethodName:
        return self.method.type if self.method else "supervised"

    @property
    def settings(self) -> Hyperparameters:
        """The hyperparameters of the method. Those at the top count if the method has none."""
        part = getattr(self.method, self.method_name) if self.method else None
        return part.hyperparameters if part else self.hyperparameters or Hyperparameters()

    @model_validator(mode="after")
    def _once(self) -> JobRequest:
        if self.hyperparameters and self.method and getattr(self.method, self.method.type):
            raise ValueError("hyperparameters can be given at the top or in method, not in both")
        if self.hyperparameters and self.method_name != "supervised":
            raise ValueError(f"hyperparameters at the top are for supervised jobs; use method.{self.method_name}")
        return self
