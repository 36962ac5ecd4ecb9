"""Models that are measured: a base and its adapters with one base in memory, their answers and their losses."""

from __future__ import annotations

import gc
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from engine.core.problems import Problem, Refusal, problem
from engine.evaluation.evaluation_spec import Generation
from engine.spec.model_settings import Model
from engine.spec.run_spec import RunSpec
from engine.worker.data.examples import IGNORED, Encoder, Example
from engine.worker.evaluation.questions import Question
from engine.worker.generation.detokenizer import Wording
from engine.worker.generation.generator import Answer, Piece, Writer
from engine.worker.generation.sampling import Sampling
from engine.worker.generation.served_models import Voice, voice
from engine.worker.models.loading import DTYPES, load_base, precision
from engine.worker.models.tokenizer import load_tokenizer

LOGITS = 1 << 27  # numbers of fp32 in the logits of one forward pass, at most, unless one row alone has more
FAR = 1 << 20  # tokens: what a model reads that does not say how much


class Told(NamedTuple):
    """One answer: its text, tokens, and whether it ended by itself. `problem`: it could not be asked."""

    text: str = ""
    tokens: int = 0
    ended: bool = False
    problem: Problem | None = None


@dataclass
class Speakers:
    """A model in memory and whoever speaks with it. End it before the next is loaded.

    `own` is how the model in `path` was loaded; `adapters` are folders by name, and `base` is the name of the model
    itself, if it is to be asked."""

    writer: Writer
    own: RunSpec
    path: str
    adapters: dict[str, str]
    base: str | None

    @classmethod
    def load(
        cls, model: Model, path: str, adapters: dict[str, str], base: str | None, at_once: int
    ) -> Speakers:
        """The model in `path`, loaded as `model` says, with `adapters` beside it."""
        own = RunSpec.read({"model": model.model_dump()})
        loaded = load_base(own, path, DTYPES[precision(own)]).requires_grad_(False).eval()
        speakers = cls(Writer(loaded, at_once), own, path, adapters, base)
        for folder in adapters.values():
            speakers.writer.call(lambda folder=folder: speakers.writer.load_adapter(folder)).result()
        return speakers

    @property
    def theirs(self) -> RunSpec:
        """How the tokenizer of an adapter is read: it has the template of its run with it."""
        return self.own.change("model.chat_template", None)

    @cached_property
    def voices(self) -> dict[str, Voice]:
        """Everybody, ready to be asked. Raises Refusal where one of them cannot be asked anything."""
        model = self.writer.model
        found = {
            name: voice(name, folder, self.theirs, model, adapter=True)
            for name, folder in self.adapters.items()
        }
        if self.base:
            instead = next(iter(found.values()), None)
            found[self.base] = voice(self.base, self.path, self.own, model, adapter=False, instead=instead)
        return found

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """That of a voice, read anew. As among voices, a base without a template has the tokenizer of its first adapter."""
        if name in self.adapters:
            return load_tokenizer(self.theirs, self.adapters[name])
        own = load_tokenizer(self.own, self.path)
        if own.chat_template or not self.adapters:
            return own
        return self.tokenizer(next(iter(self.adapters)))

    def with_model(self, name: str, act: Callable[[], Any]) -> Any:
        """What `act` answers, called by the thread that writes while the model is that of the voice `name`."""

        def acted() -> Any:
            self.writer.use(self.adapters.get(name))
            return act()

        return self.writer.call(acted).result()

    def end(self) -> None:
        """Free the memory."""
        self.writer.end()
        self.__dict__.pop("voices", None)
        self.writer.model = self.writer.adapted = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def answers(
        self, name: str, asked: Sequence[Question], how: Generation
    ) -> Iterator[tuple[Question, Told]]:
        """The answers of a voice, as they come. Raises Refusal where the memory does not suffice."""
        speaking, arrived, wanted = self.voices[name], queue.SimpleQueue[tuple[Question, Told]](), []
        for question in asked:
            try:
                prompt = speaking.prompt(question.messages, question.tools)
                if not prompt:
                    raise Refusal(problem("evaluate-empty-prompt", name=name))
            except Refusal as refusal:
                arrived.put((question, Told(problem=refusal.problems[0])))
                continue
            room = speaking.context - len(prompt) if speaking.context else FAR
            wanted.append(Answer(
                adapter=speaking.adapter, prompt=prompt, most=min(how.max_new_tokens, room), ends=speaking.ends,
                sampling=Sampling(how.temperature, how.top_p, seed=how.seed + question.row),
                wording=Wording(speaking.words), tell=_collector(question, arrived.put),
            ))  # fmt: skip
        self.writer.ask_all(wanted)
        for _ in asked:
            question, told = arrived.get()
            if told.problem and told.problem.code in ("chat-memory", "chat-error"):
                raise Refusal(told.problem)
            yield question, told

    def losses(self, name: str, asked: Sequence[Question]) -> Iterator[list[tuple[Question, float, int]]]:
        """For rows with an answer: the sum of −log p over the tokens that a training would learn, and how many these
        are; 0 of 0 where there is nothing to learn, or the row is longer than the model reads."""
        speaking = self.voices[name]
        # What is too long is left out, not cut: half an answer is another answer.
        encoder = Encoder(speaking.tokenizer, "chat", speaking.context or FAR, too_long="drop")
        examples = list(zip(asked, encoder.examples([one.chat for one in asked]), strict=True))
        examples.sort(key=lambda one: len(one[1].values[0]))
        for batch in _batches(examples, self.writer.model.config.get_text_config().vocab_size):
            rows = [example for _, example in batch]
            found = self.with_model(name, lambda rows=rows: losses(self.writer.model, rows))
            yield [(question, *loss) for (question, _), loss in zip(batch, found, strict=True)]


