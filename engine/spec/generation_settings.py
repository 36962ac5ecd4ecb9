"""Settings of generation, with the same meaning for the page, other programs and the worker that serves them."""

from __future__ import annotations

from engine.spec.parts import Part, setting


class GenerationSettings(Part):
    """How answers are generated; None means the model's own setting."""

    temperature: float | None = setting(None, "Temperature", "0 always picks the most likely token.", ge=0, le=10)
    top_p: float | None = setting(
        None, "Top-p", "Samples only from the most likely tokens that add up to this probability.", gt=0, le=1
    )
    top_k: int | None = setting(
        None, "Top-k", "Samples only from this many of the most likely tokens. 0 means all.", ge=0
    )
    seed: int | None = setting(None, "Seed", "Random seed for sampling.", ge=-(2**63), lt=2**63)
    max_tokens: int | None = setting(None, "Max tokens", "Longer answers are cut off here.", ge=1)
    repetition_penalty: float | None = setting(None, "Repetition penalty", "1 means none.", gt=0, le=10)
