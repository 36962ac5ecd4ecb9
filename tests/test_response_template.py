"""Where a tokenizer says how its answers are read, calls are read so, whole and
in a stream; what it cannot read is as without it."""

from __future__ import annotations

import copy
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from engine.worker.generation.answer import Piece
from engine.worker.generation.served_models import CallPrefix
from engine.worker.serving.openai_responses import ChatCompletion
from engine.worker.serving.schemas import ChatCompletionRequest
from engine.worker.templates.chat_template import render
from engine.worker.templates.tool_calls import ToolCallFormat
from tests.families import tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
    for name in ("weather", "time")
]
ARGUMENTS = {"city": 'Köln "x"', "days": 7}
# As transformers' own server has them for these families.
QWEN = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
    },
}
GEMMA = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": ["<turn|>", "<|tool_response>", "<eos>"], "content": "text"},
    },
}
TEMPLATES = {"qwen3": QWEN, "gemma4": GEMMA}


def reading(family: str) -> Any:
    tok = copy.copy(tokenizer(family))
    tok.response_template = TEMPLATES[family]
    return tok


def written(tok: Any, message: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, and those that a model writes that answers with this message as its template has it."""
    question = {"role": "user", "content": "Q?"}
    prompt, _ = render(tok, tok.chat_template, [question], add_generation_prompt=True, tools=TOOLS)
    text, _ = render(tok, tok.chat_template, [question, {"role": "assistant", **message}], tools=TOOLS)
    assert text.startswith(prompt)
    return [tok(part, add_special_tokens=False)["input_ids"] for part in (prompt, text[len(prompt) :])]


def calling(*calls: tuple[str, dict[str, Any]], content: str = "") -> dict[str, Any]:
    functions = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return {"content": content, "tool_calls": functions}


def answered(tok: Any, prompt: list[int], ids: list[int], **settings: Any) -> tuple[ChatCompletion, list[str]]:
    """The completion of an answer of these tokens that came one by one, and what was streamed of it."""
    model = SimpleNamespace(
        tokenizer=tok,
        name="m",
        calls=ToolCallFormat.of(tok, tok.chat_template),
        begun=lambda _: CallPrefix("", ""),
    )
    request = ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "Q?"}], "tools": TOOLS} | settings
    )
    completion, streamed, before = ChatCompletion(model, request, {}, time.monotonic()), [], ""
    answer = SimpleNamespace(prompt=prompt, written=ids)
    for count in range(1, len(ids) + 1):
        text = tok.decode(ids[:count], skip_special_tokens=True)
        piece = Piece(text.removeprefix(before), (), count, "stop" if count == len(ids) else "")
        completion.add(answer, piece)
        before = text
        streamed.append(completion.streamable_text())
    return completion, streamed


def calls_of(completion: ChatCompletion) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in completion.calls]


@pytest.mark.parametrize("family", TEMPLATES)
def test_calls_are_read_as_the_tokenizer_says(family: str) -> None:
    tok = reading(family)
    calls = [("weather", ARGUMENTS), ("time", {})]
    completion, streamed = answered(tok, *written(tok, calling(*calls)))
    assert calls_of(completion) == calls
    empty_thought = {"qwen3": "<think>\n\n</think>", "gemma4": ""}[family]  # which its template writes before a call
    assert completion.response()["choices"][0]["message"]["content"] == (empty_thought or None)
    assert "".join(streamed).strip() == empty_thought
    assert completion.finish_reason() == "tool_calls"


def test_a_family_whose_form_cannot_be_learned_needs_its_response_template() -> None:
    tok = tokenizer("gemma4")
    completion, _ = answered(tok, *written(tok, calling(("weather", ARGUMENTS))))
    assert completion.calls == []


@pytest.mark.parametrize("family", TEMPLATES)
def test_text_and_thoughts_are_streamed_and_calls_are_not(family: str) -> None:
    tok = reading(family)
    opened, closed = {"qwen3": ("<think>", "</think>"), "gemma4": ("<|channel>thought\n", "<channel|>")}[family]
    prompt, ids = written(tok, calling(("weather", ARGUMENTS)))
    call = tok.decode(ids).rpartition("</think>")[2]
    ids = tok(f"{opened}Hm, <b>.{closed}Let me see.{call}", add_special_tokens=False)["input_ids"]
    completion, streamed = answered(tok, prompt, ids)
    assert "".join(streamed).rstrip() == completion.text == "<think>Hm, <b>.</think>Let me see."
    assert calls_of(completion) == [("weather", ARGUMENTS)]
    assert sum(map(bool, streamed)) > 5  # word by word
    alone = tok(f"{opened}Hm.{closed}It rains.", add_special_tokens=False)["input_ids"]
    completion, streamed = answered(tok, prompt, alone)
    assert "".join(streamed) == completion.text == "<think>Hm.</think>It rains."


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "weather", "argum',
        '<tool_call>\n{"name": "weather"}\n</tool_call>',
        '<tool_call>\n{"name": "rob", "arguments": {}}\n</tool_call>',
        "Just <tool_calls> text.",
    ],
)
def test_what_is_no_whole_call_of_a_tool_stays_text(text: str) -> None:
    tok = reading("qwen3")
    prompt, _ = written(tok, calling(("weather", {})))
    completion, streamed = answered(tok, prompt, tok(text, add_special_tokens=False)["input_ids"])
    assert (completion.text, completion.calls) == (text, [])
    assert text.startswith("".join(streamed)[: len(text)])
    assert completion.finish_reason() == "stop"


def test_what_a_template_does_not_know_is_found_in_the_form_of_the_chat_template() -> None:
    tok = reading("qwen3")
    prompt, ids = written(tok, calling(("weather", ARGUMENTS)))
    for broken in (
        {"fields": {}},
        {"start_anchor": "x", "fields": {"content": {"content": "text"}}},
        "nonsense",
    ):
        tok.response_template = broken
        completion, _ = answered(tok, prompt, ids)
        assert calls_of(completion) == [("weather", ARGUMENTS)]


def test_calls_in_the_conversation_before_are_none_of_the_answer() -> None:
    tok = reading("qwen3")
    prompt, ids = written(tok, {"content": "It rains."})
    tok.response_template = QWEN | {"start_anchor": "never there"}
    earlier = tok('<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>', add_special_tokens=False)
    completion, _ = answered(tok, earlier["input_ids"] + prompt, ids)
    assert completion.calls == []


def test_a_template_is_kept_with_the_tokenizer_of_a_result(tmp_path: Any) -> None:
    tok = reading("qwen3")
    tok.save_pretrained(tmp_path)
    assert type(tok).from_pretrained(tmp_path).response_template == QWEN


def test_an_answer_in_channels_is_sent_back_as_its_thought_and_what_stands_behind_it() -> None:
    text = "<|channel|>analysis<|message|>2 and 2<|end|><|start|>assistant<|channel|>final<|message|>Four."
    messages = [{"role": role, "content": text} for role in ("user", "assistant")]
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": messages})
    assert request.messages == [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "Four.", "reasoning_content": "2 and 2"},
    ]
