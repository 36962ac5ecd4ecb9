"""The benchmark of a GPU runs to its end on the CPU, with a tiny model, and writes what it measures."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu import CASES, SHAPES, TINY, TINY_BATCH, TINY_LENGTH, Bench, operations_per_token, run_all
from bench.gpu_profile import PROFILED_STEPS, WARMUP_STEPS, part_of
from bench.report import BEGIN, END, Report
from engine.runs import runs
from tests.preloaded import run_python

MIXED = replace(CASES[1], batch=TINY_BATCH, length=TINY_LENGTH)


@pytest.fixture
def bench(tiny: Path, tmp_path: Path) -> Bench:
    """One that works in a folder of its own, and has a model already."""
    shutil.copytree(tiny, tmp_path / f"random-{MIXED.shape}")
    results = tmp_path / "RESULTS.md"
    results.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    shapes = {name: shape | TINY for name, shape in SHAPES.items()}
    return Bench(tmp_path, Report(results, "here"), time.monotonic() + 3600, "cpu", shapes)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_it_measures_and_profiles_a_training_and_names_what_it_leaves_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "STEPS", WARMUP_STEPS + PROFILED_STEPS + 1)
    assert run_all(bench, [MIXED], tests=False, servers=False) == 0
    with bench.part("something broken", 0):
        raise RuntimeError("no memory")
    bench.deadline = time.monotonic()
    with bench.part("something long", 60) as there_is_time:
        assert not there_is_time
    text = bench.report.file.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\nhere\nProducts of large matrices: ")
    assert text.endswith(f"\n{END}\nafter\n")
    row = next(line for line in text.splitlines() if line.startswith(f"| {MIXED.name} |"))
    step, tokens, share, held, estimated, _ = row.split(" | ")[1:]
    assert float(step.removesuffix(" s")) > 0
    assert 0 < float(tokens.replace(",", "")) / float(step.removesuffix(" s")) < 1e9
    assert share.endswith("%")
    assert (held, estimated.endswith(" GiB")) == ("0.00 GiB", True)
    profiled = next(line for line in text.splitlines() if "under the profiler" in line)
    assert "products" in profiled
    parts = [int(part.split()[-1].rstrip("%")) for part in profiled.split("profiler: ")[1].split(", ")]
    assert 90 <= sum(parts) <= 110
    assert "- something long: 0 s were left" in text
    assert "- something broken: RuntimeError: no memory" in text
    assert runs.find(bench.workplace.saves) == []


def test_operations_are_six_per_trained_weight_and_four_per_frozen_one() -> None:
    shape = SHAPES["7B"]
    weights = 7.72e9 - shape["hidden_size"] * shape["vocab_size"]  # as Qwen1.5-7B's card says, without the embeddings
    assert operations_per_token(shape, "full", 0) == pytest.approx(6 * weights, rel=0.01)
    assert operations_per_token(shape, "lora", 0) == pytest.approx(4 * weights, rel=0.01)


# PyTorch's own count of the products of a step with so many trained weights; rows are short, so attention is nothing.
COUNTED = """
import json, sys
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM
shape, answers = json.loads(sys.argv[1]), {}
for method, trained in (("full", lambda name: True), ("freeze", lambda name: ".10." in name or ".11." in name)):
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    for name, weight in model.named_parameters():
        weight.requires_grad_(trained(name))
    ids = torch.randint(0, shape["vocab_size"], (1, 8))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    answers[method] = counter.get_total_flops() / 8
print(json.dumps(answers))
"""


def test_operations_are_those_that_pytorch_counts() -> None:
    """It also leaves out the gradients that nothing needs: those of the lowest trained layer's inputs, and of ids."""
    shape = SHAPES["1.5B"] | {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 12, "vocab_size": 512}
    shape |= {"num_attention_heads": 4, "tie_word_embeddings": False}
    counted = json.loads(run_python("-c", COUNTED, json.dumps(shape)))
    for method, operations in counted.items():
        assert operations_per_token(shape, method, 8) == pytest.approx(operations, rel=0.05), method


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::_scaled_dot_product_flash_attention_backward", "attention"), ("aten::mm", "products"),
        ("aten::_foreach_addcdiv_", "optimizer"), ("bitsandbytes::dequantize_4bit", "quantization"),
        ("aten::_log_softmax", "loss"), ("aten::copy_", "casts and copies"), ("aten::mul", "other"),
    ],
)  # fmt: skip
def test_each_operation_belongs_to_a_part_of_the_step(name: str, part: str) -> None:
    assert part_of(name) == part
