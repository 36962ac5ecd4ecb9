"""Training on one NVIDIA GPU, at most ten minutes: `python -m bench.gpu [--minutes N] [--only WORD]`.

The tests of the GPU first; then trainings in the shapes of common models, in the real engine, for a few steps each:
time, share of the GPU's matrix rate, memory beside the estimate; where the time of a step goes; and serving beside
`transformers serve`. The most important comes first, each figure is printed and written to RESULTS.md as soon as it is
known, and what does not fit into the time is named. The weights are random: speed and memory do not depend on the
values. With `--tiny`, tiny shapes on the CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import serve
from bench.report import Report
from engine.core import hardware
from engine.core.problems import Refusal
from engine.core.rundir import RESULT_FILE, RunDir, read_json, read_lines, write_json
from engine.launch import command
from engine.launch.workspace import DEMO_MODEL, PROJECT, Workplace
from engine.models.facts import inspect_model
from engine.preflight.memory import memory_needed
from engine.runs import runs
from engine.spec.method_settings import Freeze
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
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 2048}  # fmt: skip
# In "long", all rows are longer than max_length, so that all examples are full; in "mixed", lengths are as in Alpaca.
STEPS, WARMUP_STEPS, DATA_ROWS, SENTENCES_PER_ROW = 12, 4, 400, 1200
GIB = 2**30
RESULTS = PROJECT / "bench" / "RESULTS.md"
CARD_TESTS_SHARE = 0.3  # of the time
CASE_SECONDS, SERVING_SECONDS = 30.0, 60.0  # with less than this left, it is not begun


@dataclass(frozen=True)
class Case:
    """One run: `batch` examples of `length` tokens per step, or of at most so many if the rows are "mixed"."""

    shape: str
    method: str
    batch: int
    length: int
    recompute: bool  # gradient checkpointing
    changes: Mapping[str, Any] = field(default_factory=dict)
    rows: str = "long"

    @property
    def name(self) -> str:
        kept = "recomputed" if self.recompute else "kept"
        mixed = ["mixed"] * (self.rows == "mixed")
        words = [self.shape, self.method, *map(str, self.changes.values()), f"{self.batch} × {self.length}", *mixed]
        return " ".join([*words, kept])

    @property
    def comes_first(self) -> bool:
        """Whether it comes before the profiles and the servers."""
        return self.shape == "7B" and self.recompute

    @property
    def is_profiled(self) -> bool:
        return self.rows == "mixed" and self.changes != QUANTIZED_8BIT


QUANTIZED_4BIT, QUANTIZED_8BIT = ({"model.quantization.kind": kind} for kind in ("4bit", "8bit"))
CASES = [
    Case("7B", "lora", 2, 2048, True),
    Case("7B", "lora", 8, 2048, True, rows="mixed"),
    Case("7B", "lora", 2, 2048, True, QUANTIZED_4BIT),
    Case("7B", "lora", 8, 2048, True, QUANTIZED_4BIT, "mixed"),
    Case("7B", "lora", 2, 2048, True, QUANTIZED_8BIT),
    Case("7B", "lora", 8, 2048, True, QUANTIZED_8BIT, "mixed"),
    Case("7B", "lora", 1, 2048, False),
    Case("1.5B", "lora", 4, 1024, False),
    Case("1.5B", "lora", 8, 1024, True),
    Case("1.5B", "full", 4, 1024, True),
    Case("1.5B", "full", 4, 1024, True, {"training.optim": "adamw_8bit"}),
    Case("1.5B", "freeze", 4, 1024, True),
]
TINY_BATCH, TINY_LENGTH = 2, 64


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


def make_data(folder: Path) -> None:
    """Rows of plain text for pre-training: each truncated at max_length; and of lengths as in Alpaca (log-normal)."""
    text = [f"word {n} follows word {n - 1}." for n in range(SENTENCES_PER_ROW)]
    drawn = random.Random(0)
    counts = [max(int(drawn.lognormvariate(3.0, 1.0)), 1) for _ in range(DATA_ROWS)]
    long = [{"text": f"{row} {' '.join(text)}"} for row in range(DATA_ROWS)]
    mixed = [{"text": f"{row} {' '.join(text[:count])}"} for row, count in enumerate(counts)]
    for name, rows in {"long": long, "mixed": mixed}.items():
        write_json(folder / f"{name}.json", rows)
    info = {name: {"file_name": f"{name}.json", "columns": {"prompt": "text"}} for name in ("long", "mixed")}
    write_json(folder / "dataset_info.json", info)


def spec_of(case: Case, model: Path, data: Path, device: str) -> RunSpec:
    """The preset "LoRA for a 7B model", shortened to a few steps of full examples."""
    plain = dict(Workplace().presets()["lora_7b"]["spec"])
    if case.method != "lora":
        plain["method"] = {"kind": case.method}
    plain["training"] = plain["training"] | {
        "max_steps": STEPS,
        "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": 1,
        "precision": "bf16" if device == "cuda" else "fp32",
        "gradient_checkpointing": case.recompute,
    }
    spec = RunSpec.read(
        plain
        | {
            "stage": "pt",
            "model": {"model_name_or_path": str(model)},
            "data": {"datasets": [case.rows], "dataset_dir": str(data), "max_length": case.length},
            "logging": {"logging_steps": 1, "save_steps": 10**6, "save_total_limit": 1, "plot_loss": False},
            "hardware": {"device": device},
        }
    )
    for path, value in case.changes.items():
        spec = spec.change(path, value)
    return spec


def used_memory() -> int:
    """Bytes in use on the first GPU, by all processes."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 2**20
    except (OSError, subprocess.CalledProcessError):
        return 0


