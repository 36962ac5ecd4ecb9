"""How the page writes counts, sizes, spans of time and moments."""

from __future__ import annotations

import time

from webui.words import Words


def human(count: float) -> str:
    """1234567 → 1.23M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g}"


def size(count: float) -> str:
    """Bytes as people read them: 1536 → 1.54 KB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def duration(seconds: float, words: Words) -> str:
    """95 → "1 min 35 s"; two units at most."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    d, hours = divmod(h, 24)
    if d:
        return words("duration-d", d=d, h=hours)
    if h:
        return words("duration-h", h=h, m=m)
    return words("duration-m", m=m, s=s) if m else words("duration-s", s=s)


def moment(then: float) -> str:
    """A time of day on this server."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(then))


def ago(then: float, words: Words) -> str:
    """How long ago, as far back as a day; then the date."""
    minutes = int((time.time() - then) // 60)
    if minutes < 1:
        return words("ago-now")
    if minutes < 60:
        return words("ago-minutes", n=minutes)
    return words("ago-hours", n=minutes // 60) if minutes < 24 * 60 else moment(then)
