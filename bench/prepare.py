"""From rows to the first optimizer step, and the speed after it: preparation, start, batches of mixed length.

Every run here is a real one, started through the queue; the peer's is started with its command line. Both read the same
files.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from bench.server import MB, wait_until_quiet
from engine.core.rundir import RunDir, read_lines, write_text
from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from engine.runs import runs
from engine.spec.run_spec import RunSpec

SHORT_ROWS, MANY_ROWS = 100_000, 500_000  # rows
BATCH, STEPS = 8, 60  # of the run on rows of mixed length: one epoch
PEER = Path(__file__).with_name("peer_prepare.py")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1"}


# ------------------------------------------------------------------------------------------- the data


def short_rows(folder: Path, count: int, name: str) -> None:
    """Rows like those of the demo, of some 25 tokens; almost all different."""
    demo_rows = json.loads((PROJECT / "data" / "alpaca_translate_zh.json").read_text(encoding="utf-8"))
    draw = random.Random(0)
    with (folder / f"{name}.json").open("w", encoding="utf-8") as file:
        for number in range(count):
            first, second = draw.choice(demo_rows), draw.choice(demo_rows)
            row = first | {"output": f"{first['output']}{second['output'][:2]} {number % 977}"}
            file.write(("[\n" if not number else ",\n") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")


def mixed_rows(folder: Path, count: int, name: str) -> None:
    """Lengths like those of Alpaca: most answers have a few dozen words, some several hundred (log-normal)."""
    draw = random.Random(0)
    words = [
        "data",
        "model",
        "answer",
        "question",
        "river",
        "language",
        "the",
        "of",
        "a",
        "in",
        "train",
        "weight",
    ]

    def text(median: float) -> str:
        return " ".join(draw.choices(words, k=max(2, min(int(draw.lognormvariate(0, 1.0) * median), 450))))

    rows = [{"instruction": text(12), "input": "", "output": text(45)} for _ in range(count)]
    (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")


def describe(folder: Path, *names: str) -> None:
    info = {name: {"file_name": f"{name}.json"} for name in names}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def larger_model(folder: Path) -> None:
    """The demo's tokenizer and family with 26 million random parameters, created in a child process: this one does not
    load torch."""
    code = (
        "import sys, torch; from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM;"
        " torch.manual_seed(0);"
        f"t = AutoTokenizer.from_pretrained({str(DEMO_MODEL)!r}); t.save_pretrained(sys.argv[1]);"
        "Qwen2ForCausalLM(Qwen2Config(vocab_size=len(t), hidden_size=512, intermediate_size=1408, num_hidden_layers=8,"
        "num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=True,"
        "eos_token_id=t.eos_token_id, pad_token_id=t.pad_token_id)).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)


# ------------------------------------------------------------------------------------------- ours


def rate(folder: Path, processes: int) -> float:
    """Rows per second from the file to the examples on disk, with this many processes; without imports."""
    code = "import sys; from bench.prepare import timed; print(timed(sys.argv[1], int(sys.argv[2])))"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(processes)],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        text=True,
    )
    return SHORT_ROWS / float(result.stdout.split()[-1])


def timed(folder: str, processes: int) -> float:
    """Seconds of one preparation of the short rows. For a separate process."""
    from engine.data.datasets import find
    from engine.worker.models import tokenizer
    from engine.worker.prepare import build
    from engine.worker.runtime import process_pool  # noqa: F401 - so that imports are over
    from engine.worker.runtime.process_lifecycle import ProgressReport

    spec = spec_of(Path(folder), "short", max_length=512, preprocessing_num_workers=processes)
    tokenizer.load_tokenizer(spec, str(DEMO_MODEL))
    target = Path(folder) / f"built-{processes}"
    target.mkdir()
    run = RunDir(target)
    began = time.perf_counter()
    build(spec, str(DEMO_MODEL), [find(Path(folder), "short")], target, ProgressReport(run))
    return time.perf_counter() - began


def spec_of(folder: Path, name: str, model: Path = DEMO_MODEL, **data: Any) -> RunSpec:
    return RunSpec.read(
        {
            "model": {"model_name_or_path": str(model)},
            "method": {"kind": "lora", "r": 8, "lora_alpha": 16},
            "data": {"datasets": [name], "dataset_dir": str(folder), **data},
            "training": {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "max_steps": 3},
            "logging": {"logging_steps": 1, "save_steps": 1000, "plot_loss": False},
            "hardware": {"device": "cpu"},
        }
    )


def peak_of_preparing(folder: Path) -> float:
    """Peak memory in MB of all processes together while 500,000 rows are prepared, with shared pages counted once."""
    run = RunDir(folder / "saves" / "demo" / "lora" / "many")
    run.path.mkdir(parents=True)
    write_text(run.spec, spec_of(folder, "many", max_length=512).to_yaml())
    child = psutil.Popen(
        [sys.executable, "-m", "engine.worker.prepare", str(run.path)], cwd=PROJECT, stdout=subprocess.DEVNULL
    )
    peak = 0
    while child.poll() is None:
        peak = max(peak, proportional_memory(child))
        time.sleep(0.2)
    if child.returncode:
        raise RuntimeError("preparation of the many rows failed")
    return peak / MB


def proportional_memory(process: psutil.Process) -> int:
    """Proportional set size of a process and its children."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def first_step(folder: Path) -> tuple[float, float]:
    """Seconds from submitting a run on 100,000 rows to its first optimizer step: without and with prepared data."""
    workplace = Workplace(models=(DEMO_MODEL,), data=folder, saves=folder / "runs")
    workplace.saves.mkdir()
    return until_first_step(folder, workplace), until_first_step(folder, workplace)


