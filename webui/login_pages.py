"""The pages of the login as HTML: signing in, and changing the password. They need no script. Other pages about one's
account look the same."""

from __future__ import annotations

from html import escape
from http import HTTPStatus
from string import Template
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import HTMLResponse

from engine.core.problems import say
from webui.reader_language import language_of

PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers would send `Origin: null` with the form
    "X-Content-Type-Options": "nosniff",
}


def login_page(
    request: Request,
    root: str,
    error: str = "",
    status: int = HTTPStatus.OK,
    headers: dict[str, str] | None = None,
    name: str = "",
    target: str = "/",
    provider: str = "",
) -> HTMLResponse:
    """The form for name and password; `target` is the page to show afterwards, `provider` another way to sign in."""
    language = language_of(request)
    fields = (
        f'<input type="hidden" name="next" value="{escape(target)}">'
        f'<label>{escape(say("login-name", language))}<input name="name" value="{escape(name[:64])}" '
        'autocomplete="username" autocapitalize="none" spellcheck="false" required autofocus></label>'
        + _password_field("password", say("login-password", language), "current-password")
    )
    link = f"{root}/login/oidc?{urlencode({'next': target})}"
    label = escape(say("login-oidc", language, name=provider))
    other = f'<p class="other"><a href="{escape(link)}">{label}</a></p>' if provider else ""
    return _page(request, "login", f"{root}/login", fields, error, status, headers, other)


def password_page(
    request: Request,
    root: str,
    error: str = "",
    status: int = HTTPStatus.OK,
    headers: dict[str, str] | None = None,
    done: str = "",
) -> HTMLResponse:
    """The form that asks for the old password and, twice, for a new one; `done`: what became of the last request."""
    language = language_of(request)
    fields = "".join(
        _password_field(name, say(f"login-{name}", language), kind)
        for name, kind in (("old", "current-password"), ("new", "new-password"), ("again", "new-password"))
    )
    back = f'<p class="back"><a href="{escape(root)}/">← Athanor</a></p>'
    return _page(request, "password", f"{root}/password", fields, error, status, headers, back, done)


def _password_field(name: str, label: str, kind: str) -> str:
    return f'<label>{escape(label)}<input name="{name}" type="password" autocomplete="{kind}" required></label>'


def _page(
    request: Request, what: str, action: str, fields: str, error: str, status: int,
    headers: dict[str, str] | None, below: str = "", done: str = "",
) -> HTMLResponse:  # fmt: skip
    """`what` is "login" or "password"; `fields` and `below` are HTML."""
    language = language_of(request)
    enter = say("login-enter" if what == "login" else "password-title", language)
    html = PAGE.substitute(
        lang={"en": "en", "zh": "zh-CN"}[language],
        title=escape(say(f"{what}-title", language)),
        tagline=escape(say("login-tagline" if what == "login" else "password-help", language)),
        form=FORM.substitute(action=escape(action), fields=fields, enter=escape(enter)),
        error=(f'<p class="done" role="status">{escape(done)}</p>' if done else "")
        + (f'<p class="error" role="alert">{escape(error)}</p>' if error else ""),
        below=below,
        flame=FLAME,
    )
    return HTMLResponse(html, status, {**PAGE_HEADERS, **(headers or {})})


FLAME = quote(
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="#c2410c">'
    '<path d="M12 1c.6 4.5 5.5 6 5.5 10.5a5.5 5.5 0 0 1-11 0c0-2 1-3.5 2.2-4.5 0 '
    '1.5.8 2.5 1.8 2.8C10 7 10.2 3.5 12 1z"/><path d="M3 19h18l-2 4H5z"/></svg>'
)

FORM = Template("""<form method="post" action="$action">
$fields
<button>$enter</button>
</form>""")
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
  main > p.other { margin: .75rem 0 0; } p.other a { display: block; padding: .65rem; text-align: center;
           color: inherit; text-decoration: none; border: 1px solid var(--line); border-radius: 8px; }
  main > p.back { margin: 1.25rem 0 0; font-size: .9rem; } p.back a { color: var(--soft); }
  button:hover { filter: brightness(1.08); }
  main > p.done { margin: 0 0 1.25rem; padding: .6rem .75rem; font-size: .9rem; color: inherit;
                  border: 1px solid var(--accent); border-radius: 8px; }
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
$form
$below
</main>
</body>
</html>
""")
