"""Settings of the method: which weights are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from engine.spec.parts import Part, setting


def _not_zero(count: int) -> int:
    if not count:
        raise ValueError("0 layers")
    return count


class Full(Part):
    """Every weight is trained. Needs about 16 bytes of device memory per parameter."""

    kind: Literal["full"] = "full"


class Freeze(Part):
    """Some layers are trained, the others stay as they are."""

    kind: Literal["freeze"] = "freeze"
    trainable_layers: Annotated[int, AfterValidator(_not_zero)] = setting(
        2, "Trained layers", "The last n transformer layers are trained; of a negative number the first n.",
        ge=-1000, le=1000,
    )  # fmt: skip
    trainable_modules: list[str] = setting(
        [], "Trained modules",
        "Names of modules to train instead, such as model.layers.3 or lm_head. When given, the number above is not used.",
    )  # fmt: skip


class Lora(Part):
    """A small adapter is trained beside the frozen weights (Hu et al. 2021)."""

    kind: Literal["lora"] = "lora"
    r: int = setting(
        16, "LoRA rank", "Width of the adapter. 8 to 64 is usual; more learns more and costs more.",
        essential=True, ge=1, le=4096,
    )  # fmt: skip
    lora_alpha: int = setting(
        32, "LoRA alpha", "The adapter's output is scaled by alpha ÷ rank.", essential=True, ge=1, le=65536
    )
    lora_dropout: float = setting(0.0, "LoRA dropout", "Share of the adapter's inputs dropped.", ge=0, lt=1)
    target_modules: list[str] = setting(
        ["all-linear"], "Target modules",
        "Layers that get an adapter. all-linear: every linear layer but the output head.",
    )  # fmt: skip
    modules_to_save: list[str] = setting(
        [],
        "Also train fully",
        "Modules trained in full and saved with the adapter, such as embed_tokens, lm_head.",
    )
    use_dora: bool = setting(
        False, "DoRA", "Train magnitude and direction apart (Liu et al. 2024). Better at low rank, slower."
    )
    use_rslora: bool = setting(
        False, "rsLoRA", "Scale by alpha ÷ √rank (Kalajdzievski 2023), so that a high rank still learns."
    )
    init_lora_weights: Literal["default", "gaussian", "pissa", "olora"] = setting(
        "default",
        "Initialization",
        "PiSSA starts from the main singular vectors of the weights (Meng et al. 2024).",
    )
    loraplus_lr_ratio: float | None = setting(
        None, "LoRA+ ratio", "Learning rate of B ÷ that of A (Hayou et al. 2024); 16 is usual. Empty: equal.",
        ge=1, le=1024,
    )  # fmt: skip


METHODS = {"lora": Lora, "freeze": Freeze, "full": Full}
