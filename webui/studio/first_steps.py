"""The texts of the first steps: from a preset to a chat with one's own adapter, on the real controls. Which step a
reader is at is seen from the page by its script (tour.js); the server only knows who has no runs yet, and which users
are done with them."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from http import HTTPStatus
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.core import dismissals
from engine.core.rights import Person, may
from engine.launch.workspace import Workplace
from engine.runs import runs
from webui.people import person_of
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


def known_of(workplace: Workplace, person: Person) -> str:
    """What the server knows of the first steps: "over" for a user who is done with them, on whatever machine; "first"
    for who could start a run and has none yet (without a login, if there is none at all); otherwise ""."""
    if dismissals.is_dismissed(workplace.saves, person.name):
        return "over"
    known = runs.find(workplace.saves)
    starts = not may(person, "start") and not any(not person.name or run.by == person.name for run in known)
    return "first" if starts else ""


def routes(saves: Path) -> list[Route]:
    """`/first-steps`, by which the script says that a user is done with them, or begins again."""

    async def note(request: Request) -> Response:
        async with request.form(max_files=0, max_fields=4, max_part_size=64) as form:
            over = form.get("over") == "1"
        await run_in_threadpool(dismissals.dismiss, saves, person_of(request).name, over)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    return [Route("/first-steps", note, methods=["POST"])]
