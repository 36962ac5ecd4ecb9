"""Read a GGUF file back and compare it with the merged model: python -m engine.worker.exporting.gguf_check

A child of an export, run by the Python that has the package `gguf`. Standard input says what to compare, as JSON; the
answer is a JSON file. transformers dequantizes the file, so the file is compared, not llama.cpp's arithmetic.

Three things are compared, since each alone would mislead. Weights: a greedy answer may be equal although a layer is
wrong. Whole answers: what a user sees, but a single near tie that rounding flips changes everything after it. And the
next token after each beginning of the merged model's own answer: this counts near ties, but not what follows from them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from engine.core.rundir import RunDir, read_object, write_json
from engine.worker.runtime.process_lifecycle import ProgressReport, silence_warnings


def check(model: Path, file: Path, precision: str, report: ProgressReport) -> dict[str, Any]:
    """{"weights", "answers"}; or {"broken"}: why it is not a GGUF file; or {"unread"}: why it cannot be read here."""
    if importlib.util.find_spec("gguf") is None:
        return {"unread": {"code": "export-gguf-no-reader", "values": {"python": sys.executable}}}
    from gguf import GGUFReader

    try:
        reader: Any = GGUFReader(file)  # a missing field is None, whose AttributeError is caught
        architecture = cast("Any", reader.get_field("general.architecture")).contents()
    except (ValueError, AttributeError, IndexError, OSError, OverflowError, MemoryError) as error:
        return {"broken": f"{type(error).__name__}: {error}"[:300]}

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        return {"unread": {"code": "export-gguf-architecture", "values": {"architecture": architecture}}}
    read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    weights = compare_weights(read.state_dict(), model)
    if not weights["compared"]:
        return {"unread": {"code": "export-gguf-other-names", "values": {"architecture": architecture}}}
    dtype = getattr(torch, precision, torch.float32)
    read = read.to(dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    return {"weights": weights, "answers": compare_answers(read.eval(), model, report)}


def compare_weights(read: dict[str, Any], model: Path) -> dict[str, Any]:
    """How far each tensor is from the merged one: root mean square of the difference relative to that of the tensor.
    `largest` is the largest difference and `name` its tensor; `compared` of `count` tensors of the merged model are in
    the file."""
    from safetensors import safe_open

    largest, name, compared, count = 0.0, "", 0, 0
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no dict
                count += 1
                if key not in read:
                    continue
                compared += 1
                far = _distance(tensors.get_tensor(key), read[key])
                if not far <= largest:  # also of NaN
                    largest, name = far, key
    return {"largest": largest if compared else None, "name": name, "compared": compared, "count": count}


def _distance(merged: Any, read: Any) -> float:
    if merged.shape != read.shape:
        return float("inf")
    merged = merged.float()
    size = merged.pow(2).mean().sqrt().item()
    far = (merged - read.float()).pow(2).mean().sqrt().item()
    return far / size if size else far


def compare_answers(read: Any, model: Path, report: ProgressReport) -> dict[str, Any]:
    """The prompts of the export again, and the next token after each beginning of the merged model's answers."""
    from engine.export.export_spec import ExportSpec
    from engine.worker.exporting.output_comparison import (
        ModelOutput,
        Prompt,
        compare_outputs,
        model_outputs,
        prompt_ids,
    )

    rows = [row for row in read_object(model / "comparison.json").get("rows", ()) if row.get("answer")]
    prompts = [Prompt(row["source"], row["messages"]) for row in rows]
    merged = [ModelOutput(row["after"], tuple(row["answer"]["tokens"]), row["answer"]["finish"]) for row in rows]
    ids = prompt_ids(model, prompts, read).ids if prompts else []
    equal_tokens = 0
    for prompt, answer in zip(ids, merged, strict=True):
        assert prompt is not None  # the merged model has answered it
        equal_tokens += count_matching_tokens(read, prompt, answer.tokens)
    comparison = compare_outputs(ExportSpec(), prompts, merged, model_outputs(read, "sft", model, prompts, report))
    return {
        "prompts": comparison["prompts"],
        "equal": comparison["equal"],
        "same_tokens": equal_tokens,
        "tokens": sum(len(answer.tokens) for answer in merged),
        "rows": [
            {key: row[key] for key in ("source", "prompt", "before", "after", "equal", "differs_at")}
            for row in comparison["rows"]
        ],
    }


def count_matching_tokens(read: Any, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """The number of tokens of an answer that are the most likely after the prompt and the tokens before them."""
    import torch

    whole = torch.tensor([[*prompt, *answer]], device=read.device)
    with torch.inference_mode():
        likeliest = read(input_ids=whole).logits[0, len(prompt) - 1 : -1].argmax(-1)
    return int((likeliest == whole[0, len(prompt) :]).sum())


def main() -> None:
    silence_warnings()
    question = json.load(sys.stdin)
    report = ProgressReport(RunDir(Path(question["run"])))
    result = check(Path(question["model"]), Path(question["file"]), question["precision"], report)
    write_json(Path(question["answer"]), result)


if __name__ == "__main__":
    main()
