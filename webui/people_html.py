"""Users and quotas as HTML: the page on which operators change them, and the table of the System tab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from engine.core.rights import ROLES, USER
from engine.core.users import MAX_PASSWORD_LENGTH
from engine.runs.accounts import Account
from engine.runs.quotas import NAMES, WARN, Entry, Quotas
from webui.account_html import Content
from webui.words import Words

PATH = "people"
STYLE = """<style>
  main { max-width: 44rem; }
  select { display: block; width: 100%; margin-top: .3rem; padding: .6rem .75rem; font: inherit; font-weight: 400;
    color: inherit; background: var(--back); border: 1px solid var(--line); border-radius: 8px; }
  select:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
  h2 { margin: 2.25rem 0 0; font-size: 1rem; font-weight: 600; } h2 + ul { margin-top: .75rem; }
  li { display: block; } summary { display: flex; gap: 1rem; align-items: baseline; cursor: pointer; }
  summary > b { font-weight: 550; overflow-wrap: anywhere; } summary > small { flex: 1; text-align: right; }
  .forms { display: grid; gap: 1rem; padding: 1rem 0 .5rem; }
  .forms form { display: flex; flex-wrap: wrap; gap: .6rem; align-items: end; }
  .forms form label { flex: 1 1 8rem; margin: 0; } .forms p { margin: 0; font-size: .875rem; color: var(--soft); }
  .forms form .tick { flex: 1 1 100%; } label.tick { font-weight: 400; }
  .tick input { display: inline; width: auto; margin: 0 .5rem 0 0; accent-color: var(--accent); }
  .forms form button { padding: .6rem .9rem; color: inherit; } .forms form button.hurts { color: var(--error); }
</style>"""


@dataclass(frozen=True)
class Typed:
    """What was typed for a new user that was refused, to be corrected; `removed`: the name is that of a removed one."""

    name: str = ""
    role: str = USER
    removed: bool = False


def content(accounts: Sequence[Account], quotas: Quotas | None, typed: Typed, root: str, words: Words) -> Content:
    """The page: the form for a new user, and below it the limits of all, and everybody with their forms."""
    if quotas is None:  # the file is wrong, as an error says
        everybody = ""
    else:
        when = words("people-warns" if not quotas.stops else "people-stops", key="when_used_up", warn=WARN)
        default = _forms([_limits("", quotas, root, words), f"<p>{escape(when)}</p>"])
        lines = f"<li>{_fold(words('people-default'), '', default)}</li>"
        lines += "".join(f"<li>{_line(account, quotas, root, words)}</li>" for account in accounts)
        everybody = f"<h2>{escape(words('people-all'))}</h2><ul>{lines}</ul>"
    title, help = words("people"), words("people-help")
    return Content(PATH, title, help, _fields(typed, words), words("people-add"), STYLE + everybody)


def _fields(typed: Typed, words: Words) -> str:
    return (
        '<input type="hidden" name="do" value="add">'
        f'<label>{escape(words("people-name"))}<input name="user" value="{escape(typed.name[:64])}" maxlength="64" '
        'autocomplete="off" autocapitalize="none" spellcheck="false" required></label>'
        f"{_password(words('people-first-password'), required=False)}{_role(typed.role, words)}"
        f"{_tick('take-over', words('people-take-over')) if typed.removed else ''}"
    )


def _tick(name: str, label: str) -> str:
    return f'<label class="tick"><input type="checkbox" name="{name}" value="1">{escape(label)}</label>'


def _password(label: str, required: bool) -> str:
    return (
        f'<label>{escape(label)}<input name="password" type="password" maxlength="{MAX_PASSWORD_LENGTH}" '
        f'autocomplete="new-password"{" required" * required}></label>'
    )


def _role(chosen: str, words: Words) -> str:
    options = "".join(
        f'<option value="{role}"{" selected" * (role == chosen)}>{escape(words(f"role-of-{role}"))}</option>'
        for role in ROLES
    )
    return f'<label>{escape(words("people-role"))}<select name="role">{options}</select></label>'


def _line(account: Account, quotas: Quotas, root: str, words: Words) -> str:
    """Somebody, with what may be changed of them inside."""
    forms = [_limits(account.name, quotas, root, words)]
    if account.user:
        role = _form(account.name, "role", _role(account.user.role, words), words("people-set-role"), root)
        password = _password(words("people-password"), required=True) + _tick("revoke", words("people-revoke"))
        password = _form(account.name, "password", password, words("people-set-password"), root)
        sure = f"<p>{escape(words('people-remove-sure', name=account.name))}</p>"
        remove = _form(account.name, "remove", "", words("people-remove-yes"), root, "hurts")
        folded = _fold(words("people-remove"), "", _forms([sure, remove]))
        forms = [role, *forms, password if account.has_password else "", folded]
    return _fold(account.name, about(account, words), _forms(forms))


def _fold(title: str, note: str, inside: str) -> str:
    return f"<details><summary><b>{escape(title)}</b><small>{escape(note)}</small></summary>{inside}</details>"


def _forms(forms: Sequence[str]) -> str:
    return f'<div class="forms">{"".join(forms)}</div>'


def _form(user: str, action: str, fields: str, button: str, root: str, look: str = "") -> str:
    return (
        f'<form method="post" action="{escape(root)}/{PATH}"><input type="hidden" name="user" value="{escape(user)}">'
        f'{fields}<button name="do" value="{action}" class="{look}">{escape(button)}</button></form>'
    )


def _limits(user: str, quotas: Quotas, root: str, words: Words) -> str:
    """The form of somebody's own limits or, for "", of the default."""
    own, default = quotas.own.get(user, {}), quotas.default if user else None
    fields = "".join(
        f'<label>{escape(words(f"quota-{name}"))}<input name="{name}" value="{escape(_own(own, name, words))}" '
        f'placeholder="{escape(_number(getattr(default, name, None), words))}" autocomplete="off"></label>'
        for name in NAMES
    )
    return _form(user, "limits", fields, words("people-set-limits"), root)


def _own(own: Entry, name: str, words: Words) -> str:
    return _number(own[name], words) if name in own else ""


def _number(limit: float | None, words: Words) -> str:
    return words("quota-none") if limit is None else f"{limit:g}"


def about(account: Account, words: Words) -> str:
    """The role, and what is used of what."""
    role = words(f"role-of-{account.user.role}") if account.user else words("people-no-user")
    return " · ".join((role, *(f"{words(f'quota-{name}')} {text}" for name, text in used(account, words).items())))


def used(account: Account, words: Words) -> Mapping[str, str]:
    """What is used, beside its limit, by the name of the limit."""
    use = {"runs_at_once": account.use.runs, "gpu_hours": account.use.gpu_hours, "disk_gb": account.use.disk_gb}
    limits = {name: getattr(account.limits, name) for name in NAMES}
    return {
        name: words("quota-use", used=f"{use[name]:.3g}", limit=_number(limits[name], words))
        if limits[name] is not None
        else f"{use[name]:.3g}"
        for name in NAMES
    }


def table(accounts: Sequence[Account], words: Words) -> str:
    """The same as a table, for the System tab."""
    heads = (words("audit-user"), words("people-role"), *(words(f"quota-{name}") for name in NAMES))
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    rows = "".join(_row(account, words) for account in accounts)
    return f'<div class="wide"><table class="runs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _row(account: Account, words: Words) -> str:
    role = words(f"role-of-{account.user.role}") if account.user else words("people-no-user")
    cells = (account.name, role, *used(account, words).values())
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
