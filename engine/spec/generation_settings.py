"""How answers are written: what the page, other programs and the worker that serves all mean by it."""

from __future__ import annotations

from engine.spec.parts import Part, setting


class Manner(Part):
    """How answers are written: None is as the model's own settings have it."""

    temperature: float | None = setting(None, "Temperature", "0: always the most likely token.", ge=0, le=10)
    top_p: float | None = setting(
        None, "Top-p", "Of the tokens, the likeliest with this share together.", gt=0, le=1
    )
    top_k: int | None = setting(None, "Top-k", "Of the tokens, this many likeliest; 0: all.", ge=0)
    seed: int | None = setting(None, "Seed", "Where chance has a part.", ge=-(2**63), lt=2**63)
    max_tokens: int | None = setting(None, "Max tokens", "A longer answer is cut there.", ge=1)
    repetition_penalty: float | None = setting(None, "Repetition penalty", "1: none.", gt=0, le=10)
