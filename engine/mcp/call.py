"""A call of a tool: who calls, where, and with which arguments; and what a tool is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from engine.api.callers import Caller
from engine.launch.workspace import Workplace
from engine.runs import runs
from engine.runs.run import Run

READ = ("read", "fine-tune")  # scopes of which a token needs one
WRITE = ("fine-tune",)
ASK = ("chat",)


@dataclass(frozen=True)
class Call:
    """Where a tool is called, by whom, and the language of its sentences."""

    workplace: Workplace
    caller: Caller
    language: str = "en"

    def run(self, name: str, fits: Callable[[Run], bool] = lambda _: True, *, whole: bool = False) -> Run:
        """The run with this ID or name, of several with that name the one that `fits`; unless it must be the `whole`
        one, the beginning or end is enough. Raises Refusal."""
        return runs.get(self.workplace.saves, name, fits, abbreviated=not whole)

    def acting(self, action: str, what: str, owner: str | None = None) -> contextlib.AbstractContextManager[None]:
        """Do an action of `engine.core.rights`, if the caller may; it is recorded in the audit. Raises Refusal."""
        return self.caller.acting(self.workplace.saves, action, what, owner)


class Arguments(BaseModel):
    """The arguments of a tool; others are refused."""

    model_config = ConfigDict(extra="forbid")


class NoArguments(Arguments):
    """Of a tool without arguments."""


class OfRun(Arguments):
    """The run that a tool is about."""

    run: str = Field(description="a run's ID, or its name; the beginning or end is enough")


@dataclass(frozen=True)
class Tool:
    """`does` takes the call and its arguments, and returns the structured result: a JSON object. Its docstring is what
    the program reads. `scopes`: of which a token needs one; `reads`: it changes nothing; `destroys`: what it does
    cannot be undone; `waits`: it may take minutes."""

    does: Callable[[Call, Any], dict[str, Any]]
    arguments: type[Arguments]
    scopes: Sequence[str]
    reads: bool = False
    destroys: bool = False
    waits: bool = False

    @property
    def description(self) -> str:
        return " ".join((self.does.__doc__ or "").split())
