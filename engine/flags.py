"""Command-line options of the verbs that have many; the verbs themselves are in `engine.verbs`."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.evaluation.right_answers import COMPARISONS
from engine.export.export_spec import ExportSpec
from engine.runs import prune, queue_order
from engine.runs.run import Run
from engine.serving.vllm import ENGINES
from engine.spec.run_spec import fields

# Settings of an evaluation that are also command-line options; their help is that of the settings.
EVALUATION_OPTIONS = {
    "data.datasets": "--datasets",
    "model.model_name_or_path": "--base",
    "with_base": "--with-base",
    "data.max_samples": "--rows",
    "data.without_references": "--without-references",
    "generation.max_new_tokens": "--max-new-tokens",
    "generation.temperature": "--temperature",
    "generation.samples": "--samples",
    "generation.batch_size": "--batch-size",
    "harness.tasks": "--tasks",
    "judge.model": "--judge",
    "judge.criterion": "--criterion",
    "judge.language": "--judge-language",
    "judge.quantization": "--judge-quantization",
    "judge.reason": "--judge-reason",
    "judge.compare": "--judge-compare",
    "judge.ratings": "--ratings",
    "hardware.device": "--device",
    "name": "--name",
}


def add_evaluate_options(verb: argparse.ArgumentParser) -> None:
    """What to evaluate, and on which rows; the options are settings of an evaluation's spec."""
    verb.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="a spec file, or - for standard input; or finished runs, by name or by ID as printed by list",
    )
    known = fields(EvaluationSpec)
    for path, option in EVALUATION_OPTIONS.items():
        setting, kind = known[path], str(known[path].annotation)
        options: dict[str, Any] = {"metavar": option[2:].upper().split("-")[-1]}
        if kind.startswith("list"):
            options |= {"nargs": "+"}
        elif setting.annotation is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif choices := get_args(setting.annotation) if "Literal" in kind else ():
            options = {"choices": choices}
        else:
            options["type"] = next((type_ for type_ in (int, float) if type_.__name__ in kind), str)
        if "None" in kind:
            options["type"] = _number_or_all
        verb.add_argument(option, default=None, help=setting.description.replace("Leave empty", 'Use "all"'), **options)


def _number_or_all(text: str) -> int | str:
    return text if text == "all" else int(text)


def add_resume_options(verb: argparse.ArgumentParser) -> None:
    """Where the run continues, if not as before."""
    verb.add_argument(
        "--processes", type=_positive_count, metavar="N",
        help="continue with N processes; a step keeps its examples, if its batches can be divided among them",
    )  # fmt: skip
    verb.add_argument(
        "--gpus", type=int, nargs="+", default=[], metavar="INDEX", help="continue on these GPUs, one process on each"
    )
    verb.add_argument(
        "--machines", type=_positive_count, metavar="N", help="continue on N machines of the cluster (Slurm)"
    )


def add_sweep_options(verb: argparse.ArgumentParser) -> None:
    """What varies, and how."""
    verb.add_argument(
        "--set", action="append", default=[], required=True, metavar="SETTING=VALUE,VALUE",
        help="a setting and its values, such as training.learning_rate=1e-4,2e-4; repeat it for others",
    )  # fmt: skip
    how = verb.add_mutually_exclusive_group()
    how.add_argument(
        "--random", type=_positive_count, metavar="N", help="N of the combinations, drawn with the training's seed"
    )
    how.add_argument("--list", action="store_true", help="the first values together, then the second ones, and so on")
    verb.add_argument(
        "--budget", type=_positive_number, metavar="HOURS", help="GPU hours for all runs, which are then stopped"
    )
    verb.add_argument("--early-stop", action="store_true", help="stop runs that are worse than the others' median")


def _positive_count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (count := int(text)) >= 1:
            return count
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")


def _positive_number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")


