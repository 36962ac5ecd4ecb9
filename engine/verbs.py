"""The verbs of the command line. Each does one thing, prints the result, and returns the exit status; or raises a
Refusal."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

from engine import flags, following, importer
from engine.core import audit
from engine.core.problems import Refusal, problem, say, shell_language
from engine.core.sockets import is_loopback
from engine.data import data_jobs
from engine.evaluation import report
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.evaluation.right_answers import save_right_answers
from engine.export import gguf, plain_script
from engine.following import print_doubts, sentence, text_of, user_name
from engine.launch.workspace import Workplace
from engine.models.conversion import convertible
from engine.models.facts import inspect_model
from engine.preflight import machine
from engine.runs import engines, evaluations, failures, gpu_use, kinds, prune, results, resumption, runs, sweeps
from engine.runs.progress import headline_curve, progress
from engine.runs.results import new_export_spec, next_spec
from engine.runs.run import sweep_of
from engine.runs.sweep_standing import best_among, summary, sweep_with
from engine.serving import server_process, servers
from engine.spec.run_spec import RunSpec


def train(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Submit a spec and follow its log to the end. Ctrl-C: stop and save; twice: kill."""
    return following.follow(_submitted(arguments, workplace), workplace)


def evaluate(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Evaluate finished runs and their base model on held-out rows, in the foreground; print the results and
    the folder of the report. WHAT is the file of an evaluation spec, or runs; options override the spec."""
    return following.follow(following.submit(_evaluation(arguments, workplace), workplace), workplace)


def _evaluation(arguments: argparse.Namespace, workplace: Workplace) -> EvaluationSpec:
    what = arguments.what
    if len(what) == 1 and (what[0] == "-" or what[0].endswith((".yaml", ".yml", ".json")) or os.path.isfile(what[0])):
        spec = kinds.read(text_of(what[0]), default=EvaluationSpec.kind)
        if not isinstance(spec, EvaluationSpec):
            raise Refusal(problem("evaluate-other-kind", file=what[0], kind=spec.kind))
    else:
        if what and not workplace.saves.is_dir():
            raise Refusal(problem("saves-missing", folder=workplace.saves))
        ids = [_trained(workplace, name).id for name in what]
        spec = EvaluationSpec.read({"results": ids})
    for path, value in flags.changes(arguments).items():
        spec = spec.change(path, value)
    return spec


def right_answers(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Make a data set of the right answers of a model in a finished evaluation, with its own reasoning before them;
    print its name."""
    run = _run(arguments, workplace)
    models = [model["id"] for model in (report.summary(run.dir) or {}).get("voices", ())]
    saved = save_right_answers(run.dir, arguments.model or next(iter(models), ""), workplace.data, arguments.by)
    print(saved.dataset)
    values = {"rows": saved.rows, "answered": saved.answers, "thinking": saved.with_reasoning}
    print(say("right-answers-made", shell_language(), **values), file=sys.stderr)
    return 0


def submit(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Add a spec to the queue and print the run's ID."""
    print(_submitted(arguments, workplace).id)
    return 0


def _submitted(arguments: argparse.Namespace, workplace: Workplace) -> runs.Run:
    return following.submit(kinds.read(text_of(arguments.spec)), workplace)


def sweep(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Submit a run for each combination of several values of settings, and print their IDs."""
    spec = kinds.read(text_of(arguments.spec))
    if not isinstance(spec, RunSpec):
        raise Refusal(problem("sweep-kind", "kind", kind=spec.kind))
    order = "random" if arguments.random else "list" if arguments.list else "grid"
    variants = sweeps.variants(spec, sweeps.read_axes(arguments.set), order, arguments.random)
    members = sweeps.submit(
        variants, workplace, by=user_name(), budget_hours=arguments.budget, early_stop=arguments.early_stop
    )
    print("\n".join(run.id for run in members))
    return 0


def list_(_arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Print one line per run, newest first; an asterisk marks the best finished run of a sweep."""
    known = runs.find(workplace.saves)
    best = best_among(known, known)
    for run in known:
        value = run.facts.headline
        shown = "" if value is None else f"{headline_curve(run)} {value:.4f}"
        print(f"{run.state:<12} {shown:>16}{'*' if run.id in best else ' '} {run.id}")
    return 0


def queue_(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Print the runs in progress, the waiting ones in their order and why each waits, then the GPUs and who uses them.
    With a run and an option, change its turn first."""
    changes = list(flags.queue_changes(arguments, user_name()))
    if changes and not arguments.run:
        raise Refusal(problem("queue-which-run"))
    if arguments.run:
        run = _run(arguments, workplace)
        with audit.recorded(workplace.saves, audit.shell(user_name()), "reorder", run.id) if changes else nullcontext():
            for change in changes:
                change(run)
    for run in runs.find(workplace.saves):
        if not run.final and run.state != "queued":
            print(f"{run.state:<12} {run.id}")
    for run, place in engines.waiting(workplace.saves):
        print(f"{place.number or '':>3}  {run.id}")
        if place.decision.reason:
            print(f"     {place.decision.text(shell_language())}")
    for use in gpu_use.gpu_uses():
        gpu, by = use.gpu, use.holder.text if use.holder else "others" if use.others else "free"
        print(f"GPU {gpu.index}  {(gpu.memory - gpu.free) / 1e9:>6.1f} of {gpu.memory / 1e9:.1f} GB  {by}")
    return 0


def show(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Print a run's state, its progress, the results of an evaluation, and its spec."""
    run = _run(arguments, workplace)
    others = [
        other.id
        for other in runs.find(workplace.saves)
        if other.facts.name == arguments.run != other.path.name and other.id != run.id
    ]
    if others:
        print(say("run-others", shell_language(), ids=", ".join(others)), file=sys.stderr)
    now = progress(run)
    done = f", {now.phase} {now.done}/{now.total or '?'} {now.unit}" if now.total or not run.final else ""
    print(f"{run.id}: {run.state}{done}")
    if place := engines.place(run):
        print(place.decision.text(shell_language()))
    elif doubt := engines.doubt(run):
        print(doubt.text(shell_language()))
    if members := sweep_with(run, workplace.saves):
        print(summary(workplace.saves, members, time.time(), shell_language()))
    if why := failures.explain(run):
        print(why.what(shell_language()), why.advice(shell_language()), sep="\n")
    if findings := evaluations.findings(run, shell_language()):
        print(findings, end="\n\n")
    print(run.spec.to_yaml(brief=True))
    return 0


def stop(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Stop a run after saving a checkpoint; with --kill, end its processes
    without saving, by force after ten seconds."""
    run = _run(arguments, workplace)
    if arguments.sweep and (of := sweep_of(run)):
        sweeps.stop(workplace.saves, of["id"], by=user_name())
        return 0
    # A queued run has nothing to save.
    runs.stop(run, "kill" if arguments.kill or run.state == "queued" else "save", by=user_name())
    return 0


def resume(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Queue a stopped, failed or interrupted run again, from its latest complete checkpoint; on other GPUs or machines,
    or with another number of processes, if asked to."""
    run, spec = _run(arguments, workplace), None
    if arguments.processes or arguments.gpus or arguments.machines:
        spec = resumption.moved(run, arguments.processes, arguments.gpus, arguments.machines)
    runs.resume(run, by=user_name(), spec=spec, data=workplace.data)
    return 0


def clone(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Submit a new run with the spec of an existing one."""
    spec = _run(arguments, workplace).spec
    print(runs.submit(spec, workplace, by=user_name()).id)
    return 0


def follow(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Print a spec for another stage that starts from a run's result."""
    run = _run(arguments, workplace)
    print(next_spec(run, arguments.stage, workplace).to_yaml(brief=True), end="")
    return 0


def script(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Write a training as a plain script that needs only the libraries, with its rows and tokenizer; print its
    folder."""
    run = _run(arguments, workplace)
    folder = arguments.to or Path(f"{run.path.name}-script")
    plain_script.write_script(run.dir, plain_script.training_spec(run.spec), workplace, folder.absolute())
    print(folder)
    return 0


def delete(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Delete a run and everything in its folder."""
    runs.delete(_run(arguments, workplace))
    return 0


def check(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """List all problems of a spec, without starting it: what prevents the start, settings that do not exist last; then
    warnings, on standard error."""
    checked = kinds.check(text_of(arguments.spec), workplace)
    print("\n".join(map(sentence, checked.problems)) or "ready to start", flush=True)
    print_doubts(checked.doubts)
    return 1 if checked.problems else 0


def import_(arguments: argparse.Namespace, _workplace: Workplace) -> int:
    """Convert a LLaMA-Factory command, YAML file or saved form, or an axolotl YAML, to
    a spec; report on standard error what has no equivalent or a different meaning."""
    folder = Path.cwd() if arguments.file == "-" else Path(arguments.file).parent

    def reader(name: str) -> str | None:
        """A file that a command refers to, relative to the command's own folder or to the current one."""
        file = next((path for path in (folder / name, Path(name), folder / Path(name).name) if path.is_file()), None)
        return importer.decoded(file.read_bytes(), name) if file else None

    imported = importer.read(_bytes_as_text(arguments.file), reader, context_of=_context)
    print(imported.spec.to_yaml(brief=True), end="")
    for note in (*imported.lost, *(note for note in imported.left_out if note not in imported.lost)):
        print(sentence(note), file=sys.stderr)
    return 0


def convert(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Convert a GGUF file, or a model folder with pickled or quantized weights, to plain safetensors; print the folder
    of the result."""
    source = convertible(arguments.model, workplace.model_roots)
    if source is None:
        roots = ", ".join(map(str, workplace.model_roots))
        raise Refusal(problem("convert-nothing", given=arguments.model, roots=roots))
    job = data_jobs.start(workplace.saves, "convert", {"file": str(source.file), "target": str(source.target)})
    print(data_jobs.wait(job, 24 * 3600)["folder"])
    return 0


def prune_(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """List what can be deleted without losing a result: checkpoints and prepared rows
    of finished runs, cached rows, leftovers of deleted runs. With --yes, delete it."""
    items = prune.removable(workplace.saves, arguments.what, arguments.older_than, int(arguments.larger_than * 1e6))
    if arguments.yes:
        items = prune.remove(workplace.saves, items)
    for item in items:
        print(f"{item.bytes / 1e6:>12,.1f} MB  {item.kind:<12} {item.path.relative_to(workplace.saves)}")
    code = "pruned" if arguments.yes else "prune-listed"
    total = f"{sum(item.bytes for item in items) / 1e6:,.1f} MB"
    print(say(code, shell_language(), count=len(items), total=total))
    return 0


def doctor(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Check what works on this machine, and suggest fixes. Exit code 1 if something is broken."""
    language, broken = shell_language(), False
    for finding in machine.findings(workplace, hub=arguments.hub):
        broken |= finding.level == "broken"
        print(machine.as_text([finding], language), flush=True)
    with suppress(OSError, Refusal):
        engines.advance(workplace.saves)  # a run may have waited for a GPU that was leased for the tests
    return int(broken)


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
            weights[_trained(workplace, run).id] = float(weight) if equals else 1.0
        except ValueError:
            raise Refusal(problem("spec-type-float", "adapters", given=weight)) from None
    names = ("form", "precision", "quantize", "shard_gb", "combination", "gguf", "license", "name")
    settings = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    settings["hardware"] = {"device": arguments.device}
    spec = new_export_spec(workplace, weights, **settings)
    with audit.recorded(workplace.saves, audit.shell(user_name()), "start", f"export {spec.name}".strip()):
        run = runs.submit(spec, workplace, by=user_name())
    code = following.follow(run, workplace, quiet=True)
    return code or _without_gguf(run)


def _without_gguf(run: runs.Run) -> int:
    """1 for a finished export without the requested GGUF file; prints why, and how to try again."""
    outcome = gguf.outcome(run.dir)
    if not outcome or not gguf.can_be_tried_again(run.dir):
        return 0
    for entry in outcome["problems"]:
        print(sentence(problem(entry["code"], **entry["values"])), file=sys.stderr)
    print(sentence(problem("export-gguf-later", folder=run.dir.model)), file=sys.stderr)
    return 1


def serve(arguments: argparse.Namespace, workplace: Workplace) -> int:
    """Serve the results of runs through an OpenAI-compatible API, until Ctrl-C."""
    key = os.environ.get("ATHANOR_API_KEY", "")
    if arguments.api_key_file:
        key = text_of(arguments.api_key_file).strip()
    if not is_loopback(arguments.host) and not key:
        raise Refusal(problem("chat-open-without-key", host=arguments.host))
    checkpoints = [results.checkpoint(workplace.saves, name) for name in arguments.runs]
    ids = [
        checkpoint.id if checkpoint else _trained(workplace, name).id
        for name, checkpoint in zip(arguments.runs, checkpoints, strict=True)
    ]
    settings = servers.serve_settings(
        workplace, servers.choose(workplace, arguments.base, ids, arguments.engine), user_name()
    )
    settings |= {"host": arguments.host, "port": arguments.port, "idle_s": 60 * arguments.idle, "shell": True}
    server = servers.Server(workplace.saves / servers.SERVERS_FOLDER / f"shell-{os.getpid()}-{time.time_ns()}")
    child = server_process.begin(server, settings, key, foreground=True)
    # Ctrl-C reaches both; the server ends its answers, and its folder is deleted when it has ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    why = server.problems if code > 0 else []
    print("".join(f"{sentence(cause)}\n" for cause in why), end="", file=sys.stderr)
    servers.end(server)
    return 1 if why else 0


def _run(arguments: argparse.Namespace, workplace: Workplace) -> runs.Run:
    """The run given to a verb; of several with that name, the one that the verb can be applied to."""
    verb = arguments.function
    fits = TAKES_RUN.get(verb, lambda _: True)
    if verb is show and sum(run.facts.name == arguments.run for run in runs.find(workplace.saves, "training")) == 1:
        fits = _is_training  # of which evaluations and exports have the name
    return runs.get(workplace.saves, arguments.run, fits, abbreviated=verb not in NEED_WHOLE_NAME)


def _bytes_as_text(file: str) -> str:
    """The text of a file in whatever encoding it has. Raises Refusal."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise Refusal(problem("file-unreadable", file=file, why=error.strerror)) from error
    return importer.decoded(content, file)


def _context(model: str) -> int | None:
    return inspect_model(Path(model)).context_length if Path(model).is_dir() else None


def _trained(workplace: Workplace, name: str) -> runs.Run:
    """The run called like that, of several the one with a result."""
    return runs.get(workplace.saves, name, _has_result, abbreviated=True)


def _has_result(run: runs.Run) -> bool:
    """Whether it is a training run with a result."""
    return run.kind == "training" and results.result_of(run) is not None


def _is_training(run: runs.Run) -> bool:
    return run.kind == "training"


# Which runs a verb can be applied to, if several have the same name. Verbs not listed here take any.
TAKES_RUN: dict[Callable[..., int], Callable[[runs.Run], bool]] = {
    queue_: lambda run: run.state == "queued",
    script: _is_training,
    right_answers: lambda run: run.kind == "evaluation" and run.state == "finished",
    stop: lambda run: "kill" in run.can,
    resume: lambda run: "resume" in run.can,
    follow: lambda run: bool(results.possible_next_stages(run)),
}  # not `delete`: of a training in progress and its evaluation, it would take the evaluation
# What these do cannot be undone, and an abbreviation of a run that is gone may be one of another.
NEED_WHOLE_NAME = (stop, delete)
