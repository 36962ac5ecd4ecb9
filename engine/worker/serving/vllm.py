"""Answers written by vLLM: a process of its own behind the same server and served models.

It takes the place of `engine.worker.generation.generator.Generator`. A served model renders its prompt here, with the
template of its own result, and vLLM is given the tokens: so every adapter keeps its template, a control token in a
question stays text, and thinking and tools are as with transformers. What comes back are tokens again, and what they
say, and where an answer ends, is decided where it always is. vLLM listens on loopback with a key of this process's
own.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, GenerationConfig

from engine.core.problems import Problem, Refusal, problem
from engine.core.rundir import RunDir
from engine.core.sockets import listen
from engine.serving import vllm
from engine.spec.run_spec import RunSpec
from engine.worker.generation.generator import Answer, TokenLogprob
from engine.worker.models.loading import precision

PR_SET_PDEATHSIG = 1
VLLM_KILL_TIMEOUT_SECONDS = 10.0  # between asking it to end and ending it


class VllmGenerator:
    """vLLM's process. `submit` for an answer; `load_adapter` has it take in another adapter."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, key: str, settings: dict[str, Any], log: Path):
        self.process, self.port, self.key, self.settings, self.log = process, port, key, settings, log
        self.names: dict[str, str] = {}  # folder of an adapter → what it is asked as
        self.loading = threading.Lock()  # one adapter at a time: each takes the next name
        self.answers: set[Answer] = set()
        self.model: Any = None  # no weights: the configuration, as far as served models need it

    @classmethod
    def start(cls, run: RunDir, settings: dict[str, Any], spec: RunSpec, closing: ExitStack) -> VllmGenerator:
        """It, once it answers; `closing` ends it. Raises Refusal with its last words if it ends before."""
        with listen("127.0.0.1", 0) as door:  # a port that is free, and is vLLM's in a moment
            port = door.getsockname()[1]
        key, log = secrets.token_urlsafe(24), run.path / "vllm.log"
        options = settings["vllm"]
        command = vllm.command(
            options["command"],
            settings["base"],
            port,
            options["rank"],
            precision(spec),
            spec.model.trust_remote_code,
        )
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                preexec_fn=_die_with_us,
                env=os.environ | vllm.environment(key),
                start_new_session=True,  # Ctrl-C is for the server, which ends it; and its group is what is left to end
            )
        generator = cls(process, port, key, settings, log)
        closing.callback(generator.close)
        generator._wait()
        [base] = [model for model in generator._call("GET", "/v1/models")["data"] if model["id"] == vllm.BASE_NAME]
        generator.model = _model_without_weights(
            settings["base"], spec.model.trust_remote_code, base.get("max_model_len")
        )
        return generator

    def _wait(self) -> None:
        while True:
            if fault := self.fault():
                print(self.log.read_text(encoding="utf-8", errors="replace")[-4000:], flush=True)
                raise Refusal(fault)
            try:
                connection = self._connection(timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.2)

    def fault(self) -> Problem | None:
        """Why it is gone; None while it lives."""
        if self.process.poll() is None:
            return None
        return problem("vllm-died", name=self.settings["name"], why=vllm.error_line(self.log))

    def close(self) -> None:
        """End it and whatever it has started, which may outlive it; come back when it is gone."""
        try:
            self.process.terminate()
            self.process.wait(VLLM_KILL_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    # ---- the interface of Generator

    def submit(self, answer: Answer) -> None:
        """Have an answer written."""
        self.answers.add(answer)
        threading.Thread(target=self._write, args=(answer,), daemon=True).start()

    def call(self, act: Callable[[], Any]) -> Future[Any]:
        """`act` done: nothing here has to be done by one thread."""
        future: Future[Any] = Future()
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)
        return future

    def waiting(self) -> int:
        """How many answers are not finished."""
        return len(self.answers)

    def load_adapter(self, folder: str) -> None:
        """Have it take in the adapter in `folder`. Raises Refusal if it must not or cannot."""
        with self.loading:
            if folder in self.names:
                return
            name = f"adapter{len(self.names)}"
            if problems := vllm.problems({}, {Path(folder).parent.name: Path(folder)}, self.settings["vllm"]["rank"]):
                raise Refusal(problems)
            self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
            self.names[folder] = name

    # ---- requests

    def _write(self, answer: Answer) -> None:
        try:
            for ids, tokens, finish in self._pieces(answer):
                if answer.cancelled:
                    answer.end("cancelled")
                    return
                for id, token in zip(ids, tokens, strict=True):
                    if answer.take(id, token):
                        return
                if finish:
                    answer.end("length" if finish == "length" else "stop")
                    return
            raise ConnectionError("the answer broke off")
        except Exception as error:  # the client waits for an end, whatever it is
            if answer.cancelled:  # its connection was shut down
                answer.end("cancelled")
                return
            if not isinstance(error, Refusal | OSError | http.client.HTTPException):
                traceback.print_exc()
            reason = error.problems[0] if isinstance(error, Refusal) else self.fault()
            answer.end("error", why=reason or problem("chat-error", why=str(error) or type(error).__name__))
        finally:
            self.answers.discard(answer)

    def _pieces(self, answer: Answer) -> Iterator[tuple[list[int], list[TokenLogprob | None], str | None]]:
        """What is new each time: the tokens, what they had of probability, and how the answer has ended."""
        how = answer.sampling
        body = {
            "model": self.names[answer.adapter] if answer.adapter else vllm.BASE_NAME,
            "prompt": answer.prompt,
            "max_tokens": answer.max_tokens,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": how.top_k,
            "repetition_penalty": how.repetition_penalty,
            "presence_penalty": how.presence_penalty,
            "frequency_penalty": how.frequency_penalty,
            "seed": how.seed,
            "stop_token_ids": sorted(answer.stop_token_ids),
            "ignore_eos": not answer.stop_token_ids,
            "stream": True,
            "return_token_ids": True,
        }
        if answer.logprobs is not None:
            body |= {"logprobs": answer.logprobs, "return_tokens_as_token_ids": True}
        connection = self._connection()
        try:
            connection.connect()
            answer.wake = partial(_shut_down, connection.sock)
            if answer.cancelled:
                return
            for line in self._send(connection, "POST", "/v1/completions", body):
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise Refusal(problem("chat-error", why=event["error"].get("message", "—")))
                for choice in event["choices"]:
                    ids = choice.get("token_ids") or []
                    yield (
                        ids,
                        _tokens(ids, choice.get("logprobs"), answer.logprobs),
                        choice.get("finish_reason"),
                    )
        finally:
            connection.close()  # before its end this tells vLLM that nobody reads on

    def _connection(self, timeout: float | None = None) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any = None
    ) -> http.client.HTTPResponse:
        """Its response. Raises Refusal with what it says where it refuses."""
        heads = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        connection.request(method, path, body=None if body is None else json.dumps(body), headers=heads)
        response = connection.getresponse()
        if response.status == 200:
            return response
        text = response.read().decode("utf-8", "replace")
        with suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["error"]["message"]
        raise Refusal(problem("chat-error", why=text[:300] or response.status))

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        connection = self._connection()
        try:
            content = self._send(connection, method, path, body).read()
            return json.loads(content) if content.startswith(b"{") else content
        except (OSError, http.client.HTTPException) as error:
            raise Refusal(self.fault() or problem("chat-error", why=error)) from error
        finally:
            connection.close()


