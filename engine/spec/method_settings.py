"""Settings of the method: which weights are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from engine.spec.fields import choices
from engine.spec.parts import Part, setting


def _not_zero(count: int) -> int:
    if not count:
        raise ValueError("0 layers")
    return count


class Full(Part):
    """All weights are trained. Needs about 16 bytes of GPU memory per parameter."""

    kind: Literal["full"] = "full"


class Freeze(Part):
    """Some layers are trained; the others stay frozen."""

    kind: Literal["freeze"] = "freeze"
    trainable_layers: Annotated[int, AfterValidator(_not_zero)] = setting(
        2,
        "Trained layers",
        "Trains the last n transformer layers; a negative number means the first n.",
        ge=-1000,
        le=1000,
    )
    trainable_modules: list[str] = setting(
        [],
        "Trained modules",
        "Trains these modules instead, such as model.layers.3 or lm_head. Overrides the number of layers.",
    )


class Lora(Part):
    """A small adapter is trained alongside the frozen weights (Hu et al. 2021)."""

    kind: Literal["lora"] = "lora"
    r: int = setting(
        16,
        "LoRA rank",
        "Dimension of the adapter, usually 8 to 64. A higher rank can learn more and uses more memory.",
        essential=True,
        ge=1,
        le=4096,
    )
    lora_alpha: int = setting(
        32, "LoRA alpha", "The adapter's output is scaled by alpha ÷ rank.", essential=True, ge=1, le=65536
    )
    lora_dropout: float = setting(
        0.0, "LoRA dropout", "Share of the adapter's inputs dropped during training.", ge=0, lt=1
    )
    target_modules: list[str] = setting(
        ["all-linear"],
        "Target modules",
        "Layers that get an adapter. all-linear means the matrices of attention and MLP: not the output head, "
        "routers, routed experts, or what reads images.",
    )
    expert_r: int | None = setting(
        None,
        "Rank of experts",
        "Rank of the adapters on the routed experts of a mixture-of-experts model, each expert with its own. "
        "Leave empty to leave the experts as they are, which takes far less memory.",
        ge=1,
        le=1024,
    )
    modules_to_save: list[str] = setting(
        [],
        "Fully trained modules",
        "Modules trained in full and saved with the adapter, such as embed_tokens or lm_head.",
    )
    use_dora: bool = setting(
        False,
        "DoRA",
        "Trains magnitude and direction separately (Liu et al. 2024). Better at low ranks, but slower.",
    )
    use_rslora: bool = setting(
        False, "rsLoRA", "Scales by alpha ÷ √rank (Kalajdzievski 2023), so that high ranks learn well."
    )
    init_lora_weights: Literal["default", "gaussian", "pissa", "olora"] = setting(
        "default",
        "Initialization",
        "PiSSA starts from the principal singular vectors of the weights (Meng et al. 2024).",
    )
    loraplus_lr_ratio: float | None = setting(
        None,
        "LoRA+ ratio",
        "Learning rate of B divided by that of A (Hayou et al. 2024), typically 16. Leave empty for equal rates.",
        ge=1,
        le=1024,
    )


AnyMethod = Lora | Freeze | Full
METHODS = choices(AnyMethod)
