"""Frozen weights in bf16 next to trained ones in fp32: every stage learns as with all of them in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.freeze_runs import MODULES, STAGES
from tests.preloaded import run_python

pytestmark = [pytest.mark.usefixtures("forked"), pytest.mark.slow]

ROUNDING = 2**-8  # of a number in bf16, as a share
EVERY_STAGE = [*STAGES, "grpo", "ppo"]
WITH_MODELS = [stage for stage in EVERY_STAGE if stage != "rm"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests.freeze_runs` prints."""
    folder: Path = tmp_path_factory.mktemp("frozen")
    return json.loads(run_python("-m", "tests.freeze_runs", folder).splitlines()[-1])


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_losses_are_those_of_frozen_weights_in_fp32(report: dict[str, Any], stage: str) -> None:
    ours, theirs = (report["stages"][name][stage]["curve"] for name in ("bf16", "fp32"))
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=5 * ROUNDING, abs=ROUNDING), name


@pytest.mark.parametrize("stage", WITH_MODELS)
def test_the_saved_model_has_one_type_and_the_weights_of_its_base(report: dict[str, Any], stage: str) -> None:
    saved = report["stages"]["bf16"][stage]
    assert saved["types"] == ["torch.float32"]
    assert saved["config"] == "float32"
    assert saved["names"]
    assert saved["changed"]
    assert all(name.startswith("model.layers.1.") for name in saved["changed"])


# Operations of a step with recomputation, as PyTorch counts them, and the gradients: as in transformers, and as here.
COUNTED = """
import json
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM
from engine.worker.training.context import pass_no_gradients_below_trained
size = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 64}
answers = []
for prepare in (lambda _: None, pass_no_gradients_below_trained):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **size)).train()
    for name, weight in model.named_parameters():
        weight.requires_grad_(".7." in name)
    prepare(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(64)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = [weight.grad.sum().item() for weight in model.parameters() if weight.grad is not None]
    answers.append([counter.get_total_flops(), gradients])
print(json.dumps(answers))
"""


def test_with_recomputation_nothing_is_computed_below_the_trained_layers() -> None:
    (theirs, expected), (ours, gradients) = json.loads(run_python("-c", COUNTED))
    assert gradients == expected
    assert ours < theirs / 2


def test_the_probe_asks_the_model_without_a_trainer(report: dict[str, Any]) -> None:
    assert report["stages"]["bf16"]["sft"]["probe"]


def test_the_reference_of_grpo_is_the_model_at_the_start(report: dict[str, Any]) -> None:
    """Exactly: no answer is rewarded in the first step, and Adam would take the smallest difference for a gradient."""
    first = report["stages"]["bf16"]["grpo"]["curve"][0]
    assert (first["kl"], first["grad_norm"]) == (0.0, 0.0)


def test_the_estimate_is_what_a_training_holds(report: dict[str, Any]) -> None:
    for name in ("bf16", "fp32"):
        held, estimated = report["stages"][name]["sft"]["held"], report["estimated"][name]
        assert estimated["weights"] == held["weights"]
        assert estimated["learning"] == pytest.approx(held["learning"], rel=0.001)
    frozen = report["estimated"]["fp32"]["weights"] - report["estimated"]["bf16"]["weights"]
    assert frozen / report["estimated"]["fp32"]["weights"] > 0.35  # one of two layers, and the embeddings


@pytest.mark.parametrize("modules", MODULES)
def test_a_model_computes_alone_whatever_is_trained_of_it(report: dict[str, Any], modules: str) -> None:
    ours, theirs = (report["alone"][name][modules] for name in ("bf16", "fp32"))
    assert (ours["trained"], ours["frozen"]) == (["torch.float32"], ["torch.bfloat16"])
    assert (theirs["trained"], theirs["frozen"]) == (["torch.float32"], ["torch.float32"])
    largest = max(map(abs, theirs["logits"]))
    difference = max(abs(logit - other) for logit, other in zip(ours["logits"], theirs["logits"], strict=True))
    assert 0 < difference < 5 * ROUNDING * largest


def test_a_tower_that_full_training_leaves_frozen_stays_in_bf16(report: dict[str, Any]) -> None:
    tower = report["frozen tower"]
    assert (tower["language"], tower["tower"]) == (["torch.float32"], ["torch.bfloat16"])
    assert tower["estimated"] == pytest.approx(tower["held"], rel=0.02)
    assert tower["finite"]
