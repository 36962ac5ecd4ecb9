"""Trains models of common sizes on one NVIDIA GPU: `python -m bench.gpu [--only WORD]`.

Each case runs in the real engine for a few steps: seconds per step, tokens per second, device memory. The weights are
random: speed and memory do not depend on the values.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.core import hardware
from engine.core.problems import Refusal
from engine.core.rundir import RESULT_FILE, RunDir, read_json, read_lines, write_json
from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from engine.runs import runs
from engine.spec.run_spec import RunSpec

SHAPES = {  # Qwen1.5-7B and Qwen2.5-1.5B
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
}
STEPS, WARMUP_STEPS, DATA_ROWS, SENTENCES_PER_ROW = (
    12,
    4,
    400,
    1200,
)  # all rows are longer than max_length, so that all examples are full
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One run: `batch` examples of `length` tokens per step."""

    shape: str
    method: str
    batch: int
    length: int
    recompute: bool  # gradient checkpointing
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        kept = "recomputed" if self.recompute else "kept"
        words = [
            self.shape,
            self.method,
            *map(str, self.changes.values()),
            f"{self.batch} × {self.length}",
            kept,
        ]
        return " ".join(words)


QUANTIZED_4BIT, QUANTIZED_8BIT = ({"model.quantization.kind": kind} for kind in ("4bit", "8bit"))
CASES = [
    Case("7B", "lora", 2, 2048, True),
    Case("7B", "lora", 1, 2048, False),
    Case("7B", "lora", 2, 2048, True, QUANTIZED_4BIT),
    Case("7B", "lora", 2, 2048, True, QUANTIZED_8BIT),
    Case("1.5B", "lora", 4, 1024, False),
    Case("1.5B", "lora", 8, 1024, True),
    Case("1.5B", "full", 4, 1024, True),
    Case("1.5B", "full", 4, 1024, True, {"training.optim": "adamw_8bit"}),
    Case("1.5B", "freeze", 4, 1024, True),
]


def make_model(folder: str, shape: str, device: str) -> None:
    """Random weights with the demo model's tokenizer. Runs in a child process, which frees its memory when it ends."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**json.loads(shape), **ids, dtype="bfloat16"))
    model.save_pretrained(folder)


def ensure_model(folder: Path, shape: Mapping[str, Any], device: str) -> Path:
    """The model of this shape, created if it does not exist."""
    if not folder.exists():
        code = "import sys; from bench.gpu import make_model; make_model(*sys.argv[1:])"
        words = [sys.executable, "-c", code, str(folder), json.dumps(shape), device]
        subprocess.run(words, cwd=PROJECT, check=True)
    return folder


def make_data(folder: Path) -> None:
    """Rows of plain text for pre-training, each truncated at max_length."""
    text = " ".join(f"word {n} follows word {n - 1}." for n in range(SENTENCES_PER_ROW))
    write_json(folder / "long.json", [{"text": f"{row} {text}"} for row in range(DATA_ROWS)])
    write_json(folder / "dataset_info.json", {"long": {"file_name": "long.json", "columns": {"prompt": "text"}}})


def spec_of(case: Case, model: Path, data: Path, device: str) -> RunSpec:
    """The preset "LoRA for a 7B model", shortened to a few steps of full examples."""
    plain = dict(Workplace().presets()["lora_7b"]["spec"])
    if case.method != "lora":
        plain["method"] = {"kind": case.method}
    plain["training"] = plain["training"] | {
        "max_steps": STEPS,
        "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": 1,
        "precision": "bf16",
        "gradient_checkpointing": case.recompute,
    }
    spec = RunSpec.read(
        plain
        | {
            "stage": "pt",
            "model": {"model_name_or_path": str(model)},
            "data": {"datasets": ["long"], "dataset_dir": str(data), "max_length": case.length},
            "logging": {"logging_steps": 1, "save_steps": 10**6, "save_total_limit": 1, "plot_loss": False},
            "hardware": {"device": device},
        }
    )
    for path, value in case.changes.items():
        spec = spec.change(path, value)
    return spec


def wait_for_end(run: runs.Run, workplace: Workplace) -> tuple[runs.Run, int]:
    """Wait for the end of the run; returns it with the peak device memory in use."""
    peak = 0
    while not run.final:
        time.sleep(0.5)
        peak, run = max(peak, used_memory()), runs.get(workplace.saves, run.id)
    return run, peak


def used_memory() -> int:
    """Bytes in use on the first GPU, by all processes."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 2**20
    except (OSError, subprocess.CalledProcessError):
        return 0


def figures(run: RunDir, peak: int) -> list[str]:
    """The cells of a row, from the logged steps without the warm-up."""
    counted = [line for line in read_lines(run.metrics) if "loss" in line][WARMUP_STEPS:]
    step = statistics.median(after["time"] - before["time"] for before, after in itertools.pairwise(counted))
    tokens = (counted[-1]["num_tokens"] - counted[0]["num_tokens"]) / (len(counted) - 1)
    held = max((read_json(path) or {}).get("peak_device_memory") or 0 for path in run.path.glob(f"*/{RESULT_FILE}"))
    return [f"{step:.3f} s", f"{tokens / step:,.0f}", f"{held / GIB:.2f} GiB", f"{peak / GIB:.2f} GiB"]


def bench(folder: Path, cases: list[Case], device: str = "cuda") -> int:
    """Create models and data in `folder`, train with the engine, print a table."""
    workplace = Workplace(models=(folder,), data=folder / "data", saves=folder / "saves")
    for path in (workplace.data, workplace.saves):
        path.mkdir()
    make_data(workplace.data)
    print("| case | step | tokens/s | held by torch | in use on the card |\n|---|---|---|---|---|", flush=True)
    failed = 0
    for case in cases:
        model = ensure_model(folder / f"random-{case.shape}", SHAPES[case.shape], device)
        try:
            run, peak = wait_for_end(runs.submit(spec_of(case, model, workplace.data, device), workplace), workplace)
        except Refusal as refusal:
            print(refusal.text(), file=sys.stderr)
            failed += 1
            continue
        if run.state == "finished":
            print(f"| {case.name} | {' | '.join(figures(run.dir, peak))} |", flush=True)
        else:
            print(run.dir.log.read_text(encoding="utf-8", errors="replace")[-3000:], file=sys.stderr)
            failed += 1
        runs.delete(run)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--folder", type=Path, help="where 25 GB find room; default: the temporary folder")
    arguments = parser.parse_args()
    if not hardware.gpus():
        print("This needs an NVIDIA card and its driver, and there is none here.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        return bench(Path(folder), [case for case in CASES if arguments.only in case.name])


if __name__ == "__main__":
    sys.exit(main())
