"""Writes the answers: one base model in memory, one thread that uses it, and as many answers at once as there are.

Answers of the same voice (the base, or one of its adapters) are written as one batch, which an answer may join and
leave at any token: its prompt is read alone, then its keys and values are put beside those of the others, padded on
the left. Batches of different voices take turns of a few tokens. Models whose cache is more than keys and values of
all tokens (sliding windows, recurrent states) write each answer in a batch of its own.

What is asked and told over HTTP is left to `engine.worker.serving.openai_api`.
"""

from __future__ import annotations

import inspect
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from engine.core.problems import Problem, problem
from engine.worker.generation.detokenizer import Wording
from engine.worker.generation.sampling import Sampling, choose
from engine.worker.models.embeddings import fit_vocabulary

AT_ONCE = 16  # answers in one batch: each costs keys and values of all its tokens
TURN = 4  # tokens that a batch writes before another voice has its turn


@dataclass(frozen=True)
class Token:
    """One token of an answer: its log-probability of all that the model gave it, and the most likely ones in its place."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """What is new of an answer. `finish` with the last one: "stop", "length", "cancelled" or "error"."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    count: int = 0  # of the answer's tokens so far
    finish: str = ""
    problem: Problem | None = None


@dataclass(eq=False)
class Answer:
    """One answer that is wanted. `tell` is called from the writing thread, at last with a `finish`."""

    adapter: str | None  # None: the base itself
    prompt: list[int]
    most: int  # tokens
    ends: frozenset[int]  # tokens that end it
    sampling: Sampling
    wording: Wording
    tell: Callable[[Piece], None]
    logprobs: int | None = None  # how many likely tokens to tell of in each place; None: nothing
    cancelled: bool = False
    wake: Callable[[], None] | None = None  # has a writer that waits for something look at `cancelled`
    # while it is being written
    source: torch.Generator = field(init=False)
    written: list[int] = field(default_factory=list)
    untold: list[Token] = field(default_factory=list)
    finish: str = ""

    def __post_init__(self) -> None:
        self.source = self.sampling.generator()

    def cancel(self) -> None:
        """Have it end where it is. May be called from any thread."""
        self.cancelled = True
        if self.wake:
            self.wake()

    def take(self, token: int, told: Token | None) -> bool:
        """One more token. Returns whether the answer has ended with it."""
        if token in self.ends:
            return self.end("stop")
        self.written.append(token)
        if told:
            self.untold.append(told)
        text = self.wording.add(token)
        if self.wording.stopped or len(self.written) >= self.most:
            return self.end("stop" if self.wording.stopped else "length", text)
        if text:
            self.tell(Piece(text, tuple(self.untold), len(self.written)))
            self.untold.clear()
        return False

    def end(self, finish: str, text: str = "", why: Problem | None = None) -> bool:
        self.finish = finish
        text += self.wording.rest()
        self.tell(Piece(text, tuple(self.untold), len(self.written), finish, why))
        return True


