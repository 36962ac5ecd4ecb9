"""Write down which arguments each stage's configuration class has, so that `engine.spec` can check `extra`
without importing torch. `python -m engine.worker.arguments` renews the file; a test compares them."""

import dataclasses
import json

from trl import SFTConfig

from engine.spec import TRAINER_ARGUMENTS

CONFIGS = {"pt": SFTConfig, "sft": SFTConfig}


def arguments() -> dict[str, list[str]]:
    """Stage → sorted names of the arguments of its configuration class."""
    return {
        stage: sorted(field.name for field in dataclasses.fields(config)) for stage, config in CONFIGS.items()
    }


if __name__ == "__main__":
    TRAINER_ARGUMENTS.write_text(json.dumps(arguments(), indent=1) + "\n", encoding="utf-8")
