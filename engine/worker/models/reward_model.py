"""A trained reward model: loading it as it was trained, and its scores of whole conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.core.problems import Refusal, problem
from engine.core.rundir import RESULT_FILE, RunDir, read_object
from engine.preflight.package_checks import quantized
from engine.runs import kinds
from engine.spec.run_spec import RunSpec
from engine.worker.models.loading import load_model
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.runtime.optional_packages import is_quantization_hidden

SCORE_BATCH_SIZE = 16  # conversations in one forward pass


@torch.no_grad()
def score_conversations(model: Any, conversations: Sequence[Sequence[int]]) -> Tensor:
    """The score of each conversation of token ids, shape (B,), in fp32, from a model that is not being trained."""
    pad, device = model.config.get_text_config().pad_token_id, model.device
    batch_scores = []
    for start in range(0, len(conversations), SCORE_BATCH_SIZE):
        batch = [torch.tensor(ids, device=device) for ids in conversations[start : start + SCORE_BATCH_SIZE]]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
        batch_scores.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1).float().cpu())
    return torch.cat(batch_scores)


def load_reward_model(folder: Path) -> tuple[Any, Any]:
    """The reward model and the tokenizer in the result folder (adapter/ or model/) of a run, loaded as in its training,
    with quantization and precision as in its spec. For scoring only.

    Raises Refusal if the folder is not the result of a reward model run, or is quantized although quantization is not
    allowed.
    """
    run, result = RunDir(folder.parent), read_object(folder / RESULT_FILE)
    if result.get("stage") != "rm":
        raise Refusal(problem("not-a-reward-model", folder=folder, stage=result.get("stage") or "—"))
    spec = kinds.read(run.spec.read_text(encoding="utf-8"))
    if not isinstance(spec, RunSpec):  # an export has the model's settings and no others
        method = "lora" if folder == run.adapter else "full"
        spec = RunSpec.read({"stage": "rm", "method": method, "model": spec.model.model_dump()})
    if spec.method.kind == "lora":
        spec = spec.change("model.adapter_path", str(folder))
        path = read_object(run.prepared / "summary.json").get("model_path", spec.model.model_name_or_path)
    else:
        # The configuration in the folder already contains the scaling.
        spec, path = spec.change("model.rope_scaling", {"kind": "none"}), str(folder)
    if is_quantization_hidden() and quantized(spec.model):
        raise Refusal(problem("judge-came-late"))
    tokenizer = load_tokenizer(spec, str(folder))
    model = load_model(spec, path)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.requires_grad_(False).eval(), tokenizer
