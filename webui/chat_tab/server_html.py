"""HTML of the state of a server, and of other servers that take up memory."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from engine.core.rundir import read_object
from engine.serving.server import Server
from webui import notices
from webui.chat_tab.answer_html import Titles
from webui.numbers import duration
from webui.words import Words

DOTS = {"waiting": "queued", "loading": "running", "ready": "finished", "failed": "failed", "ended": "queued"}


def status(
    server: Server | None, others: Sequence[Server], titles: Titles, seconds: float, words: Words, elsewhere: bool
) -> str:
    """Whether the models are loaded, what they wait for, the reason if that failed, and what else is loaded.
    `elsewhere`: runs do not compute on this machine, but chats do."""
    state = server.state if server else "ended"
    dot = DOTS[state]
    state_text = words(f"chat-{state}", time=duration(seconds, words))
    wrong = notices.listed(server.problems, words) if server and state == "failed" else ""
    rows = "".join(
        f"<li><b>{escape(titles.get(other.name, other.name))}</b> {escape(_holder(other, words))}</li>"
        for other in others
        if other.alive
    )
    beside = f'<p class="quiet">{escape(words("chat-others"))}</p><ul class="plain">{rows}</ul>' if rows else ""
    notes = _job_notes(server, words) if server and server.on_slurm and state not in ("ended", "failed") else []
    notes += [words("chat-here")] if elsewhere else []
    noted = "".join(f'<p class="quiet">{escape(note)}</p>' for note in notes)
    return f'<p class="held"><span class="dot {dot}"></span>{escape(state_text)}</p>{wrong}{noted}{beside}'


def _job_notes(server: Server, words: Words) -> list[str]:
    """What the job of a server waits for, or where it computes; and why this may be out of date."""
    if waits_for := server.waits_for:
        return [waits_for.text(words.language)]
    keeper, doubt = read_object(server.folder.keeper), server.doubt
    place = [words("chat-job", job=keeper["job"], machine=keeper["machines"])] if keeper else []
    return place + ([doubt.text(words.language)] if doubt else [])


def _holder(server: Server, words: Words) -> str:
    """Who started the server; one that was started from a shell cannot be stopped on the page."""
    return words("chat-from-shell") if server.settings.get("shell") else server.settings.get("by") or ""
