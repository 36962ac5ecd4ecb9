"""Reject request bodies that are larger than any the page sends, before they are held in memory: an ASGI middleware."""

from __future__ import annotations

import contextlib

from gradio.route_utils import GradioMultiPartParser
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.core.problems import problem
from engine.data.uploads import MAX_UPLOAD_BYTES
from webui.reader_language import language_of

MAX_BODY_BYTES = 16 << 20  # of a form with the longest spec and the longest conversation
UPLOAD_PATH = "/gradio_api/upload"  # a file is written to disk as it arrives
MAX_FIELD_BYTES = 1 << 16  # of a part of an upload that is not a file
MULTIPART_BYTES = 1 << 20  # overhead around the files of an upload


_on_part_data = GradioMultiPartParser.on_part_data


def _on_bounded_part_data(parser: GradioMultiPartParser, data: bytes, start: int, end: int) -> None:
    """A file in a form is written to disk as it arrives; other parts are held in memory and therefore limited."""
    part = parser._current_part
    if part.file is None and len(part.data) + end - start > MAX_FIELD_BYTES:
        raise MultiPartException(f"A field has more than {MAX_FIELD_BYTES:,} bytes.")
    _on_part_data(parser, data, start, end)


GradioMultiPartParser.on_part_data = _on_bounded_part_data  # type: ignore[method-assign, assignment]  # gradio has no setting for it


class _TooLarge(Exception):
    """More data has arrived than the limit allows."""


class BodyLimit:
    """Answers 413 and a sentence, based on Content-Length or, without it, on the received data."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = MAX_UPLOAD_BYTES + MULTIPART_BYTES if scope["path"].endswith(UPLOAD_PATH) else MAX_BODY_BYTES
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            await _refuse(limit, scope, receive, send)
            return
        size, answered, refused = 0, False, False

        async def receive_limited() -> Message:
            nonlocal size, refused
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                if not answered:  # here, because the inner app turns any exception into a 500
                    refused = True
                    await _refuse(limit, scope, receive, send)
                raise _TooLarge
            return message

        async def send_unless_refused(message: Message) -> None:
            nonlocal answered
            answered = True
            if not refused:
                await send(message)

        with contextlib.suppress(_TooLarge):
            await self.app(scope, receive_limited, send_unless_refused)


async def _refuse(limit: int, scope: Scope, receive: Receive, send: Send) -> None:
    sentence = problem("request-too-large", limit=limit >> 20).text(language_of(HTTPConnection(scope)))
    await PlainTextResponse(sentence, 413, {"Connection": "close"})(scope, receive, send)
