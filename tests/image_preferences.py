"""Train the demo vision model on preferences over images, and compute the same by hand.

`python -m tests.image_preferences FOLDER`. By hand means token ids that are put together here, transformers' image
processor and model, one sequence at a time, and the papers' formulas. What there is to compare is printed as JSON.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from trl import GRPOTrainer

from engine.core.problems import Refusal
from engine.core.rundir import RunDir, read_lines, write_json
from engine.launch.workspace import DEMO_VISION_MODEL
from engine.worker.prepare import prepare
from engine.worker.train import train
from tests.conftest import short_training
from tests.forked import fork_programs
from tests.train_many import lay_out

BETA = 0.3
SIZES = {"tall": (24, 96), "square": (48, 48), "wide": (90, 30)}
# Question (with <image> for the next image), its images, and the better and the worse answer.
Row = tuple[str, list[str], str, str]
ROWS: list[Row] = [
    ("<image>What is in the picture?", ["tall"], "A blue triangle.", "A red cross."),
    ("Is <image> like <image>", ["square", "wide"], "No.", "A purple ring."),
    ("Hello!", [], "Hello!", "A ring."),
    ("<image>What is in the picture?", ["wide"], "A green square.", "An orange circle."),
]
# Single answers to these questions, and whether they are good.
THUMBS = [("A blue triangle.", True), ("A red cross.", False), ("A blue triangle.", True), ("A blue triangle.", True)]
LORA = {"kind": "lora", "r": 4, "lora_dropout": 0.0}


def write_data(folder: Path) -> None:
    """The rows as LLaMA-Factory spells pairs."""
    for number, (name, size) in enumerate(SIZES.items()):
        Image.effect_mandelbrot(size, (-2, -1.5, 1 - number / 3, 1.5), 90).convert("RGB").save(folder / f"{name}.png")
    pairs = [
        {
            "conversations": [{"from": "human", "value": question}],
            "chosen": {"from": "gpt", "value": better},
            "rejected": {"from": "gpt", "value": worse},
            "images": [f"{name}.png" for name in images],
        }
        for question, images, better, worse in ROWS
    ]
    thumbs = [
        {
            "conversations": [*row["conversations"], {"from": "gpt", "value": answer}],
            "label": good,
            "images": row["images"],
        }
        for row, (answer, good) in zip(pairs, THUMBS, strict=True)
    ]
    entries: dict[str, Any] = {}
    for name, rows in (("pairs", pairs), ("thumbs", thumbs)):
        write_json(folder / f"{name}.json", rows)
        columns = {"messages": "conversations", "images": "images"}
        columns |= {"chosen": "chosen", "rejected": "rejected"} if name == "pairs" else {"kto_tag": "label"}
        entry = {"file_name": f"{name}.json", "formatting": "sharegpt", "columns": columns}
        entries[name] = entry | ({"ranking": True} if name == "pairs" else {})
    write_json(folder / "dataset_info.json", entries)


class ByHand:
    """The demo model as transformers loads it, with or without an adapter."""

    def __init__(self, folder: Path, adapter: Path | None = None):
        model = AutoModelForImageTextToText.from_pretrained(DEMO_VISION_MODEL).float()
        self.model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(DEMO_VISION_MODEL)
        self.images, self.folder = AutoImageProcessor.from_pretrained(DEMO_VISION_MODEL), folder

    def prompt(self, question: str, images: list[str]) -> tuple[list[int], dict[str, Any]]:
        """The ids up to the answer, and the arguments of the model for the images."""
        made = [self.images(Image.open(self.folder / f"{name}.png"), return_tensors="pt") for name in images]
        for each in made:
            tokens = "<|image_pad|>" * (int(each["image_grid_thw"].prod()) // 4)
            question = question.replace("<image>", f"<|vision_start|>{tokens}<|vision_end|>", 1)
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        pictures = {key: torch.cat([each[key] for each in made]) for key in ("pixel_values", "image_grid_thw") if made}
        return self.tokenizer(text)["input_ids"], pictures

    def shares(self, question: str, images: list[str], answer: list[int], temperature: float = 1) -> Tensor:
        """log p of every token (tokens of the answer, vocabulary)."""
        prompt, pictures = self.prompt(question, images)
        ids = torch.tensor([prompt + answer])
        marks = (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
        with torch.no_grad():
            logits = self.model(input_ids=ids, mm_token_type_ids=marks, **pictures).logits[0]
        return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)

    def log_prob(self, question: str, images: list[str], answer: str) -> float:
        """The sum of log p over the tokens of the answer and the one that ends it."""
        ids = self.tokenizer(f"{answer}<|im_end|>")["input_ids"]
        shares = self.shares(question, images, ids)
        return sum(float(share[token]) for share, token in zip(shares, ids, strict=True))

    def greedy(self, question: str, images: list[str], length: int) -> list[int]:
        """The answer without chance, up to its end."""
        written: list[int] = []
        ends = self.model.generation_config.eos_token_id
        while len(written) < length and not (written and written[-1] in ends):
            written.append(int(self.shares(question, images, [*written, 0])[-1].argmax()))
        return written

    def tokens(self, answer: str) -> int:
        """Of an answer, with the one that ends it."""
        return len(self.tokenizer(f"{answer}<|im_end|>")["input_ids"])

    def log_probs(self, row: Row) -> tuple[float, float]:
        """Of the better and the worse answer."""
        question, images, better, worse = row
        return self.log_prob(question, images, better), self.log_prob(question, images, worse)


def trained(root: Path, name: str, start: Path | None = None, **changes: Any) -> RunDir:
    """A run of two steps, each over all rows as one batch; `start`: a checkpoint that it continues from."""
    settings: dict[str, Any] = {
        "training__max_steps": 2, "training__per_device_train_batch_size": len(ROWS), "logging__save_steps": 1,
        "logging__save_total_limit": 5, "data__max_length": 128, "method": LORA, "data__datasets": ["pairs"],
    }  # fmt: skip
    run = lay_out(RunDir(root / "runs" / name), short_training(DEMO_VISION_MODEL, root, **settings | changes))
    prepare(run)
    if start:
        shutil.copytree(start, run.path / start.name)
    train(run)
    return run


def logged(run: RunDir, *names: str) -> list[list[float]]:
    """The values of these curves in each step."""
    return [[line[name] for name in names] for line in read_lines(run.metrics) if names[0] in line]


def distance(run: RunDir, other: RunDir) -> float:
    """The largest difference between the weights of two adapters."""
    weights, others = (load_file(each.adapter / "adapter_model.safetensors") for each in (run, other))
    return max(float((others[name] - weight).abs().max()) for name, weight in weights.items())


def dpo(root: Path) -> dict[str, Any]:
    """Loss, log-probabilities and margins of both steps, by the run and by hand; a resumed run's distance from it."""
    stage = {"kind": "dpo", "beta": BETA}
    run = trained(root, "dpo", stage=stage)
    before, after = ByHand(root), ByHand(root, run.path / "checkpoint-1")
    scores = [torch.tensor([policy.log_probs(row) for row in ROWS]) for policy in (before, after)]
    swapped = torch.tensor([before.log_probs((row[0], ["square"] * len(row[1]), *row[2:])) for row in ROWS])
    by_hand = []
    for policy in scores:
        rewards = BETA * (policy - scores[0])
        margins = rewards[:, 0] - rewards[:, 1]
        by_hand.append([float(-logsigmoid(margins).mean()), *policy.mean(0).tolist(), float(margins.mean())])
    again = trained(root, "resumed", run.path / "checkpoint-1", stage=stage)
    return {
        "by_hand": by_hand,
        "logged": logged(run, "loss", "logps/chosen", "logps/rejected", "rewards/margins"),
        "other_images": swapped.mean(0).tolist(),
        "resumed": distance(run, again),
        "resumed_steps": [line["step"] for line in read_lines(again.metrics) if "loss" in line],
        "files": sorted(file.name for file in run.adapter.iterdir()),
    }


