"""What of a conversation has to be trained, found without the engine: unique words in each message show where it is.

An example is right if its ids are the template's own rendering, every word of an answer that is rendered is trained and no
other message's word is, each answer is a run of its own that begins where the generation prompt ends, and behind it
exactly one end of turn is trained, at which generation stops.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.worker.examples import IGNORED
from tests.templates.facts import Facts
from tests.templates.rows import Conversation
from tests.templates.tokens import bytes_of

TRAINED_KINDS = {"text", "reasoning", "argument"}
FOREIGN_KINDS = {"system", "question", "result", "tool"}


@dataclass
class Verdict:
    """`state`: right, refused, raises (the template itself does), or wrong; then `rule` is the one that does not hold."""

    state: str
    rule: str = ""
    detail: str = ""
    lost: set[str] = field(default_factory=set)
    text: str = ""
    trained: list[tuple[int, int]] = field(default_factory=list)


class Wrong(Exception):
    """A rule that does not hold: its name, and how."""


@dataclass
class Expected:
    """Where an answer may begin, and where its end of turn may lie (the end of that token); `whole`: it is merged with
    the next one, and has no end of its own."""

    message: int
    first: int
    latest: int
    ends: list[int]
    words: list[tuple[int, int]]
    merged: bool = False


# ---------------------------------------------------------------------------------------- renderings


def variants(conversation: Conversation) -> Iterator[list[dict[str, Any]]]:
    """The same messages in the spellings that templates ask for: arguments as an object or as JSON text; no content
    beside a call; ids where the data has none; what the system says in front of the question."""
    for text_arguments in (False, True):
        for spelling in (_as_it_is, _null_content, _with_ids, _system_role, _system_in_question, _parts):
            messages = spelling(copy.deepcopy(conversation.messages))
            if messages is None:
                continue
            calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
            if text_arguments and not calls:
                return
            for function in calls:
                if text_arguments:
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            yield messages


def _as_it_is(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return messages


def _null_content(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    calls = [message for message in messages if message.get("tool_calls") and not message["content"]]
    for message in calls:
        message["content"] = None
    return messages if calls else None


def _with_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    calls = [call for message in messages for call in message.get("tool_calls", ()) if "id" not in call]
    for number, call in enumerate(calls):
        call["id"] = f"call{number:05}"
    results = [message for message in messages if message["role"] == "tool"]
    for call, result in zip(calls, results, strict=False):
        result |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
    return messages if calls else None


def _system_role(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    developers = [message for message in messages if message["role"] == "developer"]
    for message in developers:
        message["role"] = "system"
    return messages if developers else None


def _system_in_question(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    if messages[0]["role"] not in ("system", "developer"):
        return None
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    for message in messages:
        message["content"] = [{"type": "text", "text": message["content"]}]
    return messages


def sound(text: str, conversation: Conversation) -> bool:
    """The arguments of calls are written neither as Python's repr nor as JSON in JSON, and no answer is lost whole."""
    if "{'place'" in text or '{\\"place\\"' in text:
        return False
    answers = {mark.message for mark in conversation.marks if mark.kind in ("text", "argument")}
    written = {
        mark.message for mark in conversation.marks if mark.word in text and mark.kind in ("text", "argument")
    }
    return answers == written


# ------------------------------------------------------------------------------------------ judgement


def judge(facts: Facts, conversation: Conversation, example: Any, stops: set[int]) -> Verdict:
    """`example`: input_ids, labels, fate and reason, as the engine made it. `stops`: where generation stops."""
    texts = [
        (messages, text)
        for messages in variants(conversation)
        if (text := facts.render(messages, conversation.tools)) is not None
    ]
    good = [pair for pair in texts if sound(pair[1], conversation)]
    if not example.usable:
        code = example.reason.code if example.reason else example.fate
        if not texts:
            return Verdict("raises", code)
        return Verdict(
            "refused",
            code,
            "" if good else "the template loses what was to be trained",
            text=(good or texts)[0][1],
        )
    if not texts:
        return Verdict("wrong", "ids", "the template raises")
    messages, text = _matching(facts, example, good or texts)
    trained, length, extra = [], len(text), ""
    try:
        trained, extra = aligned(facts, conversation, example, text)
        if not sound(text, conversation):
            raise Wrong("lossy", "the arguments or a whole answer are not written as they should be")
        expected = list(expectations(facts, conversation, messages, text, extra))
        check_words(conversation, text, trained)
        check_runs(facts, example, text + extra, trained, expected, stops)
    except Wrong as wrong:
        rule, detail = wrong.args
        return Verdict("wrong", rule, detail, lost(conversation, text), text + extra, runs_of(trained))
    assert length == len(text)
    return Verdict("right", lost=lost(conversation, text), text=text + extra, trained=runs_of(trained))


