"""The bodies of requests, with their limits: JSON in memory, an uploaded file straight to the disk."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from engine.api.errors import ApiError
from engine.api.files import PURPOSE
from engine.core import hardware
from engine.core.problems import NOTHING, problem
from engine.data.upload_folder import UPLOADS_FOLDER
from engine.data.uploads import MAX_UPLOAD_BYTES
from engine.launch.workspace import Workplace

MAX_JSON_BYTES = 16 << 20  # of a conversation with images
MAX_FIELD_BYTES = 1 << 12  # of a field of a form that is not the file
MULTIPART_BYTES = 1 << 16  # overhead around the file


async def json_body(request: Request) -> bytes:
    """The whole body. Raises ApiError if it is too long."""
    body = bytearray()
    async for chunk in _limited(request, MAX_JSON_BYTES):
        body += chunk
    return bytes(body)


@asynccontextmanager
async def upload(workplace: Workplace, request: Request) -> AsyncIterator[tuple[Path, str]]:
    """The uploaded file of a form with `file` and `purpose`, as long as it is needed, and its name. Raises ApiError if
    the form is not that, or if there is no space for the file."""
    folder = workplace.saves / UPLOADS_FOLDER
    folder.mkdir(exist_ok=True)
    room = min(MAX_UPLOAD_BYTES, hardware.free_disk(folder)) + MULTIPART_BYTES
    parser = _Parser(request.headers, _limited(request, room), max_files=1, max_fields=8, max_part_size=MAX_FIELD_BYTES)
    parser.folder = folder
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:  # KeyError: no Content-Type
        why = error.message if isinstance(error, MultiPartException) else "no form"
        raise ApiError(400, problem("chat-request", what=NOTHING, why=why)) from None
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(400, problem("api-no-upload"), "file")
        if form.get("purpose") != PURPOSE:
            raise ApiError(400, problem("api-purpose", given=str(form.get("purpose"))[:80]), "purpose")
        if unknown := set(form) - {"file", "purpose"}:
            raise ApiError(400, problem("api-argument", name=min(unknown)[:80]), min(unknown)[:80])
        file.file.flush()
        yield Path(file.file.name), file.filename or ""
    finally:
        await form.close()


class _Parser(MultiPartParser):
    """Writes the file where uploads are kept, instead of into memory and the system's folder."""

    folder: Path

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        if part := self._current_part.file:
            file: Any = tempfile.NamedTemporaryFile(dir=self.folder, prefix="api-")  # noqa: SIM115  # closed by the form
            self._files_to_close_on_error.append(file)
            part.file = file


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Raises ApiError as soon as it is longer than `limit`, by its header or in fact."""
    length = request.headers.get("content-length", "")
    too_large = ApiError(413, problem("api-body-too-large", limit=f"{max(limit >> 20, 1):,}"))
    too_large.headers["Connection"] = "close"
    if length.isascii() and length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            yield chunk
    except ClientDisconnect:
        raise ApiError(400, problem("chat-request", what=NOTHING, why="it broke off")) from None
