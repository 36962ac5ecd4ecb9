"""Some architectures, from the check before the start to an export that is loaded again; `make zoo` tries all."""

from __future__ import annotations

import pytest

from tests.preloaded import run_python
from tests.zoo.whole_way import WholeWay, page

FAMILIES = (
    "llama", "gemma3", "gpt2", "qwen3_vl", "llama4", "mistral3", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h",
    "granitemoehybrid", "mllama", "inkling_mm_model", "molmo2", "reformer", "bigbird_pegasus", "minimax", "cpmant",
)  # fmt: skip
REFUSED = {
    "blip": "pixel_values",
    "idefics": "pixel_values",
    "nemotron_h_omni": "which module",
    "shieldgemma2": "lack 29 weights",
}
NOT_MERGED = ("zamba", "zamba2")


@pytest.fixture(scope="module")
def lines() -> dict[str, str]:
    printed = run_python("-m", "tests.zoo.whole_way", *FAMILIES, *REFUSED, *NOT_MERGED)
    return {line.split()[0]: line for line in printed.splitlines() if "lora" in line}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_its_merged_model_has_the_same_logits(family: str, lines: dict[str, str]) -> None:
    assert lines[family].endswith(" ok"), lines[family]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_a_family_that_cannot_learn_from_text_is_refused_before_the_start(
    family: str, reason: str, lines: dict[str, str]
) -> None:
    assert "refused: " in lines[family]
    assert reason in lines[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", NOT_MERGED)
def test_adapters_of_layers_with_one_weight_are_exported_as_they_are(family: str, lines: dict[str, str]) -> None:
    assert lines[family].endswith(" ok, not merged"), lines[family]


@pytest.mark.slow
def test_the_last_layers_are_found_whatever_they_are_called() -> None:
    """Apertus stores buffers beside its weights, BERT says `layer`, and HRM has more layers than its configuration."""
    printed = run_python("-m", "tests.zoo.whole_way", "--method", "freeze", "apertus", "bert", "hrm_text", "blt")
    *trained, refused = (line for line in printed.splitlines() if " freeze " in line)
    assert [line.endswith(" ok") for line in trained] == [True] * 3, printed
    assert "refused: method.trainable_layers: " in refused


def test_the_page_counts_families_by_what_became_of_them() -> None:
    ways = [
        WholeWay("a", "lora", modules={"q_proj": 2}, towers=["model.visual"], experts=4), WholeWay("a", "freeze"),
        WholeWay("b", "lora", refusal="model.model_name_or_path: no | text"), WholeWay("b", "freeze"),
        WholeWay("c", "lora"), WholeWay("c", "freeze", failure="train: ValueError: x"),
        WholeWay("d", "lora", failure="not built: ImportError: y"), WholeWay("e", "lora", mergeable=False),
    ]  # fmt: skip
    text = page(ways, ["lora", "freeze"])
    assert "Of 5 families, 2 pass, 1 are rejected" in text
    assert "table, 1 fail\nwith the error in the table, and 1 are not tried" in text
    assert "| `e` | — | — | ✓ not merged |" in text
    assert "| `a` | q_proj | visual, experts | ✓ | ✓ |" in text
    assert "| `b` | — | — | no \\| text | ✓ |" in text
    assert "| `c` | — | — | ✓ | train: ValueError: x |" in text
