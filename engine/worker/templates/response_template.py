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

THOUGHT_FIELDS = ("reasoning_content", "thinking")  # the second in some on the hub
CALL_FIELD = "tool_calls"


class ResponseReader:
    """One answer as its tokens come. `calls`: those that are whole; `failed`: the answer
    is not what the template says, so that neither calls nor text can be relied on."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], tools: Tools):
        """Raises ValueError if the template is none."""
        prefix: Any = tokenizer.decode(list(prompt))
        self.parser = tokenizer.get_response_parser(prefix=prefix, tools=list(map(dict, tools)))
        self.backend, self.stream = tokenizer.backend_tokenizer, DecodeStream(skip_special_tokens=False)
        self.names = {tool["function"]["name"] for tool in tools}
        self.calls: list[ToolCall] = []
        self.failed = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], tools: Tools) -> ResponseReader | None:
        """None if the tokenizer does not say how to read its answers, or not so that it can be read."""
        if not getattr(tokenizer, "response_template", None):
            return None
        try:
            return cls(tokenizer, prompt, tools)
        except (ValueError, LookupError, TypeError):
            return None

    def add(self, tokens: Iterable[int]) -> str:
        """What more of the answer's text is certain."""
        raw = "".join(self.stream.step(self.backend, token) or "" for token in tokens)
        return self._text_of(lambda: self.parser.feed(raw))

    def finish(self) -> str:
        """The rest of the text, once nothing more comes."""
        return self._text_of(lambda: self.parser.finalize()[1])

    def _text_of(self, read: Any) -> str:
        if self.failed:
            return ""
        try:
            return "".join(map(self._text, read()))
        except (ValueError, LookupError, TypeError):  # what looked like a call is none
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
        """Raises ValueError, LookupError or TypeError if that is no call of a tool that was given."""
        function = value["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if function["name"] not in self.names or not isinstance(arguments, dict):
            raise ValueError(f"no call: {value}")
        return {"name": function["name"], "arguments": arguments}
