"""A model that was trained to call a tool calls it: asked with OpenAI's own client, and as the page asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from engine.core.rundir import read_json, write_json
from engine.launch.workspace import DEMO_MODEL, Workplace
from engine.serving import chat_client, conversation_tree, servers
from tests.conftest import engine
from tests.served import client_of, serving
from tests.test_response_template import QWEN

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]

TEMPLATE = (
    "{%- for tool in tools or [] %}{{- '<|im_start|>system\\n' ~ tool.function.name ~ '<|im_end|>\\n' }}{% endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content }}"
    "{%- for call in m.tool_calls or [] %}"
    '{{- \'<tool_call>\\n{"name": "\' ~ call.function.name ~ \'", "arguments": \' ~ '
    "(call.function.arguments | tojson) ~ '}\\n</tool_call>' }}{% endfor %}{{- '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOLS = conversation_tree.parse_tools('[{"name": "add"}, {"name": "take"}]')
ASKED = {"role": "user", "content": "北京?"}
SPEC = {
    "name": "caller",
    "stage": {"kind": "sft"},
    "method": {"kind": "full"},
    "data": {"datasets": ["calls"]},
    "training": {
        "num_train_epochs": 28,
        "learning_rate": 0.003,
        "per_device_train_batch_size": 12,
        "gradient_checkpointing": False,
    },
    "logging": {"probe": False, "save_strategy": "no", "plot_loss": False},
}


def rows() -> Iterator[dict[str, Any]]:
    """Conversations in which a tool is called, that end with the call or go on with what it answered."""
    for city, mark, name in (
        ("Paris", "?", "add"),
        ("北京", "?", "add"),
        ("Paris", "!", "take"),
        ("北京", "!", "take"),
    ):
        call = {"type": "function", "function": {"name": name, "arguments": {"to": city}}}
        messages = [
            {"role": "user", "content": f"{city}{mark}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        yield {"messages": messages, "tools": list(TOOLS)}
        for result in ("1", "2"):
            told = [
                {"role": "tool", "content": result},
                {"role": "assistant", "content": f"It is {result}."},
            ]
            yield {"messages": messages + told, "tools": list(TOOLS)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, Path]:
    """A model that has learned to call."""
    folder = tmp_path_factory.mktemp("tools")
    workplace = Workplace(models=(DEMO_MODEL.parent, folder), data=folder, saves=folder / "saves")
    workplace.saves.mkdir()
    (folder / "calls.jsonl").write_text("\n".join(map(json.dumps, rows())), encoding="utf-8")
    (folder / "dataset_info.json").write_text('{"calls": {"file_name": "calls.jsonl"}}')  # its form is found
    (folder / "calling.jinja").write_text(TEMPLATE, encoding="utf-8")
    model = {"model_name_or_path": str(DEMO_MODEL), "chat_template": str(folder / "calling.jinja")}
    done = engine(workplace, "train", "-", input=json.dumps({**SPEC, "model": model}))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return workplace, Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module", params=["form of the chat template", "response template"])
def server(trained: tuple[Workplace, Path], request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    """A server of it, which reads calls as they are learned from the chat template or as the tokenizer says."""
    workplace, result = trained
    for config in result.rglob("tokenizer_config.json") if request.param == "response template" else ():
        write_json(config, read_json(config) | {"response_template": QWEN})
    with serving(workplace, servers.choose(workplace, str(result), [])) as started:
        yield started


def ask(client: openai.OpenAI, server: servers.Server, *messages: Any, **settings: Any) -> Any:
    given = {"temperature": 0, "max_tokens": 60, "tools": list(TOOLS)} | settings
    return client.chat.completions.create(model=server.name, messages=list(messages), **given)


def test_openais_client_gets_the_call_and_what_is_said_of_its_result(server: servers.Server) -> None:
    client = client_of(server)
    [choice] = ask(client, server, ASKED).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "add")
    assert json.loads(call.function.arguments) == {"to": "北京"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
    [after] = ask(client, server, ASKED, choice.message, result).choices
    assert (after.finish_reason, after.message.content, after.message.tool_calls) == (
        "stop",
        "It is 2.",
        None,
    )


def test_a_stream_gives_the_call_whole_and_nothing_of_it_as_text(server: servers.Server) -> None:
    chunks = [one.choices[0] for one in ask(client_of(server), server, ASKED, stream=True)]
    assert "".join(one.delta.content or "" for one in chunks) == ""
    [call] = [call for one in chunks for call in one.delta.tool_calls or ()]
    assert (call.index, call.function.name, json.loads(call.function.arguments)) == (
        0,
        "add",
        {"to": "北京"},
    )
    assert chunks[-1].finish_reason == "tool_calls"


def test_without_tools_what_it_writes_is_text(server: servers.Server) -> None:
    for settings in ({"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}):
        [choice] = ask(client_of(server), server, ASKED, **settings).choices
        assert choice.message.tool_calls is None
        assert choice.message.content


def test_the_call_that_is_demanded_comes_where_another_would_have(server: servers.Server) -> None:
    client = client_of(server)
    named = {"type": "function", "function": {"name": "take"}}
    for choice, wanted in (("auto", "add"), ("required", "add"), (named, "take")):
        settings = {"tool_choice": choice}
        [whole] = ask(client, server, ASKED, **settings).choices
        assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
        assert [one.function.name for one in whole.message.tool_calls] == [wanted]
        chunks = [one.choices[0] for one in ask(client, server, ASKED, stream=True, **settings)]
        assert "".join(one.delta.content or "" for one in chunks) == ""
        assert [one.function.name for chunk in chunks for one in chunk.delta.tool_calls or ()] == [wanted]
    # What it does not write itself is no part of what it has written.
    auto, required = (ask(client, server, ASKED, tool_choice=one).usage for one in ("auto", "required"))
    assert required.completion_tokens < auto.completion_tokens
    assert required.total_tokens == auto.total_tokens
    for wrong in ("maybe", {"type": "function", "function": {"name": "nobody"}}, {"type": "function"}, 3):
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            ask(client, server, ASKED, tool_choice=wrong)
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        ask(client, server, ASKED, tool_choice="required", tools=[])


def test_an_answer_that_is_cut_in_the_call_is_text(server: servers.Server) -> None:
    [choice] = ask(client_of(server), server, ASKED, max_tokens=10).choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content.startswith("<tool_call>")


def test_the_page_is_told_of_the_call(server: servers.Server) -> None:
    settings = {"temperature": 0, "max_tokens": 60, "tools": list(TOOLS)}
    [*_, [answer]] = chat_client.ask(server, {server.name: [ASKED]}, settings)
    assert (answer.text, answer.calls) == ("", ({"name": "add", "arguments": {"to": "北京"}},))
    turn = conversation_tree.answered_turn(conversation_tree.Turn(ASKED["content"], tools=TOOLS), [answer], {})
    result = conversation_tree.Turn("1", role="tool", tools=TOOLS)
    messages = conversation_tree.messages_before_answer(
        conversation_tree.Conversation().add(turn).turns_on_path(), server.name, result
    )
    [*_, [answer]] = chat_client.ask(server, {server.name: messages}, settings)
    assert answer.text == "It is 1."
