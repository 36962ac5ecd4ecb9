"""Which tokens are trained where a template is odd: miniatures of what public templates do, with the right answer."""

from __future__ import annotations

import json
import re

import pytest

from engine.core.problems import Refusal
from engine.data.template_losses import notes
from engine.worker.templates.answer_endings import MaskSettings
from engine.worker.templates.conversations import ConversationEncoder, TokenizedConversation, generation_stops
from tests.families import answer, encode, ids_of, talk, tokenizer, trained, user

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
RESULT = {"role": "tool", "content": "sunny"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALLED = {
    "messages": [user("Weather?"), answer("", tool_calls=[CALL]), RESULT, answer("Sunny.")],
    "tools": TOOLS,
}
TWO = talk("First question?", "First answer.", "Second question?", "Second answer.")

INDENTED = """{% for m in messages %}
    {% if m.role == 'user' %}
        {{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {% elif m.role == 'assistant' %}
        {{ '<|im_start|>bot\\n' + m.content + '<|im_end|>\\n' }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
    {{ '<|im_start|>bot\\n' }}
{% endif %}
"""
ALWAYS_OPEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}"
)
OTHER_NAME = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
TWO_STEPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>{{ m.role }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED_NEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|><|im_start|>end\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tok():
    """A tokenizer with ChatML's tokens, whose eos is <|im_end|>."""
    made = tokenizer("qwen2_5")
    made.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    return made


@pytest.mark.parametrize("template", [INDENTED, ALWAYS_OPEN, OTHER_NAME])
def test_exactly_the_answers_and_their_ends_are_trained(tok, template: str) -> None:
    first, both = encode(tok, {"messages": TWO["messages"][:2]}, TWO, chat_template=template)
    assert trained(tok, first) == ["First answer.<|im_end|>"]
    assert trained(tok, both) == ["First answer.<|im_end|>", "Second answer.<|im_end|>"]


def test_a_turn_that_is_closed_in_two_steps_is_trained_with_both(tok) -> None:
    (both,) = encode(tok, TWO, chat_template=TWO_STEPS)
    ends = "<|endoftext|>assistant<|im_end|>"
    assert trained(tok, both) == [f"First answer.{ends}", f"Second answer.{ends}"]


def test_what_opens_the_next_turn_is_no_end(tok) -> None:
    (both,) = encode(tok, TWO, chat_template=OPENED_NEXT)
    assert trained(tok, both) == ["First answer.<|im_end|>", "Second answer.<|im_end|>"]
    assert ConversationEncoder(tok, OPENED_NEXT).end_tokens == ["<|im_end|>"]


NO_END = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>\n"
    "{{ m.content }}{% else %}<|endoftext|>\n{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|endoftext|>\n{% endif %}"
)


def test_a_last_answer_that_the_template_does_not_end_is_ended(tok) -> None:
    first, both = encode(tok, {"messages": TWO["messages"][:2]}, TWO, chat_template=NO_END)
    assert trained(tok, first) == [f"First answer.{tok.eos_token}"]
    assert trained(tok, both) == ["First answer.<|im_start|>", f"Second answer.{tok.eos_token}"]
    (bare,) = encode(tok, TWO, chat_template=NO_END, mask=MaskSettings(end_last_answer=False))
    assert trained(tok, bare) == ["First answer.<|im_start|>", "Second answer."]
    assert not bare.ended


