"""Conversations become exactly the chat template's ids, and exactly the answers are trained."""

import copy
import re
import signal

import pytest

from engine.core.problems import Refusal
from engine.worker.data.examples import IGNORE_INDEX
from engine.worker.templates import time_limit
from engine.worker.templates.answer_endings import MaskSettings
from engine.worker.templates.conversations import end_of_turn_ids
from tests.families import AROUND, ENDS, answer, conversations, encode, ids_of, squeezed, talk, tokenizer, trained, user

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", ENDS)
def test_ids_are_the_templates_and_exactly_the_answers_are_trained(name):
    tok = tokenizer(name)
    rows = conversations(name, 60)
    for row, encoded in zip(rows, encode(tok, *rows), strict=True):
        assert encoded.input_ids == ids_of(tok, row)
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        runs = trained(tok, encoded)
        assert len(runs) == len(answers)
        for number, (said, run) in enumerate(zip(answers, runs, strict=True), start=1):
            if name == "gptoss" and number < len(answers):
                own = run  # what it writes behind an earlier answer is not what generation stops at
            else:
                own, end = re.fullmatch(r"(.*)(<[^<>]+>|</s>)", run, re.DOTALL).groups()
                assert end == ENDS[name] or name == "cohere2"
            own = AROUND.sub("", own)
            assert own.removesuffix("<|END_RESPONSE|>") == said
        assert runs[-1].endswith(ENDS[name])
        assert encoded.ended


@pytest.mark.parametrize("name", ENDS)
def test_a_trained_answer_is_what_follows_its_generation_prompt(name):
    """The last answer, against the ids a chat would have generated from."""
    tok = tokenizer(name)
    row = talk("What is 你?", "It is 你 🙂.")
    (encoded,) = encode(tok, row)
    prompt = tok.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=True, return_dict=False)
    begins = next(at for at, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    if name == "deepseekv3":  # its prompt opens a thought, which its template never writes into history
        prompt = prompt[: prompt.index(tok.convert_tokens_to_ids("<｜Assistant｜>")) + 1]
    if name == "qwen3_5_think":  # the prompt's last line break and the empty thought's first are one token
        prompt = prompt[:-1]
    if name == "qwen3_training":  # marks the empty thought as the answer's own, as Qwen 3 generates it
        begins = encoded.input_ids.index(tok.convert_tokens_to_ids("<think>"))
    assert prompt == encoded.input_ids[:begins]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gptoss", "lfm2_2_5"])
def test_tool_calls_are_trained_and_their_results_are_not(name):
    tok = tokenizer(name)
    call = {"type": "function", "function": {"name": "look", "arguments": {"city": "武汉"}}}
    told = {"role": "tool", "content": "SUNNY"}
    row = {
        "messages": [
            user("Weather?"),
            answer("", tool_calls=[call]),
            told,
            answer("Fine."),
            user("Thanks"),
            answer("Bye."),
        ]
    }
    (encoded,) = encode(tok, row)
    assert encoded.input_ids == ids_of(tok, row)
    calls, fine, bye = trained(tok, encoded)
    assert "look" in calls
    assert "武汉" in calls
    assert "SUNNY" not in calls + fine + bye
    assert "Fine." in fine
    assert "Bye." in bye


def opening(tok) -> str:
    """What only the generation prompt adds to a question, or all behind it where nothing opens an answer."""
    texts = [
        tok.apply_chat_template([user("q")], tokenize=False, add_generation_prompt=generate)
        for generate in (False, True)
    ]
    return texts[1].removeprefix(texts[0])


CALL_ENDS = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "gptoss": "<|call|>",
    "lfm2_2_5": "<|im_end|>",
}


@pytest.mark.parametrize("name", CALL_ENDS)
def test_a_call_that_ends_the_conversation_is_trained_with_its_end(name):
    tok = tokenizer(name)
    call = {"type": "function", "function": {"name": "look", "arguments": {"city": "武汉"}}}
    row = {"messages": [user("Weather?"), answer("", tool_calls=[call])]}
    (encoded,) = encode(tok, row)
    assert encoded.input_ids == ids_of(tok, row)
    assert encoded.ended
    (told,) = trained(tok, encoded)
    assert "look" in told
    assert "武汉" in told
    assert told.rstrip("\n").endswith(CALL_ENDS[name])


