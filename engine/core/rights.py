"""Who may do what: one table of actions, and one pure function that reads it.

Everybody who is signed in may look: at runs, data sets, results and exports of all. What this table lists changes
something, or costs time of a GPU. Things have an owner, the user who made them; those without one, for example from
before there was a login, are left to the operators. The web interface asks `may` before every action; who works in a
shell on this machine is an operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.core.problems import Problem, problem

Role = Literal["operator", "user", "viewer"]
OPERATOR, USER, VIEWER = "operator", "user", "viewer"
ROLES: tuple[Role, ...] = ("operator", "user", "viewer")


@dataclass(frozen=True)
class Person:
    """Who is acting: a name, "" without a login; a role; and the address, for the audit."""

    name: str = ""
    role: str = VIEWER
    address: str = ""


# Who may do it: "user": users and operators; "owner": the owner, unless a viewer by now, and operators.
RIGHTS: dict[str, Literal["user", "owner", "operator"]] = {
    # runs: trainings, sweeps, evaluations, exports
    "start": "user",
    "stop": "owner",
    "kill": "owner",
    "resume": "owner",
    "delete": "owner",
    "reorder": "owner",  # hold, release, start now, move, priority
    "publish": "owner",
    "script": "user",  # write one as a plain script, which starts a process
    "import": "user",  # finished trainings of another program, from folders that the operator names
    "mute": "owner",  # no notifications about a run, or again
    "notify": "user",  # one's own addresses and events, and a test
    # data sets and models
    "upload": "user",
    "fetch": "user",  # from a hub
    "check-data": "user",
    "derive": "user",
    "make-draft": "user",  # rows from documents, by a model
    "review-draft": "owner",  # also to see it
    "describe": "owner",  # name, columns, encoding, sheet, rows of images
    "remove-data": "owner",
    "convert": "user",  # a model
    # presets of the form
    "save-preset": "user",
    "change-preset": "owner",  # rename, share, delete
    # chat
    "load": "user",
    "ask": "user",
    "unload": "owner",
    # the machine
    "examine": "user",  # the report of the System tab, which starts processes
    "free-space": "owner",
    "read-audit": "operator",
    # people
    "see-users": "operator",  # all of them, with what they use
    "user-add": "operator",
    "user-role": "operator",
    "user-password": "operator",
    "user-quota": "operator",
    "user-remove": "operator",
}


def may(person: Person, action: str, owner: str | None = None) -> Problem | None:
    """None if the person may do `action` (a key of RIGHTS) to something of `owner`; otherwise why not. `owner` is ""
    for what belongs to nobody, and is not looked at where everybody's things are the same. Raises KeyError for an
    action that is not in the table."""
    right = RIGHTS[action]
    if person.role == OPERATOR:
        return None
    if right == "operator":
        return problem("rights-operator")
    if person.role != USER:
        return problem("rights-viewer")
    if right == "owner" and not (owner and owner == person.name):
        return problem("rights-owner", owner=owner) if owner else problem("rights-no-owner")
    return None
