"""Answers of a base model or a result: its chat server is started if necessary, and the request passed on to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

from engine.api.models import Model
from engine.core.problems import Refusal
from engine.launch.workspace import Workplace
from engine.serving import chat_client, servers


class Relay:
    """A request to a chat server, and its response under the name that was asked for. `close` may be called by another
    thread, and ends the answer."""

    def __init__(self, workplace: Workplace, model: Model, body: Mapping[str, Any], by: str):
        self.workplace, self.model, self.body, self.by = workplace, model, body, by
        self.connection: HTTPConnection | None = None
        self.response: HTTPResponse | None = None
        self.closed = False
        self.served = ""

    def open(self) -> None:
        """Load the model if necessary, and wait for the beginning of the response. Raises Refusal if it cannot come."""
        choice = self.model.choice(self.workplace)
        server = servers.start(self.workplace, choice, self.by)
        servers.wait(server)
        if choice.adapters:
            chat_client.add(server, choice.adapters)
        self.served = self.model.served_name if choice.adapters else server.name
        self.connection = chat_client.connect(server)
        try:
            if not self.closed:  # by a client that has left meanwhile
                self.response = chat_client.forward(server, self.connection, {**self.body, "model": self.served})
        except (OSError, HTTPException, AttributeError):
            raise Refusal(chat_client.why_broken(server)) from None

    @property
    def status(self) -> int:
        return self.response.status if self.response else 499

    @property
    def content_type(self) -> str:
        return self.response.headers.get("Content-Type", "application/json") if self.response else "application/json"

    def line(self) -> bytes:
        """The next line of the body as soon as it is there; empty at its end."""
        try:
            line = self.response.readline() if self.response else b""
        except (OSError, ValueError, HTTPException, AttributeError):  # the server has ended, or `close` was called
            return b""
        # In a text, the quotes of these bytes would be escaped, so that they are nothing but the name of the model.
        for separator in (b": ", b":"):
            theirs, ours = (
                b'"model"' + separator + json.dumps(name).encode() for name in (self.served, self.model.name)
            )
            line = line.replace(theirs, ours)
        return line

    def close(self) -> None:
        self.closed = True
        if self.connection:
            chat_client.shut_down(self.connection)
