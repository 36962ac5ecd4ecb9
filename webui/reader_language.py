"""The language of a request's sender: English or Chinese."""

from __future__ import annotations

from starlette.requests import HTTPConnection

from engine.core.problems import LANGUAGES


def language_of(connection: HTTPConnection) -> str:
    """The reader's choice, otherwise the first available language that the browser asks for, otherwise English."""
    chosen = connection.cookies.get("language")
    if chosen in LANGUAGES:
        return chosen
    preferences = connection.headers.get("accept-language", "").lower().split(",")
    codes = (preference.split(";")[0].strip()[:2] for preference in preferences)
    return next((code for code in codes if code in LANGUAGES), "en")
