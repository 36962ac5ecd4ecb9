"""The sources of an export: the base, the adapters, and the runs that trained them, with tokenizer and settings."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerFast

from engine.core.rundir import RESULT_FILE, read_object
from engine.export.export_spec import ExportSpec
from engine.models.adapters import adapter_config
from engine.models.facts import inspect_model
from engine.models.processor_files import copy_processor_files
from engine.models.reward_models import EVALUATION_FILE, PAIRS_FILE
from engine.runs.lineage import Training, trainings
from engine.spec.run_spec import RunSpec
from engine.worker.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Sources:
    """`settings` is the folder whose tokenizer, chat template and generation config are used: that of the first
    adapter, otherwise of the base. `trainings` are those that the weights went through, as far as they still exist."""

    base: Path
    adapters: dict[Path, float]
    settings: Path
    stage: str
    trainings: tuple[Training, ...]

    @classmethod
    def of(cls, spec: ExportSpec) -> Sources:
        base = Path(spec.model.model_name_or_path)
        adapters = {Path(folder): weight for folder, weight in spec.adapters.items()}
        results = list(adapters) or [base]
        contents = (read_object(folder / RESULT_FILE) for folder in results)
        result = next(filter(None, contents), {})
        is_reward_model = any(adapter_config(folder).get("task_type") == "SEQ_CLS" for folder in adapters) or (
            not adapters and "ForSequenceClassification" in inspect_model(base).architecture
        )
        stage = "rm" if is_reward_model else result.get("stage", "sft")
        return cls(base, adapters, results[0], stage, tuple(trainings([*adapters, base])))

    def loading(self, spec: ExportSpec) -> RunSpec:
        """How the base is loaded: as in the run, but never quantized, because merging into rounded weights would round
        twice."""
        plain = spec.model.model_dump() | {
            "quantization": {"kind": "none"},
            "adapter_path": None,
            "chat_template": None,
        }
        return RunSpec.read({"stage": "rm" if self.stage == "rm" else "sft", "model": plain})

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(RunSpec.read({"stage": "rm" if self.stage == "rm" else "sft"}), str(self.settings))

    def save_settings(self, folder: Path) -> None:
        """Copy tokenizer, chat template and generation config into `folder`."""
        self.tokenizer().save_pretrained(folder)
        copy_processor_files(self.base, folder)
        copy_processor_files(self.settings, folder)  # a training may have other limits of pixels
        if (self.settings / "generation_config.json").exists():
            GenerationConfig.from_pretrained(self.settings).save_pretrained(folder)
        for name in (
            EVALUATION_FILE,
            PAIRS_FILE,
        ):  # by which a training recognizes the reward model
            if self.stage == "rm" and (self.settings / name).exists():
                shutil.copyfile(self.settings / name, folder / name)