def add_queue_options(verb: argparse.ArgumentParser) -> None:
    """The run whose turn is to change, and how."""
    verb.add_argument("run", nargs="?", default="", help="a waiting run's ID or name")
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--now", action="store_true", help="start it as soon as no lease forbids it, even beside others")
    how.add_argument("--hold", action="store_true", help="keep it from starting")
    how.add_argument("--release", action="store_true", help="end a hold")
    how.add_argument("--move", choices=queue_order.MOVES, help="to the front, up, down, or to the end")
    how.add_argument("--priority", choices=queue_order.PRIORITIES, help="of all waiting runs, the highest come first")


def queue_changes(arguments: argparse.Namespace, by: str) -> Iterator[Callable[[Run], None]]:
    """What the options of `queue` do to the run."""
    if arguments.now:
        yield partial(queue_order.start_now, by=by)
    if arguments.hold:
        yield partial(queue_order.hold, by=by)
    if arguments.release:
        yield partial(queue_order.release, by=by)
    if arguments.move:
        yield partial(queue_order.move, where=arguments.move, by=by)
    if arguments.priority:
        yield partial(queue_order.set_priority, priority=arguments.priority, by=by)


def changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of an evaluation that were given as options: path → value."""
    values = {path: getattr(arguments, option[2:].replace("-", "_")) for path, option in EVALUATION_OPTIONS.items()}
    return {path: None if value == "all" else value for path, value in values.items() if value is not None}


def add_right_answers_options(verb: argparse.ArgumentParser) -> None:
    """Whose answers, and when one is right."""
    verb.add_argument(
        "--model", metavar="RUN", default="", help="whose answers: base, or a run's ID; default: the first"
    )
    verb.add_argument(
        "--by",
        choices=COMPARISONS,
        default=COMPARISONS[0],
        help="an answer is right if it equals the reference (exact), or its last number does (number); default: exact",
    )


def add_export_options(verb: argparse.ArgumentParser) -> None:
    """Which results to export, and in which form."""
    verb.add_argument(
        "runs",
        nargs="+",
        metavar="RUN[=WEIGHT]",
        help="finished runs, by name or by ID as printed by list",
    )
    for name in ("form", "precision", "quantize", "combination", "gguf"):
        field = ExportSpec.model_fields[name]
        verb.add_argument(f"--{name}", choices=get_args(field.annotation), help=field.description)
    verb.add_argument("--shard-gb", type=float, metavar="GB", help=ExportSpec.model_fields["shard_gb"].description)
    for name in ("license", "name"):
        verb.add_argument(f"--{name}", metavar="TEXT", help=ExportSpec.model_fields[name].description)
    verb.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="device to compute on")


def add_serve_options(verb: argparse.ArgumentParser) -> None:
    """Which results to serve, at which address, and with which key."""
    verb.add_argument("runs", nargs="*", metavar="RUN", help="finished runs, by ID as printed by list")
    verb.add_argument("--base", default="", metavar="MODEL", help="model folder; default: the base model of the runs")
    verb.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; anything but this machine requires a key"
    )
    verb.add_argument("--port", type=int, default=8000, help="default: 8000")
    verb.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="inference engine; vllm must be installed",
    )
    verb.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="file with the API key that requests must send [ATHANOR_API_KEY]",
    )
    verb.add_argument(
        "--idle",
        type=float,
        default=0,
        metavar="MINUTES",
        help="exit after this long without a request; 0: never",
    )


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text}")
    return value


def add_prune_options(verb: argparse.ArgumentParser) -> None:
    """What may be deleted, and whether to delete it."""
    verb.add_argument(
        "--what",
        nargs="+",
        choices=prune.KINDS,
        default=list(prune.KINDS),
        help="what to list or delete; everything by default",
    )
    verb.add_argument(
        "--older-than",
        type=_not_negative,
        default=7.0,
        metavar="DAYS",
        help="unchanged for at least this many days (default: 7)",
    )
    verb.add_argument(
        "--larger-than", type=_not_negative, default=0.0, metavar="MB", help="at least this many megabytes"
    )
    verb.add_argument("--yes", action="store_true", help="delete it instead of only listing it")
