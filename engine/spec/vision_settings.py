"""Settings of the parts of a model that reads images: what is trained of each, and how fast."""

from __future__ import annotations

from typing import Literal

from engine.spec.parts import Part, setting


class Vision(Part):
    """Vision parts: what is trained of a model that reads images, besides its language part. Only for SFT."""

    tower: Literal["frozen", "adapter", "trained"] = setting(
        "frozen",
        "Vision tower",
        "What turns images into features. Adapter: LoRA on its linear layers, with the rank of the method. Trained: "
        "all its weights.",
    )
    projector: Literal["frozen", "adapter", "trained"] = setting(
        "frozen",
        "Projector",
        "What turns the features of the tower into inputs of the language part, also called connector or merger.",
    )
    language_part: Literal["method", "frozen"] = setting(
        "method",
        "Language part",
        "By the method: with an adapter, some layers, or all weights. Frozen: only tower and projector are trained.",
    )
    tower_learning_rate: float | None = setting(
        None,
        "Learning rate of the tower",
        "Often a tenth of that of the language part. Leave empty for the same.",
        gt=0,
        le=1,
    )
    projector_learning_rate: float | None = setting(
        None, "Learning rate of the projector", "Leave empty for that of the language part.", gt=0, le=1
    )

    @property
    def trains_beside_language(self) -> bool:
        """Whether tower or projector are trained."""
        return {self.tower, self.projector} != {"frozen"}

    @property
    def has_adapter(self) -> bool:
        """Whether tower or projector get an adapter."""
        return "adapter" in (self.tower, self.projector)

    @property
    def first_change(self) -> str | None:
        """The first setting that is not its default; None if all are."""
        return next((name for name, value in self if value != getattr(Vision(), name)), None)
