"""What the studio does, from a shell: `python -m engine VERB …`. Same folders, same spec, same defaults as the page."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine import flags, importer
from engine.core import users
from engine.core.problems import Problem, Refusal, problem, say, shell_language
from engine.core.sockets import is_loopback
from engine.core.stages import STAGES
from engine.data import preview_client
from engine.evaluation import report
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.export import gguf
from engine.launch.workspace import Workplace, add_arguments, from_arguments, make_data
from engine.models.facts import inspect_model
from engine.runs import failures, kinds, queue, results, runs
from engine.runs.progress import headline_curve, progress
from engine.runs.results import new_export_spec, next_spec
from engine.serving import servers
from engine.spec.run_spec import RunSpec, Spec


def train(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Submit a spec and follow its log to the end. Ctrl-C: stop and save; twice: kill."""
    return _follow(_submit(arguments, workplace), workplace)


def evaluate(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Evaluate finished runs and their base model on held-out rows, in the foreground; print the findings and the folder
    of the report. WHAT is the file of an evaluation spec, or runs; options override the spec."""
    return _follow(_begin(_evaluation(arguments, workplace), workplace), workplace)


def _evaluation(arguments: argparse.Namespace, workplace: Workplace) -> EvaluationSpec:
    what = arguments.what
    if len(what) == 1 and (
        what[0] == "-" or what[0].endswith((".yaml", ".yml", ".json")) or os.path.isfile(what[0])
    ):
        spec = kinds.read(_text(what[0]), default=EvaluationSpec.kind)
        if not isinstance(spec, EvaluationSpec):
            raise Refusal(problem("evaluate-other-kind", file=what[0], kind=spec.kind))
    else:
        if what and not workplace.saves.is_dir():
            raise Refusal(problem("saves-missing", folder=workplace.saves))
        ids = [runs.get(workplace.saves, name, _has_result).id for name in what]
        spec = EvaluationSpec.read({"results": ids})
    for path, value in flags.changes(arguments).items():
        spec = spec.change(path, value)
    return spec


def _follow(run: runs.Run, workplace: Workplace, quiet: bool = False) -> int:
    """Print what the run prints until it ends; `quiet`: only where its result is."""
    presses: list[int] = []
    # Only noted here: a handler that took the queue's lock could meet itself holding it.
    signal.signal(signal.SIGINT, lambda *_: presses.append(1))
    shown, last_state, obeyed = 0, "", 0
    while True:
        now = runs.get(workplace.saves, run.id)
        if now.state != last_state and not quiet:
            last_state = now.state
            place = queue.position(now)
            print(f"[{last_state}{f' #{place}' if place else ''}]", flush=True)
        shown = shown if quiet else _print_new(now.dir.log, shown)
        if now.final:
            return _print_end(now)
        if len(presses) > obeyed:
            obeyed = len(presses)
            how = "kill" if obeyed > 1 or now.state == "queued" else "save"
            print(f"[asked to stop: {how}]", flush=True)
            with contextlib.suppress(Refusal):  # it ended in the same moment
                runs.stop(now, how, by=_me())
        queue.advance(workplace.saves)
        time.sleep(0.5)


def _print_new(log: Path, shown: int) -> int:
    if log.exists():
        with log.open("rb") as file:
            file.seek(shown)
            new = file.read()
        sys.stdout.buffer.write(new)
        sys.stdout.flush()
        return shown + len(new)
    return shown


def _print_end(run: runs.Run) -> int:
    if summary := report.summary(run.dir):
        print(report.as_text(summary))
    if why := failures.explain(run):
        print(why.what(shell_language()), why.advice(shell_language()), sep="\n", file=sys.stderr)
    print(run.dir.left() or run.path)
    return 0 if run.state in ("finished", "stopped") else 1


def submit(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Put a spec into the queue and print the run's ID."""
    print(_submit(arguments, workplace).id)
    return 0


def _submit(arguments: argparse.Namespace, workplace: Workplace) -> runs.Run:
    return _begin(kinds.read(_text(arguments.spec)), workplace)


def _begin(spec: Spec, workplace: Workplace) -> runs.Run:
    """Submit a spec; say so if that has made the data folder, or the saves folder, which may be a mistyped path."""
    if made := make_data(workplace):
        print(made.text(shell_language()), file=sys.stderr)
    fresh = not workplace.saves.is_dir()
    run = runs.submit(spec, workplace, by=_me())
    if fresh:
        print(problem("saves-made", folder=workplace.saves).text(shell_language()), file=sys.stderr)
    kind = kinds.KINDS[spec.kind]
    _print_doubts(kind.doubts(kind.frozen(spec, workplace), []))
    return run


def _run(arguments: argparse.Namespace, workplace: Workplace) -> runs.Run:
    """The run that a verb is given; of several that are called so, the one that the verb can take."""
    return runs.get(workplace.saves, arguments.run, TAKES_RUN.get(arguments.function, lambda _: True))


def _text(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Refusal(problem("file-unreadable", file=file, why=error.strerror)) from error
    except UnicodeDecodeError as error:
        raise Refusal(problem("file-not-text", file=file)) from error


def list_(_arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Print a line for each run, newest first."""
    for run in runs.find(workplace.saves):
        value = run.facts.headline
        shown = "" if value is None else f"{headline_curve(run)} {value:.4f}"
        print(f"{run.state:<12} {shown:>16}  {run.id}")
    return 0


def show(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Print a run's state, its progress, the findings of an evaluation, and its spec."""
    run = _run(arguments, workplace)
    now = progress(run)
    print(f"{run.id}: {run.state}, {now.phase} {now.done}/{now.total or '?'} {now.unit}")
    if why := failures.explain(run):
        print(why.what(shell_language()), why.advice(shell_language()), sep="\n")
    if summary := report.summary(run.dir):
        print(report.as_text(summary), end="\n\n")
    print(run.spec.to_yaml(brief=True))
    return 0


def stop(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Stop a run after saving a checkpoint; with --kill, end its processes without saving, by force after ten seconds."""
    run = _run(arguments, workplace)
    # A run that waits has nothing to save.
    runs.stop(run, "kill" if arguments.kill or run.state == "queued" else "save", by=_me())
    return 0


def resume(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Queue a stopped, failed or interrupted run again, from its latest complete checkpoint."""
    runs.resume(_run(arguments, workplace), by=_me())
    return 0


def clone(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Submit a new run with the spec of an existing one."""
    spec = _run(arguments, workplace).spec
    print(runs.submit(spec, workplace, by=_me()).id)
    return 0


def follow(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Print a spec for another stage that starts from a run's result."""
    run = _run(arguments, workplace)
    print(next_spec(run, arguments.stage, workplace).to_yaml(brief=True), end="")
    return 0


def delete(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Remove a run and everything in its folder."""
    runs.delete(_run(arguments, workplace))
    return 0


def check(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """List everything that is wrong with a spec, without starting it."""
    spec = kinds.read(_text(arguments.spec))
    kind = kinds.KINDS[spec.kind]
    spec = kind.frozen(spec, workplace)
    obstacles, notes = kind.problems(spec, workplace), []
    if not obstacles and isinstance(spec, RunSpec):
        obstacles, notes = preview_client.first_rows(spec, Path(spec.data.dataset_dir))
    _print_doubts([*kind.doubts(spec, obstacles), *notes])
    print("\n".join(map(_sentence, obstacles)) or "ready to start")
    return 1 if obstacles else 0


def _print_doubts(doubts: list[Problem]) -> None:
    """What keeps nobody from starting goes to standard error: a script reads the answer alone."""
    for doubt in doubts:
        print(say("doubt", shell_language(), what=_sentence(doubt)), file=sys.stderr)


def import_(arguments: argparse.Namespace, _workplace: Workplace) -> int:
    """Convert a LLaMA-Factory command, YAML file or saved form, or an axolotl YAML, to a spec; report on standard error what
    has no equivalent or a different meaning."""
    folder = Path.cwd() if arguments.file == "-" else Path(arguments.file).parent

    def reader(name: str) -> str | None:
        """A file that a command names: as seen from the command's own folder, or from here."""
        file = next(
            (path for path in (folder / name, Path(name), folder / Path(name).name) if path.is_file()), None
        )
        return importer.decoded(file.read_bytes(), name) if file else None

    imported = importer.read(_bytes_as_text(arguments.file), reader, context_of=_context)
    print(imported.spec.to_yaml(brief=True), end="")
    for note in (*imported.lost, *(note for note in imported.left_out if note not in imported.lost)):
        print(_sentence(note), file=sys.stderr)
    return 0


def _bytes_as_text(file: str) -> str:
    """The text of a file in whatever encoding the other program's user has it. Raises Refusal."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise Refusal(problem("file-unreadable", file=file, why=error.strerror)) from error
    return importer.decoded(content, file)


def _context(model: str) -> int | None:
    return inspect_model(Path(model)).context_length if Path(model).is_dir() else None


def schema(_arguments: argparse.Namespace, _workplace: Workplace) -> int:
    """Print the JSON schema of a run spec."""
    print(json.dumps(RunSpec.model_json_schema(), indent=2, ensure_ascii=False))
    return 0


def export(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Export the results of runs as one model or one adapter, and print its folder. RUN=0.5 sets a weight."""
    weights = {}
    for argument in arguments.runs:
        run, equals, weight = argument.partition("=")
        try:
            weights[runs.get(workplace.saves, run, _has_result).id] = float(weight) if equals else 1.0
        except ValueError:
            raise Refusal(problem("spec-type-float", "adapters", given=weight)) from None
    names = ("form", "precision", "quantize", "shard_gb", "combination", "gguf", "license", "name")
    settings = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    settings["hardware"] = {"device": arguments.device}
    spec = new_export_spec(workplace, weights, **settings)
    run = runs.submit(spec, workplace, by=_me())
    code = _follow(run, workplace, quiet=True)
    return code or _without_gguf(run)


def _without_gguf(run: runs.Run) -> int:
    """1 for a finished export whose GGUF file was asked for and is not there; says why, and how to try again."""
    if not gguf.can_be_tried_again(run.dir):
        return 0
    for entry in gguf.outcome(run.dir)["problems"]:
        print(_sentence(problem(entry["code"], **entry["values"])), file=sys.stderr)
    print(_sentence(problem("export-gguf-later", folder=run.dir.model)), file=sys.stderr)
    return 1


def serve(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Serve the results of runs through an OpenAI-compatible API, until Ctrl-C."""
    key = os.environ.get("ATHANOR_API_KEY", "")
    if arguments.api_key_file:
        key = _text(arguments.api_key_file).strip()
    if not is_loopback(arguments.host) and not key:
        raise Refusal(problem("chat-open-without-key", host=arguments.host))
    ids = [runs.get(workplace.saves, name, _has_result).id for name in arguments.runs]
    settings = servers.serve_settings(
        workplace, servers.choose(workplace, arguments.base, ids, arguments.engine), _me()
    )
    settings |= {"host": arguments.host, "port": arguments.port, "idle_s": 60 * arguments.idle, "shell": True}
    server = servers.Server(
        workplace.saves / servers.SERVERS_FOLDER / f"shell-{os.getpid()}-{time.time_ns()}"
    )
    child = servers.begin(server, settings, key, foreground=True)
    # Ctrl-C reaches both; the server ends its answers, and its folder goes when it is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    why = server.problems if code > 0 else []
    print("".join(f"{_sentence(cause)}\n" for cause in why), end="", file=sys.stderr)
    servers.end(server)
    return 1 if why else 0


def user(arguments: argparse.Namespace, _workplace: Workplace) -> int:
    """Add or remove a user of the login page."""
    file = arguments.auth or Path(os.environ.get("ATHANOR_AUTH") or "users.txt")
    if arguments.what == "remove":
        users.remove_user(file, arguments.name)
        return 0
    # From a pipe where there is no terminal, so that a script can add users; never as an argument, which ps shows.
    password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    users.add_user(file, arguments.name, password)
    print(f"{arguments.name} can log in; the file is {file}")
    return 0


def _me() -> str:
    return os.environ.get("USER") or os.environ.get("LOGNAME") or ""


def _sentence(issue: Problem) -> str:
    return issue.with_field(shell_language())


def _has_result(run: runs.Run) -> bool:
    """Whether it is a training that has left weights."""
    return run.kind == "training" and results.result_of(run) is not None


# Which runs a verb can take, where several are called alike: any, if the verb is not here.
TAKES_RUN: dict[Callable[..., int], Callable[[runs.Run], bool]] = {
    stop: lambda run: "kill" in run.can, resume: lambda run: "resume" in run.can,
    follow: lambda run: bool(results.possible_next_stages(run)), delete: lambda run: "delete" in run.can,
}  # fmt: skip
VERBS_THAT_MAKE_SAVES = (
    train,
    submit,
    evaluate,
)  # that may create the saves folder, when their spec is sound
VERBS_WITHOUT_SAVES = (check, import_, schema, user)  # that do not read it


def _workplace(arguments: argparse.Namespace) -> Workplace:
    """The workplace of a verb. Raises Refusal if the verb is about runs and there is no folder with any."""
    workplace = from_arguments(arguments)
    if arguments.function not in VERBS_THAT_MAKE_SAVES + VERBS_WITHOUT_SAVES and not workplace.saves.is_dir():
        raise Refusal(problem("saves-missing", folder=workplace.saves))
    return workplace


def parser() -> argparse.ArgumentParser:
    """The command line: one verb per function above, its help the function's docstring."""
    top = argparse.ArgumentParser(prog="python -m engine", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    takes = {
        train: "spec", submit: "spec", evaluate: "", check: "spec", list_: "", show: "run", stop: "run", resume: "run",
        clone: "run", follow: "run", delete: "run", import_: "file", export: "", serve: "", schema: "", user: "",
    }  # fmt: skip
    for function, operand in takes.items():
        verb = verbs.add_parser(
            function.__name__.rstrip("_"), help=function.__doc__, description=function.__doc__
        )
        verb.set_defaults(function=function)
        add_arguments(verb)
        if operand:
            meaning = (
                "a run's ID as printed by list, or its name"
                if operand == "run"
                else "a file, or - for standard input"
            )
            verb.add_argument(operand, help=meaning)
        if function is follow:
            verb.add_argument(
                "stage", choices=STAGES, metavar="stage", help="the next stage: " + ", ".join(STAGES)
            )
        if function is stop:
            verb.add_argument("--kill", action="store_true", help="end its processes at once, without saving")
        if function is evaluate:
            flags.add_evaluate_options(verb)
        if function is export:
            flags.add_export_options(verb)
        if function is serve:
            flags.add_serve_options(verb)
        if function is user:
            verb.add_argument("what", choices=("add", "remove"))
            verb.add_argument("name")
            verb.add_argument(
                "--auth", type=Path, metavar="FILE", help="the users file [ATHANOR_AUTH; users.txt]"
            )
    return top


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a name that is no text, as file systems allow
    arguments = parser().parse_args()
    try:
        workplace = _workplace(arguments)
        status = arguments.function(arguments, workplace)
        if arguments.function not in VERBS_WITHOUT_SAVES:
            # A supervisor that was killed has started nobody after it, and there may be no studio that does.
            with contextlib.suppress(OSError):  # somebody who may only read here
                queue.advance(workplace.saves)
        return status
    except Refusal as refusal:
        issues = refusal.problems
    except BrokenPipeError:  # whoever read it has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        issues = [problem("system-refused", file=error.filename or "—", why=error.strerror or error)]
    print("\n".join(map(_sentence, issues)), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