def kto(root: Path) -> dict[str, Any]:
    """Loss and drift of both steps, by the run and by hand. Each prompt's drift is that of its neighbour's answer."""
    changes: dict[str, Any] = {"training__learning_rate": 1e-3, "stage": {"kind": "kto", "beta": BETA}}
    changes |= {"extra": {"train_sampling_strategy": "sequential"}}
    run = trained(root, "kto", data__datasets=["thumbs"], **changes)
    answers = [answer for answer, _ in THUMBS]
    own, neighbours = [], []
    for policy in (ByHand(root), ByHand(root, run.path / "checkpoint-1")):
        own.append(torch.tensor([policy.log_prob(*row[:2], answers[n]) for n, row in enumerate(ROWS)]))
        neighbours.append(torch.tensor([policy.log_prob(*row[:2], answers[n - 1]) for n, row in enumerate(ROWS)]))
    by_hand = []
    for policy, drifted in zip(own, neighbours, strict=True):
        drift = (drifted - neighbours[0]).mean().clamp(min=0)
        signs = torch.tensor([1.0 if good else -1.0 for _, good in THUMBS])
        losses = 1 - torch.sigmoid(signs * BETA * (policy - own[0] - drift))
        by_hand.append([float(losses.mean()), float(drift)])
    return {"by_hand": by_hand, "logged": logged(run, "loss", "kl")}


