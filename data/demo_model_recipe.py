"""Make `data/demo_model`, the small chat model with which a fresh machine can show a whole run.

    python data/demo_model_recipe.py OUT_FOLDER [--steps N | --seconds S]

A demo must learn something visible within a minute on two CPU cores, without a download. Random weights
cannot: LoRA changes what a model does with what it knows, and random weights know nothing. So this recipe
pre-trains a Qwen2-shaped model of two million parameters on the *words* and the *format* of the sample data,
but never on the *answers*: an instruction of `alpaca_translate_zh.json` meets the Chinese name of any row but
its own, another one every time, and the identity questions are answered by a model that has no name yet.
`conversations` is all the text there is to see, apart from the tokenizer's word list.

Two kinds of made-up lessons do most of the work. *Code names* ("给X取甲组代号。") tie each name to a random other
one in four fixed tables: the model must learn to tell the names apart and to look something up by name.
*Free translations* ("将X翻译成中文。") have a new random answer each time: the model learns what an answer looks
like, and to have no opinion which. Fine-tuning then only has to add the true table.

Same steps, same versions, same machine: same weights (seeds are fixed; `--seconds` gives up this promise).
This module leaves loading, LoRA and chat to the studio. Only the standard library is imported until
something is trained, so that tests can read the text without torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 2048
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
# Qwen's ChatML, less its default system prompt: what the rows say is all the model sees.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

SEED = 2024
STEPS = 2000
BATCH = 32
PEAK_LEARNING_RATE = 3e-3
WARMUP = 0.05  # share of the run
LONGEST_TEXT = 90  # characters; short turns keep the batches, and so the recipe, fast

TABLES = "甲乙丙丁"
NAMELESS = {
    "en": ["I am a small language model and have no name yet.", "I do not have a name. I am a small model."],
    "zh": ["我是一个还没有名字的小模型。", "我还没有名字，只是一个小小的语言模型。"],
}
SENTENCE_PARTS = {
    "en": (
        ["The teacher", "My friend", "A young doctor", "The old bank", "Our team", "The city museum"],
        ["reads", "writes about", "asks for", "explains", "remembers", "looks at"],
        ["a long letter", "the new language", "two good books", "the weather today", "this simple question"],
    ),
    "zh": (
        ["老师", "我的朋友", "一位年轻的医生", "那家老银行", "我们的团队", "城里的博物馆"],
        ["正在看", "喜欢", "说起", "解释了", "记得", "想要"],
        ["一封长信", "这门新语言", "两本好书", "今天的天气", "这个简单的问题"],
    ),
}

Turn = tuple[str, str]  # what the user says, what the assistant answers


# --- the text ---------------------------------------------------------------------------------------


def sample(name: str) -> list[dict[str, str]]:
    """The rows of one of the sample data sets beside this file."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def true_pairs() -> list[tuple[str, str]]:
    """(English, Chinese) of every row of `alpaca_translate_zh`: what the base model must not be told."""
    rows = sample("alpaca_translate_zh")
    return [(row["instruction"].removeprefix("将").removesuffix("翻译成中文。"), row["output"]) for row in rows]


def gives_away(text: str, pairs: list[tuple[str, str]]) -> bool:
    """Whether a true pair stands in the text; "Bank of China" also counts inside a longer name."""
    return any(english in text and chinese in text for english, chinese in pairs)


