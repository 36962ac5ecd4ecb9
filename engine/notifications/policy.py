"""What the operator of a saves folder permits: notifications.yaml. Without the file, any public address."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, urlsplit

from pydantic import Field

from engine.core import regular_files
from engine.core.problems import Refusal, problem
from engine.core.rundir import stamp
from engine.notifications.services import SERVICES
from engine.spec.parts import Part
from engine.spec.yaml_text import read_yaml

POLICY_FILE = "notifications.yaml"


class Policy(Part):
    """`studio`: the address by which browsers reach the studio, for links; `services`: those that may be used, None:
    all; `internal`: names, addresses and networks that are not public and may be reached all the same."""

    enabled: bool = True
    studio: str = ""
    services: list[str] | None = Field(default=None, max_length=100)
    internal: list[str] = Field(default_factory=list, max_length=1000)

    def link(self, run_id: str) -> str | None:
        """The address of a run's page; None if that of the studio is not known."""
        return f"{self.studio.rstrip('/')}/?run={quote(run_id)}" if self.studio else None


def read_policy(saves: Path) -> Policy:
    """The policy of a saves folder. Raises Refusal if the file is wrong: then nothing is sent."""
    return _read(saves / POLICY_FILE, stamp([saves / POLICY_FILE]))


@lru_cache(maxsize=16)
def _read(path: Path, _stamp: str) -> Policy:
    try:
        text = regular_files.read_text(path)
    except FileNotFoundError:
        return Policy()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(problem("file-unreadable", file=path, why=getattr(error, "strerror", None) or error)) from None
    try:
        policy = Policy.read(read_yaml(text) or {})
    except Refusal as refusal:
        details = {language: refusal.text(language) for language in ("en", "zh")}
        raise Refusal(problem("notify-policy-wrong", file=path, details=details)) from None
    if policy.studio and not _is_web_address(policy.studio):
        raise Refusal(problem("notify-policy-studio", file=path, value=policy.studio[:80]))
    if unknown := [name for name in policy.services or () if name not in SERVICES]:
        known = ", ".join(SERVICES)
        raise Refusal(problem("notify-policy-service", file=path, value=str(unknown[0])[:80], known=known))
    return policy


def _is_web_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    plain = not (parts.query or parts.fragment or parts.username)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain and text.isprintable()


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet, not to this machine or a private network."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        return ip.is_global and not ip.is_multicast and (inner is None or is_public(str(inner)))
    return ip.is_global and not ip.is_multicast
