"""Whether exactly that of a conversation is trained which has to be, by unique words in each message.

An example is right if its ids are the template's own rendering, every word of an answer that is
rendered is trained and no other message's word is, each answer is a run of its own that begins where
the generation prompt ends, and behind it exactly one end of turn is trained, at which generation stops.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.worker.data.examples import IGNORE_INDEX
from tests.templates.facts import Facts
from tests.templates.reading import (
    FOREIGN_KINDS,
    TRAINED_KINDS,
    Expected,
    Reading,
    places,
    sound,
    variants,
    with_ids_of,
)
from tests.templates.rows import Conversation


@dataclass
class Verdict:
    """`state`: right, refused, raises (the template itself does), or wrong;
    then `rule` is the one that does not hold."""

    state: str
    rule: str = ""
    detail: str = ""
    lost: set[str] = field(default_factory=set)
    text: str = ""
    trained: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Token:
    """A token of an example, and the characters of the rendering that it holds."""

    id: int
    begin: int
    end: int
    trained: bool


class Wrong(Exception):
    """A rule that does not hold: its name, and how."""


def judge(facts: Facts, conversation: Conversation, example: Any, stops: set[int]) -> Verdict:
    """`example`: input_ids, labels, status and reason, as the engine made it. `stops`: where generation stops."""
    reading, good = _reading(facts, conversation, example)
    if not example.usable:
        code = example.reason.code if example.reason else example.status
        state = "refused" if good else "loses" if reading else "raises"
        lost = _lost(conversation, reading.text) if reading else set()
        return Verdict(state, code, lost=lost, text=reading.text if reading else "")
    if reading is None:
        return Verdict("wrong", "ids", "the template raises")
    tokens, added = [], ""
    try:
        tokens, added = aligned(facts, conversation, example, reading.text)
        if not good:
            raise Wrong("lossy", "the arguments or a whole answer are not written as they should be")
        check_words(facts, conversation, reading.text, tokens)
        check_runs(facts, reading.text + added, tokens, list(reading.expected(added)), stops)
    except Wrong as wrong:
        rule, detail = wrong.args
        verdict = Verdict("wrong", rule, detail)
    else:
        verdict = Verdict("right")
    verdict.text, verdict.trained = reading.text + added, runs_of(tokens)
    verdict.lost = _lost(conversation, reading.text)
    return verdict


def _lost(conversation: Conversation, text: str) -> set[str]:
    """The kinds of words that the template does not write."""
    return {mark.kind for mark in conversation.marks if mark.word not in text}


def _reading(facts: Facts, conversation: Conversation, example: Any) -> tuple[Reading | None, bool]:
    """The conversation in the first spelling that the template writes soundly, if one is, and that the ids are, if one
    is; and whether it is sound."""
    spelled = b"".join(facts.spellings[token] for token in example.input_ids)
    readings: list[tuple[Reading, bool]] = []
    for messages in variants(conversation):
        text = facts.render(messages, conversation.tools, forged=conversation.forged)
        if text is None:
            continue
        messages, text = with_ids_of(messages, text, spelled.decode(errors="replace"))
        reading = Reading(facts, conversation, messages, text)
        readings.append((reading, sound(text, conversation)))
        if readings[-1][1] and (not example.usable or spelled.startswith(text.encode())):
            return reading, True
    same = [pair for pair in readings if example.usable and spelled.startswith(pair[0].text.encode())]
    return max(same or readings, key=lambda pair: pair[1], default=(None, False))


def aligned(facts: Facts, conversation: Conversation, example: Any, text: str) -> tuple[list[Token], str]:
    """The tokens of an example, and what was added behind the rendering. Raises Wrong."""
    tokenizer = facts.tokenizer
    pieces = [facts.spellings[token] for token in example.input_ids]
    spelled, rendered, added = b"".join(pieces), text.encode(), ""
    if spelled != rendered:
        if not spelled.startswith(rendered) or len(pieces[-1]) != len(spelled) - len(rendered):
            pairs = enumerate(zip(spelled, rendered, strict=False))
            common = next((at for at, (a, b) in pairs if a != b), min(len(spelled), len(rendered)))
            near = spelled[max(0, common - 30) : common + 40].decode(errors="replace")
            raise Wrong("ids", f"not the template's: … {near!r}")
        added = pieces[-1].decode()
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not conversation.forged and own != list(example.input_ids[: len(own)]):
        raise Wrong("ids", "the text is the template's, but tokenized differently")
    char_at = [at for at, char in enumerate(text + added) for _ in char.encode()] + [len(text + added)]
    tokens, byte = [], 0
    for piece, token, label in zip(pieces, example.input_ids, example.labels, strict=True):
        if label not in (IGNORE_INDEX, token):
            raise Wrong("ids", "a label that is no id")
        begin, byte = byte, byte + len(piece)
        end = max(char_at[byte], char_at[byte - 1] + 1)
        tokens.append(Token(token, char_at[begin], end, label != IGNORE_INDEX))
    return tokens, added


def runs_of(tokens: list[Token]) -> list[tuple[int, int]]:
    """The trained stretches of characters."""
    runs: list[tuple[int, int]] = []
    before = False
    for token in tokens:
        if token.trained:
            runs = [*runs[:-1], (runs[-1][0], token.end)] if before else [*runs, (token.begin, token.end)]
        before = token.trained
    return runs


def check_words(facts: Facts, conversation: Conversation, text: str, tokens: list[Token]) -> None:
    """Raises Wrong where a word of an answer is not trained, another's is, or data forged a control token."""
    runs = runs_of(tokens)
    for mark in conversation.marks:
        for begin, end in places(text, mark.word):
            where = f"{mark.kind} of message {mark.message + 1}: {near(text, begin)}"
            inside = any(first <= begin and end <= last for first, last in runs)
            touched = any(first < end and begin < last for first, last in runs)
            if mark.kind in TRAINED_KINDS and not inside:
                raise Wrong("answer untrained", where)
            if mark.kind in FOREIGN_KINDS and touched:
                raise Wrong("other's trained", where)
    if conversation.forged:
        # The marks of a thought are what they seem to be in an answer: the model writes them itself.
        forged = [token for token in conversation.forged if "think" not in token.lower()]
        special = {facts.tokenizer.convert_tokens_to_ids(token) for token in forged}
        for message in range(len(conversation.messages)):
            words = [p for m in conversation.marks if m.message == message for p in places(text, m.word)]
            first, last = min(words, default=(0, 0))[0], max(words, default=(0, 0))[1]
            if any(token.id in special and first <= token.begin < last for token in tokens):
                raise Wrong("forged", f"message {message + 1} writes a control token")


