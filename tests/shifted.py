"""What `bco_pair` makes of two batches one after the other, by one or several processes: `-m tests.shifted FOLDER`.

FOLDER has spec.yaml and batches.json; each process takes its share of each batch and writes rank-N.json: the loss, the
shift, and the summed log-probabilities of its answers, from plain logits of one unpadded text at a time.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.core.rundir import RunDir, write_json
from engine.spec.run_spec import RunSpec
from engine.worker.models.loading import load_model
from engine.worker.training.context import TrainingContext
from engine.worker.training.trainers import trainer_of
from tests.judged import log_probability


@torch.no_grad()
def main(folder: Path) -> None:
    spec = RunSpec.from_yaml((folder / "spec.yaml").read_text(encoding="utf-8"))
    batches = json.loads((folder / "batches.json").read_text(encoding="utf-8"))
    path = spec.model.model_name_or_path
    model, tokenizer = load_model(spec, path), AutoTokenizer.from_pretrained(path)
    data = {"train": Dataset.from_list(batches[0])}
    trainer = trainer_of("dpo")(TrainingContext(spec, RunDir(folder), model, tokenizer, data))
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    model.train()
    reference = AutoModelForCausalLM.from_pretrained(path)
    rank, share = trainer.accelerator.process_index, len(batches[0]) // trainer.accelerator.num_processes
    told: dict[str, Any] = {"batches": []}
    for batch in batches:
        rows = batch[rank * share : (rank + 1) * share]
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        loss = trainer.compute_loss(model, inputs).item()
        sums = {
            name: {
                side: [log_probability(whose, row["prompt_ids"], row[f"{side}_ids"]) for row in rows]
                for side in ("chosen", "rejected")
            }
            for name, whose in (("policy", model), ("reference", reference))
        }
        told["batches"].append({"loss": loss, "shift": trainer.shift, **sums})
    model.eval()
    trainer.compute_loss(model, inputs)
    write_json(folder / f"rank-{rank}.json", told | {"shift_after_measuring": trainer.shift})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
