"""`accelerate launch` for a run: takes the same arguments and does the same, but starts sooner.

    python -m engine.worker.launch --config_file FILE … --module engine.worker.train FOLDER

The supervisor starts it while the rows are being prepared. Meanwhile it imports the libraries of the training, and
begins when it reads a line from standard input (see `engine.runs.supervisor`). With a single process, this is the one:
accelerate would start another, which would import torch again. As a studio's standby, it is started before there is a
run (see `engine.runs.standby`).
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from pathlib import Path

from engine.core.rundir import RunDir
from engine.launch.command import STANDBY_VARIABLE, WAIT_VARIABLE, connection_variables
from engine.preflight.package_checks import trains_quantized
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.optional_packages import hide_unused_packages
from engine.worker.runtime.process_lifecycle import library_imports, silence_warnings
from engine.worker.runtime.standby import Standby
from engine.worker.training.preload import import_libraries


def main() -> None:
    """Import, wait if the environment says so, launch."""
    silence_warnings()
    if STANDBY_VARIABLE in os.environ:
        standby = Standby.begin()
        _import(standby.stage, standby.quantizes)
        standby.wait_for_run()
        alone = True
    else:
        spec = RunSpec.from_yaml(RunDir(Path(sys.argv[-1])).spec.read_text(encoding="utf-8"))
        alone = spec.hardware.num_processes == 1
        if alone:
            _import(spec.stage.kind, trains_quantized(spec))
    with library_imports():
        from accelerate.commands import launch

    if os.environ.pop(WAIT_VARIABLE, "") and not sys.stdin.readline():
        return  # the supervisor is gone, or the rows could not be prepared
    arguments = launch.launch_command_parser().parse_args()
    if not alone:
        os.environ.update(connection_variables(RunDir(Path(sys.argv[-1]))))
        launch.launch_command(arguments)
        return
    arguments, *_ = launch._validate_launch_command(arguments)
    _, environment = launch.prepare_simple_launcher_cmd_env(arguments)
    os.environ.update(environment)
    sys.argv = [arguments.training_script, *arguments.training_script_args]
    runpy.run_module(arguments.training_script, run_name="__main__", alter_sys=True)


def _import(stage: str, quantizes: bool) -> None:
    """Import all that the training needs, for a launcher that is itself the only process."""
    hide_unused_packages(quantizes)
    with library_imports():
        import_libraries(stage)
        importlib.import_module("accelerate.commands.launch")


if __name__ == "__main__":
    main()
