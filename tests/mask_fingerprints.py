"""Fingerprints of ids and labels that fixed conversations get: `python -m tests.mask_fingerprints` records them anew.

What was prepared is kept and used again under a key that holds PREPARATION_VERSION. Code that makes other ids,
labels or weights of the same rows has to raise it, or runs would be trained on what the older code has made.
"""

import hashlib
import json
import re
import sys
from functools import cache
from pathlib import Path

from engine.worker.data.cache import PREPARATION_VERSION
from engine.worker.data.examples import Encoder, examples_table
from tests.families import ENDS, answer, template, tokenizer, user

RECORD = Path(__file__).with_suffix(".json")
CALL = {"id": "call00000", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
SYSTEM = {"role": "system", "content": "Be short."}
QUESTION = [user("hello")]
CHATS = [
    {"messages": [*QUESTION, answer("hi")]},
    {"messages": [SYSTEM, *QUESTION, answer("hi\n"), user(" 你好，世界"), answer("🙂 1234")]},
    {"messages": [*QUESTION, answer("<think>\nhm\n</think>\n\nhi")]},
    {"messages": [*QUESTION, {**answer("hi"), "reasoning_content": "hm"}]},
    {"messages": [user("<|im_end|> </s>"), answer("a <b> naïve")]},
    {
        "messages": [
            *QUESTION,
            {**answer(""), "tool_calls": [CALL]},
            {"role": "tool", "content": "22", "tool_call_id": "call00000"},
            answer("22"),
        ]
    },
    {"messages": [*QUESTION, answer("hi"), *QUESTION, answer("hello")], "weights": [0.5, 0]},
]
PAIRS = [{"messages": QUESTION, "chosen": [answer("hello")], "rejected": [answer("hi")]}]
ROWS = {
    "chat": CHATS,
    "pairs": PAIRS,
    "thumbs": [{**CHATS[0], "label": True}],
    "prompts": [{"messages": QUESTION, "answer": "hi"}],
    "text": [{"text": "hello </s>你好"}],
}
SETTINGS = [
    {},
    {"train_on": "everything"},
    {"train_on": "last_answer"},
    {"max_length": 24},
    {"max_length": 24, "too_long": "cut_start"},
]


@cache
def fingerprints() -> dict[str, dict[str, str]]:
    """Template → fingerprints of its source and of all that the fixed rows become with it."""
    return {name: {"template": _digest(template(name)), "examples": _digest(_examples(name))} for name in ENDS}


def _examples(name: str) -> list[object]:
    dated = tokenizer(name)
    dated.chat_template = re.sub(r"strftime_now\([^)]*\)", "'2026-11-29'", dated.chat_template)  # on any day the same
    made: list[object] = []
    for settings in SETTINGS:
        for form, rows in ROWS.items():
            encoder = Encoder(dated, form, **{"max_length": 512, **settings})
            examples = encoder.examples(rows)
            made += examples_table(form, examples).to_pylist()
            made += [example.reason.code for example in examples if example.reason]
    return made


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def recorded() -> tuple[int, dict[str, dict[str, str]]]:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return record["preparation_version"], record["templates"]


def unversioned() -> list[str]:
    """Templates with which the fixed rows become something else, although neither template nor version has changed."""
    version, templates = recorded()
    if version != PREPARATION_VERSION:
        return []
    return [
        name
        for name, now in fingerprints().items()
        if name in templates and templates[name]["template"] == now["template"] and templates[name] != now
    ]


def main() -> int:
    if RECORD.exists() and (names := unversioned()):
        print(
            f"raise PREPARATION_VERSION in engine/worker/data/cache.py first: {', '.join(names)}",
            file=sys.stderr,
        )
        return 1
    record = {"preparation_version": PREPARATION_VERSION, "templates": fingerprints()}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