def _collector(question: Question, put: Callable[[tuple[Question, Told]], None]) -> Callable[[Piece], None]:
    texts: list[str] = []

    def tell(piece: Piece) -> None:
        texts.append(piece.text)
        if piece.finish:
            put((question, Told("".join(texts), piece.count, piece.finish == "stop", piece.problem)))

    return tell


def _batches(examples: Sequence[Any], vocabulary: int) -> Iterator[list[Any]]:
    """Neighbours together, as many as the logits of a forward pass may be large."""
    batch: list[Any] = []
    for one in examples:
        longest = max(len(one[1].values[0]), 1)  # the examples come in the order of their length
        if batch and (len(batch) + 1) * longest * vocabulary > LOGITS:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


@torch.inference_mode()
def losses(model: Any, examples: Sequence[Example]) -> list[tuple[float, int]]:
    """For each example the sum of −log p of its trained tokens, in fp32, and how many they are."""
    there = [one for one in examples if len(one.values[0])]
    told = iter(_summed(model, there) if there else [])
    return [next(told) if len(one.values[0]) else (0.0, 0) for one in examples]


def _summed(model: Any, examples: Sequence[Example]) -> list[tuple[float, int]]:
    ids = [torch.from_numpy(one.values[0].astype("int64")) for one in examples]
    labels = [_labels(one, each) for one, each in zip(examples, ids, strict=True)]
    padded = pad_sequence(ids, batch_first=True).to(model.device)
    mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True).to(model.device)
    targets = pad_sequence(labels, batch_first=True, padding_value=IGNORED)[:, 1:]
    # Logits only where a token that counts follows: of a long question with a short answer nearly none are needed.
    places = (targets != IGNORED).any(0).nonzero().squeeze(-1)
    if not len(places):
        return [(0.0, 0)] * len(examples)
    logits = model(
        input_ids=padded, attention_mask=mask, use_cache=False, logits_to_keep=places.to(model.device)
    ).logits
    targets = targets[:, places].to(model.device)
    # A base beside an adapter that brings embeddings has no probability for what the adapter has learned to write.
    unknown = (targets >= logits.shape[-1]).any(1, keepdim=True)
    targets = targets.masked_fill(unknown, IGNORED)
    each = cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    sums, counts = each.double().sum(1).tolist(), (targets != IGNORED).sum(1).tolist()
    return list(zip(sums, counts, strict=True))


def _labels(example: Example, ids: Tensor) -> Tensor:
    labels = torch.full_like(ids, IGNORED)
    for begin, end in example.trained:
        labels[begin:end] = ids[begin:end]
    return labels
