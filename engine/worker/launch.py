"""`accelerate launch` for a run: takes the same arguments and does the same, but starts sooner.

    python -m engine.worker.launch --config_file FILE … --module engine.worker.train FOLDER

The supervisor starts it while the rows are being prepared. Meanwhile it imports the libraries of the training, and
begins when it reads a line from standard input (see `engine.runs.supervisor`). With a single process, this is the one:
accelerate would start another, which would import torch again.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from engine.core.rundir import RunDir
from engine.launch.command import WAIT_VARIABLE
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.optional_packages import hide_unused_packages, trains_quantized
from engine.worker.runtime.process_lifecycle import library_imports, silence_warnings
from engine.worker.training.preload import import_libraries


def main() -> None:
    """Import, wait if the environment says so, launch."""
    folder = RunDir(Path(sys.argv[-1]))
    spec = RunSpec.from_yaml(folder.spec.read_text(encoding="utf-8"))
    alone = spec.hardware.num_processes == 1
    silence_warnings()
    if alone:
        hide_unused_packages(trains_quantized(spec))
    with library_imports():
        if alone:
            import_libraries(spec)
        from accelerate.commands import launch

    if os.environ.pop(WAIT_VARIABLE, "") and not sys.stdin.readline():
        return  # the supervisor is gone, or the rows could not be prepared
    arguments = launch.launch_command_parser().parse_args()
    if not alone:
        launch.launch_command(arguments)
        return
    arguments, *_ = launch._validate_launch_command(arguments)
    _, environment = launch.prepare_simple_launcher_cmd_env(arguments)
    os.environ.update(environment)
    sys.argv = [arguments.training_script, *arguments.training_script_args]
    runpy.run_module(arguments.training_script, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
