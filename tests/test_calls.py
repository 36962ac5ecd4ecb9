"""Calls of tools are found in what a model writes, in the form that its own template writes them in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.worker.generation.reasoning_marks import with_visible_marks
from engine.worker.templates.chat_template import render
from engine.worker.templates.tool_calls import ToolCallFormat
from tests.families import tokenizer

ARGUMENTS = {"city": 'Köln "{x}" </tool_call>\n7', "days": [1, 2], "deep": {"a": None}}
# Family → whether it wants arguments as their JSON, and how many calls it writes at once.
FAMILIES = {
    "qwen3_5_think": (False, 2),
    "qwen3_6": (False, 2),
    "glm4moe": (False, 2),
    "nemotron_3_nano": (False, 2),
    "qwen2_5": (False, 2),
    "qwen3": (False, 2),
    "qwen3_vl": (False, 2),
    "llama3_1": (False, 1),
    "llama3_2": (False, 1),
    "deepseekv3": (True, 2),
    "gptoss": (False, 1),
}


def left_out(tok: Any) -> list[str]:
    """The tokens that are not in the texts of answers."""
    added = with_visible_marks(tok.backend_tokenizer).get_added_tokens_decoder()
    return [token.content for token in added.values() if token.special]


def written(family: str, *calls: tuple[str, Any], said: str = "") -> str:
    """What a model writes that does as its template does: what stands behind
    the generation prompt, without the tokens that the texts of answers lack."""
    tok = tokenizer(family)
    encode = json.dumps if FAMILIES[family][0] else dict
    called = [
        {
            "id": f"call0000{number}",
            "type": "function",
            "function": {"name": name, "arguments": encode(given)},
        }
        for number, (name, given) in enumerate(calls)
    ]
    spoken = {"role": "assistant", "content": said, **({"tool_calls": called} if called else {})}
    asked = {"role": "user", "content": "Q?"}
    prompt, _ = render(tok, tok.chat_template, [asked], add_generation_prompt=True)
    text, _ = render(tok, tok.chat_template, [asked, spoken])
    same = next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))
    while same < len(prompt) and prompt[same - 1] not in "> \n":  # no token is cut in two
        same -= 1
    text = text[same:]
    for token in left_out(tok):
        text = text.replace(token, "")
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_come_back_as_the_template_wrote_them(family: str) -> None:
    form = ToolCallFormat.of(tokenizer(family), tokenizer(family).chat_template)
    assert form is not None
    calls = [("get_weather", ARGUMENTS), ("other-tool", {})][: FAMILIES[family][1]]
    said, found = form.parse_tool_calls(written(family, *calls))
    assert [(one["name"], one["arguments"]) for one in found] == calls
    assert said.replace("<think>", "").replace("</think>", "").strip() == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_a_call_is_given_out_while_it_is_written(family: str) -> None:
    form = ToolCallFormat.of(tokenizer(family), tokenizer(family).chat_template)
    whole = written(family, ("get_weather", ARGUMENTS))
    said, _ = form.parse_tool_calls(whole)
    given = ""
    for upto in range(len(whole) + 1):
        held = form.length_before_calls(whole[:upto])
        assert held <= upto
        assert form.length_before_calls(whole[:upto], len(given)) == held
        assert whole[:held].startswith(given)
        given = max(given, whole[:held], key=len)
    assert given.rstrip() == said.rstrip()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text",
    [
        "No call.",
        "",
        "<tool_call>\n<function=f>\n<parameter=x>\n1",
        "a { b",
        '<tool_call>\n{"name": "f", "arguments": {"x": 1',
        '{"name": "f"}',
        "to=functions.",
    ],
)
def test_what_is_no_whole_call_stays_as_it_is(family: str, text: str) -> None:
    form = ToolCallFormat.of(tokenizer(family), tokenizer(family).chat_template)
    assert form.parse_tool_calls(text) == (text, [])


@pytest.mark.parametrize("family", FAMILIES)
def test_words_that_a_call_may_begin_with_are_held_back_no_longer_than_they_may(family: str) -> None:
    form = ToolCallFormat.of(tokenizer(family), tokenizer(family).chat_template)
    for text in (
        "A function is a rule. ",
        "The <tool_call> to <toolbox> ",
        'In Python, {"name" : 3} is a value. ',
    ):
        told = 0
        for upto in range(len(text) + 1):
            told = form.length_before_calls(text[:upto], told)
        assert told == len(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_is_demanded_is_begun_as_the_template_begins_it(family: str) -> None:
    tok = tokenizer(family)
    form = ToolCallFormat.of(tok, tok.chat_template)
    given = json.dumps({"a": "x"}) if FAMILIES[family][0] else {"a": "x"}
    call = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": given}}
    asked = {"role": "user", "content": "Q?"}
    prompt, _ = render(tok, tok.chat_template, [asked], add_generation_prompt=True)
    text, _ = render(tok, tok.chat_template, [asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
    for name in ("get_weather", ""):
        opened = form.forced_call(name)
        if text.startswith(prompt):
            assert text.startswith(prompt + opened.prompt)
        else:  # the prompt has opened a thought, which in what is told later is left out
            assert opened.prompt.startswith("</think>")
        # What the model goes on with.
        behind = name + form.named.prompt if name else ""
        rest = text[text.index("get_weather") :]
        assert rest.startswith(behind)
        rest = rest.removeprefix(behind)
        for token in left_out(tok):
            rest = rest.replace(token, "")
        assert form.parse_tool_calls(opened.read + rest) == (
            "",
            [{"name": "get_weather", "arguments": {"a": "x"}}],
        )


def test_what_json_does_not_have_is_no_argument() -> None:
    qwen3, qwen3_6 = (ToolCallFormat.of(tokenizer(one), tokenizer(one).chat_template) for one in ("qwen3", "qwen3_6"))
    for odd in ("NaN", "Infinity", "-Infinity", "1e999"):
        text = f'<tool_call>\n{{"name": "f", "arguments": {{"x": {odd}}}}}\n</tool_call>'
        assert qwen3.parse_tool_calls(text) == (text, [])
        text = f"<tool_call>\n<function=f>\n<parameter=x>\n{odd}\n</parameter>\n</function>\n</tool_call>"
        assert qwen3_6.parse_tool_calls(text)[1] == [{"name": "f", "arguments": {"x": odd}}]


def test_what_is_said_before_a_call_and_other_spaces_are_no_matter() -> None:
    form = ToolCallFormat.of(tokenizer("qwen2_5"), tokenizer("qwen2_5").chat_template)
    text = 'Well. \n<tool_call>{"name":"f","arguments":{"x":1}}</tool_call><tool_call>  {"name":  "g", "arguments": {}}'
    assert form.parse_tool_calls(text) == (
        "Well.",
        [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}],
    )


@pytest.mark.parametrize("family", ["llama3", "chatml", "plain", "gemma", "mistral", "gemma4", "lfm2_2_5"])
def test_a_template_that_writes_no_calls_or_as_a_program_has_no_form(family: str) -> None:
    assert ToolCallFormat.of(tokenizer(family), tokenizer(family).chat_template) is None


def test_what_a_tool_says_to_be_a_text_stays_one_where_that_is_not_to_be_seen() -> None:
    form = ToolCallFormat.of(tokenizer("qwen3_6"), tokenizer("qwen3_6").chat_template)
    text = written("qwen3_6", ("f", {"code": "007", "count": 7, "on": True}))
    known = {"code": {"type": "string"}, "count": {"type": "integer"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": known}}}
    [call] = form.parse_tool_calls(text, [tool])[1]
    assert call["arguments"] == {"code": "007", "count": 7, "on": True}
    for odd in (
        {},
        {"function": {"name": "f", "parameters": "x"}},
        {"function": {"name": "f", "parameters": {"properties": {"a": 1}}}},
        {"function": {"name": ["f"]}},
        {"function": {"name": "f", "parameters": {"properties": {"a": {"enum": 1, "anyOf": [3]}}}}},
    ):
        [call] = form.parse_tool_calls(text, [odd])[1]
        assert call["arguments"]["count"] == 7


def test_what_is_only_thought_of_is_not_called_and_what_stands_between_calls_ends_none() -> None:
    form = ToolCallFormat.of(tokenizer("qwen3"), tokenizer("qwen3").chat_template)
    one, other = (f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>' for name in "fg")
    assert form.parse_tool_calls(f"<think>{one}?</think>No.") == (f"<think>{one}?</think>No.", [])
    calls = [{"name": name, "arguments": {}} for name in "fg"]
    assert form.parse_tool_calls(f"A {one} and {other}")[1] == calls
    tools = [{"type": "function", "function": {"name": "g"}}]
    assert form.parse_tool_calls(f"{one}{other}", tools)[1] == calls[1:]  # nobody gave f
    broken = '<tool_call>\n{"name": "f", "arguments": ...}'
    assert form.parse_tool_calls(broken + other)[1] == calls[1:]


def test_a_text_argument_keeps_its_spaces_and_an_unfinished_one_takes_no_time() -> None:
    form = ToolCallFormat.of(tokenizer("qwen3_6"), tokenizer("qwen3_6").chat_template)
    code = "\n    return 1\n\n"
    [call] = form.parse_tool_calls(written("qwen3_6", ("write", {"code": code})))[1]
    assert call["arguments"]["code"] == code
    optional = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    tool = {"function": {"name": "f", "parameters": {"properties": {"a": optional, "b": {"enum": ["1"]}}}}}
    [call] = form.parse_tool_calls(written("qwen3_6", ("f", {"a": "123", "b": "1"})), [tool])[1]
    assert call["arguments"] == {"a": "123", "b": "1"}
    text = "<tool_call>\n<function=f>\n<parameter=x>" + "\n" * 20_000
    assert form.parse_tool_calls(text) == (text, [])


def test_gpt_oss_calls_a_tool_after_a_thought_in_the_header_of_a_message() -> None:
    form = ToolCallFormat.of(tokenizer("gptoss"), tokenizer("gptoss").chat_template)
    thought = "<|channel|>analysis<|message|>I look.<|end|>"
    call = "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    text = thought + call + json.dumps({"city": "Rome"})
    assert form.parse_tool_calls(text) == (thought, [{"name": "get_weather", "arguments": {"city": "Rome"}}])
    upto = 0
    for end in range(len(text) + 1):
        upto = form.length_before_calls(text[:end], upto)
    assert upto == len(thought)
    plain = thought + "<|start|>assistant<|channel|>final<|message|>It rains."
    assert form.parse_tool_calls(plain) == (plain, [])
