"""What the servers of messengers have really answered. apprise only says whether it took an answer for a success, and
some services report their errors with the status 200: a token that does not exist, a signature that is missing.
"""

from __future__ import annotations

import ipaddress
import json
import smtplib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import requests

from engine.core.problems import Problem, problem
from engine.notifications.sealing import Forbidden

MAX_ANSWER_CHARACTERS = 200
# Keys of the error code in an answer, of which 0 is a success: WeCom and DingTalk; Feishu and Lark, now and formerly.
CODE_KEYS, MESSAGE_KEYS = ("errcode", "code", "StatusCode"), ("errmsg", "msg", "StatusMessage", "message")
HOSTS_WITH_CODES = ("qyapi.weixin.qq.com", "oapi.dingtalk.com", "open.feishu.cn", "open.larksuite.com")
MAX_CAUSES = 10
# What the texts of errors contain, in lower case, in this order: an SSL error may be a timeout.
FAILURES = {
    "notify-timeout": ("timed out", "timeout"),
    "notify-host-unknown": ("not known", "name resolution", "no address associated", "gaierror"),
    "notify-connection-refused": ("refused",),
    "notify-certificate": ("certificate", "ssl"),
}
_seen = threading.local()


def watch(permits: Callable[[str], bool]) -> None:
    """Remember, for each thread, what its last request has met with. With a proxy, the seal sees only that: so names
    that are internal here are refused before."""
    send = requests.Session.send

    def watched(session: requests.Session, request: requests.PreparedRequest, **keywords: Any) -> requests.Response:
        host = urlsplit(request.url or "").hostname or ""
        try:
            if internal := next((address for address in _addresses(host) if not permits(address)), None):
                raise Forbidden("a connection", internal)
            response = send(session, request, **keywords)
        except Forbidden as error:
            note(problem("notify-internal", address=error.address or host, host=host))
            raise requests.ConnectionError("not permitted") from None
        except requests.RequestException as error:
            note(failure(error, host))
            raise
        note(judged(response, host))
        return response

    requests.Session.send = watched  # type: ignore[assignment, method-assign]  # used by every plugin
    for name in ("connect", "starttls", "login", "sendmail"):
        setattr(smtplib.SMTP, name, _watched_smtp(getattr(smtplib.SMTP, name)))


def _watched_smtp(act: Callable[..., Any]) -> Callable[..., Any]:
    """A step of sending a mail that notes its failure."""

    def watched(server: smtplib.SMTP, *arguments: Any, **keywords: Any) -> Any:
        host = str(getattr(server, "_host", "") or (arguments[0] if arguments else ""))
        try:
            answer = act(server, *arguments, **keywords)
        except smtplib.SMTPResponseException as error:
            text = error.smtp_error.decode("utf-8", "replace") if isinstance(error.smtp_error, bytes) else "—"
            note(problem("notify-code", host=host, code=error.smtp_code, what=text[:MAX_ANSWER_CHARACTERS]))
            raise
        except smtplib.SMTPRecipientsRefused:
            note(problem("notify-recipient", host=host))
            raise
        except smtplib.SMTPNotSupportedError:
            note(problem("notify-no-login" if act.__name__ == "login" else "notify-certificate", host=host))
            raise
        except (OSError, RuntimeError) as error:
            note(failure(error, host))
            raise
        note(None)
        return answer

    return watched


def note(outcome: Problem | None) -> None:
    """What the request of this thread has met with; None: a success."""
    _seen.outcome = outcome


def noted() -> Problem | None:
    """What this thread has noted last."""
    return getattr(_seen, "outcome", None)


def _addresses(host: str) -> list[str]:
    """The IP addresses of a host, as far as this machine knows them."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def failure(error: BaseException, host: str) -> Problem:
    """Why a server could not be asked, without its whole address, which is secret."""
    chain = list(_chain(error))
    if forbidden := next((cause for cause in chain if isinstance(cause, Forbidden)), None):
        return problem("notify-internal", address=forbidden.address or host, host=host)
    causes = " ".join(f"{type(cause).__name__} {cause}" for cause in chain).lower()
    for code, signs in FAILURES.items():
        if any(sign in causes for sign in signs):
            return problem(code, host=host)
    return problem("notify-unreachable", host=host)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes; also those that a library passes on as an argument."""
    for _ in range(MAX_CAUSES):
        if error is None:
            return
        yield error
        inner = getattr(error, "reason", None) or next(iter(error.args), None)
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__


def judged(response: requests.Response, host: str) -> Problem | None:
    """None if the answer is a success."""
    if not 200 <= response.status_code < 300:
        return problem("notify-status", host=host, status=response.status_code)
    if host not in HOSTS_WITH_CODES:
        return None
    try:
        answer = json.loads(response.content[: 1 << 16])
    except ValueError:
        return None
    answer = answer if isinstance(answer, dict) else {}
    code = next((answer[key] for key in CODE_KEYS if key in answer), 0)
    message = next((str(answer[key]) for key in MESSAGE_KEYS if key in answer), "—")
    return problem("notify-code", host=host, code=code, what=message[:MAX_ANSWER_CHARACTERS]) if code else None
