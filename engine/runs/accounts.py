"""The people of a studio as an operator sees them: each with role, limits and use. And what goes with a user who is
removed; their runs, data sets and shared presets stay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.core import dismissals, kept_forms, tokens, users
from engine.core.users import EXTERNAL, User
from engine.launch.workspace import Workplace
from engine.notifications import subscriptions
from engine.runs import index, own_presets, quota_use
from engine.runs.quota_use import Use
from engine.runs.quotas import Limits, read_quotas


@dataclass(frozen=True)
class Account:
    """One name: what it may use and does use."""

    name: str
    use: Use
    limits: Limits
    user: User | None = None  # None: nobody signs in with it, for example that of a shell

    @property
    def has_password(self) -> bool:
        return self.user is not None and self.user.hash != EXTERNAL


def account(workplace: Workplace, name: str, users_file: Path | None = None) -> Account:
    """The account of one name. Raises Refusal if the quotas cannot be read."""
    limits = read_quotas(workplace.saves).of(name)
    user = users.read_users(users_file).get(name) if users_file else None
    return Account(name, quota_use.use_of(workplace.saves, workplace.data, name), limits, user)


def accounts(workplace: Workplace, users_file: Path | None = None) -> list[Account]:
    """Those of the users file in its order, then, by name, all others that own runs or have limits. Raises Refusal if
    the quotas cannot be read."""
    known = list(users.read_users(users_file)) if users_file else []
    owners = {run.by for run in index.runs(workplace.saves)} | set(read_quotas(workplace.saves).users)
    names = [*known, *sorted(name for name in owners if name and name not in known)]
    return [account(workplace, name, users_file) for name in names]


def remove(workplace: Workplace, users_file: Path, name: str, keep_operator: bool = False) -> None:
    """Remove a user, with their tokens, kept form, and addresses for notifications; their presets become nobody's.
    Raises Refusal as `users.remove_user` does or if a file of these cannot be read, and OSError; the user is then still
    there, so that it can be tried again."""
    users.check_removable(users_file, name, keep_operator)
    tokens.revoke_tokens(users_file, name)
    kept_forms.forget(workplace.saves, name)
    dismissals.dismiss(workplace.saves, name, over=False)
    own_presets.disown(workplace.saves, name)
    subscriptions.forget(subscriptions.place_beside(users_file), name)
    users.remove_user(users_file, name, keep_operator)  # last: nobody could name them any more to remove the rest
