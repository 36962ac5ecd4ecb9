"""The probe at the end of an SFT run: a few prompts, answered by the model before and after training.

`engine.evaluation.probe` explains its results. It runs on rank 0, after the result has been saved; if it fails, the
error is only printed; and it leaves the random state unchanged. If the trained weights are an adapter of their own, the
model without it is the model before training; otherwise its answers are taken before training starts.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from engine.core.rundir import RunDir, write_json
from engine.evaluation import probe
from engine.evaluation.probe import (
    MAX_ANSWER_TOKENS,
    MAX_PROMPT_TOKENS,
    MAX_REFERENCE_TOKENS,
    MAX_TRAINING_PROMPTS,
)
from engine.spec.run_spec import RunSpec
from engine.worker.data.examples import IGNORE_INDEX, Example
from engine.worker.data.images_column import IMAGES_COLUMN
from engine.worker.evaluation.respond import losses
from engine.worker.generation.answer import Answer, Piece
from engine.worker.generation.detokenizer import Detokenizer
from engine.worker.generation.generator import Batch
from engine.worker.generation.sampling import Sampling
from engine.worker.runtime.process_lifecycle import rank
from engine.worker.runtime.sharding import shards_weights, zero_stage
from engine.worker.templates.conversations import end_of_turn_ids

MAX_EXAMPLES_EXAMINED = 64  # spread over the data: some of them should be short enough
# Shares of one model's time: until when prompts are processed, and until when answers are generated; the rest is for
# losses.
PREFILL_TIME_SHARE, ANSWER_TIME_SHARE = 0.4, 0.8
EXTRA_LOSS_SECONDS = 2.0  # beyond the budget, for losses without which general prompts would have no verdict
BEFORE_TRAINING_SECONDS = 10.0  # budget before the training, whose length is not yet known


@dataclass
class ProbePrompt:
    """One prompt. `reference`: token ids whose loss is computed; for a general prompt, the model's own earlier answer.
    `ids`: the tokens of the prompt."""

    kind: str
    ids: list[int]
    text: str  # of the prompt, for display
    reference: list[int] = field(default_factory=list)
    before: str | None = None  # None: there was no time
    after: str | None = None
    finish_before: str | None = None  # "stop", "length", or "cancelled" when time ran out
    finish_after: str | None = None
    loss_before: float | None = None  # also if it is NaN or infinite
    loss_after: float | None = None
    took_before: bool = False
    took_after: bool = False


@dataclass
class Probe:
    """A probe of one run, from before its training to its end."""

    spec: RunSpec
    run: RunDir
    tokenizer: Any
    prompts: list[ProbePrompt]
    began: float = field(default_factory=time.monotonic)

    @property
    def late(self) -> bool:
        """Whether the model before training is also available at the end: an adapter that started at zero, turned
        off."""
        method = self.spec.method
        moved = getattr(method, "init_lora_weights", "") in ("pissa", "olora")  # these change the base itself
        return method.kind == "lora" and not self.spec.model.adapter_path and not moved


def begin(spec: RunSpec, run: RunDir, model: Any, tokenizer: Any, data: Any) -> Probe | None:
    """Choose the prompts; if necessary, have the model answer them before training. None if there is no probe."""
    if spec.stage.kind != "sft" or not spec.logging.probe or rank():
        return None
    if shards_weights() or zero_stage() == 3:
        print("No probe: rank 0 alone cannot answer with weights that are divided.", flush=True)
        return None
    with _isolated():
        run_probe = Probe(
            spec, run, tokenizer, [*_training_prompts(data["train"], tokenizer), *_general_prompts(tokenizer)]
        )
        if not run_probe.late:
            _measure_model(run_probe, model, "before", BEFORE_TRAINING_SECONDS)
        run_probe.began = time.monotonic()
        return run_probe
    return None


def finish(run_probe: Probe | None, model: Any) -> None:
    """Ask the trained model, and write probe.json. `model`: without the training's wrappers."""
    if run_probe is None:
        return
    with _isolated():
        began = time.monotonic()
        allowed = probe.budget(began - run_probe.began)
        # If the model before training is also available, each gets half of the time, the trained one first.
        _measure_model(run_probe, model, "after", allowed / 2 if run_probe.late else allowed)
        if run_probe.late:
            with model.disable_adapter():
                _measure_model(run_probe, model, "before", allowed - (time.monotonic() - began))
        with _evaluation_mode(model) as inner:
            answered = [prompt for prompt in run_probe.prompts if prompt.kind == "general" and prompt.reference]
            _take_losses(inner, answered, "after", began + allowed + EXTRA_LOSS_SECONDS)
        report = _probe_report(run_probe) | {
            "budget_s": round(allowed, 2),
            "seconds": round(time.monotonic() - began, 2),
        }
        write_json(run_probe.run.probe, report)
        print(
            f"probe: {report['verdict']}, general prompts: {report['general_verdict']} ({report['seconds']} s)",
            flush=True,
        )


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Nothing in here may affect or end the run: errors are printed, and the random state is restored."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    except Exception:
        traceback.print_exc()
        print("The probe failed; the run did not.", flush=True)


