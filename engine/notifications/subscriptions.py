"""Who is notified of what, and where: a file beside the users file, readable by its owner only, since an address is as
good as a password. Without a login there is one person, whose file is in the home folder.

    file: {"people": {"ada": {"language": …, "events": {"failed": 1764493200.0}, "addresses": [{"id": …, "url": …}]}}}

Which file belongs to a saves folder is noted there by the studio when it starts, because the supervisors of runs, which
also send, know no users. Nothing is sent about what happened before an address was added, or an event was chosen.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.core.locks import wait_for_lock
from engine.core.problems import NOTHING, Problem, Refusal, problem
from engine.core.rights import Person, may
from engine.core.rundir import read_object, read_to_change, stamp, write_json, write_text
from engine.core.users import read_users
from engine.notifications.sending import Checked
from engine.notifications.services import SERVICES

EVENTS = ("finished", "failed", "stopped", "stalled", "space", "turn")
USUAL_EVENTS = ("finished", "failed", "stalled", "space", "turn")  # a stop was requested by somebody
POINTER_FILE = ".notifications.json"  # in the saves folder: where the addresses are, and which machine sends
MAX_ADDRESSES = 20
USUAL_WAIT_HOURS = 2.0  # in the queue, until that is an event
MIN_WAIT_HOURS, MAX_WAIT_HOURS = 0.1, 1000.0
EVERYBODY = "*"  # in place of a name, which cannot be this
ALONE = ""  # the name of the one person without a login


@dataclass(frozen=True)
class Address:
    """`url` is secret; `shown` is what may be seen of it. `since`: when it was added (seconds since the epoch)."""

    id: str
    url: str
    service: str
    shown: str
    since: float


@dataclass(frozen=True)
class Subscription:
    """Of one person. `events`: since when each is wanted; `follows`: whose runs besides their own, and since when;
    `user_id` as in the users file, "" without a login."""

    user_id: str = ""
    language: str = "en"
    events: Mapping[str, float] = field(default_factory=dict)
    wait_hours: float = USUAL_WAIT_HOURS
    addresses: tuple[Address, ...] = ()
    follows: Mapping[str, float] = field(default_factory=dict)

    def follows_since(self, owner: str) -> float | None:
        """Since when they follow the runs of this owner; None if they do not."""
        chosen = [self.follows[name] for name in (owner, EVERYBODY) if name and name in self.follows]
        return min(chosen, default=None)


@dataclass(frozen=True)
class Place:
    """The file of the addresses, and that of the users to whom they belong; None without a login."""

    path: Path
    users_file: Path | None = None


def place_beside(users_file: Path | None) -> Place:
    """Where the addresses of these users are or, with None, those of the one person."""
    if users_file:
        return Place(users_file.with_suffix(".notifications.json"), users_file)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return Place(home / "athanor" / "notifications.json")


def note_place(saves: Path, users_file: Path | None) -> Problem | None:
    """Note in the saves folder where its addresses are. Called by the studio when it starts, which a full disk does not
    keep it from: then this returns what is wrong."""
    noted = {"users": str(users_file.resolve()) if users_file else "", "host": socket.gethostname()}
    try:
        if read_object(saves / POINTER_FILE) != noted:
            write_json(saves / POINTER_FILE, noted)
    except OSError as error:
        return problem("notify-place-unknown", file=saves / POINTER_FILE, why=error.strerror or error)
    return None


def place_of(saves: Path) -> Place:
    """Where the addresses of a saves folder are."""
    users = read_object(saves / POINTER_FILE).get("users")
    return place_beside(Path(users) if isinstance(users, str) and users else None)


def is_sender(saves: Path) -> bool:
    """Whether this machine is the one that sends, of several with this saves folder: that of the studio."""
    return read_object(saves / POINTER_FILE).get("host") in (None, socket.gethostname())


# ------------------------------------------------------------------------------------------------------------- reading


def read(place: Place) -> dict[str, Subscription]:
    """The subscriptions of all who exist and may start runs, by name. Raises Refusal if the file cannot be read."""
    known = _read(place, stamp([place.path, *([place.users_file] if place.users_file else [])]))
    return dict(known)


@lru_cache(maxsize=16)
def _read(place: Place, _stamp: str) -> dict[str, Subscription]:
    known = _people(read_to_change(place.path, {}))
    if place.users_file is None:
        return {name: person for name, person in known.items() if name == ALONE}
    users = read_users(place.users_file)
    return {
        name: person
        for name, person in known.items()
        if name in users and users[name].id == person.user_id and not may(Person(name, users[name].role), "notify")
    }


def readers(
    subscriptions: Mapping[str, Subscription], place: Place, owner: str
) -> Iterator[tuple[Subscription, float]]:
    """Who is notified of the runs of `owner`, and of what has happened since when: the user of that name and those who
    follow them or, without a login, the one person of all."""
    own = subscriptions.get(owner if place.users_file else ALONE)
    if own:
        yield own, 0.0
    for person in subscriptions.values() if place.users_file else ():
        since = person.follows_since(owner)
        if person is not own and since is not None:
            yield person, since


def of_person(place: Place, name: str) -> Subscription:
    """What a person has chosen; without anything, the usual events. Raises Refusal if the file cannot be read."""
    usual = Subscription(events=dict.fromkeys(USUAL_EVENTS, 0.0))
    return read(place).get(name, usual)


def chosen(person: Subscription, ids: Sequence[str]) -> list[Address]:
    """The addresses with these ids, or all. Raises Refusal if there is none."""
    addresses = [address for address in person.addresses if not ids or address.id in ids]
    if not addresses or len(addresses) < len(set(ids)):
        missing = next((id for id in ids if id not in [address.id for address in addresses]), "")
        raise Refusal(_missing(person, missing))
    return addresses


def _missing(person: Subscription, id: str) -> Problem:
    known = ", ".join(address.id for address in person.addresses) or NOTHING
    return problem("notify-address-missing", "id", id=id[:20], known=known)


def _people(content: dict[str, Any]) -> dict[str, Subscription]:
    people = content.get("people")
    pairs = people.items() if isinstance(people, dict) else ()
    return {name: person for name, entry in pairs if (person := _person(entry))}


def _person(entry: Any) -> Subscription | None:
    """An entry of the file; None if it is not one. Addresses that cannot be read are left out."""
    try:
        addresses = tuple(address for plain in entry["addresses"] if (address := _address(plain)))
        events = {event: float(since) for event, since in entry["events"].items() if event in EVENTS}
        language = entry["language"] if entry["language"] in ("en", "zh") else "en"
        follows = {str(name): float(since) for name, since in entry.get("follows", {}).items()}
        return Subscription(str(entry["user_id"]), language, events, float(entry["wait_hours"]), addresses, follows)
    except (TypeError, KeyError, AttributeError, ValueError):
        return None


def _address(plain: Any) -> Address | None:
    try:
        address = Address(**plain)
    except TypeError:
        return None
    texts = (address.id, address.url, address.service, address.shown)
    right = all(isinstance(text, str) for text in texts) and isinstance(address.since, (int, float))
    return address if right and address.service in SERVICES else None


# ------------------------------------------------------------------------------------------------------------ changing


def add_address(place: Place, name: str, language: str, checked: Checked) -> Address:
    """Add an address, and send in this language from now on. Raises Refusal if it is there already, there are too many,
    or the file cannot be written."""
    url, service = checked.url, checked.service
    made = Address(secrets.token_hex(4), url, service, checked.shown, time.time())

    def add(person: Subscription) -> Subscription:
        if any(address.url == url for address in person.addresses):
            raise Refusal(problem("notify-known", "url", service=SERVICES[service].name))
        if len(person.addresses) >= MAX_ADDRESSES:
            raise Refusal(problem("notify-too-many", most=MAX_ADDRESSES))
        return replace(person, language=language, addresses=(*person.addresses, made))

    _change(place, name, add)
    return made


def remove_address(place: Place, name: str, id: str) -> None:
    """Remove an address; nothing more is sent to it. Raises Refusal if there is none."""
    _change(place, name, lambda person: replace(person, addresses=_without(person, id)))


def _without(person: Subscription, id: str) -> tuple[Address, ...]:
    kept = tuple(address for address in person.addresses if address.id != id)
    if len(kept) == len(person.addresses):
        raise Refusal(_missing(person, id))
    return kept


def choose_events(place: Place, name: str, language: str, events: Sequence[str], wait_hours: float) -> None:
    """Choose of which events a person is notified; the language is that of the notifications. Raises Refusal."""
    if unknown := [event for event in events if event not in EVENTS]:
        raise Refusal(problem("notify-event", "events", value=unknown[0][:40], known=", ".join(EVENTS)))
    if not MIN_WAIT_HOURS <= wait_hours <= MAX_WAIT_HOURS:
        raise Refusal(problem("notify-hours", "wait_hours", shortest=MIN_WAIT_HOURS, longest=f"{MAX_WAIT_HOURS:g}"))
    now = time.time()

    def choose(person: Subscription) -> Subscription:
        chosen = {event: person.events.get(event, now) for event in EVENTS if event in events}
        return replace(person, language=language, events=chosen, wait_hours=wait_hours)

    _change(place, name, choose)


def follow(place: Place, name: str, others: Sequence[str]) -> None:
    """Choose whose runs a person is also notified of: names of users, or EVERYBODY. Raises Refusal for others."""
    users = read_users(place.users_file) if place.users_file else {}
    if unknown := [other for other in others if other not in users and other != EVERYBODY]:
        raise Refusal(problem("user-missing", "follow", given=unknown[0][:80], known=", ".join(users) or NOTHING))
    now = time.time()
    _change(
        place,
        name,
        lambda person: replace(
            person, follows={other: person.follows.get(other, now) for other in others if other != name}
        ),
    )


def forget(place: Place, name: str) -> None:
    """Remove what a user had chosen, who has been removed."""
    if os.path.lexists(place.path):
        with _changing(place) as people:
            people.pop(name, None)


def _change(place: Place, name: str, change: Callable[[Subscription], Subscription]) -> None:
    """Replace a person's subscription, one process at a time."""
    user_id = ""
    if place.users_file:
        users = read_users(place.users_file)
        if name not in users:
            raise Refusal(problem("user-missing", "name", given=name[:80], known=", ".join(users) or NOTHING))
        user_id = users[name].id
    with _changing(place) as people:
        before = _person(people.get(name))
        if before is None or before.user_id != user_id:  # none yet, or another person's of the same name
            before = Subscription(user_id, events=dict.fromkeys(USUAL_EVENTS, time.time()))
        people[name] = asdict(change(before))


@contextmanager
def _changing(place: Place) -> Iterator[dict[str, Any]]:
    """The people in the file, which is written if nothing is raised. What this version cannot read stays."""
    path = place.path
    with _refusing_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = wait_for_lock(path.with_name(f".{path.name}.lock"))
        try:
            content: dict[str, Any] = read_to_change(path, {})
            people = content.get("people")
            people = people if isinstance(people, dict) else {}
            yield people
            text = json.dumps(content | {"people": people}, ensure_ascii=False, indent=1)
            write_text(path, text + "\n", private=True)
        finally:
            os.close(lock)


@contextlib.contextmanager
def _refusing_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refusal(problem("cannot-write", folder=path.parent, why=error.strerror or error)) from None
