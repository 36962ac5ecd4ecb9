"""Masks with the templates of families and with miniatures of their habits,
judged by an oracle that knows no mask code."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.worker.data.examples import IGNORE_INDEX
from tests.templates.facts import Facts
from tests.templates.miniatures import MINIATURES
from tests.templates.oracle import judge
from tests.templates.rows import FORGED, KINDS, Conversation
from tests.templates.sources import Template, installed, strings_in
from tests.templates.trial import Encoded, encode, results

# With these a template itself may raise, or write what no mask can be right for; such rows are refused.
MAY_BE_REFUSED = {
    "system", "system, turns", "developer", "call, text", "empty middle", "empty last", "greeting", "two answers",
}  # fmt: skip
LOSES_CALLS = dict.fromkeys(
    ["call", "call, text", "call, no id", "parallel", "two rounds", "ends in call", "reasoning, call"],
    "loses",
)
ONE_TURN = {"one turn", "system", "developer", *LOSES_CALLS}
# Miniature → conversations that are not simply right.
NOT_RIGHT = {
    **{
        name: LOSES_CALLS
        for name in (
            "indented",
            "always opens",
            "two steps",
            "reads thoughts",
            "marked, no calls",
            "marked with header",
            "no last end",
            "merges",
            "bos per exchange",
            "system in the last question",
            "parts",
            "parts of contents",
            "prompt opens a thought",
        )
    },
    "headers agree by chance": {"greeting": "refused"},
    "text behind the result": {"call, text": "refused"},
    "merges": LOSES_CALLS | {"two answers": "refused"},
    "no tokens": LOSES_CALLS | {kind: "refused" for kind in [*KINDS, FORGED] if kind not in ONE_TURN},
}
CHATML = next(template for template in installed() if template.name == "qwen2_5")


@pytest.mark.parametrize("template", installed(), ids=str)
def test_with_a_familys_template_exactly_the_answers_are_trained(template: Template) -> None:
    verdicts = results(template)
    assert {kind: verdict.detail for kind, verdict in verdicts.items() if verdict.state == "wrong"} == {}
    refused = {kind for kind, verdict in verdicts.items() if verdict.state == "refused"}
    assert refused <= MAY_BE_REFUSED


@pytest.mark.parametrize("template", MINIATURES, ids=lambda template: template.name)
def test_with_a_miniature_exactly_the_answers_are_trained(template: Template) -> None:
    verdicts = results(template)
    others = {kind: verdict.state for kind, verdict in verdicts.items() if verdict.state != "right"}
    assert others == NOT_RIGHT.get(template.name, {}), [
        verdict.detail for verdict in verdicts.values() if verdict.state == "wrong"
    ]


def flipped(example: Encoded, places: list[int], trained: bool) -> Encoded:
    labels = list(example.labels)
    for place in places:
        labels[place] = example.input_ids[place] if trained else IGNORE_INDEX
    return Encoded(True, None, "kept", example.input_ids, labels)


def trained_places(example: Encoded) -> list[int]:
    return [place for place, label in enumerate(example.labels) if label != IGNORE_INDEX]


def first_end(example: Encoded) -> int:
    places = trained_places(example)
    return next(place for place in places if place + 1 not in places)


# What is done to a right example → the rule that no longer holds.
FAULTS: dict[str, Callable[[Encoded], Encoded]] = {
    "answer untrained": lambda e: flipped(e, [trained_places(e)[3]], False),
    "other's trained": lambda e: flipped(e, list(range(len(e.input_ids))), True),
    "end": lambda e: flipped(e, [first_end(e)], False),
    "start": lambda e: flipped(e, [trained_places(e)[0] - 2], True),
    "ids": lambda e: Encoded(True, None, "kept", [*e.input_ids[:-1], 5], [*e.labels[:-1], IGNORE_INDEX]),
}


@pytest.mark.parametrize("rule", FAULTS)
def test_the_oracle_sees_a_fault(rule: str) -> None:
    facts = Facts.of(CHATML)
    conversation = KINDS["three turns"](Conversation("three turns"))
    (example,) = encode(facts, [conversation])
    end = facts.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert judge(facts, conversation, example, {end}).state == "right"
    faulty = FAULTS[rule](example)
    if rule == "start":  # the place before the header's last token, and that token with it
        faulty = flipped(faulty, [trained_places(example)[0] - 1], True)
    verdict = judge(facts, conversation, faulty, {end})
    assert (verdict.state, verdict.rule) == ("wrong", rule), verdict.detail


def test_the_oracle_sees_one_token_too_many_behind_an_answer() -> None:
    facts = Facts.of(CHATML)
    conversation = KINDS["three turns"](Conversation("three turns"))
    (example,) = encode(facts, [conversation])
    end = first_end(example)
    verdict = judge(facts, conversation, flipped(example, [end + 1, end + 2], True), {example.input_ids[end]})
    assert (verdict.state, verdict.rule) == ("wrong", "end"), verdict.detail


def test_the_oracle_sees_an_end_at_which_generation_goes_on() -> None:
    facts = Facts.of(CHATML)
    conversation = KINDS["one turn"](Conversation("one turn"))
    (example,) = encode(facts, [conversation])
    verdict = judge(facts, conversation, example, set())
    assert (verdict.state, verdict.rule) == ("wrong", "stop"), verdict.detail


def test_the_oracle_sees_a_span_too_many() -> None:
    facts = Facts.of(CHATML)
    conversation = KINDS["one turn"](Conversation("one turn"))
    (example,) = encode(facts, [conversation])
    verdict = judge(facts, conversation, flipped(example, [0], True), {example.input_ids[first_end(example)]})
    assert (verdict.state, verdict.rule) == ("wrong", "other's trained"), verdict.detail


def test_templates_are_read_out_of_a_program_that_is_not_run() -> None:
    program = (
        'end = "<|im_end|>"\n'
        'base_template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"\n'
        'other_template = base_template.replace("m.content", "m.role")\n'
        'made_template = open("/nowhere").read()\n'
    )
    assert dict(strings_in(program)) == {
        "base": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        "other": "{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}",
    }