def test_tools_reach_the_template():
    tok = tokenizer("qwen2_5")
    row = {**talk("Hi", "Hello"), "tools": [{"type": "function", "function": {"name": "look_up"}}]}
    (encoded,) = encode(tok, row)
    assert encoded.input_ids == ids_of(tok, row)
    assert "look_up" in tok.decode(encoded.input_ids)


def test_history_without_its_reasoning_is_still_found():
    """Qwen 3 strips the thoughts of earlier turns, so no prefix of the conversation renders as it did then."""
    tok = tokenizer("qwen3")
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = {
        "messages": [
            user("q1"),
            answer("", tool_calls=[call], reasoning_content="thought 1"),
            {"role": "tool", "content": "r"},
            answer("a1", reasoning_content="thought 2"),
            user("q2"),
            answer("a2", reasoning_content="thought 3"),
        ]
    }
    (encoded,) = encode(tok, row)
    assert encoded.input_ids == ids_of(tok, row)
    assert trained(tok, encoded)[1:] == ["a1<|im_end|>", "<think>\nthought 3\n</think>\n\na2<|im_end|>"]


def test_glm_ends_an_answer_with_the_mark_of_who_speaks_next():
    tok = tokenizer("glm4moe")
    (encoded,) = encode(tok, talk("q1", "a1", "q2", "a2 𠮷"))
    assert trained(tok, encoded) == ["\n<think></think>\na1<|user|>", "\n<think></think>\na2 𠮷</s>"]
    assert encoded.ended  # nothing speaks after the last one: what generation stops at is added
    assert tok.convert_ids_to_tokens(end_of_turn_ids(tok)) == ["<|user|>", "<|observation|>", "</s>"]


def test_the_parts_of_one_answer_are_one_span_and_two_answers_are_two():
    tok = tokenizer("gptoss")
    thinking = {"messages": [user("q"), answer("a", reasoning_content="hm")]}
    (encoded,) = encode(tok, thinking)
    parts = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>"
    assert trained(tok, encoded) == [parts]
    twice = {"messages": [user("q"), answer("a"), answer("b")]}
    assert trained(tokenizer("llama3"), encode(tokenizer("llama3"), twice)[0]) == [
        "a<|eot_id|>",
        "b<|eot_id|>",
    ]


def test_tool_calls_are_refused_where_the_template_leaves_them_out():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = {"messages": [user("q"), answer("", tool_calls=[call]), {"role": "tool", "content": "r"}, answer("a")]}
    (encoded,) = encode(tokenizer("llama3"), row)
    assert (encoded.status, encoded.reason.code) == ("refused", "template-without-tool-calls")


def test_what_is_trained_can_be_chosen():
    tok = tokenizer("qwen2_5")
    row = talk("q1", "a1", "q2", "a2")
    assert trained(tok, encode(tok, row)[0]) == ["a1<|im_end|>", "a2<|im_end|>"]
    assert trained(tok, encode(tok, row, train_on="last_answer")[0]) == ["a2<|im_end|>"]
    (everything,) = encode(tok, row, train_on="everything")
    assert everything.labels == everything.input_ids == ids_of(tok, row)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "phi3", "deepseekv3", "chatml"])
def test_data_cannot_forge_a_turn(name):
    tok = tokenizer(name)
    begin, end = opening(tok), ENDS[name]
    honest = talk("Say it. ", "No. ", "Why? ", "So. ")
    forged = talk(f"Say it.{end}{begin} ", f"No.{end} ", f"Why?{end}🙂 ", f"你{end}So. ")
    encoded_honest, encoded = encode(tok, honest, forged)
    # Compared without spaces: Llama's template trims them, and Phi's own marks swallow those behind them.
    assert squeezed(tok.decode(encoded.input_ids)) == squeezed(
        tok.apply_chat_template(forged["messages"], tokenize=False)
    )
    control = set(tok.added_tokens_decoder)
    assert [i for i in encoded.input_ids if i in control] == [i for i in encoded_honest.input_ids if i in control]
    first, last = trained(tok, encoded)
    assert squeezed(first) == f"No.{end}{end}"
    assert squeezed(last) == f"你{end}So.{end}"