@dataclass
class Bench:
    """Where it works, what it reports to, and when it has to end."""

    folder: Path
    report: Report
    deadline: float
    device: str = "cuda"
    shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: SHAPES)
    matrix_rate: float = 0.0  # operations per second
    failed: int = 0

    def __post_init__(self) -> None:
        self.workplace = Workplace(models=(self.folder,), data=self.folder / "data", saves=self.folder / "saves")
        for path in (self.workplace.data, self.workplace.saves):
            path.mkdir()
        make_data(self.workplace.data)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @contextlib.contextmanager
    def part(self, name: str, seconds: float) -> Iterator[bool]:
        """Whether there is time for it. What goes wrong in it is reported, and the next part begins."""
        if self.left < seconds:
            self.report.add("Left out", f"- {name}: {max(self.left, 0):.0f} s were left")
            yield False
            return
        try:
            yield True
        except (Refusal, RuntimeError, OSError, subprocess.SubprocessError) as error:
            self.failed += 1
            self.report.add("Failed", f"- {name}: {type(error).__name__}: {str(error)[-300:]}")

    def model(self, case: Case) -> Path:
        """Created if it does not exist."""
        folder = self.folder / f"random-{case.shape}"
        if not folder.exists():
            code = "import sys; from bench.gpu import make_model; make_model(*sys.argv[1:])"
            words = [sys.executable, "-c", code, str(folder), json.dumps(self.shapes[case.shape]), self.device]
            subprocess.run(words, cwd=PROJECT, check=True, stderr=subprocess.DEVNULL, timeout=max(self.left, 1))
        return folder


def matrix_rate(device: str) -> float:
    """Operations per second of products of large matrices in the precision of the training, in a process of its own."""
    words = [sys.executable, "-m", "bench.matrix_rate", device]
    return float(subprocess.run(words, cwd=PROJECT, capture_output=True, check=True, text=True).stdout)


