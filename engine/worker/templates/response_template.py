"""Parse answers as their tokenizer specifies: with transformers' parser, if the tokenizer has a `response_template`.

Reasoning and text are joined again as text, since that is what a page and OpenAI's API get; tool calls are extracted.
The patterns come from the model's folder, like its chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from engine.worker.templates.tool_calls import ToolCall, Tools

THOUGHT_FIELDS = ("reasoning_content", "thinking")  # the second is used by some on the hub
CALL_FIELD = "tool_calls"


class ResponseReader:
    """One answer as its tokens come in. `calls`: the complete ones; `failed`: the answer does not follow the template,
    so that neither calls nor text are reliable."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], tools: Tools):
        """Raises ValueError if the template is invalid."""
        prefix: Any = tokenizer.decode(list(prompt))
        self.parser = tokenizer.get_response_parser(prefix=prefix, tools=list(map(dict, tools)))
        self.backend, self.stream = tokenizer.backend_tokenizer, DecodeStream(skip_special_tokens=False)
        self.names = {tool["function"]["name"] for tool in tools}
        self.calls: list[ToolCall] = []
        self.failed = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], tools: Tools) -> ResponseReader | None:
        """None if the tokenizer does not specify how to read its answers, or not in a usable form."""
        if not getattr(tokenizer, "response_template", None):
            return None
        try:
            return cls(tokenizer, prompt, tools)
        except (ValueError, LookupError, TypeError):
            return None

    def add(self, tokens: Iterable[int]) -> str:
        """The further text of the answer that is certain."""
        raw = "".join(self.stream.step(self.backend, token) or "" for token in tokens)
        return self._text_of(lambda: self.parser.feed(raw))

    def finish(self) -> str:
        """The rest of the text, when nothing more comes."""
        return self._text_of(lambda: self.parser.finalize()[1])

    def _text_of(self, read: Any) -> str:
        if self.failed:
            return ""
        try:
            return "".join(map(self._text, read()))
        except (ValueError, LookupError, TypeError):  # what looked like a call is not one
            self.failed = True
            return ""

    def _text(self, event: Mapping[str, Any]) -> str:
        kind, field = event["type"], event["field"]
        if field == CALL_FIELD:
            if kind == "region_close":
                values = event["value"] if isinstance(event["value"], list) else [event["value"]]
                self.calls += map(self._call, values)
            return ""
        if kind == "region_chunk":
            return event["text"]
        mark = {"region_open": "<think>", "region_close": "</think>"}[kind]
        return mark if field in THOUGHT_FIELDS else ""

    def _call(self, value: Any) -> ToolCall:
        """Raises ValueError, LookupError or TypeError if that is not a call of a given tool."""
        function = value["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if function["name"] not in self.names or not isinstance(arguments, dict):
            raise ValueError(f"no call: {value}")
        return {"name": function["name"], "arguments": arguments}
