"""vLLM as the engine of a chat server, where it is installed: its program, its command line, and what it does not take.

Nothing of it is imported: it is a program of its own. What is sent to it is checked against the argument parser and the
protocol of vLLM 0.33. The process that starts it and asks it is `engine.worker.serving.vllm`.
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

ENGINES = ("transformers", "vllm")  # what can write a server's answers
BASE_NAME = "base"  # name of the model itself; adapters are adapter0, adapter1, …
MAX_LORAS = 4  # adapters in one batch: one more than the page asks at once
DEFAULT_LORA_RANK = 16
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
LOG_PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s*)?((INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\]\s*)?")
ERROR_LINE = re.compile(r"[\w.]*(Error|Exception)\b: ")
ROOT_CAUSE_ABOVE = "See root cause above"  # its last line where one of its processes has logged the cause


def program() -> str | None:
    """vLLM's command: beside this Python, or on the path; None where there is none."""
    return shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")


def command(words: Sequence[str], base: str, port: int, rank: int, precision: str, remote_code: bool) -> list[str]:
    """What starts it: `words` are the program, `rank` is the largest that an adapter may have."""
    return [
        *words, "serve", base, "--served-model-name", BASE_NAME, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", DTYPES[precision], "--max-model-len", "auto", "--generation-config", "vllm",
        "--enable-lora", "--max-loras", str(MAX_LORAS), "--max-lora-rank", str(rank), "--disable-uvicorn-access-log",
        *(["--trust-remote-code"] if remote_code else []),
    ]  # fmt: skip


def environment(key: str) -> dict[str, str]:
    """Its variables: its key, that adapters come and go, no usage statistics, and that its
    processes keep their environment when they rename themselves: by the marker in it they are found and ended."""
    return {
        "VLLM_API_KEY": key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "SPT_NOENV": "1",
    }


def rank(folders: Iterable[Path]) -> int:
    """The --max-lora-rank that holds every one of these adapters that vLLM takes at all."""
    taken = [config for folder in folders if not adapter_problems(config := adapter_config(folder))]
    return max([DEFAULT_LORA_RANK, *filter(None, map(max_lora_rank, taken))])


def problems(model: Mapping[str, Any], adapters: Mapping[str, Path], most: int | None = None) -> list[Problem]:
    """What of a base, as its run loads it, and of adapters vLLM would refuse or misread. `most`
    is the rank that a server which runs already has room for."""
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
    """The line of its log that says why it ended: the last that names an error, else the last there is."""
    text = end_of(log, 20_000).decode("utf-8", "replace") if log.exists() else ""
    lines = [LOG_PREFIX.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    telling = [line for line in lines if ERROR_LINE.match(line) and ROOT_CAUSE_ABOVE not in line]
    return (telling or lines or ["—"])[-1][:300]
