"""Submit a run from the command line and follow it to its end."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from engine.core import audit, regular_files
from engine.core.problems import Problem, Refusal, problem, say, shell_language
from engine.launch.workspace import Workplace, make_data
from engine.runs import engines, evaluations, failures, kinds, runs
from engine.spec.run_spec import Spec


def submit(spec: Spec, workplace: Workplace) -> runs.Run:
    """Submit a spec; print a note if that has created the data folder, or the saves folder, whose path may be
    mistyped."""
    # An installation by pip starts without one. A folder given explicitly is not created: its own sets are expected,
    # not the samples.
    made = make_data(workplace) if workplace.data == Workplace.data else None
    if made:
        print(made.text(shell_language()), file=sys.stderr)
    fresh = not workplace.saves.is_dir()
    with audit.recorded(workplace.saves, audit.shell(user_name()), "start", f"{spec.kind} {spec.name}".strip()):
        run = runs.submit(spec, workplace, by=user_name())
    if fresh:
        print(problem("saves-made", folder=workplace.saves).text(shell_language()), file=sys.stderr)
    kind = kinds.KINDS[spec.kind]
    print_doubts(kind.doubts(kind.frozen(spec, workplace), []))
    return run


def follow(run: runs.Run, workplace: Workplace, quiet: bool = False) -> int:
    """Print the output of the run until it ends; `quiet`: only the path of its result."""
    presses: list[int] = []
    # Only recorded here: a handler that took the queue's lock could wait for itself.
    signal.signal(signal.SIGINT, lambda *_: presses.append(1))
    shown: dict[Path, int] = {}
    last_state, obeyed = "", 0
    while True:
        now = runs.get(workplace.saves, run.id)
        if now.state != last_state and not quiet:
            last_state = now.state
            place = engines.place(now)
            number = f" #{place.number}" if place and place.number else ""
            waits = f"{number}: {place.decision.text(shell_language())}" if place else ""
            print(f"[{last_state}{waits.rstrip(': ')}]", flush=True)
        if not quiet:
            _print_new(now.dir.logs(), shown, now.final)
        if now.final:
            return _print_end(now)
        if len(presses) > obeyed:
            obeyed = len(presses)
            how = "kill" if obeyed > 1 or now.state == "queued" else "save"
            print(f"[asked to stop: {how}]", flush=True)
            with contextlib.suppress(Refusal):  # it ended at the same moment
                runs.stop(now, how, by=user_name())
        engines.advance(workplace.saves)
        time.sleep(0.5)


def _print_new(logs: Sequence[Path], shown: dict[Path, int], is_final: bool) -> None:
    """Print what is new in the logs of a run's machines; `shown`: the bytes of each that have been. The first machine's
    is printed as it comes, of the others whole lines (unless the run has ended) with the number of their machine."""
    at_line_start = True
    for machine, log in enumerate(logs, start=1):
        try:
            with regular_files.open_regular(log) as file:
                file.seek(shown.get(log, 0))
                new = file.read()
        except OSError:  # not there yet
            continue
        if machine > 1 and not is_final:
            new = new[: new.rfind(b"\n") + 1]
        shown[log] = shown.get(log, 0) + len(new)
        if machine > 1:
            mark = f"[machine {machine}] ".encode()
            new = b"".join(mark + line.rstrip() + b"\n" for line in new.split(b"\n") if line.strip())
            sys.stdout.buffer.write(b"\n" * bool(new and not at_line_start))
        at_line_start = new.endswith(b"\n") if new else at_line_start
        sys.stdout.buffer.write(new)
    sys.stdout.flush()


def _print_end(run: runs.Run) -> int:
    if findings := evaluations.findings(run, shell_language()):
        print(findings)
    if why := failures.explain(run):
        print(why.what(shell_language()), why.advice(shell_language()), sep="\n", file=sys.stderr)
    print(run.dir.left() or run.path)
    return 0 if run.state in ("finished", "stopped") else 1


def print_doubts(doubts: list[Problem]) -> None:
    """Warnings go to standard error, so that a script reads only the answer."""
    for doubt in doubts:
        print(say("doubt", shell_language(), what=sentence(doubt)), file=sys.stderr)


def sentence(issue: Problem) -> str:
    return issue.with_field(shell_language())


def user_name() -> str:
    """The user of the command line, also where no variable names them, as in a container; "" if nothing does."""
    with contextlib.suppress(KeyError, OSError):
        return os.environ.get("USER") or getpass.getuser()
    return ""


def text_of(file: str) -> str:
    """The text of a file, or of standard input for -. Raises Refusal."""
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Refusal(problem("file-unreadable", file=file, why=error.strerror)) from error
    except UnicodeDecodeError as error:
        raise Refusal(problem("file-not-text", file=file)) from error