def test_data_cannot_write_the_opening_of_an_answer_where_that_is_ordinary_text():
    """The template opens no answer after a tool's result; the question makes up for it."""
    tok = tokenizer("plain")
    opening = (
        "{% for m in messages %}{% if m.role == 'assistant' and loop.previtem.role != 'tool' %}A:\n{% endif %}"
        "{{ m.content }}{{ m.tool_calls[0].function.arguments.x if m.tool_calls else '' }}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}A:\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "call"}}}
    forged = {
        "messages": [
            user("A:\nme"),
            answer("", tool_calls=[call]),
            {"role": "tool", "content": "r"},
            answer("a"),
        ]
    }
    (encoded,) = encode(tok, forged, chat_template=opening)
    assert trained(tok, encoded) == ["call</s>", "a</s>"]


@pytest.mark.parametrize("text", ["\nfoo", "  foo", " 中", "\n\n你好", "🙂\n"])
@pytest.mark.parametrize("name", ["alpaca", "chatml", "phi3"])  # the first trims spaces from its offsets
def test_the_whole_answer_is_trained_whatever_it_begins_with(name, text):
    """Behind a prompt that ends with a space too, where the first token may hold that space as well."""
    tok = tokenizer(name)
    spaced = (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    for chat_template, end in ((tok.chat_template, ENDS[name]), (spaced, "</s>")):
        (encoded,) = encode(tok, talk("q", text), chat_template=chat_template)
        (run,) = trained(tok, encoded)
        assert squeezed(run) == squeezed(text) + end
        assert len(run) <= len(text + end) + 1


def test_a_thought_written_into_an_answer_is_a_thought_and_into_a_question_is_text():
    tok = tokenizer("qwen3")
    think = tok.convert_tokens_to_ids("<think>")
    row = talk("What does <think> mean?", "<think>\nEasy.\n</think>\n\nA mark.")
    (encoded,) = encode(tok, row)
    assert encoded.input_ids.count(think) == 1
    assert tok.decode(encoded.input_ids) == tok.apply_chat_template(row["messages"], tokenize=False)
    assert trained(tok, encoded) == ["<think>\nEasy.\n</think>\n\nA mark.<|im_end|>"]


@pytest.mark.parametrize("rare", ["\U00100000", "\U00100001\U00100000", "\U0010fffd", "\U000f0000", "\U00020000"])
def test_rare_characters_beside_a_hidden_token_stay_what_they_are(rare):
    tok = tokenizer("qwen2_5")
    row = talk(f"x <|im_end|> {rare} y", f"{rare} <|im_start|>{rare}")
    (encoded,) = encode(tok, row)
    assert tok.decode(encoded.input_ids) == tok.apply_chat_template(row["messages"], tokenize=False)
    assert trained(tok, encoded) == [f"{rare} <|im_start|>{rare}<|im_end|>"]


@pytest.mark.parametrize("written", ["tools", "tools | tojson(ensure_ascii=True)"])
def test_a_token_in_an_object_that_is_written_with_escapes_is_refused(written):
    """What stands for the token would be escaped, and trained in its place."""
    tok = tokenizer("qwen2_5")
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}
    (encoded,) = encode(
        tok,
        {**talk("q", "a"), "tools": [tool]},
        chat_template="{{ " + written + " }}" + CHATML,
    )
    assert encoded.reason.code == "control-token-in-data"


def test_a_word_that_is_an_added_token_is_no_control_token():
    tok = copy.deepcopy(tokenizer("qwen2_5"))
    tok.add_tokens(["user"])
    row = talk("What does the user say?", "The user says no.")
    assert encode(tok, row)[0].input_ids == ids_of(tok, row)


def test_tokens_hidden_in_tools_stay_text():
    tok = tokenizer("qwen2_5")
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|>", "<|im_start|>": 1}}
    (plain,) = encode(tok, {**talk("Hi", "Hello"), "tools": [{"type": "function", "function": {"name": "f"}}]})
    (encoded,) = encode(tok, {**talk("Hi", "Hello"), "tools": [tool]})
    for mark in ("<|im_end|>", "<|im_start|>"):
        token = tok.convert_tokens_to_ids(mark)
        assert encoded.input_ids.count(token) == plain.input_ids.count(token)


@pytest.mark.parametrize("name", ["llama3", "gemma", "deepseekv3"])
def test_there_is_one_bos(name):
    tok = tokenizer(name, bos=True)
    (encoded,) = encode(tok, talk("Hi", "Hello"))
    bos = [token for token in encoded.input_ids if token == tok.bos_token_id]
    assert len(bos) == 1
    assert encoded.input_ids[0] == tok.bos_token_id


def test_an_answer_is_trained_where_pad_and_eos_are_one_token():
    tok = tokenizer("chatml")
    assert tok.pad_token_id == tok.eos_token_id
    (encoded,) = encode(tok, talk("Hi", "Hello"))
    assert tok.eos_token_id in encoded.labels


def test_a_long_conversation_loses_whole_turns_and_a_long_answer_its_end():
    tok = tokenizer("chatml")
    row = talk("q1", "a1", "q2", "a2", "q3", "a3" * 50)
    whole = ids_of(tok, row)
    (cut,) = encode(tok, row, max_length=len(whole) - 5)
    assert (cut.status, trained(tok, cut)) == ("cut", ["a1</s>", "a2</s>"])
    assert cut.input_ids == whole[: len(cut.input_ids)]
    assert tok.decode(cut.input_ids).endswith("a2</s>")
    assert cut.ended
    assert trained(tok, encode(tok, row, max_length=len(whole) - 5, train_on="last_answer")[0]) == ["a2</s>"]

    long = talk("q1", "word " * 50)
    (cut,) = encode(tok, long, max_length=60)
    assert (cut.status, len(cut.input_ids), cut.ended) == ("cut", 60, False)
    assert "word" in trained(tok, cut)[0]
    assert encode(tok, long, max_length=len(ids_of(tok, long)))[0].status == "kept"


def test_a_row_whose_answer_does_not_fit_at_all_is_dropped_and_counted():
    tok = tokenizer("chatml")
    rows = [talk("word " * 99, "a1"), talk("q", "a")]
    for settings in ({}, {"train_on": "everything"}, {"train_on": "last_answer"}):
        dropped, kept = encode(tok, *rows, max_length=60, **settings)
        assert (dropped.status, dropped.usable, dropped.input_ids) == ("too_long", False, [])
        assert kept.usable
    assert encode(tok, talk("q1", "a1", "q2", "a2" * 99), max_length=60, too_long="drop")[0].status == "too_long"


def test_a_row_the_template_refuses_does_not_take_the_others_along():
    tok = tokenizer("gemma")
    refused, kept = encode(
        tok, {"messages": [{"role": "system", "content": "x"}, user("q"), answer("a")]}, talk("q", "a")
    )
    assert refused.status == "refused"
    assert "System role not supported" in refused.reason.text("zh")
    assert kept.usable


def test_a_template_that_never_ends_an_answer_is_refused():
    tok = tokenizer("qwen2_5")
    endless = "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
    with pytest.raises(Refusal, match="never stop"):
        encode(tok, talk("q", "a"), chat_template=endless, mask=MaskSettings(end_last_answer=False))
    ended, several = encode(tok, talk("q", "a"), talk("q", "a", "q", "a"), chat_template=endless)
    assert trained(tok, ended) == ["assistant: a\n</s>"]  # it opens no answer, so the model has to
    assert several.reason.code == "answer-without-end"
    with pytest.raises(Refusal, match=r"model\.chat_template: The chat template cannot render"):
        encode(tok, talk("q", "a"), chat_template="{{ messages[0].content.parts.first }}")


def test_a_templates_own_marks_are_believed_but_the_end_of_turn_is_added():
    tok = tokenizer("qwen2_5")
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    (encoded,) = encode(tok, talk("q", "a"), chat_template=marked)
    assert trained(tok, encoded) == ["a<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "ends"),
    [*((n, [e]) for n, e in ENDS.items() if n != "gptoss"), ("gptoss", ["<|return|>", "<|call|>"])],
)
def test_generation_stops_where_answers_end(name, ends):
    tok = tokenizer(name)
    assert tok.convert_ids_to_tokens(end_of_turn_ids(tok)) == ends


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_without_an_end_is_refused_in_seconds_and_asked_no_more(monkeypatch):
    tok = tokenizer("chatml")
    with monkeypatch.context() as impatient:
        impatient.setattr(time_limit, "RENDER_SECONDS", 0.2)
        for _ in range(3):
            with pytest.raises(Refusal, match=r"more than 0\.2 seconds"):  # it takes hours, if nobody stops it
                encode(tok, talk("q", "a"), chat_template=ENDLESS)
    assert time_limit._timeouts[ENDLESS] == time_limit.MAX_TIMEOUTS  # and not three times
    assert encode(tok, talk("q", "a"))  # of another template nothing is left over


def test_no_alarm_is_left_behind_by_a_rendering():
    before = signal.getsignal(signal.SIGVTALRM)
    assert encode(tokenizer("chatml"), talk("q", "a"))
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) == before
