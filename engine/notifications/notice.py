"""What a notification says: the title and the text for people, and the same as fields for a webhook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from engine.core.problems import NOTHING, say
from engine.notifications.policy import Policy

VERSION = 1  # of the JSON that webhooks get; raised if a field changes its meaning or is removed
Level = Literal["success", "info", "warning", "failure"]


@dataclass(frozen=True)
class Notice:
    """The fields are those of docs/notifications.md. `level` is for the colours of messengers."""

    id: str  # the same for the same event of the same run, also if it is sent again
    event: str
    title: str
    text: str
    language: str
    at: str  # when it happened: ISO 8601, UTC
    level: Level = "info"
    run: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    progress: Mapping[str, Any] | None = None
    duration_seconds: float | None = None
    reason: str | None = None
    link: str | None = None
    sweep: Mapping[str, Any] | None = None  # of the end of a whole sweep

    def fields(self) -> dict[str, Any]:
        """The body of a webhook."""
        return {"version": VERSION, **asdict(self)}


def iso(at: float) -> str:
    """A time (seconds since the epoch) as ISO 8601, in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def sample(at: float, language: str, name: str, policy: Policy) -> Notice:
    """What the test button sends, with the address of the studio if that is known."""
    return Notice(
        id=f"test-{at:.3f}",
        event="test",
        title=say("notice-test", language),
        text=say("notice-test-text", language, link=policy.studio or NOTHING),
        language=language,
        at=iso(at),
        run={"owner": name or None},
        link=policy.studio or None,
    )
