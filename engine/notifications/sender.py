"""The process that sends: `python -m engine.notifications.sender`, started by `engine.notifications.sending` alone.

The question is one JSON object on standard input, so that no address is ever in a command line, an environment or a
file. The answers are lines of JSON, each as soon as it is known, so that an address that does not answer keeps no other
waiting. This process alone imports apprise, and seals itself before it looks at an address.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import logging
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import apprise
import requests
from apprise import AppriseAsset, NotifyFormat, NotifyType, PersistentStoreMode

from engine.core.problems import NOTHING, Problem, Refusal, problem
from engine.notifications import responses
from engine.notifications.policy import is_public
from engine.notifications.sealing import seal
from engine.notifications.services import SERVICES, WEBHOOK, canonical, scheme_of, service_of

MAX_MEMORY_BYTES = 2 << 30  # of address space: a server may answer without end
MAX_THREADS = 32
PR_SET_PDEATHSIG = 1  # as in linux/prctl.h
TIMEOUT_SECONDS = (5.0, 10.0)  # to connect, and to get an answer
SHOWN_CHARACTERS = 80
MIN_SECRET_CHARACTERS = 16  # of which four may be seen
LEVELS = {
    "info": NotifyType.INFO,
    "success": NotifyType.SUCCESS,
    "warning": NotifyType.WARNING,
    "failure": NotifyType.FAILURE,
}
ASSET = AppriseAsset(
    app_id="Athanor", app_desc="Athanor", app_url="", image_url_mask="", image_url_logo="", async_mode=False,
    secure_logging=True, storage_mode=PersistentStoreMode.MEMORY, pgp_autogen=False, pem_autogen=False,
)  # fmt: skip


def permitted(internal: Sequence[str]) -> Callable[[str], bool]:
    """Which IP addresses may be reached: those of the internet, those that the operator lists, and the proxies of the
    environment."""
    proxies = [urlsplit(proxy).hostname or "" for proxy in getproxies().values() if "://" in proxy]
    networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for name in filter(None, [*internal, *proxies]):
        try:
            networks.append(ipaddress.ip_network(name, strict=False))
        except ValueError:
            networks += [ipaddress.ip_network(address) for address in _resolved(name)]

    def permits(address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return is_public(str(ip)) or any(ip in network for network in networks)

    return permits


def _resolved(name: str) -> list[str]:
    try:
        return [str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(name, None)]
    except OSError:
        return []


def check(url: str, services: Sequence[str] | None) -> dict[str, Any]:
    """The address as it is stored, its service, and what may be seen of it. Raises Refusal if it cannot be used."""
    pasted, url = url.strip(), canonical(url)
    if service_of(url) == WEBHOOK and (native := _plugin(url)):
        url = native.url()  # that of a messenger, as a webhook of which apprise knows it
    service = _service(url, services)
    shown = _shown(url, service)
    if service != WEBHOOK and service_of(pasted) == WEBHOOK:
        shown = _beginning(pasted)
    return {"url": url, "service": service, "shown": shown}


def refuse_internal(url: str, permits: Callable[[str], bool]) -> None:
    """Raises Refusal for an address of this machine or of a private network that is not permitted. What other names
    lead to is asked when something is sent."""
    host = urlsplit(url).hostname or ""
    address = "127.0.0.1" if host == "localhost" else host
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(address)
        if not permits(address):
            raise Refusal(problem("notify-internal", "url", host=host, address=address if host != address else NOTHING))


def _beginning(webhook: str) -> str:
    """The host of a messenger's webhook and how its secret begins, by which two of them can be told apart."""
    parts = urlsplit(webhook)
    secret = max(re.findall(r"[\w-]+", f"{parts.path} {parts.query}"), key=len, default="")
    return f"https://{parts.hostname}/…" + (f"{secret[:4]}…" if len(secret) >= MIN_SECRET_CHARACTERS else "")


def _service(url: str, services: Sequence[str] | None) -> str:
    service = service_of(url)
    if service is None:
        raise Refusal(problem("notify-scheme", "url", scheme=scheme_of(url) or "—"))
    if services is not None and service not in services:
        names = {language: ", ".join(SERVICES[key].name[language] for key in services) for language in ("en", "zh")}
        raise Refusal(problem("notify-service", "url", service=SERVICES[service].name, permitted=names))
    return service


