"""Generate answers: one base model in memory, one thread that uses it, and any number of answers at once.

Answers of the same model (the base, or one of its adapters) form one batch, which an answer can join and leave at any
token: its prompt is processed alone, then its keys and values are added to those of the others, padded on the left.
Batches of different models take turns of a few tokens. Models whose cache is more than keys and values of all tokens
(sliding windows, recurrent states) generate each answer in its own batch.

Requests and responses over HTTP are left to `engine.worker.serving.openai_api`.
"""

from __future__ import annotations

import contextlib
import inspect
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from engine.core.problems import Problem, Refusal, problem
from engine.models.adapters import adapts_experts
from engine.worker.generation.answer import Answer, TokenLogprob
from engine.worker.generation.image_prompts import read_with_images
from engine.worker.generation.sampling import choose_token
from engine.worker.models.embeddings import fit_vocabulary, narrow_to_adapters

MAX_BATCH_SIZE = 16  # answers in one batch: each needs memory for keys and values of all its tokens
TOKENS_PER_TURN = 4  # tokens that a batch generates before another batch has its turn


class Batch:
    """Answers of one model that are generated together, row by row."""

    def __init__(self, model: PreTrainedModel, adapter: str | None, max_batch_size: int = MAX_BATCH_SIZE):
        self.model, self.adapter, self.max_batch_size = model, adapter, max_batch_size
        arguments = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in arguments
        # Training sets the routers' logits on for their loss, which cannot be computed for a single token.
        self.without_loss = {"output_router_logits": False} if "output_router_logits" in arguments else {}
        self.clear()

    def clear(self) -> None:
        """Forget every row."""
        self.rows: list[Answer] = []
        # What the layers keep of the processed tokens; None: they keep nothing, and all tokens are processed each time.
        self.cache: DynamicCache | None = DynamicCache(config=self.model.config)
        self.mask = torch.empty(0, 0, dtype=torch.long, device=self.model.device)  # (B, T): 0 for padding
        # (B,): the difference between positions and number of tokens, if images take fewer positions than tokens
        self.shifts = torch.empty(0, dtype=torch.long, device=self.model.device)
        self.last = torch.empty(0, dtype=torch.long, device=self.model.device)  # (B,): not yet processed

    def has_room(self) -> bool:
        """Whether another answer can join."""
        if not self.rows:
            return True
        plain = self.cache and all(type(layer) is DynamicLayer for layer in self.cache.layers)
        return bool(plain) and len(self.rows) < self.max_batch_size

    def join(self, answer: Answer) -> None:
        """Process the prompt of an answer and generate its first token; unless that is its last, it is a row from now
        on."""
        prompt = torch.tensor([answer.prompt], device=self.model.device)
        mask = torch.ones_like(prompt)
        shift = torch.zeros_like(prompt[:, 0])
        cache: DynamicCache | None
        if answer.image_inputs:
            cache = DynamicCache(config=self.model.config)
            inputs = answer.image_inputs() | self.without_loss
            logits, shift = read_with_images(self.model, prompt, mask, cache, inputs)
            if not any(map(_holds_state, cache.layers)):
                raise ValueError("the model keeps nothing of what it has read, so it cannot go on behind an image")
        else:
            logits, cache = self._read_prompt(prompt, mask)
        [token] = self._write([answer], logits)
        if token is None:
            return
        if self.rows:
            width = max(self.mask.shape[1], mask.shape[1])
            assert self.cache  # ensured by `has_room`
            assert cache
            layers: Iterator[tuple[Any, Any]] = zip(self.cache.layers, cache.layers, strict=True)
            for ours, theirs in layers:
                if ours.keys is None:
                    continue  # of a layer for images, and there are none
                ours.keys = torch.cat([_pad_left(ours.keys, width), _pad_left(theirs.keys, width)])
                ours.values = torch.cat([_pad_left(ours.values, width), _pad_left(theirs.values, width)])
            self.mask = torch.cat([pad(rows_mask, (width - rows_mask.shape[1], 0)) for rows_mask in (self.mask, mask)])
            self.last, self.shifts = torch.cat([self.last, token[None]]), torch.cat([self.shifts, shift])
        else:
            self.cache, self.mask, self.last, self.shifts = cache, mask, token[None], shift
        self.rows.append(answer)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        """Generate one more token for each row; those that end leave."""
        cancelled = [row.cancelled and row.end("cancelled") for row in self.rows]
        self._keep_rows([not is_cancelled for is_cancelled in cancelled])
        if not self.rows:
            return
        self.mask = pad(self.mask, (0, 1), value=1)
        ids = self.last[:, None]
        if self.cache is None:
            ids = torch.tensor([[*row.prompt, *row.written] for row in self.rows], device=self.model.device)
        tokens = self._write(self.rows, self._read(ids, self.mask, self.cache))
        self._keep_rows([token is not None for token in tokens])
        if self.rows:
            self.last = torch.stack([token for token in tokens if token is not None])

    def _read_prompt(self, prompt: Tensor, mask: Tensor) -> tuple[Tensor, DynamicCache | None]:
        """The logits after a prompt, and the cache that contains it; None if the model has its own kind of cache or
        none: a model that ignores the cache would continue from the last token alone, and one that puts its own tokens
        before the prompt (CPM-Ant) expects all tokens beside its cache."""
        cache = DynamicCache(config=self.model.config)
        with contextlib.suppress(ValueError, TypeError):
            logits = self._read(prompt, mask, cache)
            if any(map(_holds_state, cache.layers)) and cache.get_seq_length() <= prompt.shape[1]:
                return logits, cache
        return self._read(prompt, mask, None), None

    def _read(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        """The logits (B, V) after the last of `ids` (B, t), in fp32."""
        extra: dict[str, Any] = {}
        if self.takes_positions:
            extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            if len(self.shifts) == len(ids):
                extra["position_ids"] += self.shifts[:, None]
        read = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
            **self.without_loss,
            **extra,
        )
        return read.logits[:, -1].float()

    def _write(self, rows: list[Answer], logits: Tensor) -> list[Tensor | None]:
        """The next token of each row; None for a row that has ended with it."""
        chosen = torch.stack(
            [
                choose_token(row_logits, row.prompt, row.written, row.sampling, row.source)
                for row, row_logits in zip(rows, logits, strict=True)
            ]
        )
        logprobs = [
            _token_logprob(row, row_logits, token) for row, row_logits, token in zip(rows, logits, chosen, strict=True)
        ]
        ids = chosen.tolist()  # the only time that this waits for the device
        return [
            None if row.take(id, logprob) else token
            for row, id, logprob, token in zip(rows, ids, logprobs, chosen, strict=True)
        ]

    def _keep_rows(self, stays: list[bool]) -> None:
        if all(stays):
            return
        if not any(stays):
            self.clear()
            return
        self.rows = [row for row, stay in zip(self.rows, stays, strict=True) if stay]
        kept = torch.tensor([i for i, stay in enumerate(stays) if stay], device=self.mask.device)
        self.last, self.shifts, mask = self.last[kept], self.shifts[kept], self.mask[kept]
        empty = int((mask.sum(0) == 0).cumprod(0).sum())  # columns used only by those who left
        self.mask = mask[:, empty:]
        layers: list[Any] = self.cache.layers if self.cache else []
        for layer in layers:
            if layer.keys is None:
                continue
            layer.keys, layer.values = layer.keys[kept][:, :, empty:], layer.values[kept][:, :, empty:]


