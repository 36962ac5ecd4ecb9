"""vLLM as the engine of a chat server, if it is installed: its program, its command line, and what it does not support.

Nothing of vLLM is imported; it is a separate program. What is sent to it is checked against the argument parser and the
protocol of vLLM 0.33. `engine.worker.serving.vllm` starts its process and sends requests to it.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.core.problems import Problem, problem
from engine.core.rundir import end_of
from engine.export.vllm_command import adapter_problems, max_lora_rank
from engine.models.adapters import adapter_config

ENGINES = ("transformers", "vllm")  # the inference engines of a server
BASE_NAME = "base"  # name of the model itself; adapters are adapter0, adapter1, …
MAX_LORAS = 4  # adapters in one batch: one more than the page asks at once
DEFAULT_LORA_RANK = 16
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
LOG_PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s*)?((INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\]\s*)?")
ERROR_LINE = re.compile(r"[\w.]*(Error|Exception)\b: ")
ROOT_CAUSE_ABOVE = "See root cause above"  # its last line if one of its processes has logged the cause


def program() -> str | None:
    """vLLM's command: next to this Python, or on the path; None if there is none."""
    return shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")


def command(words: Sequence[str], base: str, port: int, rank: int, precision: str, remote_code: bool) -> list[str]:
    """The command line: `words` are the program, `rank` is the maximum rank of an adapter."""
    return [
        *words, "serve", base, "--served-model-name", BASE_NAME, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", DTYPES[precision], "--max-model-len", "auto", "--generation-config", "vllm",
        "--enable-lora", "--max-loras", str(MAX_LORAS), "--max-lora-rank", str(rank), "--disable-uvicorn-access-log",
        *(["--trust-remote-code"] if remote_code else []),
    ]  # fmt: skip


def environment(key: str) -> dict[str, str]:
    """Its environment: its key, dynamic adapters, no usage statistics, and that its processes keep their environment
    when they rename themselves, because the marker in it is used to find and end them."""
    return {
        "VLLM_API_KEY": key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "SPT_NOENV": "1",
    }


def rank(folders: Iterable[Path]) -> int:
    """The --max-lora-rank that fits all of these adapters that vLLM supports."""
    taken = [config for folder in folders if not adapter_problems(config := adapter_config(folder))]
    return max([DEFAULT_LORA_RANK, *filter(None, map(max_lora_rank, taken))])


def problems(model: Mapping[str, Any], adapters: Mapping[str, Path], most: int | None = None) -> list[Problem]:
    """What vLLM would reject or misinterpret in a base, as its run loads it, and in adapters. `most` is the maximum
    rank of a running server."""
    obstacles = [] if program() else [problem("vllm-missing")]
    kinds = {name: (model.get(name) or {}).get("kind", "none") for name in ("quantization", "rope_scaling")}
    obstacles += [problem("vllm-loading", name=name, kind=kind) for name, kind in kinds.items() if kind != "none"]
    for name, folder in adapters.items():
        config = adapter_config(folder)
        if untaken := adapter_problems(config):
            obstacles += [problem("vllm-adapter", name=name), *untaken]
        needed = max_lora_rank(config)
        if most and needed and needed > most:
            obstacles.append(problem("vllm-more-rank", name=name, rank=needed, most=most))
    return obstacles


def error_line(log: Path) -> str:
    """The line of its log that says why it ended: the last that names an error, otherwise the last line."""
    text = end_of(log, 20_000).decode("utf-8", "replace") if log.exists() else ""
    lines = [LOG_PREFIX.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    telling = [line for line in lines if ERROR_LINE.match(line) and ROOT_CAUSE_ABOVE not in line]
    return (telling or lines or ["—"])[-1][:300]