def _die_with_us() -> None:
    """In the child: whatever ends this process ends that one, too."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _shut_down(sock: socket.socket) -> None:
    """End a connection that another thread may be reading from: only a shutdown wakes it, and tells vLLM to stop."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _model_without_weights(base: str, remote_code: bool, context: int | None) -> Any:
    """What served models need of a model, without its weights. `context`: the tokens that fit into the GPU's memory."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=remote_code)
    text = config.get_text_config()
    known = [length for length in (getattr(text, "max_position_embeddings", None), context) if length]
    text.max_position_embeddings = min(known) if known else None
    return SimpleNamespace(config=config, generation_config=GenerationConfig.from_model_config(config))


def _tokens(ids: list[int], logprobs: Any, count: int | None) -> list[TokenLogprob | None]:
    """The log-probabilities of tokens; None for each where none were requested."""
    if count is None or not logprobs:
        return [None] * len(ids)
    tokens: list[TokenLogprob | None] = []
    for id, logprob, likely in zip(
        ids, logprobs["token_logprobs"], logprobs["top_logprobs"] or [{}] * len(ids), strict=True
    ):
        top = sorted(
            ((int(name.rpartition(":")[2]), value) for name, value in (likely or {}).items()), key=lambda pair: -pair[1]
        )
        tokens.append(TokenLogprob(id, logprob, top[:count]))
    return tokens
