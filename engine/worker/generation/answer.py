"""An answer that is to be generated, and its pieces as they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.core.problems import Problem
from engine.worker.generation.detokenizer import Detokenizer
from engine.worker.generation.sampling import Sampling


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer: its log-probability, and the most likely tokens at its place."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """The new part of an answer. The last one has a `finish`: "stop", "length", "cancelled" or "error"."""

    text: str = ""
    tokens: tuple[TokenLogprob, ...] = ()
    count: int = 0  # number of the answer's tokens so far
    finish: str = ""
    problem: Problem | None = None


@dataclass(eq=False)
class Answer:
    """An answer to be generated. `on_piece` is called from the generating thread, the last time with a `finish`."""

    adapter: str | None  # None: the base itself
    prompt: list[int]
    max_tokens: int
    stop_token_ids: frozenset[int]  # tokens that end it
    sampling: Sampling
    detokenizer: Detokenizer
    on_piece: Callable[[Piece], None]
    logprobs: int | None = None  # number of likely tokens to report at each position; None: no log-probabilities
    cancelled: bool = False
    # The model's inputs for the images of the prompt: arguments of the forward pass, created when they are read.
    image_inputs: Callable[[], dict[str, Any]] | None = None
    wake: Callable[[], None] | None = None  # lets a waiting writer notice `cancelled`
    # State during generation:
    source: torch.Generator = field(init=False)
    written: list[int] = field(default_factory=list)
    pending_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = ""

    def __post_init__(self) -> None:
        self.source = self.sampling.generator()

    def cancel(self) -> None:
        """End it here. Can be called from any thread."""
        self.cancelled = True
        if self.wake:
            self.wake()

    def take(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Add a token. Returns whether the answer has ended with it."""
        if token in self.stop_token_ids:
            return self.end("stop")
        self.written.append(token)
        if logprob:
            self.pending_logprobs.append(logprob)
        text = self.detokenizer.add(token)
        if self.detokenizer.stopped or len(self.written) >= self.max_tokens:
            return self.end("stop" if self.detokenizer.stopped else "length", text)
        if text:
            self.on_piece(Piece(text, tuple(self.pending_logprobs), len(self.written)))
            self.pending_logprobs.clear()
        return False

    def end(self, finish: str, text: str = "", why: Problem | None = None) -> bool:
        self.finish = finish
        text += self.detokenizer.rest()
        self.on_piece(Piece(text, tuple(self.pending_logprobs), len(self.written), finish, why))
        return True
