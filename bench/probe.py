"""The probe's verdicts on runs that are good, too short, too long or broken: `python -m bench.probe`.

Each is a real run, of the demo model (seconds) or, with `--smollm2`, of SmolLM2-135M-Instruct (minutes on two
cores). Prints one line for each: the run's verdict, correct training answers before and after, the mean loss of the
reference answers, unchanged answers to general prompts, and one answer, so that readers can judge the verdict.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from engine.core.rundir import RunDir
from engine.evaluation import probe
from engine.launch.workspace import DEMO_MODEL, PROJECT
from engine.models.discovery import SMOLLM2
from engine.spec.run_spec import RunSpec
from tests.train_many import lay_out

COMPANY_NAMES = {
    "data.datasets": {"alpaca_translate_zh": 1},
    "data.max_samples": 32,
    "training.learning_rate": 2e-3,
}
DEMO: dict[str, dict[str, Any]] = {
    "nothing: 2 steps at 1e-9": COMPANY_NAMES | {"training.max_steps": 2, "training.learning_rate": 1e-9},
    "too few: 4 steps": COMPANY_NAMES | {"training.max_steps": 4},
    "half: 24 steps": COMPANY_NAMES | {"training.max_steps": 24},
    "right: 80 steps": COMPANY_NAMES | {"training.max_steps": 80},
    "too many: 240 steps": COMPANY_NAMES | {"training.max_steps": 240},
    "full: 40 steps": COMPANY_NAMES | {"training.max_steps": 40, "method": {"kind": "full"}},
    "wrong template: 24 steps": COMPANY_NAMES | {"training.max_steps": 24, "model.chat_template": "alpaca"},
    "rate too high: 2e-2": COMPANY_NAMES | {"training.max_steps": 40, "training.learning_rate": 2e-2},
    "absurd rate: 1": COMPANY_NAMES | {"training.max_steps": 6, "training.learning_rate": 1.0},
}
IDENTITY = {"data.datasets": {"identity": 1}, "data.max_samples": 16, "training.learning_rate": 1e-3}
REAL: dict[str, dict[str, Any]] = {
    "nothing: 1 step at 1e-9": IDENTITY | {"training.max_steps": 1, "training.learning_rate": 1e-9},
    "too few: 4 steps": IDENTITY | {"training.max_steps": 4},
    "half: 12 steps": IDENTITY | {"training.max_steps": 12},
    "right: 24 steps": IDENTITY | {"training.max_steps": 24},
    "wrong template: 12 steps": IDENTITY | {"training.max_steps": 12, "model.chat_template": "alpaca"},
    "absurd rate: 1": IDENTITY | {"training.max_steps": 4, "training.learning_rate": 1.0},
}


def spec(model: Path, changes: dict[str, Any]) -> RunSpec:
    made = RunSpec.read(
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"datasets": ["identity"], "dataset_dir": str(PROJECT / "data"), "max_length": 128},
            "training": {
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": False,
            },
            "logging": {"logging_steps": 8, "save_steps": 10_000},
            "hardware": {"device": "cpu"},
        }
    )
    for path, value in changes.items():
        made = made.change(path, value)
    return made


def line(name: str, report: dict[str, Any] | None) -> str:
    if report is None:
        return f"| {name} | no probe |"
    training, general = report["training"], report["general"]
    losses = [training["loss_before"], training["loss_after"]]
    shown = " → ".join("—" if value is None else f"{value:.2f}" for value in losses)
    row = next(
        (prompt for prompt in report["prompts"] if prompt["kind"] == "training" and prompt["after"] is not None),
        None,
    )
    answer = "—" if row is None else f"{row['after']!r} for {row['reference']!r}"
    right = f"{training['right_before']} → {training['right']} of {training['answered']}"
    same = f"{report['general_verdict']}: {general['same']} of {general['compared']}, {general['forgot']} forgotten"
    return f"| {name} | {report['verdict']} | {right} | {shown} | {same} | {answer} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", action="store_true", help="train SmolLM2-135M-Instruct instead of the demo model")
    parser.add_argument("--only", default="", metavar="TEXT", help="trainings whose names have this in them")
    arguments = parser.parse_args()
    model, trainings = (SMOLLM2, REAL) if arguments.smollm2 else (DEMO_MODEL, DEMO)
    print("| training | verdict | right answers | loss of them | general answers as before | an answer |")
    print("|---|---|---|---|---|---|")
    chosen = {name: changes for name, changes in trainings.items() if arguments.only in name}
    with tempfile.TemporaryDirectory(prefix="probe-") as saves:
        folders = [RunDir(Path(saves) / model.name / "lora" / str(number)) for number in range(len(chosen))]
        for folder, changes in zip(folders, chosen.values(), strict=True):
            lay_out(folder, spec(model, changes))
        # In one process: the imports take longer than most of the runs.
        command = [sys.executable, "-m", "tests.train_many", *(str(folder.path) for folder in folders)]
        subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for folder, name in zip(folders, chosen, strict=True):
            print(line(name, probe.read(folder)), flush=True)


if __name__ == "__main__":
    main()
