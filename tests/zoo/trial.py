"""What becomes of a family: is its tiny model built, does its folder load, can it be trained on text alone?"""

from __future__ import annotations

import inspect
import multiprocessing
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from tests import zoo
from tests.zoo.sizes import TEXT_TOKENS

BATCH, LENGTH = 2, 24
TIME_LIMIT_SECONDS = 60


@dataclass
class Trial:
    """Of each step an empty text where it went well, the reason where it did not, None where it was not reached."""

    family: str
    class_name: str = ""
    parameters: int = 0
    build: str | None = None
    load: str | None = None
    train: str | None = None


def try_family(family: str) -> Trial:
    trial = Trial(family)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            zoo.build(family, folder)
            trial.build = ""
        except Exception as error:
            trial.build = reason(error)
            return trial
        try:
            model = load(family, folder)
            trial.class_name, trial.parameters = type(model).__name__, model.num_parameters()
            trial.load = differences(zoo.tiny(family)[0], model)
        except Exception as error:
            trial.load = reason(error)
            return trial
    try:
        train_step(model)
        trial.train = ""
    except Exception as error:
        trial.train = reason(error)
    return trial


def load(family: str, folder: Path) -> PreTrainedModel:
    """The folder's model as the family's class loads it, for training."""
    cls = zoo.model_class(family, AutoConfig.from_pretrained(folder))
    return cls.from_pretrained(folder, dtype=torch.float32).train()


def differences(built: PreTrainedModel, loaded: PreTrainedModel) -> str:
    """Which weights of a model its folder did not keep; empty where it kept all of them."""
    weights = dict(loaded.named_parameters())
    lost = [n for n, w in built.named_parameters() if n not in weights or not torch.equal(w, weights[n])]
    return f"{len(lost)} weights differ: {', '.join(lost[:3])}" if lost else ""


def train_step(model: PreTrainedModel) -> float:
    """The loss of random text, whose gradient is left in the weights.

    Raises:
        ValueError: the model gives no loss, an infinite one, or no gradient to any weight.
    """
    ids = torch.randint(3, TEXT_TOKENS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    loss = model(**inputs).loss
    if loss is None or not loss.isfinite():
        raise ValueError(f"the loss is {loss}")
    loss.backward()
    if not any(weight.grad is not None and weight.grad.any() for weight in model.parameters()):
        raise ValueError("no weight has a gradient")
    return loss.item()


def reason(error: Exception) -> str:
    """An exception in a line: its type, and what the last sentence that is not empty says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = next((line for line in lines if "Class validation error" not in line), "")
    return f"{type(error).__name__}: {text.removeprefix('ValueError: ')}"[:160]


def serve(pipe: Connection) -> None:
    """Try the families that come through a pipe, until None comes."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for family in iter(pipe.recv, None):
        pipe.send(try_family(family))


def trials(families: list[str]) -> Iterator[Trial]:
    """Each family's trial, in a child process that is replaced where one family hangs or kills it."""
    child: multiprocessing.process.BaseProcess | None = None
    for family in families:
        if child is None:
            pipe, other = multiprocessing.Pipe()
            child = multiprocessing.get_context("spawn").Process(target=serve, args=(other,), daemon=True)
            child.start()
            other.close()
            first = True
        pipe.send(family)
        try:
            if not pipe.poll(TIME_LIMIT_SECONDS * (2 if first else 1)):
                raise TimeoutError
            first = False
            yield pipe.recv()
        except (EOFError, ConnectionError, TimeoutError) as error:
            child.kill()
            child = None
            ended = not isinstance(error, TimeoutError)
            yield Trial(family, build="its process died" if ended else f"took over {TIME_LIMIT_SECONDS} seconds")
    if child is not None:
        pipe.send(None)
        child.join()
