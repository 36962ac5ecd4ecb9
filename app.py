"""Start the studio: `python app.py`, then open the address it prints. `--help` lists the options."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.api.base_models import add_api_arguments
from engine.core import users
from engine.core.permissions import keep_from_other_users
from engine.core.problems import Refusal, problem, shell_language
from engine.core.repetition import repeat
from engine.core.sockets import KEEP_ALIVE_SECONDS, add_trusted_proxy_argument, is_loopback, listen
from engine.data.upload_folder import UPLOADS_FOLDER, remove_old_uploads
from engine.launch.engine_choice import settle_choice
from engine.launch.workspace import Workplace, add_arguments, from_arguments, make_data, make_saves
from engine.notifications import subscriptions
from engine.runs import standby
from engine.serving import servers

QUEUE_POLL_SECONDS = 2.0
CLEANING_SECONDS = 3600.0
# How long shutting down waits for transfers in progress; a slow one may take hours.
SHUTDOWN_SECONDS = 5
M_ARENA_MAX = -8  # as in malloc.h
ARENAS = 2
LOOPBACK_HOSTS = "localhost,127.0.0.1,::1"


def settle_environment(workplace: Workplace) -> None:
    """To be called before gradio is imported: requests to localhost must not go through a proxy; nothing is sent to
    outside services; and temporary files are kept here, since /tmp/gradio may belong to another user."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), LOOPBACK_HOSTS)))
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    os.environ["GRADIO_TEMP_DIR"] = str(workplace.saves / UPLOADS_FOLDER)


def settle_memory() -> None:
    """To be called before threads are started: otherwise each gets its own arena of glibc, and memory freed in one
    arena cannot be used by another, so memory would rise with every thread that gradio starts. Other C libraries
    lack the call."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names the default of a flag only where there is something to name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def arguments() -> argparse.Namespace:
    """The command line, each flag with its environment variable."""
    environment = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--host",
        default=environment("ATHANOR_HOST", "127.0.0.1"),
        help="address to listen on; anything but this machine requires --auth or --no-auth [ATHANOR_HOST]",
    )
    parser.add_argument(
        "--port", type=int, default=environment("ATHANOR_PORT", "7860"), help="0 = any free port [ATHANOR_PORT]"
    )
    parser.add_argument(
        "--auth",
        type=Path,
        metavar="FILE",
        default=environment("ATHANOR_AUTH") or None,
        help="users who may log in; add them with: python -m engine user add NAME --auth FILE [ATHANOR_AUTH]",
    )
    parser.add_argument(
        "--no-auth",
        action="store_true",
        default=environment("ATHANOR_NO_AUTH", "") not in ("", "0"),
        help="let in everyone who can reach the address [ATHANOR_NO_AUTH]",
    )
    parser.add_argument(
        "--root-path",
        default=environment("ATHANOR_ROOT_PATH", ""),
        help="sub-path under which a reverse proxy serves the studio, such as /athanor [ATHANOR_ROOT_PATH]",
    )
    parser.add_argument(
        "--allowed-host",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=environment("ATHANOR_ALLOWED_HOSTS", "").replace(",", " ").split(),
        help=(
            "host names by which browsers reach the studio, besides IP addresses and this machine's own name; "
            "needed without --auth, and behind a proxy that does not pass on Host [ATHANOR_ALLOWED_HOSTS]"
        ),
    )
    add_proxy_arguments(parser)
    add_oidc_arguments(parser)
    add_standby_argument(parser)
    add_api_arguments(parser)
    parser.add_argument(
        "--mcp",
        action="store_true",
        default=environment("ATHANOR_MCP", "") not in ("", "0"),
        help="also answer at /mcp as an MCP server, for agents with a token [ATHANOR_MCP]",
    )
    add_arguments(parser)
    return parser.parse_args()


def add_proxy_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which reverse proxies there are, and what is believed of what they say."""
    add_trusted_proxy_argument(parser)
    parser.add_argument(
        "--trust-header",
        metavar="NAME",
        default=os.environ.get("ATHANOR_TRUST_HEADER", ""),
        help=(
            "header by which a --trusted-proxy says who is signed in, such as X-Forwarded-User; "
            "ignored from any other address [ATHANOR_TRUST_HEADER]"
        ),
    )


def add_oidc_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of an OpenID provider. Its secret is in the environment only: ps shows arguments."""
    environment = os.environ.get
    parser.add_argument(
        "--oidc-issuer",
        metavar="URL",
        default=environment("ATHANOR_OIDC_ISSUER", ""),
        help=(
            "OpenID provider that signs users in; the client's secret is in ATHANOR_OIDC_CLIENT_SECRET "
            "[ATHANOR_OIDC_ISSUER]"
        ),
    )
    parser.add_argument("--oidc-client-id", default=environment("ATHANOR_OIDC_CLIENT_ID", ""), metavar="ID")
    parser.add_argument(
        "--oidc-claim",
        metavar="NAME",
        default=environment("ATHANOR_OIDC_CLAIM", "preferred_username"),
        help="part of the ID token that names the user [ATHANOR_OIDC_CLAIM]",
    )


def oidc_provider(options: argparse.Namespace) -> Any:
    """The OpenID provider; None without one. Raises Refusal if something is missing."""
    if not options.oidc_issuer:
        return None
    from webui.oidc import Provider

    secret = os.environ.pop("ATHANOR_OIDC_CLIENT_SECRET", "")  # runs must not inherit it
    if not (options.auth and options.oidc_client_id and secret):
        raise Refusal(problem("oidc-incomplete"))
    return Provider(options.oidc_issuer, options.oidc_client_id, secret, options.oidc_claim)


def add_standby_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that switches off what `engine.runs.standby` does."""
    parser.add_argument(
        "--no-standby",
        action="store_true",
        default=os.environ.get("ATHANOR_NO_STANDBY", "") not in ("", "0"),
        help=(
            "import no libraries before a run starts; by default a process does so while somebody looks at a form that "
            "is ready to start, and takes about 450 MB until then [ATHANOR_NO_STANDBY]"
        ),
    )


