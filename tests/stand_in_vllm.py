"""A stand-in for the program `vllm`, which needs a card: the words and the
requests that vLLM 0.33 takes, and no others.

Behind it are the real weights, asked token by token by transformers, so that the
tokens it is given and the adapter it is asked as are seen in what it answers. What
this cannot show: vLLM's own kernels, memory, speed, and models it does not know.
"""

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# vllm/entrypoints/openai/completion/protocol.py: those of its fields that are known here.
FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty",
    "seed", "stop_token_ids", "presence_penalty", "frequency_penalty", "ignore_eos",
    "stream", "return_token_ids", "logprobs", "return_tokens_as_token_ids",
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("model_tag")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", choices=["auto", "half", "float16", "bfloat16", "float", "float32"])
    parser.add_argument("--max-model-len", type=lambda text: -1 if text == "auto" else int(text))
    parser.add_argument("--generation-config", default="auto")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-loras", type=int, default=1)
    parser.add_argument("--max-lora-rank", type=int, choices=RANKS, default=16)
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    return parser.parse_args()


GIVEN = arguments()
if os.environ.get("STAND_IN") == "full":
    print("(APIServer pid=7) INFO 11-26 02:14:55 [api_server.py:1] starting")
    print("(EngineCore pid=9) ERROR 11-26 02:14:56 [core.py:1] Traceback (most recent call last):")
    print("(EngineCore pid=9) ERROR 11-26 02:14:56 [core.py:1] ValueError: No available memory for the cache blocks.")
    print(
        "(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. "
        "Failed core proc(s): {'EngineCore': 1}"
    )
    sys.exit(1)
assert os.environ["VLLM_API_KEY"] not in sys.argv
# As EngineCore at its busiest: asked to end, it does not, and it outlives its parent.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(10**6)  # EngineCore"],
    env=None if os.environ.get("SPT_NOENV") else {},  # a process that renames itself writes over what stands there
)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
assert os.environ["VLLM_NO_USAGE_STATS"] == os.environ["VLLM_DO_NOT_TRACK"] == "1"

with open(os.path.join(GIVEN.model_tag, "config.json"), encoding="utf-8") as config:
    CONTEXT = json.load(config)["max_position_embeddings"]
LOCK = threading.Lock()
[NAME] = GIVEN.served_model_name
LORAS: dict[str, str] = {}


def load(name: str, path: str) -> None:
    with open(os.path.join(path, "adapter_config.json"), encoding="utf-8") as file:
        if json.load(file)["r"] > GIVEN.max_lora_rank:
            raise ValueError("LoRA rank is greater than max_lora_rank.")
    with LOCK:
        if name in LORAS:
            raise ValueError(f"The lora adapter '{name}' has already been loaded.")
        LORAS[name] = path


@functools.cache
def weights(name: str) -> Any:
    """The model, or one adapter on it. Read when it is first asked: of most
    that are started only the life is looked at."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(GIVEN.model_tag, dtype=getattr(torch, GIVEN.dtype)).eval()
    return PeftModel.from_pretrained(base, LORAS[name]).eval() if name in LORAS else base


def step(name: str, ids: list[int], cache: Any) -> tuple[Any, Any]:
    """The logits behind the last of `ids`, of the model or of one adapter."""
    import torch

    with LOCK, torch.no_grad():
        told = weights(name)(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return told.logits[0, -1].float(), told.past_key_values


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def _json(self, status: int, told: object) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _wrong(self, status: int, why: str) -> None:
        self._json(status, {"error": {"message": why, "type": "BadRequestError", "param": None, "code": status}})

    def _let_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {os.environ['VLLM_API_KEY']}"

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json(200, {})
        elif self.path != "/v1/models" or not self._let_in():
            self._wrong(401, "Unauthorized")
        else:
            self._json(200, {"object": "list", "data": [{"id": NAME, "object": "model", "max_model_len": CONTEXT}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._let_in():
            self._wrong(401, "Unauthorized")
        elif self.path == "/v1/load_lora_adapter" and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "1":
            assert set(body) == {"lora_name", "lora_path"}
            try:
                load(body["lora_name"], body["lora_path"])
                self._json(200, "Success: LoRA adapter added successfully.")
            except Exception as error:
                self._wrong(500, str(error))
        elif self.path == "/v1/completions":
            self._complete(body)
        else:
            self._wrong(404, "Not Found")

    def _complete(self, asked: dict) -> None:
        if wrong := set(asked) - FIELDS:
            self._wrong(400, f"unknown fields {wrong}")
        elif asked["model"] not in (NAME, *LORAS):
            self._wrong(404, f"The model `{asked['model']}` does not exist.")
        elif len(asked["prompt"]) + asked["max_tokens"] > CONTEXT:
            self._wrong(400, "This model's maximum context length is less.")
        else:
            self.send_response(200)
            self.end_headers()
            self._stream(asked)

    def _stream(self, asked: dict) -> None:
        ends = set() if asked["ignore_eos"] else set(asked["stop_token_ids"])
        import torch

        draw = torch.Generator().manual_seed(asked["seed"] or 0)
        ids, cache, count = asked["prompt"], None, 0
        while True:
            logits, cache = step(asked["model"], ids, cache)
            chances = logits.log_softmax(-1)
            token = int(logits.argmax())
            if asked["temperature"]:
                token = int(torch.multinomial((logits / asked["temperature"]).softmax(-1), 1, generator=draw))
            count += 1
            finish = "stop" if token in ends else "length" if count == asked["max_tokens"] else None
            choice = {
                "index": 0,
                "text": "?",
                "token_ids": [token],
                "finish_reason": finish,
                "logprobs": None,
            }
            if asked.get("logprobs") is not None:
                likely = chances.topk(asked["logprobs"])
                top = dict(zip(likely.indices.tolist(), likely.values.tolist(), strict=True)) | {
                    token: float(chances[token])
                }
                choice["logprobs"] = {
                    "tokens": [f"token_id:{token}"],
                    "token_logprobs": [float(chances[token])],
                    "top_logprobs": [{f"token_id:{one}": value for one, value in top.items()}],
                }
            try:
                self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                self.wfile.flush()
            except OSError:
                print(f"aborted after {count}", flush=True)
                return
            if finish:
                self.wfile.write(b"data: [DONE]\n\n")
                return
            ids = [token]


ThreadingHTTPServer((GIVEN.host, GIVEN.port), Handler).serve_forever()
