"""The verb of the command line that makes runs of finished trainings of another program."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.core import audit
from engine.core.problems import Refusal, problem
from engine.following import sentence, user_name
from engine.importer.run_import import Candidate, candidates, import_run, unreadable
from engine.launch.workspace import Workplace, make_saves


def add_import_runs_options(verb: argparse.ArgumentParser) -> None:
    """Where the trainings are."""
    verb.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="a training of LLaMA-Factory, or a folder with some, such as its saves; default: --import-from",
    )


def import_runs(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Make runs of finished trainings of LLaMA-Factory, to chat with, compare, evaluate and export; their folders are
    only read. Prints the ID of each run, and on standard error what could not be imported."""
    if not (roots := arguments.folders or workplace.import_from):
        raise Refusal(problem("import-run-nowhere"))
    make_saves(workplace)
    usable = 0
    for root in roots:
        try:
            listed = candidates(root, workplace.saves)
        except OSError as error:
            raise Refusal(unreadable(root, error)) from error
        if not listed:
            raise Refusal(problem("import-run-nothing", folder=root))
        # The oldest first, so that a training that continues another finds it.
        usable += sum(_import(candidate, root, workplace) for candidate in reversed(listed))
    return 0 if usable else 1


def _import(candidate: Candidate, root: Path, workplace: Workplace) -> bool:
    """Import one training and print what became of it; whether it is a run now."""
    folder = candidate.folder
    shown = str(folder) if str(folder).isprintable() else repr(str(folder))
    try:
        if candidate.run:
            print(f"known  {candidate.run.id}  {shown}", flush=True)
            return True
        if candidate.hindrance:
            raise Refusal(candidate.hindrance)
        with audit.recorded(workplace.saves, audit.shell(user_name()), "import", str(folder)):
            run, notes = import_run(folder, root, workplace, user_name())
    except OSError as error:
        print(sentence(unreadable(folder, error)), file=sys.stderr, flush=True)
        return False
    except Refusal as refusal:
        print("\n".join(map(sentence, refusal.problems)), file=sys.stderr, flush=True)
        return False
    print(f"new    {run.id}  {shown}", flush=True)
    print("".join(f"       {sentence(note)}\n" for note in notes), end="", file=sys.stderr, flush=True)
    return True