def until_first_step(folder: Path, workplace: Workplace) -> float:
    wait_until_quiet()
    began = time.perf_counter()
    run = runs.submit(spec_of(folder, "short", max_length=512), workplace)
    while not run.dir.metrics.exists():
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    while not runs.read(run.path, workplace.saves).final:
        time.sleep(0.2)
    return seconds


def samples_per_second(folder: Path, model: Path) -> float:
    """Of one epoch over rows of mixed length, from the first step to the last."""
    workplace = Workplace(models=(model,), data=folder, saves=folder / "mixed-runs")
    workplace.saves.mkdir()
    spec = spec_of(folder, "mixed", model, max_length=1024).change("training.max_steps", None)
    run = runs.submit(spec.change("training.num_train_epochs", 1), workplace)
    while not runs.read(run.path, workplace.saves).final:
        time.sleep(0.5)
    steps = [line for line in read_lines(run.dir.metrics) if "loss" in line]
    return BATCH * (steps[-1]["step"] - steps[0]["step"]) / (steps[-1]["time"] - steps[0]["time"])


# ------------------------------------------------------------------------------------------- the peer's


def peer_rate(folder: Path, python: Path, processes: int) -> float:
    output = _peer(python, [str(PEER), str(folder), str(DEMO_MODEL), str(processes)], folder / f"hf-{processes}")
    return SHORT_ROWS / float(output.split()[-1])


def peer_train(folder: Path, python: Path, name: str, model: Path, **more: Any) -> tuple[float, float]:
    """Seconds from its command to its first logged step; samples per second from there to the last."""
    out = folder / f"peer-{name}-{time.monotonic_ns()}"
    settings = {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "template": "qwen",
        "dataset_dir": str(folder),
        "dataset": name,
        "cutoff_len": 1024,
        "output_dir": str(out),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "preprocessing_num_workers": os.cpu_count(),
        "use_cpu": True,
        **more,
    }
    file = out.with_suffix(".yaml")  # its reader of JSON files raises an exception
    file.write_text(json.dumps(settings), encoding="utf-8")
    log, seen = out / "trainer_log.jsonl", threading.Event()
    began, first = time.perf_counter(), [0.0]

    def watch() -> None:
        while not seen.is_set() and not log.exists():
            time.sleep(0.05)
        first[0] = time.perf_counter() - began

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _peer(python, ["-m", "llamafactory.cli", "train", str(file)], folder / "hf-train")
    seen.set()
    watcher.join()
    lines = [line for line in read_lines(log) if "loss" in line]
    took = _seconds(lines[-1]["elapsed_time"]) - _seconds(lines[0]["elapsed_time"])
    return first[0], BATCH * (lines[-1]["current_steps"] - lines[0]["current_steps"]) / max(took, 1)


def _seconds(clock: str) -> int:
    hours, minutes, seconds = map(int, clock.split(":"))
    return hours * 3600 + minutes * 60 + seconds


def _peer(python: Path, words: list[str], cache: Path) -> str:
    environment = os.environ | OFFLINE | {"HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run([str(python), *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


# ------------------------------------------------------------------------------------------- together


def measure(folder: Path, peer: Path | None) -> dict[str, float]:
    """All figures of this part, ours by name and the peer's with the prefix "peer_"."""
    short_rows(folder, SHORT_ROWS, "short")
    short_rows(folder, MANY_ROWS, "many")
    mixed_rows(folder, BATCH * STEPS, "mixed")
    describe(folder, "short", "many", "mixed")
    model = folder / "larger"
    larger_model(model)
    measured: dict[str, float] = {}
    for processes in (1, 2):
        wait_until_quiet()
        measured[f"rate_{processes}"] = rate(folder, processes)
        if peer:
            measured[f"peer_rate_{processes}"] = peer_rate(folder, peer, processes)
    measured["peak_mb"] = peak_of_preparing(folder)
    measured["cold_s"], measured["cached_s"] = first_step(folder)
    if peer:
        for kind in ("cold", "cached"):
            wait_until_quiet()
            measured[f"peer_{kind}_s"], _ = peer_train(folder, peer, "short", DEMO_MODEL, max_steps=3)
    wait_until_quiet()
    measured["samples"] = samples_per_second(folder, model)
    if peer:
        _, measured["peer_samples"] = peer_train(folder, peer, "mixed", model, num_train_epochs=1)
    return measured
