"""Changes of the order in which waiting runs start: on hold, at once, earlier, later, more important.

Of a run that waits in Slurm's queue, some of them are possible there.
The request of a run records the last change and who (`by`) made it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, get_args

from engine.core.locks import holding
from engine.core.problems import Refusal, problem
from engine.core.rundir import TURN_BYTE, RunDir, read_object, write_json
from engine.runs import engines, queue, runs
from engine.runs.run import Run

Move = Literal["first", "up", "down", "last"]
MOVES = get_args(Move)
PRIORITIES = {"high": 1, "normal": 0, "low": -1}
CHANGES = ("start-now", "hold", "release", "priority", *MOVES)
CHANGES_BY_SLURM = ("hold", "release", "priority", "first")
SECOND_NS = 1_000_000_000


def possible(run: Run) -> tuple[str, ...]:
    """Which of `CHANGES` a waiting run can have."""
    return CHANGES_BY_SLURM if run.dir.on_slurm() else CHANGES


def hold(run: Run, by: str = "") -> None:
    """Keep a waiting run from starting. Raises Refusal if it does not wait."""
    _change(run, "hold", by, lambda _order: {"held": True, "now": False})


def release(run: Run, by: str = "") -> None:
    """Let a run on hold wait for its turn again. Raises Refusal if it does not wait."""
    _change(run, "release", by, lambda _order: {"held": False})


def start_now(run: Run, by: str = "") -> None:
    """Put a waiting run first, and let it start even on GPUs on which processes of others compute, or on a CPU that
    other runs use; not on a GPU that is leased. Raises Refusal if it does not wait."""
    _change(run, "start-now", by, lambda _order: {"held": False, "now": True})


def set_priority(run: Run, priority: str, by: str = "") -> None:
    """A key of PRIORITIES. Runs of a higher priority come first. Raises Refusal if the run does not wait."""
    if priority not in PRIORITIES:
        raise Refusal(problem("spec-choice", "priority", given=priority, choices=", ".join(PRIORITIES)))
    _change(run, "priority", by, lambda _order: {"priority": PRIORITIES[priority]})


def move(run: Run, where: str, by: str = "") -> None:
    """Move a waiting run in the queue; it gets the priority of the run whose place it takes. Those that start at once
    stay in front. Raises Refusal if it does not wait."""
    if where not in MOVES:
        raise Refusal(problem("spec-choice", "move", given=where, choices=", ".join(MOVES)))
    _change(run, where, by, lambda order: _moved(run, order, where))


def _moved(run: Run, order: list[Run], where: str) -> dict[str, Any]:
    order = [other for other in order if not other.request.get("now")]
    paths = [other.path for other in order]
    if run.path not in paths:
        return {}
    at, others = paths.index(run.path), [other for other in order if other.path != run.path]
    target = {"first": 0, "up": max(at - 1, 0), "down": min(at + 1, len(others)), "last": len(others)}[where]
    if target == at:
        return {}
    before, after = ([None, *others][target], [*others, None][target])
    if before and after and _priority(before) == _priority(after):
        return {"priority": _priority(after), "queued": (_queued(before) + _queued(after)) // 2}
    if after and (target < at or before is None):
        return {"priority": _priority(after), "queued": _queued(after) - SECOND_NS}
    assert before
    return {"priority": _priority(before), "queued": _queued(before) + SECOND_NS}


def _priority(run: Run) -> int:
    return run.request.get("priority", 0)


def _queued(run: Run) -> int:
    return run.request.get("queued", 0)


def _change(run: Run, action: str, by: str, changes: Callable[[list[Run]], dict[str, Any]]) -> None:
    """Change the request of a waiting run: the runs in their order → what is changed. Raises Refusal, also if Slurm,
    which has the run, does not change its turn."""
    saves = queue.saves_of(run.path)
    with runs.refusing_write_errors(saves), holding(run.dir.lock, TURN_BYTE):
        with queue.locked(saves):
            run = runs.read(run.path, saves)
            if run.state != "queued":
                raise Refusal(problem("run-cannot-reorder", state=run.state))
            if action not in possible(run):
                raise Refusal(problem("slurm-orders"))
            change = {"action": "move" if action in MOVES else action, "by": by, "at": time.time()}
            before = read_object(run.dir.request)
            after = before | changes(queue.waiting(saves)) | {"queue_change": change}
            write_json(run.dir.request, after)
        try:  # after that, since it may just have been handed to Slurm; and Slurm may take its time
            engines.engine_of(run.dir).reorder(run.dir, action)
        except Refusal:
            with queue.locked(saves):
                _take_back(run.dir, before, after)
            raise
    engines.advance(saves)


def _take_back(run: RunDir, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Undo what the change from `before` to `after` has left in the request; what others have written since stays."""
    now = read_object(run.request)
    changed = {name for name, value in after.items() if before.get(name) != value and now.get(name) == value}
    if changed:
        kept = {name: value for name, value in now.items() if name not in changed}
        write_json(run.request, kept | {name: before[name] for name in changed if name in before})