class Batch:
    """Answers of one voice that are written together, row by row."""

    def __init__(self, model: PreTrainedModel, adapter: str | None, at_once: int = AT_ONCE):
        self.model, self.adapter, self.at_once = model, adapter, at_once
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.clear()

    def clear(self) -> None:
        """Forget every row."""
        self.rows: list[Answer] = []
        self.cache = DynamicCache(config=self.model.config)
        self.mask = torch.empty(0, 0, dtype=torch.long, device=self.model.device)  # (B, T): 0 where padded
        self.last = torch.empty(0, dtype=torch.long, device=self.model.device)  # (B,): not yet read

    def has_room(self) -> bool:
        """Whether another answer can join."""
        if not self.rows:
            return True
        plain = all(type(layer) is DynamicLayer for layer in self.cache.layers)
        return plain and len(self.rows) < self.at_once

    def join(self, answer: Answer) -> None:
        """Read the prompt of an answer and write its first token; if it is not its last, it is a row from now on."""
        prompt = torch.tensor([answer.prompt], device=self.model.device)
        cache = DynamicCache(config=self.model.config)
        mask = torch.ones_like(prompt)
        logits = self._read(prompt, mask, cache)
        [token] = self._write([answer], logits)
        if token is None:
            return
        if self.rows:
            width = max(self.mask.shape[1], mask.shape[1])
            for ours, theirs in zip(self.cache.layers, cache.layers, strict=True):
                ours.keys = torch.cat([_wide(ours.keys, width), _wide(theirs.keys, width)])
                ours.values = torch.cat([_wide(ours.values, width), _wide(theirs.values, width)])
            self.mask = torch.cat([pad(one, (width - one.shape[1], 0)) for one in (self.mask, mask)])
            self.last = torch.cat([self.last, token[None]])
        else:
            self.cache, self.mask, self.last = cache, mask, token[None]
        self.rows.append(answer)

    def step(self) -> None:
        """One more token for each row; those that end leave."""
        gone = [row.cancelled and row.end("cancelled") for row in self.rows]
        self._leave([not one for one in gone])
        if not self.rows:
            return
        self.mask = pad(self.mask, (0, 1), value=1)
        tokens = self._write(self.rows, self._read(self.last[:, None], self.mask, self.cache))
        self._leave([token is not None for token in tokens])
        if self.rows:
            self.last = torch.stack([token for token in tokens if token is not None])

    def _read(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """The logits (B, V) behind the last of `ids` (B, t), in fp32."""
        given: dict[str, Any] = {}
        if self.takes_positions:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        read = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **given,
        )
        return read.logits[:, -1].float()

    def _write(self, rows: list[Answer], logits: Tensor) -> list[Tensor | None]:
        """The next token of each row; None for a row that has ended with it."""
        chosen = torch.stack([
            choose(one, row.prompt, row.written, row.sampling, row.source)
            for row, one in zip(rows, logits, strict=True)
        ])  # fmt: skip
        told = [_token(row, one, token) for row, one, token in zip(rows, logits, chosen, strict=True)]
        ids = chosen.tolist()  # the one moment that waits for the device
        return [
            None if row.take(id, what) else token
            for row, id, what, token in zip(rows, ids, told, chosen, strict=True)
        ]

    def _leave(self, stays: list[bool]) -> None:
        if all(stays):
            return
        if not any(stays):
            self.clear()
            return
        self.rows = [row for row, stay in zip(self.rows, stays, strict=True) if stay]
        kept = torch.tensor([i for i, stay in enumerate(stays) if stay], device=self.mask.device)
        self.last, mask = self.last[kept], self.mask[kept]
        empty = int((mask.sum(0) == 0).cumprod(0).sum())  # columns that only those who left had
        self.mask = mask[:, empty:]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[kept][:, :, empty:], layer.values[kept][:, :, empty:]


def _wide(states: Tensor, width: int) -> Tensor:
    """Keys or values (B, heads, t, size) padded on the left to `width` tokens."""
    return pad(states, (0, 0, width - states.shape[-2], 0))


def _token(row: Answer, logits: Tensor, chosen: Tensor) -> Token | None:
    if row.logprobs is None:
        return None
    shares = logits.log_softmax(-1)
    top = shares.topk(row.logprobs) if row.logprobs else None
    likely = list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else []
    return Token(int(chosen), float(shares[chosen]), likely)


