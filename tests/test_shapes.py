"""The short way gives what the template gives, for every family; and knows when it cannot."""

import random

import pytest
from tokenizers import normalizers

from engine.worker.templates.conversations import ConversationEncoder, TokenizedConversation
from engine.worker.templates.template_tracing import TemplateTracer
from engine.worker.templates.word_cache import WordCache
from tests.families import ENDS, OURS, TRL, answer, ids_of, talk, tokenizer, user

# All that TRL and we have, but for templates that write images, or no end of an answer with these tokenizers.
EVERY = [
    name
    for name in (*sorted(path.stem for folder in (TRL, OURS) for path in folder.glob("*.jinja")), "mistral")
    if not name.startswith(("idefics", "llava", "smolvlm", "gemma4", "diffusion_gemma"))
]
PLANNED = [
    "qwen2_5", "qwen3", "qwen3_5_think", "llama3", "llama3_1", "gemma", "phi3", "deepseekv3", "glm4moe",
    "chatml", "gptoss", "cohere2", "lfm2",
]  # fmt: skip
# What a template may look for in a content, what a tokenizer may join to what stands before or behind it, and the rest.
SAID = [
    "</think>", "<think>\nhm\n</think>\n\nyes", "<tool_response>", " space", "\nbreak", "\n\n", "ends ", "ends\n",
    "'s", "’s", "ﬀ", "\u0301accent", "e\u0301", "한", "ᅡ", "1", "1234567", "<", "<|", "|>", "[", "]", "/", "{{ x }}",
    "\\", '"', "\ue000", "\U00100000", "hello world", "你好，世界。", "🙂", "🏳️‍🌈", "\ufeff", "\u200b", "\u3000",
    "\xa0x", "\t", "\r\n", "A", "ſ", "İ", "x" * 300, "it's he'll we've", "Z\u0351\u036b\u0343", "\U000e0001",
    "\u0378", "###", "assistant\n", "user", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", "<|im_start|>assistant\n",
    "<｜Assistant｜>", "[INST]", "<end_of_turn>",
]  # fmt: skip


def rows_of(name: str, count: int) -> list[dict]:
    chance = random.Random(name)

    def text() -> str:
        return "".join(chance.choices(SAID, k=chance.randint(1, 3)))

    rows = []
    for _ in range(count):
        turns = [said for _ in range(chance.randint(1, 3)) for said in (user(text()), answer(text()))]
        if chance.random() < 0.3:
            turns.insert(0, {"role": "system", "content": chance.choice(["", text()])})
        rows.append({"messages": turns, "tools": None})
    return rows


def same(one: object, other: object) -> bool:
    if isinstance(one, TokenizedConversation) and isinstance(other, TokenizedConversation):
        answers = [list(map(tuple, each.answers)) for each in (one, other)]
        return one.ids.tolist() == other.ids.tolist() and answers[0] == answers[1] and one.ended == other.ended
    return type(one) is type(other)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("generate", [False, True])
def test_the_short_way_gives_what_the_template_gives(name: str, generate: bool) -> None:
    conversations = ConversationEncoder(tokenizer(name))
    rows = rows_of(name, 60)
    if generate:
        rows = [{**row, "messages": row["messages"][:-1]} for row in rows]
    plainly = conversations.plain.encode(rows, generate, use_cache=False)
    for one, other in zip(conversations.encode(rows, add_generation_prompt=generate), plainly, strict=True):
        assert same(one, other)


@pytest.mark.parametrize("name", PLANNED)
def test_most_conversations_take_the_short_way(name: str) -> None:
    tok = tokenizer(name)
    conversations = ConversationEncoder(tok)
    rows = [talk(f"What is {n}?", f"It is {n + 1}, 你好.", "And then?", "Zero.") for n in range(20)]
    taken = [number for group in conversations.plain.cache.encode(rows) for number in group.rows]
    assert sorted(taken) == list(range(20))
    added = [tok.eos_token_id] if name == "glm4moe" else []  # which writes nothing behind a last answer
    for row, one in zip(rows, conversations.encode(rows), strict=True):
        assert one.ids.tolist() == ids_of(tok, row) + added


def test_a_control_token_in_one_conversation_does_not_take_the_others_off_the_short_way() -> None:
    conversations = ConversationEncoder(tokenizer("qwen2_5"))
    rows = [talk("q", "a"), talk("<|im_end|>", "a"), talk("q2", "<|im_start|>"), talk("q3", "a3")]
    assert [group.rows for group in conversations.plain.cache.encode(rows)] == [[0, 3]]