def test_the_end_is_what_the_models_configuration_stops_at(tok, tmp_path) -> None:
    tok.save_pretrained(tmp_path)
    stop = tok.convert_tokens_to_ids("<|im_start|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tok.eos_token_id, stop]}))
    before, tok.name_or_path = tok.name_or_path, str(tmp_path)
    try:
        (both,) = encode(tok, TWO, chat_template=NO_END)
    finally:
        tok.name_or_path = before
    assert trained(tok, both) == ["First answer.<|im_start|>", "Second answer.<|im_start|>"]


MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n"
    "{{ m.content }}<|im_end|>\n{% elif m.role == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_with_marks_that_writes_no_calls_trains_no_empty_answer(tok) -> None:
    row, plain = encode(tok, CALLED, TWO, chat_template=MARKED)
    assert (row.status, row.reason.code) == ("refused", "template-without-tool-calls")
    assert trained(tok, plain) == ["First answer.<|im_end|>", "Second answer.<|im_end|>"]


def calls_as(arguments: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "{{ '<call>' + c.function.name + ' ' + "
        + arguments
        + " + '</call>' }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.mark.parametrize("arguments", ["c.function.arguments", "c.function.arguments | tojson"])
def test_arguments_are_given_as_the_template_takes_them(tok, arguments: str) -> None:
    (row,) = encode(tok, CALLED, chat_template=calls_as(arguments))
    assert trained(tok, row) == ['<call>weather {"city": "Rome"}</call><|im_end|>', "Sunny.<|im_end|>"]


NINE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}#{{ c.id }}{% endfor %}"
    "{% else %}{{ m.content }}{% if m.role == 'tool' %}#{{ m.tool_call_id }}"
    "{% endif %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_calls_get_ids_where_the_data_has_none_or_others_than_the_template_takes(tok) -> None:
    own = {
        "messages": [
            user("Weather?"),
            answer("", tool_calls=[{**CALL, "id": "call_1"}]),
            {**RESULT, "tool_call_id": "call_1"},
        ]
    }
    own["messages"].append(answer("Sunny."))
    for row in encode(tok, CALLED, own, chat_template=NINE):
        call, last = trained(tok, row)
        id = call.removesuffix("<|im_end|>").partition("#")[2]
        assert len(id) == 9
        assert f"sunny#{id}" in tok.decode(row.input_ids)
        assert last == "Sunny.<|im_end|>"


def test_rows_with_tools_are_written_by_the_template_for_tools(tok) -> None:
    plain, own = tok.chat_template, calls_as("c.function.arguments | tojson")
    tok.chat_template = {"default": MARKED, "tool_use": own}
    try:
        called, without = encode(tok, CALLED, TWO)
    finally:
        tok.chat_template = plain
    assert trained(tok, called)[0] == '<call>weather {"city": "Rome"}</call><|im_end|>'
    assert trained(tok, without)[0] == "First answer.<|im_end|>"


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_takes_parts_gets_parts(tok) -> None:
    (row,) = encode(tok, TWO, chat_template=PARTS)
    assert trained(tok, row) == ["First answer.<|im_end|>", "Second answer.<|im_end|>"]


def thinks(key: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n{{ m."
        + key
        + " or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("inline", [False, True])
def test_reasoning_is_one_thing_whatever_it_is_called(tok, key: str, inline: bool) -> None:
    thought = answer("<think>\nhm\n</think>\n\nYes.") if inline else answer("Yes.", reasoning_content="hm")
    (row,) = encode(tok, {"messages": [user("Sure?"), thought]}, chat_template=thinks(key))
    assert trained(tok, row) == ["<think>\nhm\n</think>\n\nYes.<|im_end|>"]
    assert row.lost == ()


def test_what_a_template_leaves_out_of_a_row_is_said(tok) -> None:
    no_system = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"messages": [system, *TWO["messages"]]},
        {"messages": [user("q"), answer("a", reasoning_content="hm")]},
        {"messages": [user("q"), answer("a", reasoning_content="hm"), user("q"), answer("b")]},
        TWO,
    ]
    prompted = no_system + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    lost = [row.lost for row in encode(tok, *rows, chat_template=prompted)]
    assert lost == [("system",), ("reasoning",), ("earlier_reasoning",), ()]
    assert encode(tok, TWO, chat_template=thinks("reasoning"))[0].lost == ("empty_reasoning",)
    opened = no_system + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    assert encode(tok, TWO, chat_template=opened)[0].lost == ("without_reasoning",)


def test_an_empty_thought_is_trained_or_only_read(tok) -> None:
    row, template = talk("q", "a"), thinks("reasoning")
    (both,) = encode(tok, row, chat_template=template)
    assert trained(tok, both) == ["<think>\n\n</think>\n\na<|im_end|>"]
    (read,) = encode(tok, row, chat_template=template, mask=MaskSettings(train_empty_thoughts=False))
    assert trained(tok, read) == ["a<|im_end|>"]
    assert read.input_ids == both.input_ids


def test_an_answer_of_which_nothing_is_written_is_refused(tok) -> None:
    first_only = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.index < 3 else '' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    short, long = encode(tok, {"messages": TWO["messages"][:2]}, TWO, chat_template=first_only)
    assert trained(tok, short) == ["First answer.<|im_end|>"]
    assert long.reason.code == "answer-left-out"


def measures(content: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content | length }}\n{{ "
        + content
        + " }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )


def test_a_template_that_measures_its_texts_is_followed_by_prefixes(tok) -> None:
    (row,) = encode(tok, TWO, chat_template=measures("m.content"))
    assert trained(tok, row) == [" 13\nFirst answer.<|im_end|>", " 14\nSecond answer.<|im_end|>"]


def test_a_template_that_writes_other_words_than_the_row_has_is_refused(tok) -> None:
    (row,) = encode(tok, TWO, chat_template=measures("m.content | upper"))
    assert row.reason.code == "mask-unproven"


@pytest.mark.parametrize("between", ["", "e", "SECOND"])
@pytest.mark.parametrize("first", ["i", "n", "user"])
def test_words_that_are_only_found_in_the_frame_prove_nothing(tok, first: str, between: str) -> None:
    """The template writes "I"; the row's "i" stands in <|im_end|>, behind which the question would be trained."""
    for row in (talk("QQ", first, between, "OK"), talk("QQ", first)):
        (encoded,) = encode(tok, row, chat_template=measures("m.content | upper"))
        assert encoded.reason.code == "mask-unproven"


def switched_off_by(role: str) -> str:
    """As SmolLM3's: a mark in a message decides whether answers begin with an empty thought."""
    return (
        "{% set ns = namespace(thinks=true) %}{% for m in messages if m.role == '"
        + role
        + "' and '/no_think' in m.content %}{% set ns.thinks = false %}{% endfor %}"
        "{% set opening = '<|im_start|>assistant\n' ~ ('' if ns.thinks else '<think>\n\n</think>\n\n') %}"
        "{% for m in messages %}{{ opening if m.role == 'assistant' else '<|im_start|>' ~ m.role ~ '\n' }}"
        "{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}{{ opening }}{% endif %}"
    )


@pytest.mark.parametrize("role", ["system", "user"])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_where_an_answer_begins_is_not_taken_from_a_row_with_another_prompt(tok, role: str, order) -> None:
    """The same text stands before both answers: once the prompt writes it, and once the model has to."""
    thought = "<think>\n\n</think>\n\n"
    rows = [
        {"messages": [{"role": role, "content": text}, user("Sure?"), answer(content)]}
        for text, content in (("Be brief. /no_think", "Yes."), ("Be brief.", f"{thought}Yes."))
    ]
    encoded = encode(tok, *[rows[number] for number in order], chat_template=switched_off_by(role))
    expected = ["Yes.<|im_end|>", f"{thought}Yes.<|im_end|>"]
    assert [trained(tok, row) for row in encoded] == [[expected[number]] for number in order]


def test_what_a_template_adds_to_a_question_once_it_is_answered_is_not_trained(tok) -> None:
    """As Nemotron Cascade's, which marks what was asked by whether the answer is empty."""
    marks = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.role == 'user' %} /{{ 'no_think' if loop.nextitem "
        "and not loop.nextitem.content else 'think' }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (blank, row) = encode(tok, talk("q", "", "q", "a"), talk("q", "a", "q", "b"), chat_template=marks)
    assert trained(tok, row) == ["a<|im_end|>", "b<|im_end|>"]
    # An answer in which nothing is said is placed by the prompt alone, and here that is another.
    assert blank.reason.code == "answer-start-hidden"


def test_an_answer_that_is_written_twice_is_refused(tok) -> None:
    recap = tok.chat_template + "{% if messages | length > 3 %}Recap: {{ messages[1].content }}{% endif %}"
    short, long = encode(tok, talk("q", "a"), TWO, chat_template=recap)
    assert trained(tok, short) == ["a<|im_end|>"]
    assert long.reason.code == "answer-written-twice"


def test_the_name_of_who_answers_is_no_part_of_the_answer(tok) -> None:
    named = (
        "{% for m in messages %}<|im_start|>{{ m.name or m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"messages": [user("q"), answer("a", name="Bob"), user("q"), answer("b")]}
    assert trained(tok, encode(tok, row, chat_template=named)[0]) == ["a<|im_end|>", "b<|im_end|>"]


NAMES_ONLY = calls_as("''")
CHECKS_NAMES = (
    "{{ tools | tojson }}{% for m in messages %}{% for c in m.tool_calls or [] if c.function.name not in tools | "
    "map(attribute='function') | map(attribute='name') | list %}{{ raise_exception('no such tool') }}{% endfor %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def called(arguments: object) -> dict:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {**CALLED, "messages": [user("Weather?"), answer("", tool_calls=[call]), RESULT, answer("Sunny.")]}


@pytest.mark.parametrize("template", [NAMES_ONLY, CHECKS_NAMES])
@pytest.mark.parametrize("arguments", [{"days": 5}, {"at": {"deep": [1, None, True]}}, {"city": "Rome"}])
def test_a_call_of_which_a_part_is_not_written_is_refused(tok, template: str, arguments) -> None:
    """Numbers bear no marks, and a tool's name also stands in the list of tools."""
    (row,) = encode(tok, called(arguments), chat_template=template)
    assert (row.status, row.reason.code) == ("refused", "template-without-tool-calls")
    (whole,) = encode(tok, called(arguments), chat_template=calls_as("c.function.arguments | tojson"))
    assert json.loads(trained(tok, whole)[0].removeprefix("<call>weather ").partition("</call>")[0]) == arguments


def test_calls_without_a_list_of_tools_are_written_by_the_template_that_writes_calls(tok) -> None:
    plain = tok.chat_template
    tok.chat_template = {"default": MARKED, "tool_use": calls_as("c.function.arguments | tojson")}
    try:
        (row,) = encode(tok, {"messages": CALLED["messages"]})
        tok.chat_template = {"rag": MARKED, "other": MARKED}
        with pytest.raises(Refusal, match="rag, other"):
            ConversationEncoder(tok)
        tok.chat_template = {"only": MARKED}
        assert trained(tok, encode(tok, talk("q", "a"))[0]) == ["a<|im_end|>"]
    finally:
        tok.chat_template = plain
    assert trained(tok, row) == ['<call>weather {"city": "Rome"}</call><|im_end|>', "Sunny.<|im_end|>"]


@pytest.mark.parametrize("ends", [-1, None, True, 1.0, "x", [], [10**9], [5], {}], ids=str)  # [5] is an ordinary token
def test_a_configuration_that_names_no_end_leaves_the_tokenizers(tok, tmp_path, ends) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    before, tok.name_or_path = tok.name_or_path, str(tmp_path)
    try:
        assert generation_stops(tok) == [tok.eos_token]
    finally:
        tok.name_or_path = before


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("thought", ["<think></think>", "<thinking></thinking>", "</think>"])
def test_the_short_way_knows_an_empty_thought_in_any_answer(tok, thought: str, trains: bool) -> None:
    plain = [talk("q", "a", "q", "b")] * 9  # from which the short way is proved
    mask = MaskSettings(train_empty_thoughts=trains)
    *_, last = encode(tok, *plain, talk("q", f"{thought}a", "q", f"{thought}b"), mask=mask)
    written = thought if trains else ""
    assert trained(tok, last) == [f"{written}a<|im_end|>", f"{written}b<|im_end|>"]
    assert last.lost == ("empty_reasoning",)


@pytest.mark.parametrize("contents", [(" ", "\n\n", "", "x"), ("  ", "", "q", "x"), ("q", " ", "\n", "x")])
def test_a_blank_answer_to_a_blank_question_is_where_it_belongs(contents: tuple[str, ...]) -> None:
    """GLM's template strips and looks into blanks, so that no mark shows where they are."""
    (row,) = encode(tokenizer("glm4moe"), talk(*contents))
    first, last = trained(tokenizer("glm4moe"), row)
    assert first.strip() == "<think></think><|user|>"
    assert last == "\n<think></think>\nx</s>"


def test_the_same_word_in_question_and_answer_is_trained_in_the_answer_alone(tok) -> None:
    (row,) = encode(tok, talk("assistant", "assistant", "user", "user"), chat_template=INDENTED)
    assert trained(tok, row) == ["assistant<|im_end|>", "user<|im_end|>"]


def test_results_are_proved_for_every_row_of_a_batch(tok) -> None:
    """One bad row among good ones takes none of them along."""
    results = ConversationEncoder(tok, MARKED).encode([TWO, CALLED, TWO])
    assert [isinstance(result, TokenizedConversation) for result in results] == [True, False, True]


def test_words_that_the_template_changes_are_told(tok) -> None:
    loud = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (row,) = encode(tok, TWO, chat_template=loud)
    assert row.lost == ("changed",)


def test_the_name_of_who_asks_is_no_name_of_a_tool(tok) -> None:
    named = {"messages": [{**user("q"), "name": "bob"}, answer("a")]}
    assert encode(tok, named)[0].lost == ()


def test_a_template_that_writes_no_names_gets_them_in_the_ids(tok) -> None:
    template = calls_as("c.function.arguments | tojson").replace("c.function.name", "c.id")
    (row,) = encode(tok, CALLED, chat_template=template)
    assert trained(tok, row)[0] == '<call>functions.weather:0 {"city": "Rome"}</call><|im_end|>'


HEADER = "<|im_start|>assistant\n"
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPTED = NO_PROMPT + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def test_a_header_that_no_generation_prompt_writes_is_trained_and_told(tok) -> None:
    (both,), (usual,) = encode(tok, TWO, chat_template=NO_PROMPT), encode(tok, TWO, chat_template=PROMPTED)
    answers = ["First answer.<|im_end|>", "Second answer.<|im_end|>"]
    assert trained(tok, both) == [HEADER + answer for answer in answers]
    assert trained(tok, usual) == answers
    assert (both.lost, usual.lost) == (("header",), ())
    (note,) = notes({"header": 1}, 3)
    assert "has no generation prompt, so in 1 of 3 rows the header" in note.text()
    assert "3 行中有 1 行的回答开头标记" in note.text("zh")


@pytest.mark.parametrize("template", ["mistral", "gemma", "phi3"])
def test_where_nothing_opens_an_answer_or_a_prompt_does_no_header_is_trained(template: str) -> None:
    (row,) = encode(tokenizer(template), TWO)
    assert "header" not in row.lost


GREETED = {"messages": [answer("Hello."), user("Who?"), answer("Me.")]}
SAID_TWICE = {"messages": [user("Hi."), user("Who?"), answer("Me."), answer("And you?"), user("I."), answer("Ah.")]}
LEFT_OPEN = {"messages": [user("Who?"), answer("Me."), user("Why?")]}


@pytest.mark.parametrize("row", [GREETED, SAID_TWICE, LEFT_OPEN], ids=["greeted", "said twice", "left open"])
@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "phi3"])
def test_in_any_order_of_speakers_exactly_the_answers_are_trained(name: str, row) -> None:
    tok = tokenizer(name)
    rendered = ConversationEncoder(tok).plain
    short, long = (rendered.encode([row] * 3, use_cache=short)[2] for short in (True, False))
    assert short.ids.tolist() == long.ids.tolist() == ids_of(tok, row)
    assert list(short.answers) == list(long.answers)
    assert rendered.cache.of(row["messages"]).proven  # the short way was taken, and had proved itself
    weights = [2.0, 0.5, 3.0][: len(long.answers)]
    (plain,), (weighted,) = encode(tok, row), encode(tok, row | {"weights": weights})
    texts = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    assert [re.sub(r"<\|\w+\|>$", "", run) for run in trained(tok, plain)] == texts
    assert trained(tok, weighted) == trained(tok, plain)
    assert [weighted.weights[begin] for begin, _ in long.answers] == weights


def test_an_order_that_the_template_refuses_is_told_in_its_own_words() -> None:
    refused, plain = encode(tokenizer("gemma"), GREETED, TWO)
    assert (refused.status, refused.reason.code) == ("refused", "template-refuses-row")
    assert "must alternate user/assistant" in refused.reason.text()
    assert plain.usable
