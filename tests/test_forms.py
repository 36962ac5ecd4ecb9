"""Rows of every form become what their trainers are given: texts, pairs, thumbs, prompts; and what is too long."""

import json

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from engine.worker.data.examples import ROW_STATUSES, USABLE_STATUSES, Encoder, examples_table
from engine.worker.data.splits import windows
from tests.families import ENDS, answer, encode, ids_of, squeezed, talk, tokenizer, trained, user

FAMILIES = [name for name in ENDS if name not in ("alpaca", "plain")]


def pair(question: str, chosen: str, rejected: str) -> dict:
    return {"messages": [user(question)], "chosen": [answer(chosen)], "rejected": [answer(rejected)], "tools": None}


def windows_of(tok: PreTrainedTokenizerFast, *texts: str, max_length: int) -> list[list[int]]:
    encoder = Encoder(tok, "text", max_length)
    made = examples_table("text", encoder.examples([{"text": text} for text in texts]))
    cut = windows(made.select(["input_ids", "labels"]), max_length).to_pylist()
    assert all(row["input_ids"] == row["labels"] for row in cut)
    return [row["input_ids"] for row in cut]


# ----------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("bos", [True, False])
def test_documents_end_with_one_eos_and_are_split_without_loss(bos: bool) -> None:
    tok = tokenizer("llama3", bos=bos)
    text = "你好 <|eot_id|></s> the quick brown fox " * 5
    (ids,) = windows_of(tok, text, max_length=10_000)
    assert (ids[0] == tok.bos_token_id) == bos
    assert [i for i in ids if i in tok.added_tokens_decoder] == [tok.bos_token_id] * bos + [tok.eos_token_id]
    assert tok.decode(ids) == "<s>" * bos + text + "</s>"
    *cut, last = windows_of(tok, text, "x", max_length=16)
    assert [i for window in cut for i in window] == ids
    assert all(len(window) == 16 for window in cut[:-1])
    assert tok.decode(last) == "<s>" * bos + "x</s>"


def test_a_document_gets_no_second_eos_from_a_tokenizer_that_writes_one_itself() -> None:
    backend = Tokenizer.from_str(tokenizer("plain").backend_tokenizer.to_str())
    eos = [("</s>", backend.token_to_id("</s>"))]
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=eos)
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert [tok.decode(ids) for ids in windows_of(tok, "hello", "you", max_length=99)] == [
        "hello</s>",
        "you</s>",
    ]


# ------------------------------------------------------------------------------------ pairs and thumbs


@pytest.mark.parametrize("name", FAMILIES)
def test_both_sides_of_a_pair_are_the_templates_ids_from_one_prompt_on(name: str) -> None:
    tok = tokenizer(name)
    row = pair("你好 who?", "It is me.", "you 🙂")
    (encoded,) = encode(tok, row, form="pairs")
    for side in ("chosen", "rejected"):
        whole = ids_of(tok, {"messages": row["messages"] + row[side]})
        ids = encoded.prompt_ids + getattr(encoded, f"{side}_ids")
        assert ids == whole[: len(ids)]
        rest = tok.decode(whole[len(ids) :])
        assert rest.strip() in ("", "</s>")  # Phi writes eos behind its own end of turn
        assert squeezed(row[side][0]["content"]) in squeezed(tok.decode(getattr(encoded, f"{side}_ids")))
    assert (encoded.status, encoded.ended) == ("kept", True)


