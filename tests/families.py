"""Tokenizers and conversations for the templates of real model families, and examples as a trainer sees them."""

import random
import re
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from engine.core.problems import Problem
from engine.worker.data.examples import IGNORE_INDEX, ROW_STATUSES, USABLE_STATUSES, Encoder, examples_table

OURS = Path(__file__).parent.parent / "engine" / "models" / "templates"
TRL = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"  # found without importing trl

# Family → the token that has to be trained at the end of an answer.
ENDS = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "gptoss": "<|return|>",
    "lfm2_2_5": "<|im_end|>",
    "qwen3_training": "<|im_end|>",
    "mistral": "</s>",
    "chatml": "</s>",
    "alpaca": "</s>",
    "plain": "</s>",
}
# As Mistral's: what the system says stands before the last question, and nothing opens an answer.
MISTRAL = (
    "{{ bos_token }}{% set said = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if said and loop.revindex <= 2 %}{{ said ~ '\n\n' }}{% endif %}"
    "{{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    "{{ ' ' ~ (m.content | trim) ~ eos_token }}{% endif %}{% endfor %}"
)
ALTERNATING = {"gemma", "cohere2", "mistral"}  # take no system message, or put it elsewhere
# What templates write inside an answer, before its content.
AROUND = re.compile(r"^ |<think>\n.*?</think>\n\n|^\n\n</think>\n\n|^<\|channel\|>final<\|message\|>", re.DOTALL)
MARK = re.compile(
    r"<[|｜][^<>{}'\s]+[|｜]>|<(?:start|end)_of_turn>|</?(?:think|tool_call|tool_response|arg_\w+)>|<sop>|\[/?INST\]"
)
# How Llama 3 and Qwen split text; unlike GPT-2's way it treats line breaks the same whatever follows them.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECES = [
    "hello", " the quick brown fox", "你好，世界", "🙂", "👩‍👩‍👧", "é", "\n", "\n\n", "  ", "1234",
    "naïve", "<b>", "{}", "\ufeff", "\t", "### Response:\n", "assistant\n", "🏳️‍🌈", "ａ", "。",
]  # fmt: skip


@cache
def template(name: str) -> str:
    if name == "mistral":
        return MISTRAL
    folder = OURS if (OURS / f"{name}.jinja").exists() else TRL
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def words_and_merges() -> str:
    """What all the tokenizers share: byte-level BPE that knows the words of PIECES."""
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(PIECES) * 20, "user assistant system\n\n" * 20], trainer)
    return backend.to_str()


@cache
def tokenizer(name: str, bos: bool = False) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with the control tokens the template writes."""
    backend = Tokenizer.from_str(words_and_merges())
    marks = sorted(set(MARK.findall(template(name))) - {"<s>", "</s>"})
    own = [mark for mark in marks if re.search("think|tool_|arg_", mark)]  # what a model writes inside its answer
    # Phi's control tokens swallow the spaces behind them.
    backend.add_tokens([AddedToken(mark, normalized=False) for mark in own])
    special = ["<s>", "</s>", *(mark for mark in marks if mark not in own)]
    backend.add_special_tokens(
        [AddedToken(mark, special=True, normalized=False, rstrip=name == "phi3" and mark != "</s>") for mark in special]
    )
    trim = processors.ByteLevel(trim_offsets=name.startswith(("llama", "alpaca")))  # as in Llama 3's own
    first = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    backend.post_processor = processors.Sequence([trim, first]) if bos else trim
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = template(name)
    return made


def ids_of(tokenizer: PreTrainedTokenizerFast, row: dict) -> list[int]:
    return tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=True, return_dict=False)


@dataclass
class Seen:
    """One example as a trainer will see it."""

    status: str
    ended: bool
    reason: Problem | None
    lost: tuple[str, ...] = ()
    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] | None = None
    prompt_ids: list[int] = field(default_factory=list)
    chosen_ids: list[int] = field(default_factory=list)
    rejected_ids: list[int] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    label: bool | None = None
    prompt: str | None = None
    answer: str | None = None

    @property
    def usable(self) -> bool:
        return self.status in ROW_STATUSES[:USABLE_STATUSES]


def encode(tokenizer: PreTrainedTokenizerFast, *rows: dict, form: str = "chat", **settings: object) -> list[Seen]:
    encoder = Encoder(tokenizer, form, **{"max_length": 100_000, **settings})
    examples = encoder.examples(rows)
    return [
        Seen(
            **(columns | {"status": ROW_STATUSES[columns["status"]], "lost": example.lost}),
            reason=example.reason,
        )
        for columns, example in zip(examples_table(form, examples).to_pylist(), examples, strict=True)
    ]


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def answer(content: str, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


def talk(*contents: str) -> dict:
    return {"messages": [answer(text) if turn % 2 else user(text) for turn, text in enumerate(contents)]}


def trained(tokenizer: PreTrainedTokenizerFast, encoded) -> list[str]:
    """The trained runs of tokens, decoded."""
    assert len(encoded.input_ids) == len(encoded.labels)
    runs, previous = [], IGNORE_INDEX
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (IGNORE_INDEX, token)
        if label != IGNORE_INDEX:
            runs = runs if previous != IGNORE_INDEX else [*runs, []]
            runs[-1].append(token)
        previous = label
    return [tokenizer.decode(run) for run in runs]


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def conversations(name: str, count: int) -> list[dict]:
    """Conversations of odd characters. An answer neither begins nor ends with a space, which some templates strip."""
    chance = random.Random(name)

    def text() -> str:
        return "".join(chance.choices(PIECES, k=chance.randint(1, 6)))

    rows = []
    for _ in range(count):
        turns = [said for _ in range(chance.randint(1, 3)) for said in (user(text()), answer(f"a{text()}z"))]
        if name not in ALTERNATING and chance.random() < 0.4:
            turns.insert(0, {"role": "system", "content": chance.choice(["", text()])})
        rows.append({"messages": turns})
    return rows
