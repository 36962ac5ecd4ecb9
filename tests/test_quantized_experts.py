"""Mixtures of experts in 4 and 8 bits: the numbers of a model quantized by hand, and little kept in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.core.rundir import write_json
from engine.models.facts import inspect_model
from engine.preflight import limits
from engine.preflight.model_checks import quantizes_experts
from engine.spec.run_spec import RunSpec
from tests.conftest import short_training
from tests.expert_runs import FAMILIES, KINDS, WAYS
from tests.preloaded import run_python

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the models, and what `tests.expert_runs` prints."""
    folder = tmp_path_factory.mktemp("experts")
    printed = run_python("-m", "tests.expert_runs", folder)
    return folder, json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def report(made: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return made[1]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_experts_quantized_matrix_by_matrix(
    report: dict[str, Any], family: str, kind: str, way: str
) -> None:
    logits, gradients = report[family]["compared"][kind][way]
    assert report[family]["compared"][kind]["scale"] > 0.1
    assert logits < 1e-6
    assert gradients < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_token_needs_the_matrices_of_its_experts_alone(report: dict[str, Any], family: str, kind: str) -> None:
    compared = report[family]["compared"][kind]
    assert compared["token"] < 1e-6
    assert 0 < compared["experts of a token"] < compared["experts"]


@pytest.mark.slow
def test_matrices_need_not_end_with_a_block_nor_are_more_quantized_than_can_be_counted(report: dict[str, Any]) -> None:
    assert report["without whole blocks"] == 0.0
    assert report["too large"] == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_dequantized_matrix_is_kept_for_the_backward_pass(report: dict[str, Any], family: str) -> None:
    """What the oracle keeps includes all of its experts, in fp32."""
    compared = report[family]["compared"]["4bit"]
    assert compared["kept by the oracle"] > compared["bytes of experts"]
    assert compared["kept by the oracle"] - compared["kept"] > 0.8 * compared["bytes of experts"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_of_their_weights_is_exact(report: dict[str, Any], family: str) -> None:
    for kind, (estimated, held) in report[family]["estimated"].items():
        assert estimated == pytest.approx(held, rel=0.005), kind


@pytest.mark.slow
def test_loading_holds_one_tensor_of_experts_at_a_time_in_16_bits(report: dict[str, Any]) -> None:
    """The model has eight tensors of experts."""
    loading = report["loading"]
    assert loading["tensors"] == 8
    assert loading["largest"] <= loading["held"] < 3 * loading["largest"]


@pytest.mark.slow
def test_a_run_is_resumed_exported_and_asked_like_any_other(report: dict[str, Any]) -> None:
    way = report["whole way"]
    assert way["learned"] > 0.005
    assert (way["resumed"], way["same names"]) == (0.0, True)
    assert way["merged"] < 1e-5  # into the plain base
    assert way["asked"] < 1e-6  # of the oracle with the saved adapter
    assert way["quantized for answers"]


@pytest.mark.slow
def test_experts_with_adapters_stay_unquantized_and_the_page_says_so(made: tuple[Path, dict[str, Any]]) -> None:
    folder, results = made
    adapted = results["adapters on experts"]
    assert (adapted["while trained"], adapted["for answers"]) == (False, False)
    assert adapted["refused"] == ["adapter-on-quantized-experts"]
    model = inspect_model(folder / "qwen3_moe" / "base")

    def doubts(**changes: Any) -> list[str]:
        spec = short_training(model.path, folder / "qwen3_moe", model__quantization="4bit", **changes)
        return [warning.code for warning in limits.limit_warnings(spec, []) if "experts" in warning.code]

    assert doubts() == []
    assert doubts(method__expert_r=2) == ["adapted-experts-not-quantized"]


def test_experts_are_quantized_unless_an_adapter_covers_them(tmp_path: Path) -> None:
    def spec(**model: Any) -> RunSpec:
        return RunSpec.read({"model": {"quantization": {"kind": "4bit"}, **model}})

    for name, config in {"attention": {}, "experts": {"target_parameters": ["experts.down_proj"]}}.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "adapter_config.json", config)
    attention, experts = str(tmp_path / "attention"), str(tmp_path / "experts")
    assert quantizes_experts(spec())
    assert not quantizes_experts(spec(quantization={"kind": "none"}))
    assert quantizes_experts(spec(), [attention])
    assert not quantizes_experts(spec(), [attention, experts])
    assert quantizes_experts(spec(adapter_path=attention))
    assert not quantizes_experts(spec(adapter_path=experts))
    assert not quantizes_experts(spec().change("method.expert_r", 4))
