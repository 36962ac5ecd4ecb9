"""Ask the process that sends (`engine.notifications.sender`), with a hard limit on its time. The addresses are passed
on its standard input; what comes back contains none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.core.problems import Problem, Refusal, problem
from engine.core.project import PROJECT
from engine.notifications.notice import Notice
from engine.notifications.policy import Policy
from engine.notifications.services import MAX_URL_CHARACTERS

SEND_SECONDS = 40.0  # for all addresses together; the connections have limits of their own
CHECK_SECONDS = 30.0  # on a machine that is busy, importing apprise takes seconds


@dataclass(frozen=True)
class Checked:
    """An address as it is stored, the key of its service, and what may be seen of it."""

    url: str
    service: str
    shown: str


def check(url: str, policy: Policy) -> Checked:
    """Whether an address can be used; nothing is sent. Raises Refusal."""
    url = url.strip()
    if not url or len(url) > MAX_URL_CHARACTERS or not url.isprintable() or " " in url:
        raise Refusal(problem("notify-url", "url"))
    refuse_if_disabled(policy)
    answers = _ask({"check": url}, policy, CHECK_SECONDS)
    if not answers:
        raise Refusal(problem("notify-sender-silent", seconds=int(CHECK_SECONDS)))
    if "problem" in answers[0]:
        raise Refusal(_problem(answers[0]["problem"]))
    return Checked(answers[0]["url"], answers[0]["service"], answers[0]["shown"])


def refuse_if_disabled(policy: Policy) -> None:
    """Raises Refusal if the operator has switched notifications off."""
    if not policy.enabled:
        raise Refusal(problem("notify-disabled"))


def send(
    deliveries: Sequence[tuple[str, Notice]], policy: Policy, seconds: float = SEND_SECONDS
) -> list[Problem | None]:
    """Send a notice to each address at the same time. Returns, in their order, None or why it could not be sent."""
    question = {"deliveries": [{"url": url, "notice": notice.fields()} for url, notice in deliveries]}
    outcomes: list[Problem | None] = [problem("notify-sender-silent", seconds=int(seconds))] * len(deliveries)
    for answer in _ask(question, policy, seconds):
        if answer.get("number") in range(len(outcomes)):
            outcomes[answer["number"]] = _problem(answer["problem"]) if "problem" in answer else None
    return outcomes


def _ask(question: dict[str, Any], policy: Policy, seconds: float) -> list[dict[str, Any]]:
    """The answers that came before the time was over."""
    child = subprocess.Popen(
        [sys.executable, "-m", "engine.notifications.sender"],
        cwd=PROJECT,
        env=os.environ | {"PYTHONUTF8": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a traceback may contain an address
        text=True,
    )
    limits = {"internal": policy.internal, "services": policy.services, "parent": os.getpid()}
    try:
        output, _ = child.communicate(json.dumps(question | limits), timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
    return [answer for line in output.splitlines() if (answer := _answer(line))]


def _answer(line: str) -> dict[str, Any] | None:
    try:
        answer = json.loads(line)
    except ValueError:  # cut off
        return None
    return answer if isinstance(answer, dict) else None


def _problem(record: dict[str, Any]) -> Problem:
    return Problem(record["code"], record["field"], record["values"])