def operations_per_token(shape: Mapping[str, Any], method: str, tokens: float) -> float:
    """Operations of the model for a token in a row of so many, forward and backward, without what is recomputed: 2 per
    weight forward, 2 for the gradient of its input, 2 for that of itself if it is trained; and causal attention, once
    forward and twice backward. With freeze, nothing goes back below the last layers, which are trained."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * shape["intermediate_size"]
    head, attention = hidden * shape["vocab_size"], 2 * hidden * tokens
    passed = min(Freeze().trainable_layers, layers) if method == "freeze" else layers  # backward
    trained, trained_head = {"full": (layers, head), "freeze": (passed, 0)}.get(method, (0, 0))
    forward = layers * (2 * layer + attention) + 2 * head
    backward = passed * (2 * layer + 2 * attention) + 2 * head
    return forward + backward + 2 * (trained * layer + trained_head)


def measure(bench: Bench, case: Case) -> None:
    """A row of the table: a run of the case, from submitting it to its end."""
    spec = spec_of(case, bench.model(case), bench.workplace.data, bench.device)
    run, peak = runs.submit(spec, bench.workplace), 0
    while not run.final:
        time.sleep(0.5)
        peak, run = max(peak, used_memory()), runs.get(bench.workplace.saves, run.id)
        if bench.left < 0 and run.state != "stopping":
            runs.stop(run, "kill")
    try:
        if run.state != "finished":
            raise RuntimeError(run.dir.log.read_text(encoding="utf-8", errors="replace")[-300:])
        head = "| case | step | tokens/s | of the matrix rate | held by torch | estimated | in use on the GPU |\n"
        head += "|---|---|---|---|---|---|---|"
        bench.report.add("Training", f"| {case.name} | {' | '.join(figures(bench, case, spec, run.dir, peak))} |", head)
    finally:
        runs.delete(run)


def figures(bench: Bench, case: Case, spec: RunSpec, run: RunDir, peak: int) -> list[str]:
    """The cells of a row, from the logged steps without the warm-up."""
    counted = [line for line in read_lines(run.metrics) if "loss" in line][WARMUP_STEPS:]
    step = statistics.median(after["time"] - before["time"] for before, after in itertools.pairwise(counted))
    tokens = (counted[-1]["num_tokens"] - counted[0]["num_tokens"]) / (len(counted) - 1)
    held = max((read_json(path) or {}).get("peak_device_memory") or 0 for path in run.path.glob(f"*/{RESULT_FILE}"))
    each = operations_per_token(bench.shapes[case.shape], case.method, tokens / case.batch)
    share = each * tokens / step / bench.matrix_rate
    need = memory_needed(spec, inspect_model(spec.model.model_name_or_path), len(hardware.gpus()))
    estimated = f"{need.total / GIB:.2f} GiB" if need else "—"
    memory = [f"{held / GIB:.2f} GiB", estimated, f"{peak / GIB:.2f} GiB"]
    return [f"{step:.3f} s", f"{tokens / step:,.0f}", f"{share:.0%}", *memory]


def profile(bench: Bench, case: Case) -> None:
    """Where the time of a step goes."""
    spec = spec_of(case, bench.model(case), bench.workplace.data, bench.device)
    run = runs.submit(spec, bench.workplace, start=False)
    variables = command.environment(spec, run.path, hardware.gpus(), hardware.threads())
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.gpu_profile", str(run.path)],
            cwd=PROJECT, env=command.inherited_environment() | variables, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=max(bench.left, 1),
        )  # fmt: skip
    finally:
        runs.delete(run)  # otherwise the next one would start it, too
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    parts = json.loads(done.stdout.splitlines()[-1])
    step = parts.pop("step")
    shares = ", ".join(f"{part} {seconds / step:.0%}" for part, seconds in parts.items() if seconds / step >= 0.005)
    bench.report.add(
        "Where the time of a step goes", f"- {case.name}: {1000 * step:.0f} ms under the profiler: {shares}"
    )


def card_tests(bench: Bench, limit_s: float) -> None:
    """The tests that need a GPU, in a process group that is ended with all it has started when its time is over."""
    words = [sys.executable, "-m", "pytest", "-q", "-n", "6", "tests/test_card.py"]
    child = subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output = child.communicate(timeout=limit_s)[0]
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output = child.communicate()[0] + f"\nnot all of them within {limit_s:.0f} s"
    bench.failed += child.returncode != 0
    bench.report.add("Tests on the GPU", f"- {output.strip().splitlines()[-1] if output.strip() else 'no output'}")


def serving(bench: Bench) -> None:
    """Our server beside `transformers serve`."""
    model = bench.folder / "serving"
    serve.make_model(model, json.dumps(serve.SHAPE))
    for figure in serve.compare(model, seconds=bench.left - 10, tokens=32):
        what, value, *_, peer = figure.cells()
        bench.report.add("Serving", f"- {what}: {value}" + (f" (transformers serve: {peer})" if peer else ""))


def run_all(bench: Bench, cases: list[Case], *, tests: bool = True, servers: bool = True) -> int:
    """Everything, the most important first."""
    if tests:
        limit = bench.left * CARD_TESTS_SHARE
        with bench.part("tests on the GPU", limit) as there_is_time:
            if there_is_time:
                card_tests(bench, limit)
    bench.matrix_rate = matrix_rate(bench.device)
    bench.report.add("", f"Products of large matrices: {bench.matrix_rate / 1e12:,.1f} TFLOP/s.")
    first = [(case, measure) for case in cases if case.comes_first]
    profiled = [(case, profile) for case in cases if case.is_profiled]
    for case, action in [*first, *profiled]:
        with bench.part(case.name, CASE_SECONDS) as there_is_time:
            if there_is_time:
                action(bench, case)
    if servers:
        with bench.part("serving", SERVING_SECONDS) as there_is_time:
            if there_is_time:
                serving(bench)
    for case in cases:
        if not case.comes_first:
            with bench.part(case.name, CASE_SECONDS) as there_is_time:
                if there_is_time:
                    measure(bench, case)
    return 1 if bench.failed else 0


def title(device: str, minutes: float) -> str:
    """What was measured, and when."""
    import importlib.metadata

    gpu = hardware.gpus()[0].name if device == "cuda" else "tiny shapes on the CPU"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{gpu}, {time.strftime('%Y-%m-%d')}, `python -m bench.gpu --minutes {minutes:g}`: {versions}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="after which nothing new is begun")
    parser.add_argument("--only", default="", help="cases with this in their names, without tests and servers")
    parser.add_argument("--folder", type=Path, help="where 25 GB find room; default: the temporary folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that is written")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, without the tests of the GPU")
    arguments = parser.parse_args()
    if not arguments.tiny and not hardware.gpus():
        print("This needs an NVIDIA GPU and its driver, and there is none here: try --tiny.", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * arguments.minutes
    device, whole = "cpu" if arguments.tiny else "cuda", not arguments.only
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = Report(arguments.results, title(device, arguments.minutes))
        shapes = {name: shape | TINY for name, shape in SHAPES.items()} if arguments.tiny else SHAPES
        bench = Bench(Path(folder), report, deadline, device, shapes)
        cases = [case for case in CASES if arguments.only in case.name]
        if arguments.tiny:
            cases = [replace(case, batch=TINY_BATCH, length=TINY_LENGTH) for case in cases]
        return run_all(bench, cases, tests=whole and not arguments.tiny, servers=whole)


if __name__ == "__main__":
    sys.exit(main())
