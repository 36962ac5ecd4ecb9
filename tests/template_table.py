"""Every chat template that can be had × every kind of conversation: is exactly what should be trained trained?

    python -m tests.template_table [--only NAME …] [--kind NAME] [--package NAME] [--show] [--fetch] [--write]

Prints a line per result that is wrong, then the counts. `--show` prints the renderings, what is trained between ⟦ and ⟧.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from typing import Any

from engine.problems import Refusal
from engine.worker.conversations import end_of_turn_ids
from tests.families import Seen, encode
from tests.templates import sources
from tests.templates.facts import Facts
from tests.templates.oracle import Verdict, judge
from tests.templates.rows import Conversation, conversations
from tests.templates.sources import Template

logging.getLogger("transformers").setLevel(logging.ERROR)


def results(template: Template, kind: str = "") -> dict[str, Verdict]:
    """Name of each conversation → what became of it."""
    facts = Facts.of(template)
    every = conversations(facts.after_question, facts.after_answer, facts.between_turns)
    made = [conversation for conversation in every if kind in conversation.name]
    try:
        stops = {facts.tokenizer.eos_token_id, *end_of_turn_ids(facts.tokenizer)}
        examples = encode(facts.tokenizer, *(conversation.row for conversation in made))
    except Refusal as refusal:
        stops = set()
        examples = [Seen("refused", False, refusal.problems[0]) for _ in made]
    verdicts = {}
    for conversation, example in zip(made, examples, strict=True):
        verdicts[conversation.name] = checked(facts, conversation, example, stops)
    return verdicts


def checked(facts: Facts, conversation: Conversation, example: Any, stops: set[int]) -> Verdict:
    verdict = judge(facts, conversation, example, stops)
    openers = {facts.tokenizer.convert_tokens_to_ids(token) for token in facts.openers} & stops
    if verdict.state == "right" and openers:
        names = facts.tokenizer.convert_ids_to_tokens(sorted(openers))
        return Verdict(
            "wrong",
            "opener stops",
            f"generation stops at {names}",
            verdict.lost,
            verdict.text,
            verdict.trained,
        )
    return verdict


def shown(verdict: Verdict) -> str:
    """The rendering, with what is trained in brackets."""
    pieces, at = [], 0
    for begin, end in verdict.trained:
        pieces += [verdict.text[at:begin], "⟦", verdict.text[begin:end], "⟧"]
        at = end
    return "".join([*pieces, verdict.text[at:]])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.template_table", description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="NAME", help="templates whose name contains one of these"
    )
    parser.add_argument("--package", default="", help="templates of this package alone")
    parser.add_argument("--kind", default="", help="conversations whose name contains this")
    parser.add_argument("--show", action="store_true", help="print renderings, with what is trained marked")
    parser.add_argument("--all", action="store_true", help="details of every result, not of wrong ones alone")
    parser.add_argument("--fetch", action="store_true", help="fetch the packages first")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.fetch:
        sources.fetch()
    chosen = [
        template
        for template in sources.every()
        if options.package in template.package
        and (not options.only or any(name in str(template) for name in options.only))
    ]
    states, rules, refusals = Counter(), Counter(), Counter()
    for template in chosen:
        for name, verdict in results(template, options.kind).items():
            states[verdict.state] += 1
            if verdict.state == "wrong":
                rules[verdict.rule] += 1
            elif verdict.state == "refused":
                refusals[verdict.rule] += 1
            if options.all or verdict.state == "wrong":
                print(f"{template} · {name}: {verdict.state} {verdict.rule} {verdict.detail}")
                if options.show:
                    print("    " + shown(verdict).replace("\n", "⏎\n    "))
    print(
        f"\n{len(chosen)} templates:", ", ".join(f"{count} {state}" for state, count in states.most_common())
    )
    print("wrong:", dict(rules.most_common()))
    print("refused:", dict(refusals.most_common()))
    return 1 if states["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
