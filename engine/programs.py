"""The verbs for other programs: OpenAI's interface without a studio, the tools of an MCP server, and the tokens with
which programs sign in."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from engine.api.base_models import add_api_arguments, base_models
from engine.core import audit, tokens, users
from engine.core.permissions import keep_from_other_users
from engine.core.problems import NOTHING, Refusal, problem, shell_language
from engine.core.sockets import add_trusted_proxy_argument, listen
from engine.following import user_name
from engine.launch.workspace import Workplace, make_data, make_saves
from engine.mcp.package import load_server

USERS_FILE = "users.txt"


def add_api_options(verb: argparse.ArgumentParser) -> None:
    """Where to listen, who may ask, and for which models."""
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on; default: only this machine")
    verb.add_argument("--port", type=int, default=8001, help="default: 8001")
    add_trusted_proxy_argument(verb)
    add_api_arguments(verb)
    _add_auth(verb)


def add_token_options(verb: argparse.ArgumentParser) -> None:
    """Whose token, and what it is for."""
    verb.add_argument("what", choices=("add", "list", "revoke"))
    verb.add_argument("name", nargs="?", default="", help="of the token, such as laptop; to revoke it, also its ID")
    verb.add_argument("--user", default="", help="whose token; default: the user of this shell; with list: everybody")
    verb.add_argument(
        "--scope",
        nargs="+",
        choices=tokens.SCOPES,
        default=list(tokens.SCOPES),
        help="what it is for: fine-tune (files and jobs), chat (answers), read (only look at jobs); default: all",
    )
    _add_auth(verb)


def _add_auth(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--auth", type=Path, metavar="FILE", help=f"the users file; tokens are beside it [ATHANOR_AUTH; {USERS_FILE}]"
    )


def _users_file(arguments: argparse.Namespace) -> Path:
    file = arguments.auth or Path(os.environ.get("ATHANOR_AUTH") or USERS_FILE)
    if not file.is_file():
        raise Refusal(problem("no-users-file", file=file))
    return file


def api(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Serve OpenAI's interface for fine-tuning and chat without the page, until Ctrl-C. Programs need a token."""
    users_file = _users_file(arguments)
    base_models(workplace, arguments.api_models)  # a wrong table is refused now, not at the first request
    listener = listen(arguments.host, arguments.port)
    keep_from_other_users()
    for made in (make_saves(workplace), make_data(workplace)):
        if made:
            print(made.text(shell_language()), file=sys.stderr)
    from engine.api import server  # which needs the libraries of a web server

    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"OpenAI's interface is at http://{host}:{listener.getsockname()[1]}/v1", flush=True)
    server.serve(workplace, users_file, arguments.api_models, listener, arguments.trusted_proxy)
    return 0


def mcp(_arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Offer runs, models and data to an agent as tools of the Model Context Protocol, on standard input and output,
    with the rights of this shell's user."""
    server = load_server()
    make_saves(workplace)
    server.serve_stdio(workplace, user_name())
    return 0


def token(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Add a token for a user's programs and print it, which is possible only once; list or revoke tokens."""
    users_file = _users_file(arguments)
    if arguments.what == "list":
        for known in tokens.read_tokens(users_file, arguments.user or None):
            used = _day(known.used) if known.used else "never"
            scopes = ",".join(known.scopes)
            print(f"{known.id}  {known.user}  {known.name}  {scopes}  created {_day(known.created)}  used {used}")
        return 0
    user = arguments.user or user_name()
    if not arguments.user and user not in (existing := users.read_users(users_file)):
        raise Refusal(
            problem("token-whose", given=user or NOTHING, file=users_file, known=", ".join(existing) or NOTHING)
        )
    what = f"{user} {arguments.name}"
    with audit.recorded(workplace.saves, audit.shell(user_name()), f"token-{arguments.what}", what):
        if arguments.what == "revoke":
            tokens.revoke_token(users_file, user, arguments.name)
        else:
            print(tokens.add_token(users_file, user, arguments.name, arguments.scope))
    return 0


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
