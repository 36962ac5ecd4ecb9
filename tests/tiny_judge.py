"""A judge whose mind is known, made by hand: `python -m tests.tiny_judge FOLDER`.

It is a real Qwen2 of one layer. Its attention counts the exclamation marks of all that it has read; the more there are,
the higher the score that it gives. It cannot see where they are, so of two answers it always prefers A.
"""

import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.tiny_model import tokenizer

HIDDEN = 64
ROOT = HIDDEN**0.5  # the length of what a norm lets through
LIKED = "!"
# Of each choice, what its logit gets from having read anything, and from exclamation marks.
WEIGHTS = {"1": (2.0, 1.0), "2": (1.9, 1.2), "3": (1.8, 1.4), "4": (1.7, 1.6), "5": (1.6, 1.8)}
WEIGHTS |= {"A": (2.0, 1.5), "B": (1.8, 1.3)}


def score_without_marks() -> float:
    """What it gives to an answer without an exclamation mark: the mean of the scores, weighted by e to the logits."""
    shares = {int(choice): 2.718281828459045 ** (ROOT * WEIGHTS[choice][0]) for choice in "12345"}
    return sum(score * share for score, share in shares.items()) / sum(shares.values())


def make(folder: Path) -> None:
    words = tokenizer()
    config = Qwen2Config(
        vocab_size=800,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        layer = model.model.layers[0].self_attn
        model.model.embed_tokens.weight[:, 0] = 1.0
        [liked] = words(LIKED)["input_ids"]
        model.model.embed_tokens.weight[liked, 1] = 8.0
        layer.v_proj.weight[0, 1] = 1.0  # each token offers its mark,
        layer.o_proj.weight[1, 0] = 40.0  # and all of them are averaged, since queries and keys are 0
        for choice, weights in WEIGHTS.items():
            for text in (choice, f" {choice}"):
                if len(ids := words(text)["input_ids"]) == 1:
                    model.lm_head.weight[ids[0], :2] = torch.tensor(weights)
    words.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
