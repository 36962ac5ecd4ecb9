"""What the pages about accounts have in common: a form for something new, what became of the last request, and a list
below. They look like the login page and need no script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from http import HTTPStatus

from starlette.responses import HTMLResponse

from webui.login_pages import FLAME, FORM, PAGE, PAGE_HEADERS
from webui.words import Words

STYLE = """<style>
  main { max-width: 34rem; }
  fieldset { margin: 0 0 1rem; padding: 0; border: 0; font-size: .875rem; }
  legend { padding: 0; font-weight: 550; } fieldset label { margin: .35rem 0 0; font-weight: 400; }
  fieldset input { display: inline; width: auto; margin: 0 .5rem 0 0; accent-color: var(--accent); }
  .new { margin: 0 0 1.25rem; padding: .75rem; border: 1px solid var(--accent); border-radius: 8px; font-size: .9rem; }
  .new code { display: block; margin-top: .4rem; overflow-wrap: anywhere; user-select: all; }
  ul { margin: 1.5rem 0 0; padding: 0; list-style: none; }
  li { display: flex; gap: 1rem; align-items: center; padding: .7rem 0; border-top: 1px solid var(--line); }
  li > div { flex: 1; min-width: 0; overflow-wrap: anywhere; } li small { display: block; color: var(--soft); }
  li button { width: auto; margin: 0; padding: .35rem .75rem; font-size: .875rem; color: var(--error);
              background: none; border: 1px solid var(--line); }
</style>"""


@dataclass(frozen=True)
class Content:
    """One of these pages. `fields` and `below` are HTML, the rest is text."""

    path: str  # "tokens": below the studio's address, where the form is sent
    title: str
    help: str
    fields: str
    enter: str  # the button of the form; "" for a page without one
    below: str


@dataclass(frozen=True)
class Outcome:
    """What became of the last request: HTML of what was done, and texts of what is wrong."""

    done: str = ""
    errors: tuple[str, ...] = ()
    status: int = HTTPStatus.OK


def account_page(
    content: Content, words: Words, root: str, outcome: Outcome, headers: Mapping[str, str] = PAGE_HEADERS
) -> HTMLResponse:
    """The whole page; `root` is the studio's external path."""
    done = f'<div class="new" role="status">{outcome.done}</div>' if outcome.done else ""
    errors = (f'<p class="error" role="alert">{escape(error)}</p>' for error in outcome.errors if error)
    form = FORM.substitute(action=escape(f"{root}/{content.path}"), fields=content.fields, enter=escape(content.enter))
    html = PAGE.substitute(
        lang={"en": "en", "zh": "zh-CN"}[words.language],
        title=escape(content.title),
        tagline=escape(content.help),
        form=form if content.enter else "",
        error=done + "".join(errors),
        below=f'{STYLE}{content.below}<p class="back"><a href="{escape(root)}/">← Athanor</a></p>',
        flame=FLAME,
    )
    return HTMLResponse(html, outcome.status, dict(headers))


def denied_page(path: str, title: str, why: str, words: Words, root: str) -> HTMLResponse:
    """The page for a person who may not use it: why not, and a way back."""
    return account_page(Content(path, title, title, "", "", ""), words, root, Outcome("", (why,), HTTPStatus.FORBIDDEN))
