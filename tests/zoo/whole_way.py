"""The whole way of a family's tiny model: checked, trained, exported (merged, if that is possible), loaded again.

By the engine's own functions, in a fork for each family: `python -m tests.zoo.whole_way [--method lora] [FAMILY …]`
prints a line for each, and with `--page FILE` writes the table of docs/models.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests import forked

TIME_LIMIT_SECONDS = 180
NOT_BUILT = "not built"  # the beginning of a failure of the test, not of the program
MAX_LOGIT_DIFFERENCE = 1e-3  # between base with adapter and merged model, both in fp32
MAX_MEMORY_DIFFERENCE = 0.02  # between the estimate and what a training holds, as a share
PROMPTS = ["What comes after 3?", "Hello"]


@dataclass
class WholeWay:
    """Both empty: all went well. `refusal` is what the check before the start says, `failure` the step that failed."""

    family: str
    method: str
    class_name: str = ""
    parameters: int = 0
    trained: int = 0
    modules: dict[str, int] = field(default_factory=dict)  # that get an adapter
    towers: list[str] = field(default_factory=list)
    experts: int = 0  # tensors of routed experts
    mergeable: bool = True  # the adapter can be merged
    refusal: str = ""
    failure: str = ""


def go(family: str, method: str, place: Path) -> WholeWay:
    """The whole way of one family below an empty folder."""
    from tests import zoo

    way = WholeWay(family, method)
    folder = place / "models" / family
    try:
        zoo.build(family, folder)
    except Exception as error:
        way.failure = f"{NOT_BUILT}: {_reason(error)}"
        return way
    step = "check"
    try:
        spec = _spec(folder, _data(place / "data"), method)
        if refusal := _check(way, spec, folder, place):
            way.refusal = refusal
            return way
        step = "train"
        held = _observe_memory()
        result = _train(spec, place / "saves" / "u" / "trained")
        step = "memory"
        _check_memory(spec, folder, held)
        step = "export"
        exported = _export(folder, result, way, place / "saves" / "u" / "exported")
        step = "compare"
        _compare(folder, result, exported, way)
    except Exception as error:
        way.failure = f"{step}: {_reason(error)}"
    return way


def _data(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rows = [{"instruction": f"What comes after {n}?", "input": "", "output": f"{n + 1}."} for n in range(40)]
    (folder / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"chat": {"file_name": "chat.json"}}), encoding="utf-8")
    return folder


def _spec(model: Path, data: Path, method: str) -> Any:
    from engine.spec.run_spec import RunSpec

    return RunSpec.read({
        "model": {"model_name_or_path": str(model)}, "method": {"kind": method},
        "data": {"datasets": ["chat"], "dataset_dir": str(data), "max_length": 64},
        "training": {
            "max_steps": 3, "learning_rate": 5e-3, "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
        },
        "logging": {"logging_steps": 1, "save_steps": 3, "probe": False, "plot_loss": False},
        "hardware": {"device": "cpu"},
    })  # fmt: skip


def _check(way: WholeWay, spec: Any, model: Path, place: Path) -> str:
    """Write down what the page says before the start; returns what stands in the way."""
    from engine.launch.workspace import Workplace
    from engine.models.facts import inspect_model
    from engine.models.structure import structure_of
    from engine.preflight.checks import preflight_problems
    from engine.preflight.limits import limit_warnings
    from engine.preflight.model_checks import adapted_modules, trained_parameters

    facts = inspect_model(model)
    structure = structure_of(facts)
    way.class_name, way.parameters = facts.architecture, facts.parameters or 0
    way.towers, way.experts = list(structure.towers), len(structure.experts)
    problems = preflight_problems(spec, Workplace((model.parent,), Path(spec.data.dataset_dir), place / "saves"))
    if problems:
        return str(problems[0])
    way.mergeable = not any(warning.code == "adapter-not-mergeable" for warning in limit_warnings(spec, []))
    way.trained, way.modules = trained_parameters(spec) or 0, adapted_modules(spec)
    return ""


def _run(folder: Path, spec: Any) -> Any:
    from engine.core.rundir import RunDir

    folder.mkdir(parents=True)
    run = RunDir(folder)
    run.spec.write_text(spec.to_yaml(), encoding="utf-8")
    run.request.write_text('{"attempt": 1}', encoding="utf-8")
    return run


def _train(spec: Any, folder: Path) -> Path:
    from engine.worker.prepare import prepare
    from engine.worker.train import train

    run = _run(folder, spec)
    prepare(run)
    train(run)
    return run.adapter if spec.method.kind == "lora" else run.model


def _observe_memory() -> dict[str, int]:
    """What a training of this process will hold when it takes a step, in bytes: "weights", and with gradients and
    optimizer state, "learning"."""
    import torch
    from transformers import TrainerCallback, trainer

    held: dict[str, int] = {}

    def bytes_of(tensors: Iterable[Any]) -> int:
        return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())

    class Observer(TrainerCallback):
        def on_optimizer_step(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            parameters = list(model.parameters())
            held["weights"] = bytes_of(parameters)
            states = [value for state in optimizer.state.values() for value in state.values()]
            held["learning"] = bytes_of(value for value in states if torch.is_tensor(value))
            for parameter in filter(lambda parameter: parameter.requires_grad, parameters):
                # Layers for images get no gradient from text alone; they would also need Adam's two moments.
                held["learning"] += parameter.nbytes * (3 if parameter.grad is None else 1)

    trainer.DEFAULT_CALLBACKS.append(Observer)
    return held


def _check_memory(spec: Any, model: Path, held: dict[str, int]) -> None:
    """Raises ValueError if the estimate before the start differs from what the training held."""
    from engine.models.facts import inspect_model
    from engine.preflight.memory import memory_needed

    need = memory_needed(spec, inspect_model(model), gpu_count=0)
    if need is None:
        raise ValueError("the estimate says nothing")
    if set(held) != {"weights", "learning"}:
        raise ValueError("no step was observed")
    for part, seen in held.items():
        expected = getattr(need, part)
        if abs(expected - seen) > MAX_MEMORY_DIFFERENCE * seen:
            raise ValueError(f"{part}: {expected:,.0f} bytes estimated, {seen:,} held")


def _export(base: Path, result: Path, way: WholeWay, folder: Path) -> Path:
    from engine.export.export_spec import ExportSpec
    from engine.worker.export import export

    lora = way.method == "lora"
    run = _run(folder, ExportSpec.read({
        "name": "exported", "model": {"model_name_or_path": str(base if lora else result)},
        "adapters": {str(result): 1.0} if lora else {}, "precision": "fp32", "check_prompts": 0,
        "form": "merged" if way.mergeable else "adapter", "prompts": PROMPTS,
        "hardware": {"device": "cpu"},
    }))  # fmt: skip
    export(run)
    exported = run.model if way.mergeable else run.adapter
    comparison = json.loads((exported / "comparison.json").read_text(encoding="utf-8"))
    if comparison["equal"] != comparison["prompts"]:
        raise ValueError(f"{comparison['equal']} of {comparison['prompts']} answers are the same after the export")
    return exported


def _compare(base: Path, result: Path, exported: Path, way: WholeWay) -> None:
    """Logits of what was trained and of what was exported, both loaded as anybody would: by transformers and peft.

    Raises:
        ValueError: they differ, or a tensor of the base is missing in the export.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig

    from engine.models.safetensors_headers import tensors_of
    from tests import zoo

    def load(folder: Path) -> Any:
        config = AutoConfig.from_pretrained(folder)
        return zoo.model_class(config.model_type, config).from_pretrained(folder, dtype=torch.float32).eval()

    def adapted(folder: Path) -> Any:
        return PeftModel.from_pretrained(load(base), str(folder))

    trained = adapted(result) if way.method == "lora" else load(result)
    again = load(exported) if way.mergeable else adapted(exported)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for model in (trained, again)]
    difference = float((logits[0] - logits[1]).abs().max())
    if difference > MAX_LOGIT_DIFFERENCE:
        raise ValueError(f"logits differ by {difference:.2g}")
    if way.mergeable and (lost := set(tensors_of(base)[0]) - set(tensors_of(exported)[0])):
        raise ValueError(f"{len(lost)} tensors of the base are not in the export, such as {min(lost)}")


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def _import_libraries() -> None:
    """All that a family needs, once for all forks."""
    import torch
    import transformers

    from engine.worker.runtime.optional_packages import hide_unused_packages
    from engine.worker.training.preload import import_libraries

    hide_unused_packages(quantizes=False)
    import_libraries("sft")
    import engine.worker.data.examples
    import engine.worker.export
    import engine.worker.exporting.merge  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def whole_ways(families: Sequence[str], method: str) -> Iterator[WholeWay]:
    """Each family's, in a fork of its own: one that hangs or dies stops no other."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    _import_libraries()
    subprocess.Popen = forked.Popen  # type: ignore[misc]  # the child that builds its skeleton is forked, too
    forked.start_forking_process()
    gc.freeze()  # no fork has to look through what was imported, and to copy it for that
    for family in families:
        place = Path(tempfile.mkdtemp())
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            signal.alarm(TIME_LIMIT_SECONDS)
            os.write(writing, json.dumps(asdict(go(family, method, place))).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        shutil.rmtree(place, ignore_errors=True)
        yield WholeWay(**json.loads(text)) if text else WholeWay(family, method, failure="its process ended")


def line(way: WholeWay) -> str:
    outcome = way.failure or (f"refused: {way.refusal}" if way.refusal else "ok" if way.mergeable else "ok, not merged")
    return f"{way.family:26} {way.method:6} {way.class_name:44} {way.trained:>8,} of {way.parameters:>9,}  {outcome}"


def page(ways: Sequence[WholeWay], methods: Sequence[str]) -> str:
    """The table of docs/models.md: a row for each family."""
    by_family: dict[str, dict[str, WholeWay]] = {}
    for way in ways:
        by_family.setdefault(way.family, {})[way.method] = way
    counts = Counter(map(_verdict, by_family.values()))
    rows = [_row(family, row, methods) for family, row in sorted(by_family.items())]
    return (Path(__file__).parent / "models_page.md").read_text(encoding="utf-8").format(
        families=len(by_family), passed=counts["passed"], refused=counts["refused"], failed=counts["failed"],
        untried=counts["untried"],
        methods=" | ".join(methods), rules=" | ".join("---" for _ in methods), rows="\n".join(rows),
    )  # fmt: skip


def _verdict(row: Mapping[str, WholeWay]) -> str:
    failures = [way.failure for way in row.values() if way.failure]
    if failures:
        return "untried" if all(failure.startswith(NOT_BUILT) for failure in failures) else "failed"
    return "refused" if any(way.refusal for way in row.values()) else "passed"


def _row(family: str, row: dict[str, WholeWay], methods: Sequence[str]) -> str:
    way = row[methods[0]]
    beside = [*(f"{tower.rpartition('.')[2]}" for tower in way.towers), *(["experts"] if way.experts else [])]
    modules = ", ".join(way.modules) or "—"
    outcomes = [_outcome(row[method]) if method in row else "" for method in methods]
    return f"| `{family}` | {modules} | {', '.join(beside) or '—'} | {' | '.join(outcomes)} |"


def _outcome(way: WholeWay) -> str:
    text = way.failure or way.refusal
    passed = "✓" if way.mergeable else "✓ not merged"
    return text.replace("|", "\\|").removeprefix("model.model_name_or_path: ") if text else passed


def main() -> None:
    from tests import zoo

    parser = argparse.ArgumentParser(prog="python -m tests.zoo.whole_way")
    parser.add_argument("--method", choices=("lora", "freeze", "full"), action="append")
    parser.add_argument("--page", type=Path, help="write the table there")
    parser.add_argument("families", nargs="*")
    arguments = parser.parse_args()
    ways, methods = [], arguments.method or ["lora"]
    for method in methods:
        for way in whole_ways(arguments.families or zoo.families(), method):
            ways.append(way)
            print(line(way), flush=True)
    if arguments.page:
        arguments.page.write_text(page(ways, methods), encoding="utf-8")


if __name__ == "__main__":
    main()
