"""Tries a chat template with every kind of conversation: the engine makes the examples, the oracle judges them."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core.problems import Problem, Refusal
from engine.worker.data.examples import ROW_STATUSES, USABLE_STATUSES, Encoder, Example, examples_table
from engine.worker.templates.conversations import end_of_turn_ids
from tests.templates.facts import Facts
from tests.templates.oracle import Verdict, judge
from tests.templates.rows import Conversation, conversations
from tests.templates.sources import Template

LENGTH = 100_000  # more tokens than any of the conversations has


@dataclass
class Encoded:
    """A conversation as a trainer will see it; `reason`: why it is refused."""

    usable: bool
    reason: Problem | None
    status: str = "refused"
    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def results(template: Template, kind: str = "") -> dict[str, Verdict]:
    """Name of each conversation, if it contains `kind` → what became of it."""
    facts = Facts.of(template)
    every = conversations(facts.after_question, facts.after_answer, facts.between_turns)
    made = [conversation for conversation in every if kind in conversation.name]
    stops: set[int] = set()
    try:
        stops = {facts.tokenizer.eos_token_id, *end_of_turn_ids(facts.tokenizer)}
        encoded = encode(facts, made)
    except Refusal as refusal:
        encoded = [Encoded(False, refusal.problems[0]) for _ in made]
    return {
        conversation.name: checked(facts, conversation, example, stops)
        for conversation, example in zip(made, encoded, strict=True)
    }


def encode(facts: Facts, made: list[Conversation]) -> list[Encoded]:
    examples: list[Example] = Encoder(facts.tokenizer, "chat", LENGTH).examples([each.row for each in made])
    columns = examples_table("chat", examples).select(["input_ids", "labels", "status"]).to_pylist()
    return [
        Encoded(
            row["status"] < USABLE_STATUSES,
            example.reason,
            ROW_STATUSES[row["status"]],
            row["input_ids"],
            row["labels"],
        )
        for row, example in zip(columns, examples, strict=True)
    ]


def checked(facts: Facts, conversation: Conversation, example: Encoded, stops: set[int]) -> Verdict:
    """The oracle's verdict; wrong also where generation would stop at a token that opens messages."""
    verdict = judge(facts, conversation, example, stops)
    openers = {facts.tokenizer.convert_tokens_to_ids(token) for token in facts.openers} & stops
    if verdict.state == "right" and openers:
        names = facts.tokenizer.convert_ids_to_tokens(sorted(openers))
        verdict.state, verdict.rule, verdict.detail = "wrong", "opener stops", f"generation stops at {names}"
    return verdict


def shown(verdict: Verdict) -> str:
    """The rendering, with what is trained in brackets."""
    pieces, at = [], 0
    for begin, end in verdict.trained:
        pieces += [verdict.text[at:begin], "⟦", verdict.text[begin:end], "⟧"]
        at = end
    return "".join([*pieces, verdict.text[at:]])
