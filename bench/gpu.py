"""Trains a 7B model for 20 steps on one NVIDIA card: `python -m bench.gpu`. Speed and device memory.

The weights are random, in the shape of Qwen1.5-7B: speed and memory do not depend on what a model knows.
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
from pathlib import Path

from bench.figures import Figure, table
from engine import machine, runs
from engine.problems import Refusal
from engine.rundir import RunDir, write_json
from engine.spec import RunSpec
from engine.workplace import DEMO_MODEL, PROJECT, Workplace

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
STEPS, ROWS, WORDS = 20, 400, 1200  # every row is longer than max_length, so that every example is full
GIB = 2**30


def make_model(folder: str, shape: str, device: str) -> None:
    """Random weights with the demo model's tokenizer. Runs in a child, which gives its memory back when it ends."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**json.loads(shape), **ids, dtype="bfloat16"))
    model.save_pretrained(folder)


def make_data(folder: Path) -> None:
    """Rows of plain text for pre-training, each cut at max_length."""
    text = " ".join(f"word {n} follows word {n - 1}." for n in range(WORDS))
    write_json(folder / "long.json", [{"text": f"{row} {text}"} for row in range(ROWS)])
    write_json(
        folder / "dataset_info.json", {"long": {"file_name": "long.json", "columns": {"prompt": "text"}}}
    )


def spec_of(model: Path, data: Path, length: int, batch: int, checkpointing: bool, device: str) -> RunSpec:
    """The preset "LoRA for a 7B model", shortened to a few steps of full examples."""
    plain = dict(Workplace().presets()["lora_7b"]["spec"])
    plain["training"] = plain["training"] | {
        "max_steps": STEPS, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1,
        "precision": "bf16", "gradient_checkpointing": checkpointing,
    }  # fmt: skip
    return RunSpec.read(plain | {
        "stage": "pt", "model": {"model_name_or_path": str(model)},
        "data": {"datasets": ["long"], "dataset_dir": str(data), "max_length": length},
        "logging": {"logging_steps": 1, "save_steps": 10**6, "plot_loss": False}, "hardware": {"device": device},
    })  # fmt: skip


def follow(run: runs.Run, workplace: Workplace) -> tuple[runs.Run, int]:
    """Wait for the end of the run; with it comes the most device memory that was in use meanwhile."""
    peak = 0
    while not run.final:
        time.sleep(0.5)
        peak, run = max(peak, used_memory()), runs.get(workplace.saves, run.id)
    return run, peak


def used_memory() -> int:
    """Bytes in use on the first card, by whomever."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 2**20
    except (OSError, subprocess.CalledProcessError):
        return 0


def figures(run: RunDir, peak: int) -> list[Figure]:
    """From the logged steps; the first five warm up and do not count."""
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    counted = [line for line in lines if "loss" in line][5:]
    step = statistics.median(after["time"] - before["time"] for before, after in itertools.pairwise(counted))
    tokens = (counted[-1]["num_tokens"] - counted[0]["num_tokens"]) / (len(counted) - 1)
    return [
        Figure("time of a step", step, "s"),
        Figure("tokens of a step", tokens),
        Figure("speed", tokens / step, "tokens/s"),
        Figure("most device memory in use", peak / GIB, "GiB"),
    ]


def bench(folder: Path, length: int, batch: int, checkpointing: bool, device: str = "cuda") -> int:
    """Make model and data in `folder`, train through the engine, print the figures."""
    workplace = Workplace(models=(folder,), data=folder / "data", saves=folder / "saves")
    for one in (workplace.data, workplace.saves):
        one.mkdir()
    make_data(workplace.data)
    model = folder / "random-7b"
    words = [
        "import sys; from bench.gpu import make_model; make_model(*sys.argv[1:])",
        str(model),
        json.dumps(SHAPE),
    ]
    subprocess.run([sys.executable, "-c", *words, device], cwd=PROJECT, check=True)
    spec = spec_of(model, workplace.data, length, batch, checkpointing, device)
    try:
        run, peak = follow(runs.submit(spec, workplace), workplace)
    except Refusal as refusal:
        print(refusal.text(), file=sys.stderr)
        return 1
    if run.state != "finished":
        print(run.dir.log.read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
        return 1
    print(
        f"LoRA, bf16, {batch} examples of {length} tokens a step, {'with' if checkpointing else 'without'} checkpointing"
    )
    print(table(figures(run.dir, peak), "peer"))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of an example")
    parser.add_argument("--batch", type=int, default=2, help="examples of a step")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--folder", type=Path, help="where 20 GB find room; default: the temporary folder")
    given = parser.parse_args()
    if not machine.gpus():
        print("This needs an NVIDIA card and its driver, and there is none here.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        return bench(Path(folder), given.length, given.batch, not given.no_checkpointing)


if __name__ == "__main__":
    sys.exit(main())
