"""The page of one's own notifications as HTML: addresses, events, and those of the browser, whose button needs the
script notifications.js."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from http import HTTPStatus

from starlette.responses import HTMLResponse

from engine.notifications.services import MAX_URL_CHARACTERS, SERVICES
from engine.notifications.subscriptions import (
    EVENTS,
    EVERYBODY,
    MAX_WAIT_HOURS,
    MIN_WAIT_HOURS,
    Address,
    Subscription,
)
from webui.account_html import Content, Outcome, account_page
from webui.login_pages import PAGE_HEADERS
from webui.words import Words

HEADERS = PAGE_HEADERS | {
    "Content-Security-Policy": f"{PAGE_HEADERS['Content-Security-Policy']}; script-src 'self'; connect-src 'self'"
}
STYLE = """<style>
  li form { display: flex; gap: .4rem; } li form button.test { color: inherit; }
  h2 { margin: 2rem 0 .5rem; font-size: 1rem; font-weight: 600; }
  .help { margin: .75rem 0 1rem; color: var(--soft); font-size: .875rem; overflow-wrap: anywhere; }
  .new { margin-top: 0; } .hours { display: flex; gap: .6rem; align-items: center; }
  .hours input { width: 6rem; margin: 0; padding: .35rem .5rem; } [hidden] { display: none; }
  fieldset.others { max-height: 14rem; overflow-y: auto; }
  section > button, form.events button { width: auto; padding: .5rem 1rem; font-size: .9rem; color: inherit;
    background: none; border: 1px solid var(--line); }
</style>"""


@dataclass(frozen=True)
class View:
    """What the page shows: `done` or `error` is the outcome of what was requested; `remarks` is what is wrong on the
    operator's side, `hint` what is missing there."""

    root: str
    person: Subscription
    done: str = ""
    error: str = ""
    remarks: tuple[str, ...] = ()
    hint: str = ""
    others: tuple[str, ...] = ()  # whose runs the person could follow
    status: int = HTTPStatus.OK


def page(view: View, words: Words) -> HTMLResponse:
    """The whole page."""
    field = (
        f'<label>{escape(words("notify-address"))}<input name="url" maxlength="{MAX_URL_CHARACTERS}" '
        'autocomplete="off" autocapitalize="none" spellcheck="false" required></label>'
    )
    addresses = "".join(_address(address, view.root, words) for address in view.person.addresses)
    hint = f'<p class="help">{escape(view.hint)}</p>' if view.hint else ""
    below = (
        f'{STYLE}<p class="help">{escape(words("notify-address-help"))}</p><ul>{addresses}</ul>{hint}'
        f"{_events(view, words)}{_others(view, words)}{_browser(view.root, words)}"
    )
    title, help = words("notifications"), words("notifications-help")
    content = Content("notifications", title, help, field, words("notify-add"), below)
    outcome = Outcome(escape(view.done), (view.error, *view.remarks), view.status)
    return account_page(content, words, view.root, outcome, HEADERS)


def _address(address: Address, root: str, words: Words) -> str:
    buttons = "".join(
        f'<button name="{action}" value="{escape(address.id)}"{look}>{escape(words(f"notify-{action}"))}</button>'
        for action, look in (("test", ' class="test"'), ("remove", ""))
    )
    name = SERVICES[address.service].name[words.language]
    return (
        f"<li><div>{escape(name)}<small>{escape(address.shown)}</small></div>"
        f'<form method="post" action="{escape(root)}/notifications">{buttons}</form></li>'
    )


def _events(view: View, words: Words) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" name="event" value="{event}"{" checked" * (event in view.person.events)}>'
        f"{escape(words(f'notify-event-{event}'))}</label>"
        for event in EVENTS
    )
    return (
        f'<h2>{escape(words("notify-when"))}</h2><form class="events" method="post" '
        f'action="{escape(view.root)}/notifications"><input type="hidden" name="choose" value="1">'
        f"<fieldset>{boxes}</fieldset>"
        f'<label class="hours">{escape(words("notify-hours"))}<input name="hours" type="number" '
        f'value="{view.person.wait_hours:g}" min="{MIN_WAIT_HOURS}" max="{MAX_WAIT_HOURS:g}" step="any" required>'
        f"</label><button>{escape(words('notify-save'))}</button></form>"
    )


def _others(view: View, words: Words) -> str:
    """Whose runs the person is notified of besides their own; "" if there is nobody else."""
    if not view.others:
        return ""
    labels = {EVERYBODY: words("notify-everybody"), **{name: name for name in view.others}}
    boxes = "".join(
        f'<label><input type="checkbox" name="user" value="{escape(name)}"{" checked" * (name in view.person.follows)}>'
        f"{escape(label)}</label>"
        for name, label in labels.items()
    )
    return (
        f'<h2>{escape(words("notify-others"))}</h2><form class="events" method="post" '
        f'action="{escape(view.root)}/notifications"><input type="hidden" name="follow" value="1">'
        f'<fieldset class="others">{boxes}</fieldset><button>{escape(words("notify-save"))}</button></form>'
    )


def _browser(root: str, words: Words) -> str:
    """Its parts say in which state of the browser they are shown."""
    texts = "".join(
        f'<p class="help" data-browser="{state}" hidden>{escape(words(f"notify-browser-{state}"))}</p>'
        for state in ("default", "granted", "denied", "insecure")
    )
    return (
        f"<section><h2>{escape(words('notify-browser'))}</h2>{texts}"
        f'<button type="button" id="browser-allow" data-browser="default" hidden>'
        f"{escape(words('notify-browser-allow'))}</button></section>"
        f'<script src="{escape(root)}/notifications.js"></script>'
    )