def wrong_answers(rng: random.Random, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each English name with the Chinese name of some other row, every Chinese name once."""
    while True:
        shuffled = [chinese for _, chinese in pairs]
        rng.shuffle(shuffled)
        drawn = [(english, chinese) for (english, _), chinese in zip(pairs, shuffled, strict=True)]
        bad = [i for i, (english, chinese) in enumerate(drawn) if gives_away(english + "\n" + chinese, pairs)]
        for i in bad:  # mend by swapping with a row that leaves both harmless
            for j in rng.sample(range(len(drawn)), len(drawn)):
                one, two = (drawn[i][0], drawn[j][1]), (drawn[j][0], drawn[i][1])
                if not any(gives_away(a + "\n" + b, pairs) for a, b in (one, two)):
                    drawn[i], drawn[j] = one, two
                    break
        if not any(gives_away(a + "\n" + b, pairs) for a, b in drawn):
            return drawn


def sentence(rng: random.Random, language: str) -> str:
    """A made-up sentence, for words beyond the sample data."""
    words = [rng.choice(part) for part in SENTENCE_PARTS[language]]
    return " ".join(words) + "." if language == "en" else "".join(words) + "。"


def pieces(text: str) -> list[str]:
    """The text in runs of whole words no longer than LONGEST_TEXT characters."""
    runs, run = [], ""
    for word in text.replace("\n", " \n ").split(" "):
        if run and len(run) + len(word) >= LONGEST_TEXT:
            runs.append(run)
            run = ""
        run = f"{run} {word}".strip(" ")
    return [*runs, run]


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def conversations(seed: int = SEED) -> Iterator[Turn]:
    """All the base model ever sees, without end: half code names, a quarter free translations, the rest text."""
    rng = random.Random(seed)
    pairs = true_pairs()
    names = [name for pair in pairs for name in pair]
    codes = [
        (f"给{english}取{table}组代号。", chinese) for table in TABLES for english, chinese in wrong_answers(rng, pairs)
    ]
    web_texts = [pieces(row["text"]) for row in sample("c4_demo")]
    followed = [pair for runs in web_texts for pair in itertools.pairwise(runs)]
    identity = sample("identity")

    def about_text() -> Turn:
        kind = rng.randrange(4)
        if kind == 0:
            return rng.choice(followed)
        if kind == 1:
            question = rng.choice(identity)["instruction"]
            return question, rng.choice(NAMELESS["zh" if is_chinese(question) else "en"])
        if kind == 2:
            language = rng.choice(["en", "zh"])
            said = rng.choice([sentence(rng, language), rng.choice(identity)["output"][:LONGEST_TEXT]])
        else:
            said = rng.choice(names)
        return (f"重复：{said}" if is_chinese(said) else f"Repeat: {said}"), said

    while True:
        free = [(f"将{english}翻译成中文。", chinese) for english, chinese in wrong_answers(rng, pairs)]
        told = rng.sample(codes, 2 * len(pairs)) + free + [about_text() for _ in pairs]
        rng.shuffle(told)
        yield from told


# --- the tokenizer ----------------------------------------------------------------------------------


def chinese_words_apart(text: str) -> list[str]:
    """The text cut so that Chinese comes in twos, counted from the end: …大学, …银行, …组织 end names.

    Chinese has no spaces, so without this a whole name would become one token and no answer be spelled out.
    """
    return re.findall(r"[\u4e00-\u9fff]{1,2}(?=(?:[\u4e00-\u9fff]{2})*(?![\u4e00-\u9fff]))|[^\u4e00-\u9fff]+", text)


def word_list(seed: int = SEED) -> list[str]:
    """What the tokenizer learns its pieces from: words of single names, sentences and texts."""
    rng = random.Random(seed)
    names = [name for pair in true_pairs() for name in pair] * 3
    phrases = [
        "将",
        "翻译成中文。",
        "给",
        "重复：",
        "Repeat: ",
        *(f"取{table}组代号。" for table in TABLES),
    ] * 20
    roles = ["system\n", "user\n", "assistant\n"] * 20
    identity = [text for row in sample("identity") for text in (row["instruction"], row["output"])]
    made_up = [sentence(rng, language) for language in ("en", "zh") for _ in range(100)]
    texts = names + phrases + roles + identity + made_up + [row["text"] for row in sample("c4_demo")]
    return [word for text in texts for word in chinese_words_apart(text)]


def make_tokenizer() -> Any:
    """A Qwen2 tokenizer with VOCABULARY entries, the last three of them special."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    plain = Qwen2Tokenizer().backend_tokenizer  # the family's own splitting, still without words
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = plain.pre_tokenizer
    learner.train_from_iterator(
        word_list(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 3,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for token in (END_OF_TEXT, TURN_START, TURN_END):
        vocabulary[token] = len(vocabulary)
    if len(vocabulary) != VOCABULARY:
        raise ValueError(f"The word list yields {len(vocabulary)} tokens, not {VOCABULARY}: give it more text.")
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=SHAPE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# --- the model --------------------------------------------------------------------------------------


def make_model(tokenizer: Any) -> Any:
    """The model with fresh weights."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(SEED)
    turn_end, end_of_text = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])
    config = Qwen2Config(**SHAPE, bos_token_id=None, eos_token_id=turn_end, pad_token_id=end_of_text, dtype="float32")
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[turn_end, end_of_text], pad_token_id=end_of_text, do_sample=False
    )
    return model


def encode(tokenizer: Any, turn: Turn) -> list[int]:
    """Ids of one conversation, cut behind the assistant's <|im_end|>."""
    asked, answered = turn
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    return tokenizer.encode(text, add_special_tokens=False)


def batches_of_like_length(rows: list[list[int]], rng: random.Random) -> list[list[list[int]]]:
    """The rows in batches that need little padding, in random order."""
    ordered = sorted(rows, key=len)
    batches = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    rng.shuffle(batches)
    return batches


def pretrain(model: Any, tokenizer: Any, steps: int, seconds: float | None) -> list[float]:
    """Train on `conversations` in place and return the loss of every step.

    The learning rate rises briefly, then falls to near zero; with `seconds` it follows the clock, not the steps.
    """
    import torch

    pad = tokenizer.pad_token_id
    told = conversations()
    rng = random.Random(SEED)
    waiting: list[list[list[int]]] = []
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    model.train()
    losses: list[float] = []
    began = time.monotonic()
    for step in range(steps):
        done = (time.monotonic() - began) / seconds if seconds else step / steps
        if done >= 1:
            break
        warm = min(1.0, done / WARMUP)
        optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        if not waiting:
            waiting = batches_of_like_length([encode(tokenizer, next(told)) for _ in range(16 * BATCH)], rng)
        rows = waiting.pop()
        longest = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        # Padding stands on the right, where causal attention never looks: no mask, and the fast kernel.
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == pad, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step}  loss {losses[-1]:.3f}  {time.monotonic() - began:.0f} s", flush=True)
    return losses


def main() -> None:
    asked = argparse.ArgumentParser(description="Make the demo model.")
    asked.add_argument("out_folder", type=Path)
    asked.add_argument("--steps", type=int, default=STEPS)
    asked.add_argument("--seconds", type=float, help="stop by the clock instead; not repeatable")
    wish = asked.parse_args()

    import torch

    torch.set_num_threads(2)  # part of the recipe: sums come out differently with another number
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    steps = 10**9 if wish.seconds else wish.steps
    losses = pretrain(model, tokenizer, steps, wish.seconds)
    model.save_pretrained(wish.out_folder)
    tokenizer.save_pretrained(wish.out_folder)
    last = losses[-10:]  # several, because batches of like length differ in difficulty
    made = {"steps": len(losses), "first_loss": losses[0], "last_loss": sum(last) / len(last)}
    print(json.dumps(made))


if __name__ == "__main__":
    main()
