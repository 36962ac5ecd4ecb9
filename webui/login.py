"""The login of the studio: an ASGI middleware that lets only logged-in users through to the app behind it.

Everything behind it is protected, including websockets and API endpoints; only /login, /logout and /healthz respond by
themselves. The app finds the user's name and role in `request.state`, which clients cannot set. Users and hashes are in
`engine.core.users`, sessions in `webui.sessions`; this module handles cookies, pages and rate limiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from html import escape
from http import HTTPStatus
from pathlib import Path
from string import Template
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.core import rights, users
from engine.core.attempts import Attempts
from engine.core.problems import say
from webui.reader_language import language_of
from webui.sessions import SESSION_SECONDS, Sessions

MAX_FORM_BYTES = 8192
# The page to show after the login: a path of this studio. For a browser, "//host" and "/\\host" are other sites.
TARGET_PATTERN = re.compile(r"/(?![/\\])[!-\[\]-~]{0,2000}")
MAX_CONCURRENT_HASHES = 2  # passwords hashed at a time: each takes a core and 16 MiB

PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers would send `Origin: null` with the form
    "X-Content-Type-Options": "nosniff",
}


class LoginRequired:
    """Wraps an ASGI app. `root_path` is the studio's external path, "" or "/studio"; whether a proxy strips it does not
    matter. `ended_file` records who has signed out. Raises Refusal for a secret file without a key."""

    def __init__(
        self, app: ASGIApp, users_file: Path, secret_file: Path, ended_file: Path, root_path: str = ""
    ) -> None:
        self.app = app
        self.users_file = users_file
        key = users.signing_key(secret_file)
        self.sessions = Sessions(users_file, key, ended_file)
        self.root = "/" + root if (root := urlsplit(root_path).path.strip("/")) else ""
        # Browsers keep cookies by host, not by port: two studios on one machine must not log each other out.
        self.cookie = "athanor_" + hashlib.sha256(key).hexdigest()[:8]
        self.attempts = Attempts()
        self.hashing = asyncio.Semaphore(MAX_CONCURRENT_HASHES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        name = self._user(HTTPConnection(scope))
        if scope["type"] == "http" and (answer := await self._own_page(Request(scope, receive), name)):
            return await answer(scope, receive, send)
        if name is None:
            return await self._turn_away(scope, receive, send)
        # A copy: the server's own state is kept, and what is added here stays with this request.
        inside = {**scope, "state": {**scope.get("state", {}), "user": name, "role": self._role(name)}}
        return await self.app(inside, receive, send)

    def _user(self, connection: HTTPConnection) -> str | None:
        # Reads the users file each time: it has only a few lines, and a removed user is out at once.
        return self.sessions.user(connection.cookies.get(self.cookie, ""))

    def _role(self, name: str) -> str:
        user = users.read_users(self.users_file).get(name)
        return user.role if user else rights.VIEWER  # removed a moment ago

    async def _own_page(self, request: Request, name: str | None) -> Response | None:
        """The answer of /login, /logout and /healthz; None for every other path."""
        path, reading = self._path(request.scope), request.method in ("GET", "HEAD")
        if path == "/healthz" and reading:
            return PlainTextResponse("ok")
        if path == "/login" and reading:
            target = _target(request.query_params.get("next", ""))
            if name:
                return RedirectResponse(self.root + target, 303)
            return _page(request, self.root, target=target)
        if path == "/login" and request.method == "POST":
            return await self._log_in(request)
        if path == "/logout" and request.method == "POST":
            return _foreign_origin_page(request, self.root) or self._log_out(request)
        if path in ("/login", "/logout"):
            return PlainTextResponse("", 405, {"Allow": "GET, HEAD, POST" if path == "/login" else "POST"})
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
            return _page(request, self.root, words, HTTPStatus.TOO_MANY_REQUESTS, headers, target=target)
        # Counted as failed until it succeeds: a thousand attempts sent at once must not all pass this line.
        self.attempts.failed(address, now)
        name, password = form.get("name", "").strip(), form.get("password", "")
        async with self.hashing:
            right = await asyncio.to_thread(users.check_password, self.users_file, name, password)
        if not right:
            words = say("login-wrong", language_of(request))
            return _page(request, self.root, words, HTTPStatus.UNAUTHORIZED, name=name, target=target)
        self.attempts.forget(address)
        answer = RedirectResponse(self.root + target, HTTPStatus.SEE_OTHER)
        answer.set_cookie(
            self.cookie,
            self.sessions.begin(name),
            max_age=SESSION_SECONDS,
            path=self.root or "/",
            secure=_is_https(request),  # on a plain-HTTP network, browsers would drop a Secure cookie: a login loop
            httponly=True,
            samesite="lax",
        )
        return answer

    def _log_out(self, request: Request) -> Response:
        with contextlib.suppress(OSError):  # on a full disk, at least the browser forgets it
            self.sessions.end(request.cookies.get(self.cookie, ""))
        answer = RedirectResponse(f"{self.root}/login", HTTPStatus.SEE_OTHER)
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
    return _page(request, root, words, HTTPStatus.FORBIDDEN)


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_https(request: Request) -> bool:
    forwarded = request.headers.get("x-forwarded-proto", "").split(",")[0].strip()
    return (forwarded or request.url.scheme) == "https"


def _page(
    request: Request,
    root: str,
    error: str = "",
    status: int = HTTPStatus.OK,
    headers: dict[str, str] | None = None,
    name: str = "",
    target: str = "/",
) -> HTMLResponse:
    language = language_of(request)
    words = {word: say(f"login-{word}", language) for word in ("title", "tagline", "enter")}
    html = PAGE.substitute(
        {word: escape(text) for word, text in words.items()},
        lang={"en": "en", "zh": "zh-CN"}[language],
        name_label=escape(say("login-name", language)),
        password_label=escape(say("login-password", language)),
        action=escape(f"{root}/login"),
        name=escape(name[:64]),
        target=escape(target),
        error=f'<p class="error" role="alert">{escape(error)}</p>' if error else "",
        flame=FLAME,
    )
    return HTMLResponse(html, status, {**PAGE_HEADERS, **(headers or {})})


FLAME = quote(
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="#c2410c">'
    '<path d="M12 1c.6 4.5 5.5 6 5.5 10.5a5.5 5.5 0 0 1-11 0c0-2 1-3.5 2.2-4.5 0 '
    '1.5.8 2.5 1.8 2.8C10 7 10.2 3.5 12 1z"/><path d="M3 19h18l-2 4H5z"/></svg>'
)

PAGE = Template("""<!doctype html>
<html lang="$lang">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title · Athanor 丹炉</title>
<link rel="icon" href="data:image/svg+xml,$flame">
<style>
  :root { color-scheme: light dark; --back: #faf8f5; --card: #fff; --text: #1c1917; --soft: #78716c;
          --line: #d6d3d1; --accent: #c2410c; --error: #b91c1c; --error-back: #fef2f2; }
  @media (prefers-color-scheme: dark) {
    :root { --back: #161412; --card: #211e1b; --text: #f5f5f4; --soft: #a8a29e; --line: #44403c;
            --error: #fca5a5; --error-back: #3b1715; }
  }
  * { box-sizing: border-box; }
  body { margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1rem; color: var(--text);
         background: var(--back);
         font: 16px/1.5 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
  main { width: 100%; max-width: 25rem; padding: 2.25rem; background: var(--card); border: 1px solid var(--line);
         border-radius: 14px; box-shadow: 0 10px 40px rgb(0 0 0 / .07); }
  img { display: block; width: 2.75rem; height: 2.75rem; margin-bottom: .75rem; }
  h1 { margin: 0; font-size: 1.5rem; font-weight: 650; letter-spacing: -.01em; }
  main > p { margin: .15rem 0 1.5rem; color: var(--soft); }
  label { display: block; margin-bottom: 1rem; font-size: .875rem; font-weight: 550; }
  input { display: block; width: 100%; margin-top: .3rem; padding: .6rem .75rem;
          font: inherit; font-size: 1rem; font-weight: 400; color: inherit;
          background: var(--back); border: 1px solid var(--line); border-radius: 8px; }
  input:focus-visible, button:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
  button { width: 100%; margin-top: .5rem; padding: .7rem; font: inherit; font-weight: 600; color: #fff;
           background: var(--accent); border: 0; border-radius: 8px; cursor: pointer; }
  button:hover { filter: brightness(1.08); }
  main > p.error { margin: 0 0 1.25rem; padding: .6rem .75rem; font-size: .9rem; color: var(--error);
                   background: var(--error-back); border-radius: 8px; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<img src="data:image/svg+xml,$flame" alt="">
<h1>Athanor 丹炉</h1>
<p>$tagline</p>
$error
<form method="post" action="$action">
<input type="hidden" name="next" value="$target">
<label>$name_label<input name="name" value="$name" autocomplete="username" autocapitalize="none" spellcheck="false"
  required autofocus></label>
<label>$password_label<input name="password" type="password" autocomplete="current-password" required></label>
<button>$enter</button>
</form>
</main>
</body>
</html>
""")
