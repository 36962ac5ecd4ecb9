"""The studio on the command line: `python -m engine VERB …`, with the same folders, specs and defaults as the page."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from engine import document_verbs, flags, import_verbs, notification_verbs, people_verbs, preset_verbs, programs, verbs
from engine.core import audit
from engine.core.problems import Refusal, problem
from engine.core.stages import STAGES
from engine.following import sentence, user_name
from engine.launch.engine_choice import settle_choice
from engine.launch.workspace import Workplace, add_arguments, from_arguments, make_saves
from engine.runs import engines

# Verbs that may create the saves folder if their spec is valid, and verbs that do not read it.
VERBS_THAT_MAKE_SAVES = (
    verbs.train,
    verbs.submit,
    verbs.sweep,
    verbs.evaluate,
    verbs.convert,
    document_verbs.documents,
    import_verbs.import_runs,
    programs.api,
    programs.mcp,
)
VERBS_WITHOUT_SAVES = (verbs.check, verbs.import_, verbs.schema, people_verbs.user, verbs.doctor, programs.token)


# Verbs that change something, with the name of that in the audit; `following.submit` records what it submits.
AUDITED = {
    verbs.sweep: "start",
    verbs.clone: "start",
    verbs.stop: "stop",
    verbs.resume: "resume",
    verbs.delete: "delete",
    verbs.right_answers: "derive",
    verbs.convert: "convert",
    verbs.prune_: "free-space",
}


OPERANDS = {
    "run": "a run's ID as printed by list, or its name; the beginning or end is enough, except for stop and delete",
    "model": "a GGUF file, or a model folder",
}


def _workplace(arguments: argparse.Namespace) -> Workplace:
    """The workplace of a verb. Raises Refusal if the verb needs runs and the saves folder does not exist."""
    workplace = from_arguments(arguments)
    if arguments.function not in VERBS_THAT_MAKE_SAVES + VERBS_WITHOUT_SAVES and not workplace.saves.is_dir():
        raise Refusal(problem("saves-missing", folder=workplace.saves))
    engine = getattr(arguments, "run_engine", None)
    if engine and arguments.function in VERBS_THAT_MAKE_SAVES:
        make_saves(workplace)
    if note := settle_choice(workplace.saves, engine if workplace.saves.is_dir() else None):
        print(sentence(note), file=sys.stderr)
    return workplace


def parser() -> argparse.ArgumentParser:
    """The command line: one verb per function of `engine.verbs` and the modules beside it, its help the docstring."""
    top = argparse.ArgumentParser(prog="python -m engine", description=__doc__)
    subparsers = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    takes = {
        verbs.train: "spec",
        verbs.submit: "spec",
        verbs.evaluate: "",
        verbs.right_answers: "run",
        verbs.check: "spec",
        verbs.list_: "",
        verbs.sweep: "spec",
        verbs.queue_: "",
        verbs.show: "run",
        verbs.stop: "run",
        verbs.resume: "run",
        verbs.clone: "run",
        verbs.follow: "run",
        verbs.script: "run",
        verbs.delete: "run",
        verbs.import_: "file",
        import_verbs.import_runs: "",
        verbs.convert: "model",
        document_verbs.documents: "",
        verbs.export: "",
        verbs.serve: "",
        programs.api: "",
        programs.mcp: "",
        programs.token: "",
        verbs.schema: "",
        people_verbs.user: "",
        people_verbs.audit: "",
        people_verbs.quotas_: "",
        preset_verbs.presets: "",
        notification_verbs.notifications: "",
        verbs.doctor: "",
        verbs.prune_: "",
    }
    for function, operand in takes.items():
        name = function.__name__.rstrip("_").replace("_", "-")
        # `serve` has an --engine of its own, which answers and starts no run.
        verb = subparsers.add_parser(
            name, help=function.__doc__, description=function.__doc__, conflict_handler="resolve"
        )
        verb.set_defaults(function=function)
        add_arguments(verb)
        if operand:
            verb.add_argument(operand, help=OPERANDS.get(operand, "a file, or - for standard input"))
        _add_options(function, verb)
    return top


def _add_options(function: Callable[..., int], verb: argparse.ArgumentParser) -> None:
    """The options of the verbs that have some."""
    if function is verbs.follow:
        verb.add_argument("stage", choices=STAGES, metavar="stage", help="the next stage: " + ", ".join(STAGES))
    if function is verbs.stop:
        verb.add_argument("--kill", action="store_true", help="end its processes immediately, without saving")
        verb.add_argument("--sweep", action="store_true", help="stop all runs of its sweep")
    if function is verbs.script:
        verb.add_argument("--to", type=Path, metavar="FOLDER", help="new or empty folder; default: RUN-script")
    if function is verbs.resume:
        flags.add_resume_options(verb)
    if function is verbs.sweep:
        flags.add_sweep_options(verb)
    if function is verbs.queue_:
        flags.add_queue_options(verb)
    if function is verbs.evaluate:
        flags.add_evaluate_options(verb)
    if function is verbs.right_answers:
        flags.add_right_answers_options(verb)
    if function is import_verbs.import_runs:
        import_verbs.add_import_runs_options(verb)
    if function is verbs.export:
        flags.add_export_options(verb)
    if function is verbs.serve:
        flags.add_serve_options(verb)
    if function is programs.api:
        programs.add_api_options(verb)
    if function is programs.token:
        programs.add_token_options(verb)
    if function is verbs.prune_:
        flags.add_prune_options(verb)
    if function is verbs.doctor:
        verb.add_argument("--hub", action="store_true", help="also try to reach the model hubs")
    if function is people_verbs.user:
        people_verbs.add_user_options(verb)
    if function is preset_verbs.presets:
        preset_verbs.add_options(verb)
    if function is notification_verbs.notifications:
        notification_verbs.add_notification_options(verb)
    if function is document_verbs.documents:
        document_verbs.add_options(verb)
    if function is people_verbs.audit:
        people_verbs.add_audit_options(verb)


def _recorded(arguments: argparse.Namespace, workplace: Workplace) -> contextlib.AbstractContextManager[None]:
    """The audit of a verb that changes something, unless its function records what it does itself."""
    action = AUDITED.get(arguments.function)
    if not action or (arguments.function is verbs.prune_ and not arguments.yes):
        return contextlib.nullcontext()
    what = next((str(value) for name in ("run", "spec", "model") if (value := getattr(arguments, name, None))), "")
    return audit.recorded(workplace.saves, audit.shell(user_name()), action, what)


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be valid text
    arguments = parser().parse_args()
    try:
        workplace = _workplace(arguments)
        with _recorded(arguments, workplace):
            status = arguments.function(arguments, workplace)
        if arguments.function not in VERBS_WITHOUT_SAVES:
            # A supervisor that was killed did not start the next run, and there may be no studio to do so.
            with contextlib.suppress(OSError):  # a user with read access only
                engines.advance(workplace.saves)
        return status
    except Refusal as refusal:
        issues = refusal.problems
    except BrokenPipeError:  # the reader of the pipe has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        issues = [problem("system-refused", file=error.filename or "—", why=error.strerror or error)]
    print("\n".join(map(sentence, issues)), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
