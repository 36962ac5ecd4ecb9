"""The verbs of the command line that are about people: users and their roles, the audit, quotas. Who works in a shell
of this machine is an operator."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
import time
from pathlib import Path

from engine.core import audit as record
from engine.core import tokens, users
from engine.core.problems import say, shell_language
from engine.core.rights import OPERATOR, ROLES, USER
from engine.following import user_name
from engine.launch.workspace import Workplace
from engine.runs import accounts, quotas
from engine.runs.quotas import Limits

USUAL_LINES = 50


def user(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Add or remove a user of the login page, set a role (user role NAME ROLE), or list users and roles."""
    file = arguments.auth or Path(os.environ.get("ATHANOR_AUTH") or "users.txt")
    if arguments.what == "list":
        print("".join(f"{known.role:<10}{name}\n" for name, known in users.read_users(file).items()), end="")
        return 0
    what = f"{arguments.name} {arguments.role}".strip()
    with record.recorded(workplace.saves, record.shell(user_name()), f"user-{arguments.what}", what):
        if arguments.what == "remove":
            accounts.remove(workplace, file, arguments.name)
        elif arguments.what == "role":
            users.set_role(file, arguments.name, arguments.role)
        else:
            password = None if arguments.no_password else _password()
            users.add_user(file, arguments.name, password, arguments.role, arguments.take_over)
            role = users.read_users(file)[arguments.name].role
            print(f"{arguments.name} can log in, as {role}; the file is {file}")
            _look_at_tokens(file, arguments.name, arguments.revoke_tokens)
    return 0


def _look_at_tokens(file: Path, name: str, revoke: bool) -> None:
    """Revoke the tokens of a user whose password has been set, or say that they still work."""
    if revoke:
        tokens.revoke_tokens(file, name)
    elif known := tokens.read_tokens(file, name):
        names = ", ".join(token.name for token in known)
        print(say("tokens-remain", shell_language(), user=name, count=len(known), names=names), file=sys.stderr)


def _password() -> str:
    # Without a terminal, from a pipe, so that scripts can add users; never as an argument, which ps shows.
    return getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")


def add_user_options(verb: argparse.ArgumentParser) -> None:
    """Whom to change, and how."""
    verb.add_argument("what", choices=("add", "remove", "role", "list"))
    verb.add_argument("name", nargs="?", default="")
    verb.add_argument(
        "role",
        nargs="?",
        default="",
        help=f"{', '.join(ROLES)}; by default, the first user of a file is {OPERATOR}, every other {USER}",
    )
    verb.add_argument(
        "--no-password",
        action="store_true",
        help="the user signs in through a reverse proxy (--trust-header) or an OpenID provider (--oidc-issuer)",
    )
    verb.add_argument(
        "--take-over",
        action="store_true",
        help="the user gets what belongs to a removed user of the same name: runs, data sets, quota",
    )
    verb.add_argument("--revoke-tokens", action="store_true", help="with a new password: end the user's tokens, too")
    verb.add_argument("--auth", type=Path, metavar="FILE", help="the users file [ATHANOR_AUTH; users.txt]")


def audit(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Print the newest actions of all users, oldest first: when, user, address, action, to what, and its outcome."""
    for entry in reversed(record.read(workplace.saves, arguments.last, " ".join(arguments.words))):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at))
        fields = (when, entry.user or "—", entry.address or "—", entry.action, entry.what, entry.outcome)
        print("\t".join(field if field.isprintable() else repr(field) for field in fields))
    return 0


def add_audit_options(verb: argparse.ArgumentParser) -> None:
    """Which lines."""
    verb.add_argument("words", nargs="*", metavar="WORD", help="only lines that contain all of these words")
    lines = f"how many lines; default: {USUAL_LINES}"
    verb.add_argument("--last", type=int, default=USUAL_LINES, metavar="N", help=lines)


def quotas_(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Print what each user uses and their limits, which are in quotas.yaml in the saves folder."""
    for account in accounts.accounts(workplace):
        use, most = account.use, account.limits
        print(
            f"{account.name}  {_of(use.runs, most.runs_at_once)} runs at once"
            f"  {_of(use.gpu_hours, most.gpu_hours)} GPU hours  {_of(use.disk_gb, most.disk_gb)} GB"
        )
    limits = quotas.read_quotas(workplace.saves)
    if limits.default == Limits() and not limits.users:
        print(say("quotas-none", shell_language(), file=workplace.saves / quotas.QUOTAS_FILE), file=sys.stderr)
    return 0


def _of(used: float, limit: float | None) -> str:
    return f"{used:.4g}" if limit is None else f"{used:.4g} of {limit:g}"
