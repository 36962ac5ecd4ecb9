"""What a file is for: training, evaluation (`do_predict`, `llamafactory-cli eval`) or export; and the import of the
latter two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.core.problems import Refusal, problem
from engine.evaluation.evaluation_spec import EvaluationSpec
from engine.export.export_spec import ExportSpec
from engine.importer.converters import CONVERTERS
from engine.importer.draft import Draft, as_list
from engine.importer.model_converters import CONTEXT_LENGTH_KEY, quantization_bit
from engine.importer.table import entries, reasons
from engine.importer.training import CONVERSION_ERRORS, put_unknown

# Keys with the same meaning in an evaluation or an export, in addition to those that the table lists for it.
EVALUATION_PATHS = {
    "model_name_or_path": "model.model_name_or_path",
    "model_revision": "model.model_revision",
    "quantization_type": "model.quantization.bnb_4bit_quant_type",
    "double_quantization": "model.quantization.bnb_4bit_use_double_quant",
    "dataset_dir": "data.dataset_dir",
    "max_samples": "data.max_samples",
    "per_device_eval_batch_size": "generation.batch_size",
    "seed": "data.seed",
    "run_name": "name",
}
EXPORT_PATHS = {
    "model_name_or_path": "model.model_name_or_path",
    "model_revision": "model.model_revision",
    "run_name": "name",
}
PRECISIONS = {"auto": "auto", "float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
TRAINING_KEYS = (
    "stage",
    "dataset",
    "finetuning_type",
    "do_train",
    "learning_rate",
    "num_train_epochs",
    "output_dir",
)
INFERENCE_KEYS = (
    "infer_backend",
    "infer_dtype",
    "vllm_maxlen",
    "vllm_config",
    "template",
    "vllm_enforce_eager",
)


def spec_kind(settings: Mapping[str, Any], verb: str) -> str:
    """ "training", "evaluation" or "export". Raises Refusal if the settings are only for chatting."""
    if verb == "export" or settings.get("export_dir"):
        return "export"
    if verb == "eval" or "task" in settings:
        return "evaluation"
    trains = settings.get("do_train")
    measures = any(settings.get(name) is True for name in ("do_predict", "do_eval", "predict_with_generate"))
    if measures and trains is not True:
        return "evaluation"
    if (
        not any(name in settings for name in TRAINING_KEYS)
        and any(name in settings for name in INFERENCE_KEYS)
        and trains is None
    ):
        raise Refusal(problem("import-chat"))
    return "training"


def evaluation_draft(settings: Mapping[str, Any]) -> Draft:
    """An evaluation with the settings for prediction. LLaMA-Factory's defaults are temperature 0.95, top_p 0.7 and all
    rows."""
    draft = Draft(EvaluationSpec, "evaluation", settings)
    for path, value in {
        "data.max_samples": None,
        "generation.temperature": 0.95,
        "generation.top_p": 0.7,
        "generation.max_new_tokens": 1024,
    }.items():
        draft.put(path, value)
    sets = "eval_dataset" if settings.get("eval_dataset") is not None else "dataset"
    for name, value in settings.items():
        if name == sets and value is not None:
            draft.put("data.datasets", list(dict.fromkeys(map(str, as_list(value)))), name)
        elif name == "adapter_name_or_path" and value is not None:
            _measured_adapter(draft, name, value)
        elif name == "quantization_bit" and value is not None:
            quantization_bit(draft, name, value)
        else:
            _put_key(draft, name, value, EVALUATION_PATHS)
    if isinstance(seed := settings.get("seed"), int):
        draft.put("generation.seed", seed)
    return draft


def _measured_adapter(draft: Draft, name: str, value: Any) -> None:
    folders = as_list(value)
    draft.put("results", [str(folder) for folder in folders], name)
    draft.put("with_base", False)  # LLaMA-Factory evaluates one model
    draft.differs(name, value, reasons()["measured-results"])


def export_draft(settings: Mapping[str, Any]) -> Draft:
    """An export of what the file merges. Several adapters are added up, since LLaMA-Factory merges one after
    another."""
    draft = Draft(ExportSpec, "export", settings)
    for name, value in settings.items():
        if name == "adapter_name_or_path" and value is not None:
            draft.put("adapters", {str(folder): 1.0 for folder in as_list(value)}, name)
        elif name == "export_device" and value is not None:
            draft.put("hardware.device", value, name)
        elif name == "infer_dtype" and value is not None:
            draft.put("precision", PRECISIONS.get(str(value), value), name)
        else:
            _put_key(draft, name, value, EXPORT_PATHS)
    return draft


def _put_key(draft: Draft, name: str, value: Any, paths: Mapping[str, str]) -> None:
    entry = entries("llamafactory").get(name)
    if name == CONTEXT_LENGTH_KEY:
        return
    if entry is None:
        put_unknown(draft, name, value)
    elif value is None:
        draft.needless(name, value, "empty")
    elif path := paths.get(name) or entry.paths.get(draft.kind):
        try:
            CONVERTERS[entry.converter](draft, name, value) if entry.converter and name not in paths else draft.put(
                path, value, name
            )
        except CONVERSION_ERRORS as error:
            draft.note("import-value", name, value, {"en": str(error), "zh": str(error)})
    elif name == "trust_remote_code" or (entry.none and not entry.paths):
        draft.note_unused(name, value, entry)
    else:
        draft.needless(name, value, "other-purpose")
