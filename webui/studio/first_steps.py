"""The texts of the first steps: from a preset to a chat with one's own adapter, on the real controls. Which step a
reader is at is seen from the page by its script (tour.js); the server only knows who has no runs yet."""

from __future__ import annotations

import hashlib
import json
from functools import cache

from engine.core.rights import Person, may
from engine.launch.workspace import Workplace
from engine.runs import runs
from webui.words import Words

STEPS = 5
DEMO = "demo"  # the preset
QUESTION = "将World Health Organization翻译成中文。"  # one of the rows of its data


@cache
def texts_file(language: str) -> tuple[str, str]:
    """The name of the file, which changes with its content, and the content: JSON."""
    words = Words(language)
    demo = str(Workplace().presets()[DEMO]["title"][language])
    texts = {
        "demo": demo,
        "question": QUESTION,
        "steps": [
            {
                "title": words(f"tour-{number}"),
                "how": words(f"tour-{number}-how", demo=demo, question=QUESTION, start=words("start")),
            }
            for number in range(1, STEPS + 1)
        ],
        **{name: words(f"tour-{name}") for name in ("title", "close", "insert", "ended", "done", "unfinished")},
    }
    content = json.dumps(texts, ensure_ascii=False, separators=(",", ":"))
    return f"first-steps-{language}-{hashlib.sha1(content.encode()).hexdigest()[:12]}.json", content


def is_first_visit(workplace: Workplace, person: Person) -> bool:
    """Whether the person could start a run, and has none yet; without a login, whether there is none at all."""
    known = runs.find(workplace.saves)
    return not may(person, "start") and not any(not person.name or run.by == person.name for run in known)
