"""Our server compared with `transformers serve`, with the same model: `python -m bench.serve [--shape JSON]`.

The weights are random: speed does not depend on the values. Both servers are running and are queried alternately, with
OpenAI's client, greedily, for the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import openai

from bench.figures import Figure, table
from bench.server import Server, free_port
from engine.core import hardware
from engine.launch.workspace import PROJECT

# Only the demo model's words: a token without text would be sent late, or not at all.
SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TOKENS_PER_ANSWER, REPEATS, CONCURRENT_ANSWERS = 128, 3, 4
QUESTION = [{"role": "user", "content": "Write about rivers, and then about the sea. " * 6}]


def make_model(folder: Path, shape: str) -> None:
    """In a child process, which frees its memory when it ends."""
    device = "cuda" if hardware.gpus() else "cpu"
    code = "import sys; from bench.gpu import make_model; make_model(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, str(folder), shape, device], cwd=PROJECT, check=True)


@contextmanager
def ours(folder: Path, model: Path) -> Iterator[openai.OpenAI]:
    (folder / "saves").mkdir()
    port = free_port()
    flags = [
        "--base",
        str(model),
        "--models",
        str(model),
        "--saves",
        str(folder / "saves"),
        "--port",
        str(port),
    ]
    command = [sys.executable, "-m", "engine", "serve", *flags]
    with closing_server(Server(command, port, folder, path="/health", PYTHONPATH=str(PROJECT))) as client:
        yield client


@contextmanager
def theirs(folder: Path, model: Path) -> Iterator[openai.OpenAI]:
    port = free_port()
    dtype = "bfloat16" if hardware.gpus() else "float32"  # in the same precision as ours
    command = [
        str(Path(sys.executable).parent / "transformers"),
        "serve",
        str(model),
        "--port",
        str(port),
        "--dtype",
        dtype,
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with closing_server(Server(command, port, folder, path="/health", **offline)) as client:
        yield client


@contextmanager
def closing_server(server: Server) -> Iterator[openai.OpenAI]:
    try:
        with closing(openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=300)) as client:
            yield client
    finally:
        server.end()


def ask(client: openai.OpenAI, model: str, most: int = TOKENS_PER_ANSWER) -> tuple[float, int]:
    """Seconds to the end of a streamed answer, and its tokens. The time of the first text depends on the text: some
    tokens are half a character. So the delay is measured with answers of one token."""
    began, tokens = time.perf_counter(), 0
    stream = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        max_tokens=most,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    return time.perf_counter() - began, tokens


def milliseconds_per_token(client: openai.OpenAI, model: str, most: int) -> float:
    """Milliseconds per token for several concurrent answers."""
    began = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENT_ANSWERS) as threads:
        answers = list(threads.map(lambda _: ask(client, model, most), range(CONCURRENT_ANSWERS)))
    return 1000 * (time.perf_counter() - began) / sum(tokens for _, tokens in answers)


def compare(model: Path, seconds: float = math.inf, tokens: int = TOKENS_PER_ANSWER) -> list[Figure]:
    """The figures after REPEATS rounds, or fewer if these `seconds` are over. Both servers answer one round at least,
    whose length grows with `tokens`: `transformers serve` computes answers that come at the same time one by one."""
    deadline = time.monotonic() + seconds
    measured: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    with ExitStack() as stack:
        clients = {}
        for name, start in (("ours", ours), ("theirs", theirs)):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            client = stack.enter_context(start(folder, model))
            clients[name] = (client, client.models.list().data[0].id if name == "ours" else str(model))
            ask(*clients[name], most=tokens)  # the first answer of a server is slower
        for number in range(REPEATS):
            if number and time.monotonic() > deadline:
                break
            for name, target in clients.items():
                first, _ = ask(*target, most=1)
                whole, answered = ask(*target, most=tokens)
                each = (whole - first) / (answered - 1)
                measured[name].append([1000 * first, 1000 * each, milliseconds_per_token(*target, most=tokens)])
    mine, peer = (
        [statistics.median(column) for column in zip(*measured[name], strict=True)] for name in ("ours", "theirs")
    )
    names = (
        "an answer of one token",
        "a token of one answer",
        f"a token of {CONCURRENT_ANSWERS} answers at once",
    )
    figures = []
    for what, value, other in zip(names, mine, peer, strict=True):
        figures.append(Figure(what, value, "ms", None, other))
        figures.append(Figure("… as a share of the peer's", value / other, "", None if what is names[0] else 1.0))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shape", default="{}", help="JSON: how the model differs from the usual one of 52M parameters"
    )
    arguments = parser.parse_args()
    if os.getloadavg()[0] > 0.7:
        print(f"Something else is at work here (load {os.getloadavg()[0]:.1f}).", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), json.dumps(SHAPE | json.loads(arguments.shape)))
        figures = compare(Path(folder))
    print(table(figures, "transformers serve"))
    return 1 if any(figure.met is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