# --------------------------------------------------------------------------------------------- prompts


def _training_prompts(rows: Any, tokenizer: Any) -> list[ProbePrompt]:
    """Prompts of some training examples, spread over the data, each with its first answer."""
    prompts: list[ProbePrompt] = []
    for at in dict.fromkeys(np.linspace(0, len(rows) - 1, min(MAX_EXAMPLES_EXAMINED, len(rows))).astype(int).tolist()):
        if rows[at].get(IMAGES_COLUMN):
            continue  # its ids alone are not all that the model is trained on
        for ids, labels in _examples(rows[at]):
            begin, end = _span(labels)
            if begin <= 1:  # everything is trained: the second half is treated as the answer to the first
                begin, end = len(ids) // 2, len(ids)
            if 0 < begin <= MAX_PROMPT_TOKENS and begin < end:
                prompt, reference = list(ids[:begin]), list(ids[begin:end][:MAX_REFERENCE_TOKENS])
                text = tokenizer.decode(prompt, skip_special_tokens=True)
                prompts.append(ProbePrompt("training", prompt, text, reference))
    chosen = np.linspace(0, len(prompts) - 1, min(MAX_TRAINING_PROMPTS, len(prompts))).astype(int)
    return [prompts[at] for at in chosen]


def _examples(row: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of a prepared row, or of each of those packed into it."""
    at = 0
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        yield row["input_ids"][at : at + length], row["labels"][at : at + length]
        at += length


def _span(labels: Sequence[int]) -> tuple[int, int]:
    """Where the first trained tokens begin and end."""
    trained = np.asarray(labels) != IGNORE_INDEX
    if not trained.any():
        return 0, 0
    begin = int(trained.argmax())
    rest = trained[begin:]
    return begin, begin + (len(rest) if rest.all() else int((~rest).argmax()))


def _general_prompts(tokenizer: Any) -> list[ProbePrompt]:
    prompts = []
    for text in probe.general_prompts():
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        prompts.append(ProbePrompt("general", ids, text))
    return prompts


# --------------------------------------------------------------------------------------------- answers


@contextlib.contextmanager
def _evaluation_mode(model: Any) -> Iterator[Any]:
    """The model in evaluation mode."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    trains = inner.training
    inner.eval()
    try:
        yield inner
    finally:
        inner.train(trains)


def _measure_model(run_probe: Probe, model: Any, when: str, seconds: float) -> None:
    """Answers and losses of the current model, as far as time allows. Answers come first, since people read them. All
    are generated in parallel, so that too little time cuts all of them short and drops none."""
    began = time.monotonic()
    with _evaluation_mode(model) as inner:
        answers = _answers(run_probe, inner, began + PREFILL_TIME_SHARE * seconds, began + ANSWER_TIME_SHARE * seconds)
        for prompt, answer in answers:
            setattr(prompt, when, answer.text)
            setattr(prompt, f"finish_{when}", answer.finish)
            if when == "before" and prompt.kind == "general" and answer.tokens:
                prompt.reference = answer.tokens
        kinds = {"training"} if when == "after" else {"training", "general"}
        with_reference = [prompt for prompt in run_probe.prompts if prompt.reference and prompt.kind in kinds]
        _take_losses(inner, with_reference, when, began + seconds)


def _take_losses(model: Any, prompts: Sequence[ProbePrompt], when: str, deadline: float) -> None:
    """The losses of the references, the first of each kind in any case. One by one: there are few, and each needs no
    more memory than in training."""
    taken: set[str] = set()
    for prompt in prompts:
        if prompt.kind in taken and time.monotonic() > deadline:
            continue
        taken.add(prompt.kind)
        ids = np.array([*prompt.ids, *prompt.reference], dtype=np.int32)
        [(total, count)] = losses(model, [Example((ids,), trained=[(len(prompt.ids), len(ids))])])
        value = total / max(count, 1)
        setattr(prompt, f"loss_{when}", value if np.isfinite(value) else None)
        setattr(prompt, f"took_{when}", True)


@dataclass
class GreedyAnswer:
    """A greedy answer, and how it ended: "stop", "length", or "cancelled" if time ran out."""

    tokens: list[int]
    text: str
    finish: str


def _answers(run_probe: Probe, model: Any, joining: float, deadline: float) -> list[tuple[ProbePrompt, GreedyAnswer]]:
    """The answers to as many prompts as are processed until `joining`, the first of each kind in any case."""
    ends = model.generation_config.eos_token_id
    known = [] if ends is None else [ends] if isinstance(ends, int) else ends
    stops = frozenset([*known, *end_of_turn_ids(run_probe.tokenizer)])
    batch = Batch(model, None)
    begun: list[tuple[ProbePrompt, Answer, list[str]]] = []
    with torch.inference_mode():
        for prompt in _interleaved(run_probe.prompts):
            late = time.monotonic() > joining
            if not batch.has_room() or (late and any(prompt.kind == other.kind for other, _, _ in begun)):
                continue
            texts: list[str] = []
            answer = Answer(
                adapter=None,
                prompt=prompt.ids,
                max_tokens=MAX_ANSWER_TOKENS,
                stop_token_ids=stops,
                sampling=Sampling(),
                detokenizer=Detokenizer(run_probe.tokenizer.backend_tokenizer),
                on_piece=partial(_keep_text, texts),
            )
            begun.append((prompt, answer, texts))
            batch.join(answer)
        while batch.rows:
            if time.monotonic() > deadline:
                for _, answer, _ in begun:
                    answer.cancelled = True
            batch.step()
    return [(prompt, GreedyAnswer(answer.written, "".join(texts), answer.finish)) for prompt, answer, texts in begun]


def _keep_text(texts: list[str], piece: Piece) -> None:
    texts.append(piece.text)


def _interleaved(prompts: Sequence[ProbePrompt]) -> Iterator[ProbePrompt]:
    """Two training prompts, one general, and so on, since there may not be time for all."""
    training, general = ([prompt for prompt in prompts if prompt.kind == kind] for kind in ("training", "general"))
    turns = zip_longest(training[::2], training[1::2], general)
    return filter(None, chain.from_iterable(turns))


# --------------------------------------------------------------------------------------------- verdicts


def _probe_report(run_probe: Probe) -> dict[str, Any]:
    """The content of probe.json, without what there was no time for."""
    decode = run_probe.tokenizer.decode
    prompts = [
        probe.with_verdicts(
            {
                "kind": prompt.kind,
                "prompt": prompt.text,
                "before": prompt.before,
                "after": prompt.after,
                "finish_before": prompt.finish_before,
                "finish_after": prompt.finish_after,
                "reference": decode(prompt.reference, skip_special_tokens=True) if prompt.kind == "training" else None,
                # A loss that was computed before and is NaN now counts; a loss for which there was no time does not.
                "loss_before": prompt.loss_before if prompt.took_after else None,
                "loss_after": prompt.loss_after,
            }
        )
        for prompt in run_probe.prompts
        if prompt.after is not None or (prompt.took_before and prompt.took_after)
    ]
    return probe.summary(prompts) | {
        "prompts": prompts,
        "learned": probe.CHANGED_LOSS_NATS,
        "forgot": probe.FORGOTTEN_LOSS_NATS,
    }