def test_the_prompt_of_a_pair_is_the_same_where_a_token_holds_the_end_of_it_and_the_beginning_of_one_answer() -> None:
    tok = tokenizer("chatml")
    spaced = (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    row = pair("q", "the fox", "\nno")
    (encoded,) = encode(tok, row, form="pairs", chat_template=spaced)
    tok.chat_template, own = spaced, tok.chat_template
    try:
        for side in ("chosen", "rejected"):
            whole = ids_of(tok, {"messages": row["messages"] + row[side]})
            assert encoded.prompt_ids + getattr(encoded, f"{side}_ids") == whole
    finally:
        tok.chat_template = own
    assert tok.decode(encoded.prompt_ids).rstrip() == "Q: q</s>A:"


def test_a_long_pair_loses_the_end_of_its_answers_and_never_of_its_prompt() -> None:
    tok = tokenizer("chatml")
    row = pair("short", "word " * 30, "other " * 40)
    (whole,) = encode(tok, row, form="pairs")
    room = len(whole.prompt_ids) + 20
    (cut,) = encode(tok, row, form="pairs", max_length=room)
    assert (cut.status, cut.ended) == ("cut", False)
    assert cut.prompt_ids == whole.prompt_ids
    assert (cut.chosen_ids, cut.rejected_ids) == (whole.chosen_ids[:20], whole.rejected_ids[:20])
    assert encode(tok, row, form="pairs", max_length=room, too_long="drop")[0].status == "too_long"
    assert encode(tok, row, form="pairs", max_length=len(whole.prompt_ids))[0].status == "too_long"


def test_a_pair_that_a_cut_makes_equal_is_dropped_and_counted() -> None:
    tok = tokenizer("chatml")
    row = pair("q", "same " * 30 + "yes", "same " * 30 + "no")
    length = len(encode(tok, row, form="pairs")[0].prompt_ids) + 12
    (encoded,) = encode(tok, row, form="pairs", max_length=length)
    assert (encoded.status, encoded.usable, encoded.chosen_ids) == ("equal", False, [])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_thumb_is_the_last_answer_and_its_prompt(name: str) -> None:
    tok = tokenizer(name)
    row = {**talk("q1", "a1", "q2", "It is so."), "label": False}
    (encoded,) = encode(tok, row, form="thumbs")
    ids = encoded.prompt_ids + encoded.completion_ids
    assert ids == ids_of(tok, row)[: len(ids)]
    assert "It is so." in tok.decode(encoded.completion_ids)
    assert "q2" not in tok.decode(encoded.completion_ids)
    assert encoded.label is False


def test_no_value_of_a_pair_can_forge_a_turn() -> None:
    tok = tokenizer("qwen2_5")
    end = tok.convert_tokens_to_ids("<|im_end|>")
    (encoded,) = encode(tok, pair("x<|im_end|>y", "no<|im_end|>", "yes"), form="pairs")
    assert encoded.chosen_ids.count(end) == encoded.rejected_ids.count(end) == 1
    assert "no<|im_end|><|im_end|>" in tok.decode(encoded.chosen_ids)


# -------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_ends_where_an_answer_has_to_begin(name: str) -> None:
    tok = tokenizer(name)
    messages = [user("q1"), answer("a1"), user("你好?")]
    row = {"messages": messages, "answer": "42", "tools": None}
    encoded, without = encode(tok, row, {**row, "answer": None}, form="prompts")
    wanted = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert encoded.prompt_ids == without.prompt_ids == wanted
    assert json.loads(encoded.prompt) == messages
    assert (encoded.answer, without.answer) == ("42", None)


def test_a_prompt_that_is_too_long_loses_its_oldest_turns_or_is_dropped() -> None:
    tok = tokenizer("chatml")
    row = {"messages": [user("word " * 40), answer("a1"), user("q2")], "answer": None}
    assert encode(tok, row, form="prompts", max_length=40)[0].status == "too_long"
    (cut,) = encode(tok, row, form="prompts", max_length=40, too_long="cut_start")
    assert cut.status == "cut"
    assert json.loads(cut.prompt) == [user("q2")]


# ------------------------------------------------------------------------------------------- too long


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_the_end_drops_the_oldest_turns_and_as_few_as_will_do(name: str) -> None:
    tok = tokenizer(name)
    turns = [f"{letter}{number}" for number in range(1, 9) for letter in "qa"]
    row = talk(*turns)
    if name not in ("gemma", "cohere2"):
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    system = row["messages"][: -len(turns)]
    shorter = [{"messages": system + row["messages"][len(system) + 2 * dropped :]} for dropped in range(8)]
    lengths = [len(ids_of(tok, one)) for one in shorter]
    for dropped in (1, 3, 7):
        (cut,) = encode(tok, row, max_length=lengths[dropped - 1] - 1, too_long="cut_start")
        assert cut.input_ids == ids_of(tok, shorter[dropped])
        assert (cut.status, cut.ended) == ("cut", True)
        assert len(trained(tok, cut)) == 8 - dropped
    assert encode(tok, row, max_length=lengths[0], too_long="cut_start")[0].status == "kept"


def test_where_the_last_turn_alone_is_too_long_its_answer_loses_its_end() -> None:
    tok = tokenizer("chatml")
    row = talk("q1", "a1", "q2", "word " * 60)
    (cut,) = encode(tok, row, max_length=50, too_long="cut_start")
    assert (cut.status, len(cut.input_ids), cut.ended) == ("cut", 50, False)
    assert cut.input_ids == ids_of(tok, talk("q2", "word " * 60))[:50]
    asked_long = talk("q1", "a1", "word " * 60, "a2")
    assert encode(tok, asked_long, max_length=50, too_long="cut_start")[0].status == "too_long"


def test_a_greeting_goes_as_the_oldest_turn_and_a_last_question_stays_with_its_turn() -> None:
    tok = tokenizer("chatml")
    kept = [user("q1"), answer("a1"), user("q2")]
    row = {"messages": [{"role": "system", "content": "s"}, answer("word " * 40), *kept], "weights": [3, 2]}
    (cut,) = encode(tok, row, max_length=50, too_long="cut_start")
    assert cut.status == "cut"
    assert cut.input_ids == ids_of(tok, {"messages": [row["messages"][0], *kept]})
    assert trained(tok, cut) == ["a1</s>"]
    (left,) = encode(
        tok, {"messages": [user("word " * 40), answer("a1"), user("q2")]}, max_length=40, too_long="cut_start"
    )
    assert left.status == "too_long"  # and not a question alone, of which nothing is trained


def test_a_pair_keeps_its_last_question_when_its_oldest_turns_go() -> None:
    tok = tokenizer("chatml")
    row = pair("q2", "yes", "no")
    row["messages"] = [user("word " * 40), answer("a1"), *row["messages"]]
    (cut,) = encode(tok, row, form="pairs", max_length=40, too_long="cut_start")
    (short,) = encode(tok, pair("q2", "yes", "no"), form="pairs")
    assert (cut.status, cut.prompt_ids, cut.chosen_ids) == ("cut", short.prompt_ids, short.chosen_ids)


def test_what_cannot_be_used_is_empty_in_the_table_and_has_a_fate() -> None:
    tok = tokenizer("gemma")
    system = {"role": "system", "content": "x"}
    rows = {
        "chat": {"messages": [system, user("q"), answer("a")]},
        "pairs": {**pair("q", "a", "b"), "messages": [system, user("q")]},
        "thumbs": {"messages": [system, user("q"), answer("a")], "label": True},
        "prompts": {"messages": [system, user("q")], "answer": "a"},
    }
    for form, row in rows.items():
        (made,) = examples_table(form, Encoder(tok, form, 99).examples([row])).to_pylist()
        assert ROW_STATUSES[made.pop("status")] == "refused"
        assert made.pop("ended")
        assert not any(made.values())
    assert ROW_STATUSES[:USABLE_STATUSES] == ("kept", "cut")
