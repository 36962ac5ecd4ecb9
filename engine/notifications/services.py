"""The addresses to which notifications can be sent: a table of services, and how an address that somebody has copied
from a messenger becomes that of a service.

apprise has many more, also ones that start programs or write files of this machine. Only those of the table are ever
passed to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import yaml


@dataclass(frozen=True)
class Service:
    """A service by its key in services.yaml: the schemes of its addresses, and its name in each language."""

    schemes: tuple[str, ...]
    name: Mapping[str, str]


def _read() -> dict[str, Service]:
    table = yaml.load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    return {
        key: Service(tuple(entry["schemes"]), {language: entry[language] for language in ("en", "zh")})
        for key, entry in table.items()
    }


SERVICES = _read()
WEBHOOK = "webhook"  # the service that gets our own JSON; all others are apprise's
MAX_URL_CHARACTERS = 2000
_OF_SCHEME = {scheme: key for key, service in SERVICES.items() for scheme in service.schemes}
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
# Addresses of bots as their messengers show them, which apprise does not recognize itself.
_HOOK = re.compile(r"https://open\.(feishu\.cn|larksuite\.com)/open-apis/bot/v2/hook/([\w-]+)/?", re.ASCII)
_DINGTALK = "https://oapi.dingtalk.com/robot/send?"


def service_of(url: str) -> str | None:
    """The service of an address, a key of SERVICES; None if there is none for its scheme."""
    return _OF_SCHEME.get(scheme_of(url))


def scheme_of(url: str) -> str:
    """The scheme of an address; "" without one."""
    scheme = _SCHEME.match(url)
    return scheme[1].lower()[:20] if scheme else ""


def canonical(url: str) -> str:
    """An address as the table has it. That of a DingTalk bot with a signature has `&secret=SEC…` added to it."""
    url = url.strip()
    if bot := _HOOK.fullmatch(url):
        return f"{'feishu' if bot[1] == 'feishu.cn' else 'lark'}://{bot[2]}"
    if url.startswith(_DINGTALK):
        query = parse_qs(urlsplit(url).query)
        token, secret = (query.get(name, [""])[0] for name in ("access_token", "secret"))
        return f"dingtalk://{f'{quote(secret)}@' if secret else ''}{quote(token)}" if token else url
    return url
