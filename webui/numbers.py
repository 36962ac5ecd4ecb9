"""How the page formats counts, sizes, durations and times."""

from __future__ import annotations

import time

from webui.words import Words


def human(count: float) -> str:
    """1234567 → 1.23M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g}"


def short(value: float) -> str:
    """A number in few characters: 1.234, 0.00012 → 1.2e-4, 12345 → 12.3k."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e15 or size < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.3g}{name}"
    return f"{value:.4g}"


def clock(seconds: float) -> str:
    """45 → 0:45, 4000 → 1:06:40."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def size(count: float) -> str:
    """Bytes in readable form: 1536 → 1.54 KB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def duration(seconds: float, words: Words) -> str:
    """95 → "1 min 35 s"; at most two units."""
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
    """How long ago, up to a day; then the date."""
    minutes = int((time.time() - then) // 60)
    if minutes < 1:
        return words("ago-now")
    if minutes < 60:
        return words("ago-minutes", n=minutes)
    return words("ago-hours", n=minutes // 60) if minutes < 24 * 60 else moment(then)
