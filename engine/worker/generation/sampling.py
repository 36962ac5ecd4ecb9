"""Logits → the next token of one answer: greedy, or sampled with its own seed.

The order is that of transformers (penalties, temperature, top-k, top-p), so that the same settings have the same
effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token.

    The repetition penalty counts the tokens of prompt and answer; the presence and frequency penalties, which are
    OpenAI's, only those of the answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0  # Keskar et al. 2019, arXiv:1909.05858, section 4.1
    presence_penalty: float = 0.0  # subtracted from the logit of a token that is present,
    frequency_penalty: float = 0.0  # and this for each occurrence
    seed: int | None = None

    def generator(self) -> torch.Generator:
        """The random generator of one answer, on the CPU, so that a seed gives the same on every device."""
        source = torch.Generator()
        if self.seed is None:
            source.seed()
        else:
            source.manual_seed(self.seed)
        return source


def choose_token(
    logits: Tensor, prompt: Sequence[int], written: Sequence[int], how: Sampling, source: torch.Generator
) -> Tensor:
    """The next token, a scalar on the device of `logits` (V,), fp32, after the tokens of a prompt and the answer
    `written` so far."""
    logits = _penalized(logits, prompt, written, how)
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
        # A token stays if those before it have less than top_p together: the most likely one always does.
        logits = logits.masked_fill(share.cumsum(-1) - share >= how.top_p, -torch.inf)
    drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=source)[0].to(logits.device)
    return drawn if tokens is None else tokens[drawn]


def _penalized(logits: Tensor, prompt: Sequence[int], written: Sequence[int], how: Sampling) -> Tensor:
    if how.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *written}), device=logits.device)
        known = logits[seen]
        known = torch.where(known < 0, known * how.repetition_penalty, known / how.repetition_penalty)
        logits = logits.index_copy(0, seen, known)
    if written and (how.presence_penalty or how.frequency_penalty):
        tokens, counts = torch.tensor(written, device=logits.device).unique(return_counts=True)
        logits = logits.index_add(0, tokens, -(how.presence_penalty + how.frequency_penalty * counts))
    return logits
