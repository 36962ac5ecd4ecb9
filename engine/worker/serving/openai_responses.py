"""One chat completion in OpenAI's format: as a whole response, or in chunks."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from engine.core.problems import Problem
from engine.worker.generation.answer import Answer, Piece, TokenLogprob
from engine.worker.generation.served_models import ServedModel
from engine.worker.serving.schemas import ChatCompletionRequest
from engine.worker.templates.response_template import ResponseReader
from engine.worker.templates.tool_calls import ToolCall


class ChatCompletion:
    """One answer in OpenAI's format, assembled from its pieces.

    If tools were given, tool calls are removed from its text once it has ended: they are parsed as the tokenizer
    specifies (`ResponseReader`), or in the form that the chat template writes them.
    """

    def __init__(self, model: ServedModel, request: ChatCompletionRequest, stamp: dict[str, Any], began: float):
        self.model, self.request, self.stamp, self.began = model, request, stamp, began
        self.call_form = model.calls if request.usable_tools else None
        self.plain = model.begun(request.call).read  # the raw text, starting with the part it did not generate itself
        self.reader: ResponseReader | None = None
        self.text = self.plain  # without what may be a call
        self.tokens: list[TokenLogprob] = []
        self.count, self.prompt = 0, 0
        self.streamed = 0  # characters of the text
        self.calls: list[dict[str, Any]] = []  # once the answer has ended
        self.finish = ""
        self.problem: Problem | None = None
        self.first: float | None = None
        self.last = began

    def add(self, answer: Answer, piece: Piece) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self._read(answer, piece)
        self.tokens += piece.tokens
        self.count, self.prompt = piece.count, len(answer.prompt)
        self.finish, self.problem = piece.finish, piece.problem
        if self.finish:
            self.text, calls = self._parse()
            self.calls = [_tool_call(call) for call in calls]

    def _read(self, answer: Answer, piece: Piece) -> None:
        """Add the text of a piece."""
        tools = self.request.usable_tools
        if not self.count and tools and not self.request.stop:  # a stop sequence ends only the text
            self.reader = ResponseReader.of(self.model.tokenizer, answer.prompt, tools)
            self.text = "" if self.reader else self.text
        self.plain += piece.text
        self.text += self.reader.add(answer.written[self.count : piece.count]) if self.reader else piece.text

    def _parse(self) -> tuple[str, list[ToolCall]]:
        """The text of the whole answer, and the calls in it."""
        text = self.text + (self.reader.finish() if self.reader else "")
        read = self.reader is not None and not self.reader.failed
        if read and self.reader and self.reader.calls:
            return text.rstrip(), self.reader.calls
        form = self.call_form
        plain, calls = form.parse_tool_calls(self.plain, self.request.usable_tools) if form else (self.plain, [])
        return (text, []) if read and not calls else (plain, calls)

    def streamable_text(self) -> str:
        """The further text that can be streamed: a possible call waits until the answer has ended."""
        upto = (
            self.call_form.length_before_calls(self.text, self.streamed)
            if self.call_form and not self.reader and not self.finish
            else len(self.text)
        )
        text, self.streamed = self.text[self.streamed : upto], max(self.streamed, upto)
        return text

    def finish_reason(self) -> str:
        """Why the answer ended, in OpenAI's terms."""
        if self.calls and self.finish == "stop":
            return "tool_calls"
        return "stop" if self.finish == "cancelled" else self.finish

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt, "completion_tokens": self.count, "total_tokens": self.prompt + self.count}

    def timing(self) -> dict[str, Any]:
        """Seconds to the first piece of the answer, and tokens per second from then on."""
        first = self.first or self.last
        spent = self.last - first
        return {
            "first_s": round(first - self.began, 4),
            "tokens": self.count,
            "tokens_per_s": round((self.count - 1) / spent, 2) if spent > 0 and self.count > 1 else None,
        }

    def chunk(
        self, delta: dict[str, Any] | None, tokens: tuple[TokenLogprob, ...] = (), finish: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish}
        if self.request.logprobs:
            choice["logprobs"] = self._logprobs(tokens) if tokens else None
        return {
            **self.stamp,
            "object": "chat.completion.chunk",
            "model": self.model.name,
            "choices": [choice],
        }

    def response(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.calls:
            message = {"role": "assistant", "content": self.text.strip() or None, "tool_calls": self.calls}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": self.finish_reason(),
            "logprobs": self._logprobs(self.tokens) if self.request.logprobs else None,
        }
        return {
            **self.stamp,
            "object": "chat.completion",
            "model": self.model.name,
            "choices": [choice],
            "usage": self.usage(),
            "timing": self.timing(),
        }

    def _logprobs(self, tokens: Any) -> dict[str, Any]:
        def entry(id: int, logprob: float) -> dict[str, Any]:
            text = self.model.tokenizer.decode([id])
            assert isinstance(text, str)  # one of them, since one list of ids is given
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {
            "content": [
                entry(token.id, token.logprob) | {"top_logprobs": [entry(*likely) for likely in token.top]}
                for token in tokens
            ]
        }


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """A call in OpenAI's format, with the arguments as JSON text."""
    arguments = json.dumps(call["arguments"])  # escaped: a model may generate half a character
    function = {"name": call["name"], "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