class Writer:
    """The thread that uses the model. `ask` for an answer; `call` has something else done with the model meanwhile."""

    def __init__(self, model: PreTrainedModel, at_once: int = AT_ONCE):
        self.model = model  # adapters are put into its layers: it stays the object that is called
        self.at_once = at_once  # answers that are written at once, whoever's
        self.over = False
        self.adapted: PeftModel | None = None
        self.names: dict[str, str] = {}  # folder of an adapter → its name in peft, which takes no dots
        self.active: str | None = None
        self.asked: queue.Queue[Answer | Callable[[], None]] = queue.Queue()
        self.batches: list[Batch] = []
        threading.Thread(target=self._run, daemon=True, name="writer").start()

    def ask(self, answer: Answer) -> None:
        """Have an answer written."""
        self.asked.put(answer)

    def call(self, act: Callable[[], Any]) -> Future[Any]:
        """Have `act` done by the writing thread, between two tokens."""
        future: Future[Any] = Future()

        def done() -> None:
            try:
                future.set_result(act())
            except BaseException as error:
                future.set_exception(error)

        self.asked.put(done)
        return future

    def ask_all(self, answers: Sequence[Answer]) -> None:
        """Have answers written in this order, none begun before all are known: so what is in a batch together does not
        depend on how fast they were asked for, and the same questions get the same answers."""

        def all_of_them() -> None:
            for answer in answers:
                self.ask(answer)

        self.call(all_of_them).result()

    def end(self) -> None:
        """End the thread, which else would keep the model in memory. Nothing may be asked any more."""
        self.call(lambda: setattr(self, "over", True)).result()

    def fault(self) -> Problem | None:
        """Why it is gone: never, since it ends with the process that asks."""
        return None

    def load_adapter(self, folder: str) -> None:
        """Put the adapter in `folder` beside the others. To be called by `call`."""
        if folder in self.names:
            return
        name = f"adapter{len(self.names)}"
        fit_vocabulary(self.adapted.get_base_model() if self.adapted else self.model, [folder])
        if self.adapted is None:
            self.adapted = PeftModel.from_pretrained(self.model, folder, adapter_name=name).eval()
        else:
            self.adapted.load_adapter(folder, adapter_name=name)
        self.names[folder] = name
        self.active = "?"  # peft may have made it the active one

    def waiting(self) -> int:
        """How many answers are wanted and not finished; of those not begun, about."""
        return sum(len(batch.rows) for batch in self.batches) + self.asked.qsize()

    def _run(self) -> None:
        pending: list[Answer] = []
        while not self.over:
            pending = self._heard(pending)
            for batch in list(self.batches):
                self.use(batch.adapter)
                turn = TURN if len(self.batches) > 1 else 1
                self._guarded(batch, lambda batch=batch, turn=turn: [batch.step() for _ in range(turn)])
            self.batches = [batch for batch in self.batches if batch.rows]

    def _heard(self, pending: list[Answer]) -> list[Answer]:
        """Do what was asked for meanwhile; wait for it where there is nothing else to do. Returns who found no room."""
        with suppress(queue.Empty):
            while True:
                one = self.asked.get(block=not self.batches and not pending)
                if isinstance(one, Answer):
                    pending.append(one)
                else:
                    one()
        left = []
        for answer in pending:
            if answer.cancelled:
                answer.end("cancelled")
            elif batch := self._room(answer.adapter):
                self.use(answer.adapter)
                self._guarded(batch, lambda batch=batch, answer=answer: batch.join(answer), answer)
            else:
                left.append(answer)
        return left

    def _room(self, adapter: str | None) -> Batch | None:
        for batch in self.batches:
            if batch.adapter == adapter and batch.has_room():
                return batch
        if sum(len(batch.rows) for batch in self.batches) >= self.at_once:
            return None
        self.batches.append(Batch(self.model, adapter, self.at_once))
        return self.batches[-1]

    def use(self, adapter: str | None) -> None:
        """Have the model be the base, or the base with the adapter in that folder. To be called by the thread."""
        if self.adapted is None or self.active == adapter:
            return
        if adapter is None:
            self.adapted.base_model.disable_adapter_layers()
        else:
            self.adapted.base_model.enable_adapter_layers()
            self.adapted.set_adapter(self.names[adapter], inference_mode=True)
        self.active = adapter

    def _guarded(self, batch: Batch, act: Callable[[], None], joining: Answer | None = None) -> None:
        """An error ends the answers that met it, and nothing else."""
        try:
            with torch.inference_mode():
                act()
        except Exception as error:
            traceback.print_exc()
            short = isinstance(error, torch.OutOfMemoryError)
            why = (
                problem("chat-memory")
                if short
                else problem("chat-error", why=f"{type(error).__name__}: {error}")
            )
            # Only the one that joins is lost if it fails while its prompt is read; the others have not been touched.
            for answer in [joining] if joining else batch.rows:
                answer.end("error", why=why)
            if not joining:
                batch.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
