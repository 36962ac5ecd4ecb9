"""Train several prepared runs one after the other, as one of the processes that train together.

`python -m tests.train_ranks FOLDER …`, started by `tests.preloaded.run_ranks`: the real worker code, its imports and
the meeting of the processes paid for once. What a run's launcher would say about FSDP comes from its accelerate.yaml.
An error of a run is left in its error.json, as always, and the next one begins.
"""

from __future__ import annotations

import contextlib
import os
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from engine.launch.command import SHARD_ON_CPU_VARIABLE
from engine.spec.yaml_text import read_yaml
from engine.worker.runtime.process_lifecycle import run_lifecycle
from engine.worker.train import train


def main() -> None:
    os.environ[SHARD_ON_CPU_VARIABLE] = "1"
    for folder in sys.argv[1:]:
        with contextlib.suppress(SystemExit), run_lifecycle(folder) as run:
            configuration = read_yaml(run.accelerate.read_text(encoding="utf-8"))
            os.environ["ACCELERATE_USE_FSDP"] = str(configuration["distributed_type"] == "FSDP").lower()
            copies = configuration.get("parallelism_config", {})
            os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = str(bool(copies)).lower()
            zero = configuration.get("deepspeed_config", {})
            os.environ["ACCELERATE_USE_DEEPSPEED"] = str(bool(zero)).lower()
            # As in `prepare_deepspeed_cmd_env` of accelerate.
            zero = {f"ACCELERATE_DEEPSPEED_{name.replace('init_flag', 'init')}": value for name, value in zero.items()}
            for name, value in (configuration.get("fsdp_config", {}) | copies | zero).items():
                os.environ[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
            train(run)
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state()  # which belongs to a process, and is another for each run
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


if __name__ == "__main__":
    main()