def open_socket(options: argparse.Namespace) -> socket.socket:
    """The socket to serve on. Raises Refusal if it would be open to anyone, or if another process listens there."""
    if not is_loopback(options.host) and not options.auth and not options.no_auth:
        raise Refusal(problem("open-without-login", host=options.host))
    if options.trust_header and not (options.auth and options.trusted_proxy):
        raise Refusal(problem("proxy-header-alone"))
    if options.auth and not Path(options.auth).is_file():
        raise Refusal(problem("no-users-file", file=options.auth))
    return listen(options.host, options.port)


def login_required(options: argparse.Namespace, saves: Path) -> Any:
    """What wraps the studio in its login; None without one. Raises Refusal."""
    provider = oidc_provider(options)
    if not options.auth:
        return None
    from webui.login import LoginRequired

    users_file = Path(options.auth)
    return functools.partial(
        LoginRequired,
        users_file=users_file,
        secret_file=users_file.with_suffix(".secret"),
        ended_file=users_file.with_suffix(".ended.jsonl"),
        root_path=options.root_path,
        saves=saves,
        provider=provider,
    )


def behind_proxies(page: Any, options: argparse.Namespace) -> Any:
    """The app with what the trusted proxies say of a request: the client's own address and, if so configured, its user.
    That is looked at first, by the address of the connection. Raises Refusal."""
    from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

    from webui.proxy_sign_in import ProxySignIn, loopback_warning

    page = ProxyHeadersMiddleware(page, trusted_hosts=options.trusted_proxy)
    if not options.trust_header:
        return page
    if warning := loopback_warning(options.trust_header, options.trusted_proxy):
        print(warning.text(shell_language()), file=sys.stderr)
    return ProxySignIn(page, options.trust_header, options.trusted_proxy)


def serve(options: argparse.Namespace) -> None:
    """Build the studio and serve it until it is stopped. Raises Refusal if it cannot start."""
    workplace = from_arguments(options)
    listener = open_socket(options)
    if options.auth:
        keep_from_other_users()
        if remark := users.remark_without_role(Path(options.auth)):
            print(remark.text(shell_language()), file=sys.stderr)
    users_file = Path(options.auth) if options.auth else None
    notes = make_saves(workplace), settle_choice(workplace.saves, options.run_engine), make_data(workplace)
    for made in (*notes, subscriptions.note_place(workplace.saves, users_file)):
        if made:
            print(made.text(shell_language()), file=sys.stderr)
    if not is_loopback(options.host) and options.no_auth and not options.auth:
        print(
            f"WARNING: anyone who can reach {options.host} can train, read data and delete runs here.",
            file=sys.stderr,
        )

    settle_environment(workplace)
    settle_memory()
    gc.disable()  # what is imported and built now stays; the collector would search it again and again
    import uvicorn

    from engine.api.app import Api
    from engine.api.app import application as api_application
    from engine.api.callers import Gate
    from engine.mcp.package import load_server
    from webui.studio.application import application

    login = login_required(options, workplace.saves)
    hosts = [*options.allowed_host, options.host, *filter(None, [urlsplit(options.root_path).hostname])]
    gate = Gate(users_file)
    api = api_application(Api(workplace, gate, options.api_models))
    mcp = load_server().application(workplace, gate) if options.mcp else None
    page = application(
        workplace, auth=login, root_path=options.root_path, hosts=hosts, api=api, mcp=mcp, users_file=users_file
    )
    page = behind_proxies(page, options)
    repeat(lambda: standby.tick(workplace.saves), QUEUE_POLL_SECONDS)  # supervisors, too, let the queue move on
    repeat(lambda: remove_old_uploads(workplace.saves, workplace.data), CLEANING_SECONDS)
    servers.attend(workplace.saves)
    if not options.no_standby:
        standby.enable()
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"Athanor is at http://{host}:{listener.getsockname()[1]}{options.root_path}", flush=True)
    # The components of the page are never freed; a garbage collection that visited them would stall all pages.
    gc.collect()
    gc.freeze()
    gc.enable()
    config = uvicorn.Config(
        page,
        root_path=options.root_path,
        log_level="warning",
        proxy_headers=False,  # behind_proxies
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listener])


def main() -> int:
    try:
        serve(arguments())
        return 0
    except Refusal as refusal:
        print(refusal.text(shell_language()), file=sys.stderr)
    except OSError as error:
        refused = problem("system-refused", file=error.filename or "—", why=error.strerror or error)
        print(refused.text(shell_language()), file=sys.stderr)
    return 2


def command() -> int:
    """`athanor`: the studio; with a verb, the same as `python -m engine`: `athanor train spec.yaml`."""
    if sys.argv[1:2] and not sys.argv[1].startswith("-"):
        from engine import __main__ as shell

        return shell.main()
    return main()


if __name__ == "__main__":
    sys.exit(main())
