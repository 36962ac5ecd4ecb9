"""The request bodies of a chat server, as OpenAI's clients send them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from engine.core.reasoning import content_of
from engine.data.images import IMAGE_MARK, ImageSource, image_in_url
from engine.spec.generation_settings import GenerationSettings

ROLES = ("system", "user", "assistant", "tool")


def _normalize_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: its text in one piece, the arguments of its calls as objects."""
    content = message.get("content")
    images: list[ImageSource] = []
    if isinstance(content, list):
        content, images = _joined_parts(content)
        if images and message.get("role") != "user":
            raise ValueError("only messages of the user can have images")
    if not isinstance(content, str | None):
        raise ValueError("the content of a message is text")
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise ValueError(f"the role {role!r} is none of {', '.join(ROLES)}")
    plain = {key: value for key, value in message.items() if key != "images"}
    plain |= {"role": role, "content": content or ""} | ({"images": images} if images else {})
    if role == "assistant":  # a client sends back what an answer was
        plain |= content_of(content or "")
    tool_calls = message.get("tool_calls") or []
    if not isinstance(tool_calls, list) or not all(isinstance(call, dict) for call in tool_calls):
        raise ValueError("tool_calls is a list of objects")
    calls = [{**call, "function": _parse_arguments(call)} for call in tool_calls]
    return plain | ({"tool_calls": calls} if calls else {})


def _joined_parts(parts: list[Any]) -> tuple[str, list[ImageSource]]:
    """The text of the parts of a content, with IMAGE_MARK for each image, and the images. Raises Refusal for an
    unusable image."""
    text, images = "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text += str(part.get("text", "")).replace(IMAGE_MARK, "")
        elif kind in ("image_url", "input_image"):
            reference = part.get("image_url")
            url = reference.get("url") if isinstance(reference, dict) else reference
            images.append(image_in_url(str(url)))
            text += IMAGE_MARK
        else:
            raise ValueError("only parts of type text and image_url can be read")
    return text, images


def _parse_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        raise ValueError("each of tool_calls has a function")
    if isinstance(arguments := function.get("arguments"), str):
        with contextlib.suppress(ValueError, RecursionError):
            return {**function, "arguments": json.loads(arguments)}
    return function


def _tool_names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the tools."""
    functions = [tool.get("function") for tool in tools]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return [name for name in names if isinstance(name, str)]


Message = Annotated[dict[str, Any], AfterValidator(_normalize_message)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatCompletionRequest(GenerationSettings):
    """The body of POST /v1/chat/completions. OpenAI's other settings are rejected if they would change the answer, and
    ignored otherwise; null means that a setting is absent."""

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: list[Message] = Field(min_length=1)
    tools: list[dict[str, Any]] = Field([])
    tool_choice: Any = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_completion_tokens: int | None = Field(None, ge=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, float] = Field({}, max_length=0)
    response_format: Literal["text"] = "text"
    stop: list[str] = Field([], max_length=16)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    n: Literal[1] = 1
    thinking: bool = True
    ignore_eos: bool = False
    request_id: str = Field("", max_length=100)

    @property
    def usable_tools(self) -> list[dict[str, Any]]:
        return [] if self.tool_choice == "none" else self.tools

    @property
    def call(self) -> str | None:
        """The name of the tool that has to be called, "" if any has to be; None if none has."""
        names = _tool_names(self.usable_tools)
        if self.tool_choice == "required":
            return names[0] if len(names) == 1 else ""
        return self.tool_choice["function"]["name"] if isinstance(self.tool_choice, dict) else None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {name: setting for name, setting in value.items() if setting is not None}

    @field_validator("tool_choice")
    @classmethod
    def _check_tool_choice(cls, value: Any, info: ValidationInfo) -> Any:
        names = _tool_names(info.data.get("tools", ()))
        match value:
            case None | "none" | "auto":
                return value
            case "required" if names:
                return value
            case {"type": "function", "function": {"name": str(name)}} if name in names:
                return value
        raise ValueError("it is none, auto, required, or the function that is one of the tools")

    @field_validator("response_format", mode="before")
    @classmethod
    def _response_type(cls, value: Any) -> Any:
        return value.get("type") if isinstance(value, dict) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class ScoreRequest(BaseModel):
    """A request for scores. `judge` is the result folder of a reward model."""

    judge: str
    conversations: list[Annotated[list[Message], Field(min_length=1)]] = Field(min_length=1, max_length=64)
