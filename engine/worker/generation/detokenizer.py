"""The tokens of an answer → its text, piece by piece as they arrive, up to a stop sequence.

A piece is released only when nothing that follows can change it: half a character waits for its other half, and a
possible beginning of a stop sequence waits for what follows.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of one answer. `stopped` is set after a stop sequence, which is not part of the text."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.stream = DecodeStream(skip_special_tokens=True)
        self.tokens: list[int] = []
        self.emitted, self.held = 0, ""  # characters already released; text not yet released
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that can be released after one more token; often nothing."""
        self.tokens.append(token)
        self.held += self.stream.step(self.tokenizer, token) or ""
        positions = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if positions:
            self.stopped = True
            return self._emit(min(positions))
        held_back = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        return self._emit(len(self.held) - held_back)

    def rest(self) -> str:
        """The text held back, when nothing more comes: all pieces together are the text of the tokens."""
        if self.stopped:
            return ""
        whole = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        self.held = whole[self.emitted :]
        return self._emit(len(self.held))

    def _emit(self, count: int) -> str:
        ready, self.held = self.held[:count], self.held[count:]
        self.emitted += len(ready)
        return ready


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of `text` that are the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