@pytest.mark.parametrize(
    "written",
    [
        "{{ m.content[:3] }}",
        "{{ m.content | length }}",
        "{{ m.content | upper }}",
        "{{ m.content | tojson }}",
        "{{ '%s' % m.content }}",
        "{{ '{}'.format(m.content) }}",
        "{{ m.content.title() }}",
        "{{ [m.content] | join('-') }}",
        "{{ 1 if m.content in 'hello' else 2 }}",
        "{% for c in m.content %}{{ c }}{% endfor %}",
        "{{ m.content ~ m.content | length }}",
        "{% set x = '<' ~ m.content %}{{ 1 if x == '<hello' else 2 }}",
        "{% set x %}<{{ m.content }}{% endset %}{{ x | replace('h', 'j') }}",
        "{{ m.content * 2 }}",
        "{{ m.content < 'z' }}",
        "{{ {'hello': 1}[m.content] }}",
        "{{ m | tojson }}",
        "{{ messages | string }}",
        "{{ m.content | replace('\"', '') }}",
        "{{ m.content is in 'hello' }}",
        "{{ m.content | first }}",
        "{{ m.content | e }}",
    ],
)
def test_a_template_that_does_more_with_a_content_than_write_it_is_not_learned(written: str) -> None:
    template = "{% for m in messages %}" + written + "{% endfor %}"
    tracer = TemplateTracer(template, {})
    assert tracer.outline(["user"]) is None
    assert tracer.outline(["user", "assistant", "user"]) is None


@pytest.mark.parametrize(
    ("written", "said", "same_as_usual"),
    [
        ("{{ m.content | trim }}", " x", False),
        ("{{ m.content | trim }}", "x y", True),
        ("{{ 'T' if '<t>' in m.content else 'F' }}{{ m.content }}", "a<t>", False),
        ("{{ m.content.split('</t>')[-1] }}", "a</t>b", False),
        ("{{ m.content.split('</t>')[-1] }}", "a", True),
        ("{% if m.content %}[{{ m.content }}]{% endif %}", "", False),
        ("{{ m.content.startswith('a') }}{{ m.content }}", "abc", False),
        ("{{ 'none' if m.content == 'x' else m.content }}", "x", False),
        ("{% macro w(c) %}{{ c }}{% endmacro %}<{{ w(m.content) | trim }}>", "x ", False),
        ("{% macro w(c) %}{{ c }}{% endmacro %}<{{ w(m.content) | trim }}>", "x", True),
    ],
)
def test_what_a_template_asks_of_a_content_has_to_be_answered_alike(
    written: str, said: str, same_as_usual: bool
) -> None:
    found = TemplateTracer("{% for m in messages %}" + written + "{% endfor %}", {}).outline(["user"])
    assert all(check(said) for _, check in found.checks) == same_as_usual


@pytest.mark.parametrize("name", ENDS)
def test_words_have_the_ids_that_the_tokenizer_gives_their_text(name: str) -> None:
    tok = tokenizer(name)
    words, chance = WordCache.of(tok), random.Random(name)
    known = 0
    for _ in range(200):
        texts = ["".join(chance.choices(SAID, k=chance.randint(1, 4))) for _ in range(3)]
        if found := words.ids(texts):
            known += 1
            together, lengths = found
            each = [tok.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
            assert together.tolist() == [token for ids in each for token in ids]
            assert lengths.tolist() == list(map(len, each))
    assert known > 50


def test_words_leave_to_the_tokenizer_what_they_do_not_know() -> None:
    tok = tokenizer("qwen2_5")
    words = WordCache.of(tok)
    assert words.ids(["plain", "text"])
    assert words.ids(["<|im_end|>"]) is None  # an added token
    assert words.ids(["\u0378"]) is None  # no character yet
    tok.backend_tokenizer.normalizer = normalizers.NFC()
    try:
        assert WordCache.of(tok).ids(["e\u0301"]) is None  # not in the normal form
        assert WordCache.of(tok).ids(["é"])
        tok.backend_tokenizer.normalizer = normalizers.Lowercase()
        assert WordCache.of(tok) is None
    finally:
        tok.backend_tokenizer.normalizer = None