def lost(conversation: Conversation, text: str) -> set[str]:
    """The kinds of marks that the template does not write."""
    return {mark.kind for mark in conversation.marks if mark.word not in text}


def _matching(facts: Facts, example: Any, texts: list[Any]) -> Any:
    """The rendering that the ids spell, else the first."""
    spelled = b"".join(bytes_of(facts.tokenizer, token) for token in example.input_ids)
    return next((pair for pair in texts if spelled.startswith(pair[1].encode())), texts[0])


def aligned(
    facts: Facts, conversation: Conversation, example: Any, text: str
) -> tuple[list[tuple[int, int, bool]], str]:
    """Each token's characters and whether it is trained, and what was added behind the rendering. Raises Wrong."""
    tokenizer = facts.tokenizer
    pieces = [bytes_of(tokenizer, token) for token in example.input_ids]
    spelled, wanted = b"".join(pieces), text.encode()
    extra = ""
    if spelled != wanted:
        if not spelled.startswith(wanted) or len(pieces[-1]) != len(spelled) - len(wanted):
            common = next(
                (at for at, (a, b) in enumerate(zip(spelled, wanted, strict=False)) if a != b),
                min(len(spelled), len(wanted)),
            )
            raise Wrong(
                "ids",
                f"not the template's: … {spelled[common - 30 : common + 40].decode(errors='replace')!r}",
            )
        extra = pieces[-1].decode()
    if not conversation.forged:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        if own != list(example.input_ids[: len(own)]):
            raise Wrong("ids", "the text is the template's, but tokenized differently")
    char_at, at = [], 0
    for char in text + extra:
        char_at += [at] * len(char.encode())
        at += 1
    char_at.append(at)
    tokens, byte = [], 0
    for piece, token, label in zip(pieces, example.input_ids, example.labels, strict=True):
        if label not in (IGNORED, token):
            raise Wrong("ids", "a label that is no id")
        begin, byte = byte, byte + len(piece)
        tokens.append((char_at[begin], max(char_at[byte], char_at[byte - 1] + 1), label != IGNORED))
    return tokens, extra


def runs_of(tokens: list[tuple[int, int, bool]]) -> list[tuple[int, int]]:
    """The trained stretches of characters."""
    runs: list[list[int]] = []
    open_ = False
    for begin, end, trained in tokens:
        if trained and open_:
            runs[-1][1] = end
        elif trained:
            runs.append([begin, end])
        open_ = trained
    return [(begin, end) for begin, end in runs]


def places(text: str, word: str) -> Iterator[tuple[int, int]]:
    at = text.find(word)
    while at >= 0:
        yield at, at + len(word)
        at = text.find(word, at + 1)


def check_words(conversation: Conversation, text: str, tokens: list[tuple[int, int, bool]]) -> None:
    """Raises Wrong where a word of an answer is not trained, or another's is."""
    runs = runs_of(tokens)
    for mark in conversation.marks:
        for begin, end in places(text, mark.word):
            inside = any(first <= begin and end <= last for first, last in runs)
            touched = any(first < end and begin < last for first, last in runs)
            if mark.kind in TRAINED_KINDS and not inside:
                raise Wrong(
                    "answer untrained", f"{mark.kind} of message {mark.message + 1}: {_near(text, begin)}"
                )
            if mark.kind in FOREIGN_KINDS and touched:
                raise Wrong(
                    "other's trained", f"{mark.kind} of message {mark.message + 1}: {_near(text, begin)}"
                )


def check_runs(
    facts: Facts,
    example: Any,
    text: str,
    tokens: list[tuple[int, int, bool]],
    expected: list[Expected],
    stops: set[int],
) -> None:
    """Raises Wrong where a run begins or ends elsewhere than expected, is missing, or is one too many."""
    runs = runs_of(tokens)
    groups = joined(text, expected)
    for group in groups:
        first, last = group[0], group[-1]
        where = f"message {first.message + 1}"
        at = first.words[0][0] if first.words else first.latest
        run = next((run for run in runs if run[0] <= at < run[1]), None)
        if run is None:
            run = next((run for run in runs if run[0] >= first.first), None)
        if run is None:
            raise Wrong("no span", where)
        end = len(text[: run[1]].rstrip())
        if not last.ends:
            raise Wrong("no end", f"{where}: the template ends this answer with no token: {_near(text, end)}")
        if end not in last.ends:
            raise Wrong("end", f"{where} ends at {_near(text, end)}, not at {_near(text, last.ends[0])}")
        token = next(
            token
            for token, (begin, stop, _) in zip(example.input_ids, tokens, strict=True)
            if begin < end <= stop
        )
        if token not in stops:
            raise Wrong(
                "stop",
                f"{where} ends with {facts.tokenizer.convert_ids_to_tokens(token)}, where generation goes on",
            )
        straddling = next(((b, e) for b, e, _ in tokens if b <= first.first < e), None)
        starts = set(range(first.first, first.latest + 1)) | set(straddling or ())
        if run[0] not in starts:
            raise Wrong(
                "start", f"{where} begins at {_near(text, run[0])}, not at {_near(text, first.first)}"
            )
        runs.remove(run)
    if runs:
        raise Wrong("other's trained", f"a span too many: {text[slice(*runs[0])][:60]!r}")


