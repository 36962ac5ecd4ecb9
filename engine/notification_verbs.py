"""The verb of the command line for notifications: one's addresses and events, a test, and runs to be silent about."""

from __future__ import annotations

import argparse
import getpass
import sys
import time
from pathlib import Path

from engine.core import audit
from engine.core.problems import Refusal, problem, say, shell_language
from engine.following import user_name
from engine.launch.workspace import Workplace
from engine.notifications import notice, sending, subscriptions
from engine.notifications.policy import read_policy
from engine.notifications.services import SERVICES
from engine.notifications.subscriptions import ALONE, EVENTS, Place
from engine.runs import notification_choice, runs

ACTIONS = ("list", "add", "remove", "test", "events", "mute", "unmute")


def add_notification_options(verb: argparse.ArgumentParser) -> None:
    """What to do, and for whom."""
    verb.add_argument("what", choices=ACTIONS)
    verb.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"remove, test: the ID of an address; mute, unmute: a run; events: any of {', '.join(EVENTS)}",
    )
    verb.add_argument("--user", default="", help="whose; default: the user of this shell; without a login: everybody")
    verb.add_argument("--wait-hours", type=float, metavar="HOURS", help="events: in the queue, until that is an event")
    verb.add_argument(
        "--auth", type=Path, metavar="FILE", help="the users file; default: that of the studio of the saves folder"
    )


def notifications(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """List, add, remove or test the addresses to which notifications about runs are sent; choose the events; mute a
    run. The address to add is asked for, or read from standard input, since ps shows arguments."""
    place = subscriptions.place_beside(arguments.auth) if arguments.auth else subscriptions.place_of(workplace.saves)
    name = (arguments.user or user_name()) if place.users_file else ALONE
    if arguments.what == "list":
        return _list(place, name)
    action = "mute" if arguments.what in ("mute", "unmute") else "notify"
    what = " ".join([arguments.what, *arguments.names])
    with audit.recorded(workplace.saves, audit.shell(user_name()), action, what):
        return {
            "add": _add,
            "remove": _remove,
            "test": _test,
            "events": _choose_events,
            "mute": _mute,
            "unmute": _mute,
        }[arguments.what](arguments, workplace, place, name)


def _list(place: Place, name: str) -> int:
    person = subscriptions.of_person(place, name)
    for address in person.addresses:
        print(f"{address.id}  {SERVICES[address.service].name[shell_language()]}  {address.shown}")
    print(f"events: {', '.join(person.events)}; wait: {person.wait_hours:g} h", file=sys.stderr)
    return 0


def _add(_arguments: argparse.Namespace, workplace: Workplace, place: Place, name: str) -> int:
    url = getpass.getpass("Address: ") if sys.stdin.isatty() else sys.stdin.readline()
    checked = sending.check(url, read_policy(workplace.saves))
    made = subscriptions.add_address(place, name, shell_language(), checked)
    print(f"{made.id}  {made.shown}")
    return 0


def _remove(arguments: argparse.Namespace, _workplace: Workplace, place: Place, name: str) -> int:
    for id in arguments.names:
        subscriptions.remove_address(place, name, id)
    return 0


def _test(arguments: argparse.Namespace, workplace: Workplace, place: Place, name: str) -> int:
    policy = read_policy(workplace.saves)
    sending.refuse_if_disabled(policy)
    addresses = subscriptions.chosen(subscriptions.of_person(place, name), arguments.names)
    language = shell_language()
    message = notice.sample(time.time(), language, name, policy)
    outcomes = sending.send([(address.url, message) for address in addresses], policy)
    for address, outcome in zip(addresses, outcomes, strict=True):
        service = SERVICES[address.service].name
        print(f"{address.id}  {outcome.text(language) if outcome else say('notify-sent', language, service=service)}")
    return 1 if any(outcomes) else 0


def _choose_events(arguments: argparse.Namespace, _workplace: Workplace, place: Place, name: str) -> int:
    hours = arguments.wait_hours
    hours = subscriptions.of_person(place, name).wait_hours if hours is None else hours
    subscriptions.choose_events(place, name, shell_language(), arguments.names, hours)
    return 0


def _mute(arguments: argparse.Namespace, workplace: Workplace, _place: Place, _name: str) -> int:
    if not arguments.names:
        raise Refusal(problem("run-unknown", id=""))
    for id in arguments.names:
        run = runs.get(workplace.saves, id, abbreviated=True)
        notification_choice.choose(run, arguments.what == "unmute", user_name())
    return 0
