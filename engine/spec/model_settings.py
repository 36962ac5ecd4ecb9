"""Settings of the model: which one, how its weights are quantized, how its context is extended."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from engine.spec.parts import OneOf, Part, setting

MAX_ADDED_TOKENS = 4096
MAX_TOKEN_LENGTH = 200


def _tokens(tokens: list[str]) -> list[str]:
    """Raises ValueError for invalid tokens."""
    for token in tokens:
        if not token.strip() or len(token) > MAX_TOKEN_LENGTH:
            raise ValueError(f"{token[:MAX_TOKEN_LENGTH]!r} cannot be a token")
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"{next(token for token in tokens if tokens.count(token) > 1)!r} is given twice")
    return tokens


class NoQuantization(Part):
    """Weights are loaded in the training precision."""

    kind: Literal["none"] = "none"


class EightBit(Part):
    """Weights are loaded in 8 bits (LLM.int8(), Dettmers et al. 2022); only an adapter can be trained."""

    kind: Literal["8bit"] = "8bit"


class FourBit(Part):
    """Weights are loaded in 4 bits (QLoRA, Dettmers et al. 2023); only an adapter can be trained."""

    kind: Literal["4bit"] = "4bit"
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = setting(
        "nf4", "4-bit type", "NF4 suits normally distributed weights best; FP4 is plain 4-bit floating point."
    )
    bnb_4bit_use_double_quant: bool = setting(
        True,
        "Double quantization",
        "Also quantizes the quantization constants, which saves about 0.4 bits per parameter.",
    )
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Compute dtype", "Data type of matrix multiplications. Auto uses the training precision."
    )


class NoRopeScaling(Part):
    """The model's own context length."""

    kind: Literal["none"] = "none"


class RopeScaling(Part):
    """Stretch the rotary position embedding, so that the model can handle texts longer than it was trained on."""

    factor: float = setting(2.0, "Scaling factor", "New context length divided by the original one.", gt=1, le=64)


class LinearRope(RopeScaling):
    """Linear position interpolation (Chen et al. 2023)."""

    kind: Literal["linear"] = "linear"


class DynamicRope(RopeScaling):
    """NTK-aware scaling that grows with the length of the text."""

    kind: Literal["dynamic"] = "dynamic"


class YarnRope(RopeScaling):
    """YaRN (Peng et al. 2023)."""

    kind: Literal["yarn"] = "yarn"


class Model(Part):
    """Model: what is fine-tuned, and how it is loaded."""

    model_name_or_path: str = setting(
        "",
        "Model",
        "A folder in one of the model folders, or a hub ID such as Qwen/Qwen3-8B.",
        essential=True,
        max_length=1024,
    )
    hub: Literal["huggingface", "modelscope"] = setting(
        "huggingface", "Hub", "Where a hub ID is downloaded from. A local folder never uses the network."
    )
    model_revision: str | None = setting(None, "Revision", "Branch, tag or commit of a hub model.", max_length=200)
    adapter_path: str | None = setting(
        None,
        "Continue from adapter",
        "LoRA adapter of a finished run, of this stage or another, to train further. Leave empty to start a new one.",
        essential=True,
        max_length=1024,
    )
    chat_template: str | None = setting(
        None,
        "Chat template",
        "Leave empty for the tokenizer's own. For a base model without one, use chatml, alpaca, plain or a "
        ".jinja file.",
        max_length=1024,
    )
    quantization: OneOf[NoQuantization | EightBit | FourBit] = setting(
        NoQuantization(),
        "Quantization",
        "Loads the frozen weights in fewer bits. LoRA on 4-bit weights is QLoRA.",
        essential=True,
    )
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = setting(
        "auto",
        "Attention",
        "Auto uses PyTorch's scaled dot-product attention. flash_attention_2 needs a separate package.",
    )
    rope_scaling: OneOf[NoRopeScaling | LinearRope | DynamicRope | YarnRope] = setting(
        NoRopeScaling(), "RoPE scaling", "For texts longer than the model's context length."
    )
    add_tokens: Annotated[list[str], AfterValidator(_tokens)] = setting(
        [],
        "Added tokens",
        "Words that become separate tokens, such as <answer>. Their rows of the embeddings and the output head "
        "start as the mean of the others and are trained; with LoRA they are saved with the adapter.",
        max_length=MAX_ADDED_TOKENS,
    )
    add_special_tokens: Annotated[list[str], AfterValidator(_tokens)] = setting(
        [],
        "Added special tokens",
        "The same for control tokens of the chat template, which are not shown in answers. Their spelling in rows "
        "and messages stays plain text; enter tokens that occur in the data in the other list.",
        max_length=MAX_ADDED_TOKENS,
    )
    resize_embeddings: bool = setting(
        False,
        "Resize embeddings",
        "Adds the missing rows if the tokenizer has more tokens than the model has embeddings, and trains them. "
        "With LoRA they are saved with the adapter.",
    )
    trust_remote_code: bool = setting(
        False,
        "Trust remote code",
        "Runs Python code that comes with the model. Only for models that the operator has allowed with "
        "--allow-remote-code.",
    )

    @property
    def added_tokens(self) -> list[str]:
        """All added tokens, in the order of their ids."""
        return list(dict.fromkeys([*self.add_tokens, *self.add_special_tokens]))

    @property
    def makes_rows(self) -> bool:
        """Whether the embeddings get a row for each token without one."""
        return self.resize_embeddings or bool(self.added_tokens)

    def used(self, folder: str) -> Model:
        """How the model in `folder` is loaded for use instead of training: trained parts are in the results."""
        changes: dict[str, Any] = {
            "model_name_or_path": folder,
            "adapter_path": None,
            "chat_template": None,
            "add_tokens": [],
            "add_special_tokens": [],
        }
        return self.model_copy(update=changes)
