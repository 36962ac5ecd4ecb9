"""Every stage on a model with a tower, and answers of models with experts or states, by transformers' own classes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.launch.workspace import Workplace
from engine.models.facts import has_reward_model
from engine.models.safetensors_headers import read_header
from engine.preflight.model_checks import chosen_model_problems
from engine.spec.run_spec import RunSpec
from tests.forked import run_forking

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]

STAGES = ("pt", "sft", "dpo", "kto", "orpo", "simpo", "grpo", "ppo", "ppo of gemma3 with its own reward model")
WRITERS = ("qwen3_vl", "gemma3", "qwen3_moe", "mamba2", "openai-gpt")
SCORERS = ("bert", "ctrl", "gemma3", "gpt2", "llama4", "qwen3", "qwen3_vl", "xlnet")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    printed = run_forking("-m", "tests.other_models", tmp_path_factory.mktemp("other"))
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_the_language_part_of_a_model_that_sees(results: dict[str, Any], stage: str) -> None:
    adapter = read_header(Path(results["stages"][stage]["adapter"]) / "adapter_model.safetensors")
    assert isinstance(adapter, dict)
    assert adapter
    assert all("language_model" in name for name in adapter)


@pytest.mark.parametrize(
    ("stage", "curve", "value"),
    # Where the model is its own reference, -log σ(0) is lost (Rafailov et al. 2023), half of every answer
    # (Ethayarajh et al. 2024), and no distance has been gone.
    [("dpo", "loss", math.log(2)), ("kto", "loss", 0.5), ("grpo", "kl", 0.0), ("ppo", "kl", 0.0)],
)
def test_a_model_that_sees_begins_where_its_reference_is(
    results: dict[str, Any], stage: str, curve: str, value: float
) -> None:
    assert results["stages"][stage]["curves"][curve] == pytest.approx(value, abs=1e-4)


def test_adapters_on_experts_are_merged_exactly(results: dict[str, Any]) -> None:
    assert results["merged"]["off"] < 1e-4 < 1e-1 < results["merged"]["change"]


@pytest.mark.parametrize(("dropout", "refused"), [(0.0, False), (0.1, True)])
def test_dropout_is_refused_where_an_adapter_on_experts_is_continued(
    results: dict[str, Any], dropout: float, refused: bool
) -> None:
    spec = RunSpec.read(
        {
            "model": {"model_name_or_path": "a-hub/model", "adapter_path": results["merged"]["adapter"]},
            "method": {"kind": "lora", "lora_dropout": dropout},
        }
    )
    codes = [problem.code for problem in chosen_model_problems(spec, Workplace(), set())]
    assert ("adapter-on-experts" in codes) == refused


def test_a_whole_model_with_experts_can_be_asked_by_anybody(results: dict[str, Any]) -> None:
    assert results["full"] == {"asks": False, "tokens": 12}


@pytest.mark.parametrize("family", WRITERS)
def test_answers_are_those_of_transformers_generate(results: dict[str, Any], family: str) -> None:
    ours, theirs = results["answers"][family]["ours"], results["answers"][family]["theirs"]
    assert ours == theirs
    assert ours["base"] != ours["adapter"]


@pytest.mark.parametrize("family", SCORERS)
def test_a_family_has_a_reward_model_where_transformers_has_a_score_for_it(
    results: dict[str, Any], family: str
) -> None:
    assert has_reward_model(family) == results["scorers"][family]