def _holds_state(layer: Any) -> bool:
    """Whether a layer of the cache keeps anything: keys, or the states of convolutions and recurrences."""
    states = [getattr(layer, name, None) for name in ("keys", "conv_states", "recurrent_states")]
    flat = [part for state in states for part in (state if isinstance(state, list) else [state])]
    return any(isinstance(part, Tensor) for part in flat)


def _pad_left(states: Tensor, width: int) -> Tensor:
    """Keys or values (B, heads, t, size) padded on the left to `width` tokens."""
    return pad(states, (0, 0, width - states.shape[-2], 0))


def _token_logprob(row: Answer, logits: Tensor, chosen: Tensor) -> TokenLogprob | None:
    if row.logprobs is None:
        return None
    shares = logits.log_softmax(-1)
    top = shares.topk(row.logprobs) if row.logprobs else None
    likely = list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else []
    return TokenLogprob(int(chosen), float(shares[chosen]), likely)


class Generator:
    """The thread that uses the model. `submit` adds an answer; `call` runs something else with the model."""

    def __init__(self, model: PreTrainedModel, max_batch_size: int = MAX_BATCH_SIZE):
        self.model = model  # adapters are put into its layers; the object that is called stays the same
        self.max_batch_size = max_batch_size  # answers that are generated at once, of all adapters
        self.over = False
        self.adapted: PeftModel | None = None
        self.names: dict[str, str] = {}  # folder of an adapter → its name in peft, which does not accept dots
        self.active: str | None = None
        self.requests: queue.Queue[Answer | Callable[[], None]] = queue.Queue()
        self.batches: list[Batch] = []
        threading.Thread(target=self._run, daemon=True, name="writer").start()

    def submit(self, answer: Answer) -> None:
        """Have an answer generated."""
        self.requests.put(answer)

    def call(self, act: Callable[[], Any]) -> Future[Any]:
        """Have `act` called by the generating thread, between two tokens."""
        future: Future[Any] = Future()

        def done() -> None:
            try:
                future.set_result(act())
            except BaseException as error:
                future.set_exception(error)

        self.requests.put(done)
        return future

    def submit_all(self, answers: Sequence[Answer]) -> None:
        """Have answers generated in this order, starting when all are known: so the composition of a batch does not
        depend on the timing of the requests, and the same questions get the same answers."""

        def all_of_them() -> None:
            for answer in answers:
                self.submit(answer)

        self.call(all_of_them).result()

    def end(self) -> None:
        """End the thread, which would otherwise keep the model in memory. No requests are allowed afterwards."""
        self.call(lambda: setattr(self, "over", True)).result()

    def fault(self) -> Problem | None:
        """Why it has ended: never, since it ends with its process."""
        return None

    def load_adapter(self, folder: str) -> None:
        """Load the adapter in `folder` next to the others. To be called by `call`. Raises Refusal for one on experts
        that are quantized."""
        if folder in self.names:
            return
        name = f"adapter{len(self.names)}"
        base: Any = self.adapted.get_base_model() if self.adapted else self.model
        if getattr(base, "has_quantized_experts", False) and adapts_experts(folder):
            raise Refusal(problem("adapter-on-quantized-experts", folder=folder))
        fit_vocabulary(base, [folder])
        if self.adapted is None:
            self.adapted = PeftModel.from_pretrained(self.model, folder, adapter_name=name).eval()
        else:
            self.adapted.load_adapter(folder, adapter_name=name)
        narrow_to_adapters(self.adapted)
        self.names[folder] = name
        self.active = "?"  # peft may have made it the active one

    def waiting(self) -> int:
        """The number of unfinished answers; approximate for those not started."""
        return sum(len(batch.rows) for batch in self.batches) + self.requests.qsize()

    def _run(self) -> None:
        pending: list[Answer] = []
        while not self.over:
            pending = self._take_requests(pending)
            for batch in list(self.batches):
                self.use(batch.adapter)
                turn = TOKENS_PER_TURN if len(self.batches) > 1 else 1
                self._catching_errors(batch, partial(batch.steps, turn))
            self.batches = [batch for batch in self.batches if batch.rows]

    def _take_requests(self, pending: list[Answer]) -> list[Answer]:
        """Handle pending requests; wait for them if there is nothing else to do. Returns the answers without room."""
        with suppress(queue.Empty):
            while True:
                request = self.requests.get(block=not self.batches and not pending)
                if isinstance(request, Answer):
                    pending.append(request)
                else:
                    request()
        waiting = []
        for answer in pending:
            if answer.cancelled:
                answer.end("cancelled")
            elif batch := self._batch_with_room(answer.adapter):
                self.use(answer.adapter)
                self._catching_errors(batch, partial(batch.join, answer), answer)
            else:
                waiting.append(answer)
        return waiting

    def _batch_with_room(self, adapter: str | None) -> Batch | None:
        for batch in self.batches:
            if batch.adapter == adapter and batch.has_room():
                return batch
        if sum(len(batch.rows) for batch in self.batches) >= self.max_batch_size:
            return None
        self.batches.append(Batch(self.model, adapter, self.max_batch_size))
        return self.batches[-1]

    def use(self, adapter: str | None) -> None:
        """Activate the base, or the adapter in that folder. To be called by the thread."""
        if self.adapted is None or self.active == adapter:
            return
        tuner: Any = self.adapted.base_model
        if adapter is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            self.adapted.set_adapter(self.names[adapter], inference_mode=True)
        self.active = adapter

    def _catching_errors(self, batch: Batch, act: Callable[[], None], joining: Answer | None = None) -> None:
        """An error ends the affected answers and nothing else."""
        try:
            with torch.inference_mode():
                act()
        except Exception as error:
            traceback.print_exc()
            short = isinstance(error, torch.OutOfMemoryError)
            why = problem("chat-memory") if short else problem("chat-error", why=f"{type(error).__name__}: {error}")
            # If processing the prompt fails, only the joining answer is lost; the others have not been touched.
            for answer in [joining] if joining else batch.rows:
                answer.end("error", why=why)
            if not joining:
                batch.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
