"""The login of the studio: an ASGI middleware that lets only logged-in users through to the app behind it.

Everything behind it is protected, including websockets and API endpoints; only /login, /logout, /password and /healthz
respond by themselves. The app finds the user's name and role in `request.state`, which clients cannot set. Users and
hashes are in `engine.core.users`, sessions in `webui.sessions`, the pages' HTML in `webui.login_pages`; names may come
from a reverse proxy (`webui.proxy_sign_in`) or an OpenID provider (`webui.oidc`). This module handles cookies, forms
and rate limiting.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.core import audit, rights, users
from engine.core.attempts import Attempts
from engine.core.problems import Refusal, problem, say
from webui.login_pages import login_page, password_page
from webui.oidc import MAX_SIGN_IN_SECONDS, Oidc, Provider
from webui.proxy_sign_in import proxy_user
from webui.reader_language import language_of
from webui.sessions import SESSION_SECONDS, Sessions

MAX_FORM_BYTES = 8192
OIDC_PATH = "/login/oidc"
# The page to show after the login: a path of this studio. For a browser, "//host" and "/\\host" are other sites.
TARGET_PATTERN = re.compile(r"/(?![/\\])[!-\[\]-~]{0,2000}")
MAX_CONCURRENT_HASHES = 2  # passwords hashed at a time: each takes a core and 16 MiB


class LoginRequired:
    """Wraps an ASGI app. `root_path` is the studio's external path, "" or "/studio"; whether a proxy strips it does not
    matter. `ended_file` records who has signed out; the audit is in `saves`, if given; `provider` is an OpenID
    provider that signs in users, too. Raises Refusal for a secret file without a key, and as `Oidc` does."""

    def __init__(
        self,
        app: ASGIApp,
        users_file: Path,
        secret_file: Path,
        ended_file: Path,
        root_path: str = "",
        saves: Path | None = None,
        provider: Provider | None = None,
    ) -> None:
        self.app, self.saves = app, saves
        self.users_file = users_file
        key = users.signing_key(secret_file)
        self.sessions = Sessions(users_file, key, ended_file)
        self.root = "/" + root if (root := urlsplit(root_path).path.strip("/")) else ""
        # Browsers keep cookies by host, not by port: two studios on one machine must not log each other out.
        self.cookie = "athanor_" + hashlib.sha256(key).hexdigest()[:8]
        self.oidc = Oidc(provider, key) if provider else None
        self.attempts, self.returns = Attempts(), Attempts()  # by password; from the provider
        self.hashing = asyncio.Semaphore(MAX_CONCURRENT_HASHES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        connection = HTTPConnection(scope)
        if (unknown := proxy_user(connection)) and unknown not in users.read_users(self.users_file):
            return await self._not_listed(unknown, connection)(scope, receive, send)
        name = self._user(connection)
        if scope["type"] == "http" and (answer := await self._own_page(Request(scope, receive), name)):
            return await answer(scope, receive, send)
        if name is None:
            return await self._turn_away(scope, receive, send)
        # A copy: the server's own state is kept, and what is added here stays with this request.
        own = {"user": name, "role": self._role(name), "account_pages": self._account_pages(name, connection)}
        return await self.app({**scope, "state": {**scope.get("state", {}), **own}}, receive, send)

    def _user(self, connection: HTTPConnection) -> str | None:
        # Reads the users file each time: it has only a few lines, and a removed user is out at once.
        return proxy_user(connection) or self.sessions.user(connection.cookies.get(self.cookie, ""))

    def _role(self, name: str) -> str:
        user = users.read_users(self.users_file).get(name)
        return user.role if user else rights.VIEWER  # removed a moment ago

    def _has_password(self, name: str, connection: HTTPConnection) -> bool:
        user = users.read_users(self.users_file).get(name)
        return user is not None and user.hash != users.EXTERNAL and not proxy_user(connection)

    def _account_pages(self, name: str, connection: HTTPConnection) -> list[str]:
        """The pages about their account that a user can use, for the head of the page."""
        usable = {"logout": not proxy_user(connection), "password": self._has_password(name, connection)}
        return [page for page, can_use in usable.items() if can_use]

    async def _own_page(self, request: Request, name: str | None) -> Response | None:
        """The answer of /login, /logout and /healthz; None for every other path."""
        path, reading = self._path(request.scope), request.method in ("GET", "HEAD")
        if path == "/healthz" and reading:
            return PlainTextResponse("ok")
        if path == "/login" and reading:
            target = _target(request.query_params.get("next", ""))
            if name:
                return RedirectResponse(self.root + target, 303)
            return self._login_page(request, target=target)
        if path == "/login" and request.method == "POST":
            return await self._log_in(request)
        if self.oidc and path == OIDC_PATH and reading:
            return await self._begin_oidc(request, self.oidc)
        if self.oidc and path == f"{OIDC_PATH}/back" and reading:
            return await self._finish_oidc(request, self.oidc)
        if path == "/logout" and request.method == "POST":
            return _foreign_origin_page(request, self.root) or self._log_out(request)
        if path == "/password" and not (name and self._has_password(name, request)):
            return None
        if path == "/password" and reading:
            done = say("password-changed", language_of(request)) if "changed" in request.query_params else ""
            return password_page(request, self.root, done=done)
        if path == "/password" and request.method == "POST":
            return _foreign_origin_page(request, self.root) or await self._change_password(request, name or "")
        if path in ("/login", "/logout", "/password"):
            return PlainTextResponse("", 405, {"Allow": "POST" if path == "/logout" else "GET, HEAD, POST"})
        return None

    def _path(self, scope: Scope) -> str:
        path = scope["path"]
        return path.removeprefix(self.root) if path.startswith(f"{self.root}/") else path

    async def _log_in(self, request: Request) -> Response:
        if foreign := _foreign_origin_page(request, self.root):
            return foreign
        address = request.client.host if request.client else ""
        form = await _form(request)
        target, now = _target(form.get("next", "")), time.monotonic()
        if wait := self.attempts.wait(address, now):
            words = say("login-wait", language_of(request), seconds=wait)
            headers = {"Retry-After": str(wait)}
            return self._login_page(request, words, HTTPStatus.TOO_MANY_REQUESTS, headers, target=target)
        # Counted as failed until it succeeds: a thousand attempts sent at once must not all pass this line.
        self.attempts.failed(address, now)
        name, password = form.get("name", "").strip(), form.get("password", "")
        async with self.hashing:
            right = await asyncio.to_thread(users.check_password, self.users_file, name, password)
        known = name if name in users.read_users(self.users_file) else ""  # it may be a password, in the wrong box
        self._record(request, "sign-in", known, "done" if right else "refused: login-wrong")
        if not right:
            words = say("login-wrong", language_of(request))
            return self._login_page(request, words, HTTPStatus.UNAUTHORIZED, name=name, target=target)
        self.attempts.forget(address)
        return self._with_session(request, name, RedirectResponse(self.root + target, HTTPStatus.SEE_OTHER))

    def _login_page(
        self, request: Request, error: str = "", status: int = HTTPStatus.OK, headers: dict[str, str] | None = None,
        name: str = "", target: str = "/",
    ) -> Response:  # fmt: skip
        provider = self.oidc.name if self.oidc else ""
        return login_page(request, self.root, error, status, headers, name, target, provider)

    async def _begin_oidc(self, request: Request, oidc: Oidc) -> Response:
        """Send the browser to the provider."""
        target = _target(request.query_params.get("next", ""))
        try:
            url, begun = await oidc.begin(self._oidc_address(request), target)
        except Refusal as refusal:
            return self._login_page(request, refusal.text(language_of(request)), HTTPStatus.BAD_GATEWAY, target=target)
        answer = RedirectResponse(url, HTTPStatus.SEE_OTHER)
        self._set_cookie(request, answer, f"{self.cookie}_oidc", begun, MAX_SIGN_IN_SECONDS)
        return answer

    async def _finish_oidc(self, request: Request, oidc: Oidc) -> Response:
        """Begin a session for the user with whom the browser has come back."""
        address, language, now = request.client.host if request.client else "", language_of(request), time.monotonic()
        try:
            begun = oidc.begun(request.query_params, request.cookies.get(f"{self.cookie}_oidc", ""))
        except Refusal as refusal:  # not recorded: anybody could fill the audit with it, as could any page by a link
            return self._login_page(request, refusal.text(language), HTTPStatus.FORBIDDEN)
        if wait := self.returns.wait(address, now):
            headers = {"Retry-After": str(wait)}
            words = say("login-wait", language, seconds=wait)
            return self._login_page(request, words, HTTPStatus.TOO_MANY_REQUESTS, headers)
        self.returns.failed(address, now)  # until it succeeds, as in _log_in
        name, outcome = "", "done"
        try:
            name = self._external_user(await oidc.finish(request.query_params, begun, self._oidc_address(request)))
            self.returns.forget(address)
            answer: Response = RedirectResponse(self.root + _target(begun.target), HTTPStatus.SEE_OTHER)
            answer = self._with_session(request, name, answer)
        except Refusal as refusal:
            outcome = f"refused: {refusal.problems[0].code}"
            answer = self._login_page(request, refusal.text(language), HTTPStatus.FORBIDDEN)
        self._record(request, "sign-in", name, outcome)
        answer.delete_cookie(f"{self.cookie}_oidc", path=self.root or "/", httponly=True, samesite="lax")
        return answer

    def _external_user(self, claimed: str) -> str:
        """The user whom a provider names. At some, people choose that name themselves, so it cannot be that of somebody
        who has a password here. Raises Refusal."""
        user = users.read_users(self.users_file).get(claimed)
        if user is None:
            raise Refusal(problem("login-not-listed", name=_shown(claimed)))
        if user.hash != users.EXTERNAL:
            raise Refusal(problem("login-by-password", name=claimed))
        return claimed

    def _oidc_address(self, request: Request) -> str:
        """Where the provider sends the browser back to; it only does so to addresses that it has been told."""
        scheme, host = "https" if _is_https(request) else "http", request.headers.get("host", "")
        return f"{scheme}://{host}{self.root}{OIDC_PATH}/back"

    def _with_session(self, request: Request, name: str, answer: Response) -> Response:
        """The answer with the cookie of a new session."""
        self._set_cookie(request, answer, self.cookie, self.sessions.begin(name), SESSION_SECONDS)
        return answer

    def _set_cookie(self, request: Request, answer: Response, cookie: str, value: str, seconds: int) -> None:
        answer.set_cookie(
            cookie,
            value,
            max_age=seconds,
            path=self.root or "/",
            secure=_is_https(request),  # on a plain-HTTP network, browsers would drop a Secure cookie: a login loop
            httponly=True,
            samesite="lax",
        )

    async def _change_password(self, request: Request, name: str) -> Response:
        """Ends all sessions with the old password, and begins one with the new."""
        address, language = request.client.host if request.client else "", language_of(request)
        form, now = await _form(request), time.monotonic()
        if wait := self.attempts.wait(address, now):
            headers = {"Retry-After": str(wait)}
            words = say("login-wait", language, seconds=wait)
            return password_page(request, self.root, words, HTTPStatus.TOO_MANY_REQUESTS, headers)
        self.attempts.failed(address, now)
        async with self.hashing:
            right = await asyncio.to_thread(users.check_password, self.users_file, name, form.get("old", ""))
        outcome = "done" if right else "refused: password-wrong"
        try:
            if not right:
                raise Refusal(problem("password-wrong"))
            self.attempts.forget(address)
            if form.get("new") != form.get("again"):
                raise Refusal(problem("password-differs"))
            if form.get("new") == form.get("old"):
                raise Refusal(problem("password-same"))
            await asyncio.to_thread(users.set_password, self.users_file, name, form.get("new", ""))
        except Refusal as refusal:
            outcome = f"refused: {refusal.problems[0].code}"
            return password_page(request, self.root, refusal.text(language), HTTPStatus.UNPROCESSABLE_ENTITY)
        except OSError as error:
            outcome = "failed"
            failed = problem("system-refused", file=error.filename or self.users_file, why=error.strerror or error)
            return password_page(request, self.root, failed.text(language), HTTPStatus.INSUFFICIENT_STORAGE)
        finally:
            self._record(request, "password", name, outcome)
        address = f"{self.root}/password?changed=1"
        return self._with_session(request, name, RedirectResponse(address, HTTPStatus.SEE_OTHER))

    def _record(self, request: Request, action: str, name: str, outcome: str) -> None:
        if self.saves:
            address = request.client.host if request.client else ""
            audit.record(self.saves, rights.Person(name, address=address), action, "", outcome)

    def _not_listed(self, name: str, connection: HTTPConnection) -> Response:
        """A user of the proxy who is not one of the studio's."""
        words = say("login-not-listed", language_of(connection), name=_shown(name))
        return PlainTextResponse(words, HTTPStatus.FORBIDDEN, {"Cache-Control": "no-store"})

    def _log_out(self, request: Request) -> Response:
        name = self._user(request)
        answer: Response = RedirectResponse(f"{self.root}/login", HTTPStatus.SEE_OTHER)
        outcome = "done"
        try:
            self.sessions.end(request.cookies.get(self.cookie, ""))
        except OSError as error:  # for example a full disk; at least the browser forgets it
            outcome = "failed"
            words = say("sign-out-unwritten", language_of(request), why=error.strerror or error)
            answer = self._login_page(request, words, HTTPStatus.INSUFFICIENT_STORAGE)
        if name:
            self._record(request, "sign-out", name, outcome)
        answer.delete_cookie(self.cookie, path=self.root or "/", httponly=True, samesite="lax")
        return answer

    async def _turn_away(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            return await send({"type": "websocket.close", "code": 1008})  # before accepting: the client sees 403
        request = Request(scope)
        if request.method in ("GET", "HEAD") and "text/html" in request.headers.get("accept", ""):
            target = quote(self._path(scope)) + f"?{request.url.query}" * bool(request.url.query)
            login = "/login" if target == "/" else f"/login?{urlencode({'next': target})}"
            answer: Response = RedirectResponse(self.root + login, HTTPStatus.SEE_OTHER)
        else:
            answer = PlainTextResponse(say("login-needed", language_of(request)), HTTPStatus.UNAUTHORIZED)
        answer.headers["Cache-Control"] = "no-store"
        return await answer(scope, receive, send)


def _shown(name: str) -> str:
    """A name that may be no user's, for a sentence."""
    return name if users.USER_NAME.fullmatch(name) else repr(name[:80])


async def _form(request: Request) -> dict[str, str]:
    """The fields of a small url-encoded form; {} for anything else."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            return {}
    try:
        fields = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=16)
    except ValueError:
        return {}
    return {name: values[0] for name, values in fields.items()}


def _target(path: str) -> str:
    """The path inside the studio that is shown after the login: `path`, or the start page."""
    return path if TARGET_PATTERN.fullmatch(path) else "/"


def _foreign_origin_page(request: Request, root: str) -> Response | None:
    """A refusal if the form came from another site's page; browsers always state this. Ports are not compared, because
    cookies do not distinguish them either, and many proxies leave them out of Host."""
    origin = request.headers.get("origin") or request.headers.get("referer")
    if origin is None:
        return None  # not a browser, so nobody can be tricked
    hosts = [request.headers.get(header, "") for header in ("host", "x-forwarded-host")]
    if _hostname(origin) and _hostname(origin) in [_hostname(f"//{host.split(',')[0].strip()}") for host in hosts]:
        return None
    words = say("login-foreign", language_of(request), origin=origin[:200], host=hosts[0][:200])
    return login_page(request, root, words, HTTPStatus.FORBIDDEN)


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_https(request: Request) -> bool:
    forwarded = request.headers.get("x-forwarded-proto", "").split(",")[0].strip()
    return (forwarded or request.url.scheme) == "https"