def _shown(url: str, service: str) -> str:
    """What may be seen of an address: of a webhook its host, of others what apprise takes for no secret."""
    if service == WEBHOOK:
        try:
            parts = urlsplit(url)
            host = parts.hostname
            port = f":{parts.port}" if parts.port else ""
        except ValueError:
            host = None
        if not host or parts.username or parts.password:
            raise Refusal(problem("notify-url", "url"))
        return f"{parts.scheme.lower()}://{host}{port}/…"
    plugin = _plugin(url)
    if plugin is None:
        raise Refusal(problem("notify-url-of", "url", service=SERVICES[service].name))
    return plugin.url(privacy=True).partition("?")[0].rstrip("/")[:SHOWN_CHARACTERS]


def _plugin(url: str) -> Any:
    """What apprise makes of an address whose service is in the table; None if it cannot use it."""
    plugin = apprise.Apprise.instantiate(url, asset=ASSET) if service_of(url) else None
    known = plugin is not None and service_of(f"{_scheme(plugin)}://") not in (None, WEBHOOK)
    return plugin if known else None


def _scheme(plugin: Any) -> str:
    return scheme_of(plugin.url(privacy=True))


def deliver(delivery: dict[str, Any], services: Sequence[str] | None) -> Problem | None:
    """Send a notice to an address; None if that has worked."""
    responses.note(None)
    try:
        url, notice = delivery["url"], delivery["notice"]
        service = _service(url, services)
        if service == WEBHOOK:
            return _post(url, notice)
        return _send(url, notice, service)
    except Refusal as refusal:
        return refusal.problems[0]
    except Exception as error:  # of a plugin: its text may contain the address
        return responses.noted() or problem("notify-broken", what=type(error).__name__)


def _post(url: str, notice: dict[str, Any]) -> Problem | None:
    host = urlsplit(url).hostname or ""
    try:
        response = requests.post(
            url,
            json=notice,
            headers={"User-Agent": "Athanor"},
            timeout=TIMEOUT_SECONDS,
            allow_redirects=False,
            stream=True,  # the answer is not read
        )
    except requests.RequestException as error:
        return responses.noted() or responses.failure(error, host)
    response.close()
    return responses.noted()


def _send(url: str, notice: dict[str, Any], service: str) -> Problem | None:
    plugin = _plugin(url)
    if plugin is None:
        return problem("notify-url-of", "url", service=SERVICES[service].name)
    plugin.socket_connect_timeout, plugin.socket_read_timeout = TIMEOUT_SECONDS
    outcomes: list[Problem | None] = []

    def send(*arguments: Any, **keywords: Any) -> bool:
        """As the plugin's own, which apprise calls in a thread of its own; what that has met with is kept."""
        responses.note(None)
        accepted = type(plugin).send(plugin, *arguments, **keywords)
        outcomes.append(responses.noted())
        return accepted

    plugin.send = send
    messenger = apprise.Apprise(asset=ASSET)
    messenger.add(plugin)
    accepted = messenger.notify(
        body=notice["text"],
        title=notice["title"],
        notify_type=LEVELS[notice["level"]],
        body_format=NotifyFormat.TEXT,
        interpret_escapes=False,
    )
    if failed := [outcome for outcome in outcomes if outcome]:
        return failed[0]
    return None if accepted else problem("notify-refused", service=SERVICES[service].name)


def end_with_parent() -> None:
    """Whoever notes what was sent must be alive: otherwise it would be sent again. Other systems lack the call."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(answer: dict[str, Any], outcome: Problem | None = None) -> None:
    if outcome:
        values = {name: value if isinstance(value, dict) else str(value) for name, value in outcome.values.items()}
        answer |= {"problem": {"code": outcome.code, "field": outcome.field, "values": values}}
    print(json.dumps(answer, default=str), flush=True)


def main() -> int:
    end_with_parent()
    question = json.load(sys.stdin)
    if os.getppid() != question["parent"]:
        return 1
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no address in a file
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    logging.disable(logging.CRITICAL)  # apprise's warnings may contain addresses
    permits = permitted(question["internal"])
    responses.watch(permits)
    seal(permits)
    services = question["services"]
    if "check" in question:
        try:
            checked = check(question["check"], services)
            refuse_internal(checked["url"], permits)
            _say(checked)
        except Refusal as refusal:
            _say({}, refusal.problems[0])
        return 0
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        sent = {
            pool.submit(deliver, delivery, services): number for number, delivery in enumerate(question["deliveries"])
        }
        for done in as_completed(sent):
            _say({"number": sent[done]}, done.result())
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without what libraries do at exit, which the seal may not permit
