"""How likely a model is to begin with each of a few choices: the scores 1 to 5, or A and B.

A choice can be read off the next token's probabilities only if it is a single token right after what the reply begins
with. That depends on the tokenizer, so it is proved on the very text that is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from engine.evaluation.evaluation_memory import MAX_LOGITS

MAX_PROMPT_TOKENS = 1 << 14  # of all prompts in one forward pass, unless a single one has more


class Choices(NamedTuple):
    """The tokens that begin the reply, and the token of each choice that may follow them."""

    begun: list[int]
    tokens: list[int]


def single_token_choices(
    tokenizer: PreTrainedTokenizerFast, begun: str, choices: Sequence[str], joints: Sequence[str]
) -> Choices | None:
    """The tokens of `choices` after `begun`, with one of `joints` between them, either at the end of what is begun or
    at the start of the choice (" 4" is a single token of many vocabularies). None if no way gives each choice a single
    token of its own."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ways = [way for joint in joints for way in ((begun + joint, ""), (begun, joint))]
    for head, joint in dict.fromkeys(ways):
        first = ids(head)
        whole = [ids(head + joint + choice) for choice in choices]
        last = [tokens[-1] for tokens in whole if tokens[:-1] == first]
        if len(set(last)) == len(choices):
            return Choices(first, last)
    return None


def choice_probabilities(model: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[list[float]]:
    """For each of the prompts (N lists of tokens), the probability of each of `tokens` (k) as the next one: (N, k).
    They are those of the whole vocabulary, so their sum is the probability of any of them."""
    results: list[list[float]] = [[] for _ in prompts]
    for numbers in _batches([len(prompt) for prompt in prompts], model.config.get_text_config().vocab_size):
        batch = _probabilities(model, [prompts[number] for number in numbers], tokens)
        for number, probabilities in zip(numbers, batch, strict=True):
            results[number] = probabilities
    return results


@torch.inference_mode()
def _probabilities(model: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[list[float]]:
    ids = [torch.tensor(prompt) for prompt in prompts]
    # Padded on the right: no token looks ahead, so none sees the padding.
    padded = pad_sequence(ids, batch_first=True).to(model.device)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(model.device)
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
    places, at = ends.unique(return_inverse=True)
    logits = model(
        input_ids=padded, attention_mask=mask, use_cache=False, logits_to_keep=places.to(model.device)
    ).logits
    last = logits[torch.arange(len(prompts), device=logits.device), at.to(logits.device)]
    return last.float().log_softmax(-1)[:, list(tokens)].double().exp().tolist()


def _batches(lengths: Sequence[int], vocabulary: int) -> Iterator[list[int]]:
    """The numbers of the prompts in batches of similar length, as many as fit the limits of one forward pass."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        size = len(batch) + 1
        if batch and (size * lengths[number] > MAX_PROMPT_TOKENS or size * size * vocabulary > MAX_LOGITS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
