"""Logits → the next token, for one answer: greedy, or drawn with a seed of its own.

The order is the one transformers has (penalty, temperature, top-k, top-p), so that the same settings mean the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 leave every token in."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0  # Keskar et al. 2019, arXiv:1909.05858, section 4.1
    seed: int | None = None

    def generator(self) -> torch.Generator:
        """The source of chance of one answer: on the CPU, so that a seed means the same on every device."""
        source = torch.Generator()
        if self.seed is None:
            source.seed()
        else:
            source.manual_seed(self.seed)
        return source


def choose(logits: Tensor, seen: Tensor, how: Sampling, source: torch.Generator) -> Tensor:
    """The next token, a scalar on the device of `logits` (V,), fp32. `seen` (n,) are the tokens of prompt and answer."""
    if how.repetition_penalty != 1:
        known = logits[seen]
        known = torch.where(known < 0, known * how.repetition_penalty, known / how.repetition_penalty)
        logits = logits.index_copy(0, seen, known)
    if how.temperature == 0:
        return logits.argmax()
    logits = logits / how.temperature
    tokens = None
    if 0 < how.top_k < len(logits):
        logits, tokens = logits.topk(how.top_k)
    if how.top_p < 1:
        logits, order = logits.sort(descending=True)
        tokens = order if tokens is None else tokens[order]
        share = logits.softmax(-1)
        # One stays if those before it have less than top_p together: the most likely one always does.
        logits = logits.masked_fill(share.cumsum(-1) - share >= how.top_p, -torch.inf)
    drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=source)[0].to(logits.device)
    return drawn if tokens is None else tokens[drawn]
