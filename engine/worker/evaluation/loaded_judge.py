"""A judge in memory: how its prompts are cut to its context, and how its scores and choices are read.

They are read off the probabilities of the next token where the tokenizer allows it (`judge_choices`), otherwise from
the text that it writes.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

from engine.core.problems import Problem, Refusal, problem
from engine.core.reasoning import split_reasoning
from engine.evaluation import judge as rules
from engine.evaluation.evaluation_settings import Judge
from engine.evaluation.judge import SCORES, SIDES
from engine.worker.evaluation.judge_choices import Choices, choice_probabilities, single_token_choices
from engine.worker.evaluation.respond import DEFAULT_CONTEXT, LoadedModels
from engine.worker.generation.answer import Answer, Piece
from engine.worker.generation.detokenizer import Detokenizer
from engine.worker.generation.sampling import Sampling
from engine.worker.generation.served_models import ServedModel

JUDGE_NAME = "judge"  # the name of the judge among loaded models
CUT_TOKENS = 24  # that the mark of a cut may take
MARK_TOKENS = 48  # that the marks around the texts may have in addition, if a text contains the usual ones
LABEL_TOKENS = 16  # that the label of a choice may take, and the choice

Key = tuple[str, str, int]


class Item(NamedTuple):
    """Something to judge: one answer to score, or two to compare, ours first. `kind`: "score" or "comparison", of the
    model called `model`, or "thumb" or "preference" of a rated row."""

    kind: str
    model: str
    row: int
    question: str
    reference: str | None
    answers: tuple[str, ...]

    @property
    def key(self) -> Key:
        return self.kind, self.model, self.row


@dataclass
class LoadedJudge:
    """The judge in memory; it is freed at the end of a `with` block."""

    settings: Judge
    loaded: LoadedModels

    @classmethod
    def load(cls, settings: Judge, batch_size: int) -> LoadedJudge:
        model = rules.judge_model(settings)
        adapters = {JUDGE_NAME: model.adapter} if model.adapter else {}
        base = None if model.adapter else JUDGE_NAME
        path = model.model.model_name_or_path
        return cls(settings, LoadedModels.load(model.model, path, adapters, base, batch_size))

    def __enter__(self) -> LoadedJudge:
        return self

    def __exit__(self, *_: object) -> None:
        self.loaded.end()

    @cached_property
    def served(self) -> ServedModel:
        return self.loaded.models[JUDGE_NAME]

    @cached_property
    def words(self) -> Mapping[str, Any]:
        return rules.texts(self.settings.language)

    @cached_property
    def obstacle(self) -> Problem | None:
        """Why choices cannot be read off the probabilities, so that the judge's text has to be; None: they can."""
        prompt = self.served.prompt([{"role": "user", "content": "?"}], thinking=False)
        if self.served.opens_reasoning(prompt):
            return problem("judge-reasons-first")
        return None if self.scores and self.sides else problem("judge-without-digits")

    @cached_property
    def scores(self) -> Choices | None:
        begun = ("\n" if self.settings.reason else "") + self.words["score_begun"]
        return single_token_choices(self.served.tokenizer, begun, SCORES, self.words["joints"])

    @cached_property
    def sides(self) -> Choices | None:
        begun = self.words["compare_begun"]
        return single_token_choices(self.served.tokenizer, begun, SIDES, self.words["joints"])

    def facts(self) -> dict[str, Any]:
        """What the judge is and is asked, for the report."""
        model, example = rules.judge_model(self.settings), {"question": "{question}", "reference": "{reference}"}
        prompts = {
            "score": rules.score_prompt(self.settings, **example, answer="{answer}"),
            "compare": rules.compare_prompt(self.settings, **example, first="{first}", second="{second}"),
        }
        obstacle = self.obstacle
        return {
            "title": model.title,
            "model": model.model.model_name_or_path,
            "adapter": model.adapter,
            "language": self.settings.language,
            "criterion": rules.criterion(self.settings),
            "prompts": prompts,
            "reads": "text" if obstacle else "probabilities",
            "why": obstacle and {"code": obstacle.code, "values": {}},
            "tokens": None if obstacle else {"scores": self.scores, "sides": self.sides},
        }

    def judge(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """A line for each item, in the same order."""
        known: dict[Key, dict[str, Any]] = {}
        for ask, count in ((self._score, 1), (self._compare, 2)):
            prompts: list[tuple[Item, int, list[list[int]]]] = []
            for item in (item for item in items if len(item.answers) == count):
                try:
                    prompts.append((item, *self._prompts(item)))
                except Refusal as refusal:
                    why = refusal.problems[0]
                    values = {name: str(value) for name, value in why.values.items()}
                    known[item.key] = {"problem": {"code": why.code, "values": values}}
            parts = ask([prompt for *_, own in prompts for prompt in own]) if prompts else []
            for at, (item, cut, _) in enumerate(prompts):
                known[item.key] = self._line(parts[at * count : (at + 1) * count]) | ({"cut": cut} if cut else {})
        return [{"kind": item.kind, "voice": item.model, "row": item.row, **known[item.key]} for item in items]

    def _line(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The result of one prompt, or of both orders."""
        if len(parts) == 1:
            return parts[0]
        return {"verdict": rules.verdict(parts[0]["side"], parts[1]["side"]), "orders": list(parts)}

    # ---- prompts

    def _prompts(self, item: Item) -> tuple[int, list[list[int]]]:
        """The number of characters that were cut, and the tokens of the prompt; of both orders for two answers. Raises
        Refusal if there is no room for them."""
        texts = [item.question, *([] if item.reference is None else [item.reference]), *item.answers]
        tokens = [self._count(text) for text in texts]
        room = min(self._room(item), self.settings.max_input_tokens)
        cuts = [self._cut(text, own) for text, own in zip(texts, rules.room_of_each(tokens, room), strict=True)]
        question, *rest = [text for text, _ in cuts]
        reference = None if item.reference is None else rest.pop(0)
        orders = [rest] if len(rest) == 1 else [rest, rest[::-1]]
        prompts = [self._prompt(question, reference, answers) for answers in orders]
        return sum(cut for _, cut in cuts), prompts

    def _prompt(self, question: str, reference: str | None, answers: Sequence[str]) -> list[int]:
        ask = rules.score_prompt if len(answers) == 1 else rules.compare_prompt
        content = ask(self.settings, question, reference, *answers)
        return self.served.prompt([{"role": "user", "content": content}], thinking=False)

    def _room(self, item: Item) -> int:
        """Tokens that the judge's context leaves for question, reference and answers. Raises Refusal."""
        empty = self._prompt("", None if item.reference is None else "", [""] * len(item.answers))
        context = self.served.context or DEFAULT_CONTEXT
        room = context - len(empty) - self.settings.max_reason_tokens - 2 * LABEL_TOKENS - MARK_TOKENS
        if room < CUT_TOKENS * (2 + len(item.answers)):
            raise Refusal(problem("judge-no-room", context=context, asked=len(empty)))
        return room

    def _count(self, text: str) -> int:
        return len(self.served.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _cut(self, text: str, tokens: int) -> tuple[str, int]:
        """A text with at most about this many tokens: its beginning and its end, with a mark between them; and the
        number of characters left out."""
        offsets = self.served.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) <= tokens:
            return text, 0
        side = max((tokens - CUT_TOKENS) // 2, 0)
        begin = offsets[side][0]
        end = offsets[len(offsets) - side][0] if side else len(text)
        return text[:begin] + self.words["cut"].format(count=end - begin) + text[end:], end - begin

    # ---- replies

    def _score(self, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
        if self.obstacle:
            return [self._read_score(prompt, reply) for prompt, reply in self._texts(prompts)]
        assert self.scores  # otherwise there is an obstacle
        reasons = [""] * len(prompts)
        if self.settings.reason:
            begun = self._ids(self.words["reason_begun"])
            stops = ("\n", self.words["score_begun"])
            replies = self._write([[*prompt, *begun] for prompt in prompts], self.settings.max_reason_tokens, stops)
            reasons = [reply.strip() for reply in replies]
            prompts = [
                [*prompt, *begun, *self._ids(f"{self.words['joints'][0]}{reason}")]
                for prompt, reason in zip(prompts, reasons, strict=True)
            ]
        probabilities = self._probabilities(prompts, self.scores)
        return [
            {"score": rules.expected_score(shares), "share": sum(shares), "probabilities": shares}
            | ({"reason": reason} if reason else {})
            for shares, reason in zip(probabilities, reasons, strict=True)
        ]

    def _compare(self, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
        if self.obstacle:
            return [
                {"side": rules.written_side(reply, self.settings, opened=self.served.opens_reasoning(prompt))}
                for prompt, reply in self._texts(prompts)
            ]
        assert self.sides  # otherwise there is an obstacle
        shares = self._probabilities(prompts, self.sides)
        return [{"side": rules.preferred(own), "probabilities": own} for own in shares]

    def _read_score(self, prompt: list[int], reply: str) -> dict[str, Any]:
        opened = self.served.opens_reasoning(prompt)
        score = rules.written_score(reply, self.settings, opened=opened)
        reason = split_reasoning(reply, opened=opened).answer.strip()
        return {"score": score} | ({"reason": reason} if self.settings.reason and reason else {})

    def _probabilities(self, prompts: Sequence[list[int]], choices: Choices) -> list[list[float]]:
        whole = [[*prompt, *choices.begun] for prompt in prompts]
        model = self.loaded.generator.model
        return self.loaded.with_model(JUDGE_NAME, partial(choice_probabilities, model, whole, choices.tokens))

    def _texts(self, prompts: Sequence[list[int]]) -> Iterator[tuple[list[int], str]]:
        replies = self._write(prompts, self.settings.max_reason_tokens + LABEL_TOKENS)
        return zip(prompts, replies, strict=True)

    def _ids(self, text: str) -> list[int]:
        return self.served.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _write(self, prompts: Sequence[list[int]], max_tokens: int, stops: Sequence[str] = ()) -> list[str]:
        """What the judge writes after each of the prompts, greedily. Raises Refusal if memory is insufficient."""
        arrived: queue.SimpleQueue[tuple[int, str, Problem | None]] = queue.SimpleQueue()
        self.loaded.generator.submit_all(
            [
                Answer(
                    adapter=self.served.adapter,
                    prompt=list(prompt),
                    max_tokens=max_tokens,
                    stop_token_ids=self.served.stop_token_ids,
                    sampling=Sampling(seed=number),
                    detokenizer=Detokenizer(self.served.backend_tokenizer, stops),
                    on_piece=_collector(number, arrived),
                )
                for number, prompt in enumerate(prompts)
            ]
        )
        texts = [""] * len(prompts)
        for _ in prompts:
            number, text, why = arrived.get()
            if why:
                raise Refusal(why)
            texts[number] = text
        return texts


def _collector(number: int, arrived: queue.SimpleQueue[tuple[int, str, Problem | None]]) -> Any:
    pieces: list[str] = []

    def on_piece(piece: Piece) -> None:
        pieces.append(piece.text)
        if piece.finish:
            arrived.put((number, "".join(pieces), piece.problem))

    return on_piece
