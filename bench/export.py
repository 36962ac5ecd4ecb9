"""The memory that a merge needs in addition to the model's own bytes: `python -m bench.export [--shape JSON]`.

A base in bf16 with random weights and an adapter of it are exported by the real engine, in the precision of the base.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bench.figures import Figure, table
from engine.core.rundir import read_json
from engine.launch.processes import find_processes
from engine.launch.workspace import PROJECT, Workplace
from engine.models.facts import inspect_model
from engine.runs import runs
from engine.runs.results import new_export_spec
from engine.runs.runs import Run

SHAPE = {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


SHARDS = (2.0, 0.2)


def make(base: Path, saves: Path, shape: str) -> None:
    """Base and adapter, each created by a child process, which frees its memory when it ends."""
    code = "import sys; from bench.gpu import make_model; make_model(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, str(base), shape, "cpu"], cwd=PROJECT, check=True)
    subprocess.run([sys.executable, "-m", "tests.tiny_adapter", str(base), str(saves), "one"], cwd=PROJECT, check=True)


def measure(shape: str) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        base, saves = Path(folder, "base"), Path(folder, "saves")
        make(base, saves, shape)
        workplace, model = Workplace(models=(base,), saves=saves), inspect_model(base)
        weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        figures = [
            Figure("parameters", model.parameters / 1e6, "M"),
            Figure(f"weights of the base ({model.dtype})", weights / 1e6, "MB"),
        ]
        for shard in SHARDS:
            run, most = export(workplace, shard)
            resident = read_json(run.dir.model / "result.json")["peak_memory"]
            figures += [
                Figure(f"most memory of its own, files of {shard:g} GB", most / 1e6, "MB"),
                Figure("… resident, with the mapped files", resident / 1e6, "MB"),
                Figure("… seconds, with two answers before and after", run.ended - run.started, "s"),
            ]
        return figures


def export(workplace: Workplace, shard: float) -> tuple[Run, int]:
    """The finished run, and the peak of its processes' own memory: mapped weight files also count as resident, but the
    system reclaims these pages when needed."""
    settings = {"check_prompts": 2, "hardware": {"device": "cpu"}, "shard_gb": shard}
    run, most = (
        runs.submit(new_export_spec(workplace, {"demo_model/lora/one": 1.0}, **settings), workplace),
        0,
    )
    while not runs.get(workplace.saves, run.id).final:
        most = max(most, sum(map(anonymous_memory, find_processes(run.path))))
        time.sleep(0.05)
    return runs.get(workplace.saves, run.id), most


def anonymous_memory(process: psutil.Process) -> int:
    """Bytes of memory that are not mapped files; 0 if the process has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"RssAnon:\s+(\d+)", status)
    return 1024 * int(match[1]) if match else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default=json.dumps(SHAPE), help="sizes of the model, as in its config.json")
    print(table(measure(parser.parse_args().shape), ""))


if __name__ == "__main__":
    main()