def orpo(root: Path) -> dict[str, Any]:
    """Loss of the first step by the run and by hand, and the log-probabilities per token."""
    stage = {"kind": "orpo", "orpo_lambda": BETA}
    run = trained(root, "orpo", training__max_steps=1, stage=stage)
    policy = ByHand(root)
    means = [[policy.log_prob(*row[:2], answer) / policy.tokens(answer) for answer in row[2:]] for row in ROWS]
    chosen, rejected = torch.tensor(means, dtype=torch.float64).T
    odds = chosen - rejected - torch.log1p(-chosen.exp()) + torch.log1p(-rejected.exp())
    loss = (-chosen - BETA * logsigmoid(odds)).mean()
    by_hand = [[float(loss), float(chosen.mean()), float(rejected.mean())]]
    return {"by_hand": by_hand, "logged": logged(run, "loss", "logps/chosen", "logps/rejected")}


LENGTH, TEMPERATURE = 6, 2.0  # tokens of a generated answer; surer answers would all be equal


@contextlib.contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """What the losses of GRPO are computed from inside the context."""
    inputs: list[dict[str, Any]] = []
    compute = GRPOTrainer._compute_loss

    def record(self: Any, model: Any, batch: dict[str, Any]) -> Any:
        inputs.append(batch)
        return compute(self, model, batch)

    GRPOTrainer._compute_loss = record
    yield inputs
    GRPOTrainer._compute_loss = compute


def answers_in(batch: dict[str, Any], base: ByHand) -> list[tuple[Row, list[int]]]:
    """Each row of a batch, known by its prompt, and the ids of its answer."""
    known = {tuple(base.prompt(row[0], row[1])[0]): row for row in ROWS}
    parts = [batch[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask")]
    return [
        (known[tuple(prompt[shown.bool()].tolist())], answer[counted.bool()].tolist())
        for prompt, shown, answer, counted in zip(*parts, strict=True)
    ]


def grpo(root: Path) -> dict[str, Any]:
    """Answers without chance by a run and by hand; the mean entropy of the first step's tokens, and KL of the second's,
    by another run and by hand; and the distance from it of one that is resumed in the middle of a round."""
    stage = {"kind": "grpo", "rewards": {"length": 1}, "reward_length": 3, "num_generations": 2, "grpo_beta": 0.1}
    stage |= {"max_new_tokens": LENGTH, "temperature": TEMPERATURE, "sample_steps": 1, "num_iterations": 2}
    changes: dict[str, Any] = {"training__per_device_train_batch_size": 2 * len(ROWS), "stage": stage}
    base, certain = ByHand(root), {"generation_kwargs": {"do_sample": False}}
    with recorded() as batches, contextlib.suppress(Refusal):  # nothing is learned from equal answers
        trained(root, "greedy", **changes, training__max_steps=1, extra=certain)
    written = [(answer, base.greedy(row[0], row[1], LENGTH)) for row, answer in answers_in(batches[0], base)]
    with recorded() as batches:
        run = trained(root, "grpo", **changes)
    again = trained(root, "rest", run.path / "checkpoint-1", **changes)
    after = ByHand(root, run.path / "checkpoint-1")
    entropies, divergences = [], []
    for row, answer in answers_in(batches[0], base):
        shares = base.shares(row[0], row[1], answer, TEMPERATURE)
        entropies += (-(shares.exp() * shares).sum(-1)).tolist()
    for row, answer in answers_in(batches[1], base):
        chosen = torch.tensor(answer)[:, None]
        policy, reference = (
            model.shares(row[0], row[1], answer, TEMPERATURE).gather(1, chosen) for model in (after, base)
        )
        lead = policy - reference  # TRL's KL has the ratio to the model that wrote the answers as a factor
        divergences += (lead.exp() * ((-lead).exp() + lead - 1)).flatten().tolist()
    return {
        "written": written,
        "by_hand": [sum(entropies) / len(entropies), sum(divergences) / len(divergences)],
        "logged": [logged(run, "entropy")[0][0], logged(run, "kl")[1][0]],
        "resumed": distance(run, again),
        "resumed_steps": [line["step"] for line in read_lines(again.metrics) if "loss" in line],
        "samples": read_lines(run.samples),
    }


def main(root: Path) -> None:
    torch.set_num_threads(1)  # the model is too small for more to help
    root.mkdir(parents=True, exist_ok=True)
    write_data(root)
    print("\n" + json.dumps({stage.__name__: stage(root) for stage in (dpo, kto, orpo, grpo)}))


if __name__ == "__main__":
    fork_programs()
    main(Path(sys.argv[1]))