def joined(text: str, expected: list[Expected]) -> list[list[Expected]]:
    """Answers that nothing separates are one run."""
    groups: list[list[Expected]] = []
    for one in expected:
        previous = groups[-1][-1] if groups else None
        if previous and (previous.merged or one.first in previous.ends):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def expectations(
    facts: Facts, conversation: Conversation, messages: list[dict[str, Any]], text: str, extra: str
) -> Iterator[Expected]:
    """One for each answer that is rendered. Messages may be fewer than the conversation's: a system message that stands
    in the question."""
    shift = len(conversation.messages) - len(messages)
    after = 0
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        words = sorted(
            place
            for mark in conversation.marks
            if mark.message == at + shift and mark.kind in TRAINED_KINDS
            for place in places(text, mark.word)
        )
        latest = words[0][0] if words else None
        start = _start(facts, conversation, messages, at, shift, text, latest, after)
        if start is None:
            continue  # the template does not write this message at all
        first, latest = start
        core = words[-1][1] if words else latest
        following = [
            place[0]
            for mark in conversation.marks
            if mark.message > at + shift and mark.kind in TRAINED_KINDS | FOREIGN_KINDS
            for place in places(text, mark.word)
            if place[0] >= core
        ]
        followed = text[core : min(following)] if following else None
        alone = _alone(facts, conversation, messages, at, shift, text, core)
        adjacent = bool(following) and messages[at + 1]["role"] == "assistant"
        units = facts.ends_in(alone, followed)
        if followed is None:
            closing = facts.special_in(alone)
            units = [unit for unit in closing if unit.text in facts.enders] or units
        ends = [core + unit.end for unit in units]
        if followed is None and not ends and extra:
            ends = [len(text + extra)]
        after = ends[0] if ends else core
        yield Expected(at + shift, first, latest, ends, words, merged=adjacent and not ends)


def _alone(
    facts: Facts, conversation: Conversation, messages: Any, at: int, shift: int, text: str, core: int
) -> str:
    """What follows an answer where the conversation ends with it."""
    if at == len(messages) - 1:
        return text[core:]
    cut = facts.render(messages[: at + 1], conversation.tools)
    if cut is None:
        return facts.at_the_end
    own = [
        place[1]
        for mark in conversation.marks
        if mark.message == at + shift and mark.kind in TRAINED_KINDS
        for place in places(cut, mark.word)
    ]
    if own:
        return cut[max(own) :]
    before = facts.render(messages[:at], conversation.tools, generate=True)
    return cut[len(before) :] if before and cut.startswith(before) else facts.at_the_end


def _start(
    facts: Facts,
    conversation: Conversation,
    messages: Any,
    at: int,
    shift: int,
    text: str,
    word: int | None,
    after: int,
) -> tuple[int, int] | None:
    """The first and the last place where an answer may begin; None if the template leaves it out."""
    previous = [
        (place[1], mark.word)
        for mark in conversation.marks
        if -1 < mark.message < at + shift and mark.kind in TRAINED_KINDS | FOREIGN_KINDS
        for place in places(text, mark.word)
        if word is None or place[1] <= word
    ]
    behind, last_word = max(previous, default=(0, ""))
    behind = max(behind, after)
    before = facts.render(messages[:at], conversation.tools, generate=True) if at else None
    if before is None:
        return None if word is None else (behind, word)
    plain = facts.render(messages[:at], conversation.tools) or ""
    if text.startswith(before) and (
        len(before) > len(plain) or not text[len(before) : word].strip() or word is None
    ):
        return len(before), len(before)
    if text.startswith(before):
        return len(before), len(text[:word].rstrip()) if facts.added_by_prompt.strip() else word
    tail = before.rpartition(last_word)[2] if last_word in before else before
    begin = (
        text.rfind(last_word, 0, word if word is not None else len(text)) + len(last_word) if last_word else 0
    )
    here = text[begin:word]
    if here.startswith(tail):
        return begin + len(tail), begin + len(tail)
    _matched, shared = facts.shared(tail, here)
    if not shared and facts.units(tail):
        return None if word is None else (behind, word)
    blanks = len(here) - shared - len(here[shared:].lstrip()) if here[shared:].strip() else len(here) - shared
    return begin + shared, begin + shared + blanks


def _near(text: str, at: int) -> str:
    return repr(text[max(0, at - 40) : at] + "⟨here⟩" + text[at : at + 30])
