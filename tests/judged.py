"""What a preference stage makes of one batch, and the log-probabilities from which it can be worked out by hand.

`python -m tests.judged MODEL < cases.json`: each case is a spec's stage and the rows of a batch. The real trainer of
the stage is built, its model moved away from the reference by a seeded push, and the loss of the batch computed. Beside
it stand the summed log-probabilities of every answer, from plain logits of one unpadded text at a time.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.core.rundir import RunDir
from engine.spec.run_spec import RunSpec
from engine.worker.models.loading import load_model
from engine.worker.training.context import TrainingContext
from engine.worker.training.trainers import assert_effective, trainer_of


def log_probability(model: Any, prompt: list[int], answer: list[int]) -> float:
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()


def score(model: Any, prompt: list[int], answer: list[int]) -> float:
    return model(input_ids=torch.tensor([prompt + answer])).logits.item()


@torch.no_grad()
def judge(path: str, stage: dict[str, Any], rows: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    spec = RunSpec.read(
        {
            "model": {"model_name_or_path": path},
            "stage": stage,
            "method": {"kind": "full"},
            "data": {"datasets": ["x"]},
            "training": {"gradient_checkpointing": False, "per_device_train_batch_size": len(rows)},
            "hardware": {"device": "cpu"},
        }
    )
    run = RunDir(Path(folder))
    model, tokenizer = load_model(spec, path), AutoTokenizer.from_pretrained(path)
    context = TrainingContext(spec, run, model, tokenizer, {"train": Dataset.from_list(rows)})
    trainer = trainer_of(spec.stage.kind)(context)
    assert_effective(spec, run, trainer)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    model.eval()
    told = {"loss": trainer.compute_loss(model, trainer._prepare_inputs(trainer.data_collator(rows))).item()}
    answers = {
        "chosen": [one.get("chosen_ids") for one in rows],
        "rejected": [one.get("rejected_ids") for one in rows],
        "completion": [one.get("completion_ids") for one in rows],
        "exchanged": [one.get("completion_ids") for one in rows[-1:] + rows[:-1]],
    }
    measure = score if stage["kind"] == "rm" else log_probability
    reference = None if stage["kind"] == "rm" else AutoModelForCausalLM.from_pretrained(path)
    for name, those in answers.items():
        for one, whose in (("policy", model), ("reference", reference)):
            if those[0] and whose is not None:
                pairs = zip(rows, those, strict=True)
                told[f"{one} {name}"] = [measure(whose, row["prompt_ids"], answer) for row, answer in pairs]
    return told


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as here:
        judged = [judge(sys.argv[1], **case, folder=here) for case in json.load(sys.stdin)]
    print(json.dumps(judged))