def check_runs(facts: Facts, text: str, tokens: list[Token], expected: list[Expected], stops: set[int]) -> None:
    """Raises Wrong where a run begins or ends elsewhere than expected, is missing, or is one too many."""
    runs = runs_of(tokens)
    for group in joined(expected, runs):
        run = _run_of(group[0], runs)
        check_end(facts, group[-1], text, run, stops)
        check_start(group[0], text, run, tokens)
        runs.remove(run)
    closing = expected[-1].ends[0][1] if expected and expected[-1].ends else len(text)
    for begin, end in runs:
        # A template may write a second end behind the last one (Phi 3), and mark it.
        if begin < closing or {unit.text for unit in facts.units(text[begin:end])} - set(facts.enders):
            raise Wrong("other's trained", f"a span too many: {text[begin:end][:60]!r}")


def _run_of(answer: Expected, runs: list[tuple[int, int]]) -> tuple[int, int]:
    at = answer.latest if answer.word is None else answer.word
    around = [run for run in runs if run[0] <= at < run[1]] or [run for run in runs if run[0] >= answer.first]
    if not around:
        raise Wrong("no span", f"message {answer.message + 1}")
    return around[0]


def check_end(facts: Facts, answer: Expected, text: str, run: tuple[int, int], stops: set[int]) -> None:
    """The run ends with the token that ends the turn, if generation stops there, else before it."""
    end, where = len(text[: run[1]].rstrip()), f"message {answer.message + 1}"
    if not answer.ends:
        raise Wrong("no end", f"{where}: the template ends this answer with no token: {near(text, end)}")
    allowed, behind = set(), False
    for begins, ends in answer.ends:
        if facts.tokenizer.convert_tokens_to_ids(text[begins:ends]) in stops:
            allowed.add(ends)
        else:
            allowed.add(len(text[:begins].rstrip()))
            behind = behind or end == ends
    if end not in allowed and behind:
        raise Wrong("stop", f"{where} ends with {text[:end][-20:]!r}, where generation goes on")
    if end not in allowed:
        raise Wrong("end", f"{where} ends at {near(text, end)}, not at {near(text, answer.ends[0][1])}")


def check_start(answer: Expected, text: str, run: tuple[int, int], tokens: list[Token]) -> None:
    """The run begins where it may, or with an ordinary token that holds this place."""
    starts = set(range(answer.first, answer.latest + 1))
    starts |= {place for t in tokens if t.begin <= answer.first < t.end for place in (t.begin, t.end)}
    if run[0] not in starts:
        where = f"message {answer.message + 1} begins at {near(text, run[0])}"
        raise Wrong("start", f"{where}, not at {near(text, answer.latest)}")


def joined(expected: list[Expected], runs: list[tuple[int, int]]) -> list[list[Expected]]:
    """Answers that are one run: nothing separates them, or the generation prompt adds nothing to an answer, so that a
    model would go on by itself with what opens the next."""
    groups: list[list[Expected]] = []
    for answer in expected:
        previous = groups[-1][-1] if groups else None
        follows = previous and answer.first in {end for _, end in previous.ends}
        one_run = previous and any(begin <= previous.first and answer.latest < end for begin, end in runs)
        if previous and (previous.merged or (follows and one_run)):
            groups[-1].append(answer)
        else:
            groups.append([answer])
    return groups


def near(text: str, at: int) -> str:
    return repr(text[max(0, at - 40) : at] + "⟨here⟩" + text[at : at + 30])
