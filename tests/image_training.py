"""Train tiny models that read images, and compute the same by hand: `python -m tests.image_training FOLDER`.

The loss of the first step is that of the model as it was. By hand it comes from transformers' own image processor and
model, and from token ids that are put together here. What there is to compare is printed as one JSON object.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import queue
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from engine.core.rundir import RunDir, read_json, read_lines, write_json
from engine.data.datasets import examples, find
from engine.models.processor_files import pixel_limits
from engine.worker.data.examples import Encoder
from engine.worker.evaluation.questions import Question
from engine.worker.evaluation.respond import LoadedModels
from engine.worker.generation.answer import Answer
from engine.worker.generation.detokenizer import Detokenizer
from engine.worker.generation.sampling import Sampling
from engine.worker.models.processor import image_tokens_or_problem, load_image_tokens
from engine.worker.models.tokenizer import load_tokenizer
from engine.worker.prepare import prepare
from engine.worker.train import train
from tests import zoo
from tests.conftest import short_training
from tests.forked import fork_programs
from tests.train_many import lay_out

FAMILIES = ("qwen2_5_vl", "gemma3")
# What stands in the rendered text for an image, and what a processor makes of it (n: tokens of the image).
PLACES = {"qwen2_5_vl": "<vision_start><image><vision_end>", "gemma3": "<boi>"}
EXPANSIONS = {"qwen2_5_vl": "<vision_start>{}<vision_end>", "gemma3": "\n\n<boi>{}<eoi>\n\n"}
GEMMA_TOKENS = 4  # of each image
TYPE_KEYS = {"qwen2_5_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}
TOKENS = 8  # of an answer
COLOURS = {"red": (220, 30, 30), "blue": (20, 40, 220), "green": (30, 200, 60)}
SIZES = {"red": (40, 30), "blue": (64, 64), "green": (30, 50)}
ROWS: list[tuple[str, str]] = [  # question (with <image> for the next image) and answer
    ("<image>Which colour is it?", "It is red."),
    ("Is this <image> like <image>", "No: blue, and green."),
    ("What comes after 3?", "4."),
]
REJECTED = "It is not."  # the worse answer in pairs
IMAGES = [["red"], ["blue", "green"], []]


def write_data(folder: Path) -> None:
    for name, colour in COLOURS.items():
        picture = Image.new("RGB", SIZES[name], colour)
        picture.paste((0, 0, 0), (5, 5, 15, 20))
        picture.save(folder / f"{name}.png")
    rows = [
        {"instruction": question, "output": answer, "images": [f"{name}.png" for name in names]}
        for (question, answer), names in zip(ROWS, IMAGES, strict=True)
    ]
    write_json(folder / "seen.json", rows)
    write_json(folder / "dataset_info.json", {"seen": {"file_name": "seen.json"}})


def write_model(family: str, folder: Path) -> Path:
    zoo.build(family, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = zoo.CHATML.replace("IMAGE_MARK", repr(PLACES[family]))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if family == "qwen2_5_vl":  # as it is published: the zoo allows no larger images than its models' own
        file = folder / "preprocessor_config.json"
        write_json(file, read_json(file) | {"size": {"shortest_edge": 256, "longest_edge": 28 * 28 * 1280}})
    if family == "gemma3":  # which the zoo leaves at the 256 tokens of a large image
        changed = {"config.json": "mm_tokens_per_image", "processor_config.json": "image_seq_length"}
        for name, key in changed.items():
            write_json(folder / name, read_json(folder / name) | {key: GEMMA_TOKENS})
        weights = load_file(folder / "model.safetensors")
        projector = next(name for name in weights if name.endswith("mm_input_projection_weight"))
        weights[projector] = torch.randn_like(weights[projector])  # zeros, with which every image is the same
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokens_by_hand(
    family: str, folder: Path, data: Path, row: int, answered: bool, another: str = ""
) -> tuple[list[int], list[Any]]:
    """The ids of a row, or of its question alone, and what the image processor makes of its images. `another`: answer
    instead of its own."""
    tokenizer, images = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    text, answer = ROWS[row][0], another or ROWS[row][1]
    pixels = []
    for name in IMAGES[row]:
        made = images(Image.open(data / f"{name}.png").convert("RGB"), return_tensors="pt")
        pixels.append(made)
        tokens = int(made["image_grid_thw"].prod()) // 4 if "image_grid_thw" in made else GEMMA_TOKENS
        text = text.replace("<image>", EXPANSIONS[family].format("\0" * tokens), 1)
    text = text.replace("\0", "<image>")
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    whole = f"{prompt}{answer}<|im_end|>\n" if answered else prompt
    return tokenizer(whole, add_special_tokens=False)["input_ids"], pixels


def by_hand(family: str, folder: Path, data: Path) -> tuple[float, float, list[list[int]], list[list[int]]]:
    """The loss of all rows as one batch, that with the negatives of its images, their ids, and their labels."""
    model = AutoModelForImageTextToText.from_pretrained(folder).float().train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, labels, pixels = [], [], []
    for row in range(len(ROWS)):
        whole, seen = tokens_by_hand(family, folder, data, row, answered=True)
        begin = len(tokens_by_hand(family, folder, data, row, answered=False)[0])
        ids.append(whole)
        labels.append([-100] * begin + whole[begin:-1] + [-100])
        pixels += seen
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    longest = max(map(len, ids))
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    targets = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
    types = (padded == image_id).long()
    more: dict[str, Any] = {TYPE_KEYS[family]: types}
    more |= {key: torch.cat([each[key] for each in pixels]) for key in pixels[0] if key != "num_crops"}
    loss = model(input_ids=padded, attention_mask=mask, labels=targets, **more).loss
    more["pixel_values"] = -more["pixel_values"]
    other = model(input_ids=padded, attention_mask=mask, labels=targets, **more).loss
    return float(loss), float(other), ids, labels


def trained(root: Path, family: str, data: str = "seen", **changes: Any) -> RunDir:
    """A run over all rows as one batch."""
    settings = {"training__max_steps": 3, "training__per_device_train_batch_size": len(ROWS), "data__max_length": 256}
    spec = short_training(root / family / "base", root, **settings | changes)
    name = "-".join(["run", data, changes.get("stage", {}).get("kind", ""), *sorted(changes)])
    run = lay_out(RunDir(root / family / name), spec.change("data.datasets", [data]))
    prepare(run)
    train(run)
    return run


def prepared(run: RunDir) -> list[dict[str, Any]]:
    from datasets import Dataset

    return list(Dataset.from_file(str(run.prepared / "train.arrow")))


def encoder_of(root: Path, family: str, **changes: Any) -> Encoder:
    spec = short_training(root / family / "base", root, **{"data__max_length": 256} | changes)
    tokenizer = load_tokenizer(spec, spec.model.model_name_or_path)
    return Encoder.of(spec, tokenizer, images=load_image_tokens(spec.model.model_name_or_path, tokenizer))


def prepared_otherwise(root: Path, family: str) -> dict[str, Any]:
    """What rows become under other settings: the statuses, labels of the first and files of each."""
    rows = list(examples(find(root, "seen"), lambda bad: print(bad.text())))
    ask = [{**message, "images": []} for message in rows[0]["messages"]]
    long = {"messages": rows[0]["messages"] + rows[1]["messages"] + rows[2]["messages"], "tools": None}
    settings: dict[str, dict[str, Any]] = {
        "everything": {"stage": {"kind": "sft", "train_on": "everything"}},
        "cut_end": {"data__max_length": 90},
        "cut_start": {"data__max_length": 110, "data__too_long": "cut_start"},
        "no room": {"data__max_length": 20},
        "text template": {"model__chat_template": "chatml"},
    }
    made: dict[str, Any] = {}
    for name, changes in settings.items():
        whole = [long] if name.startswith("cut") else rows[:1]
        (example,) = encoder_of(root, family, **changes).examples(whole)
        ids = example.values[0].tolist()
        trained = [token for begin, end in example.trained for token in ids[begin:end]]
        files = [Path(image.path).stem for image in example.images]
        reason = example.reason.text() if example.reason else ""
        made[name] = {"status": example.status, "ids": ids, "trained": trained, "files": files, "reason": reason}
    (plain,) = encoder_of(root, family).examples([{"messages": ask, "tools": None}])
    return {"otherwise": made, "plain": plain.values[0].tolist()}


def answers(root: Path, family: str) -> dict[str, Any]:
    """Greedy answers to three questions that are written side by side, and losses of the rows, with those by hand."""
    base = root / family / "base"
    rows = list(examples(find(root, "seen"), lambda bad: print(bad.text())))
    loaded = LoadedModels.load(short_training(base, root).model, str(base), {}, "base", 4)
    model, ended = loaded.models["base"], queue.SimpleQueue[str]()
    batch = []
    for row in rows:
        prompt = model.prompt(row["messages"][:1])
        detokenizer = Detokenizer(model.backend_tokenizer)
        inputs = model.image_inputs(row["messages"][:1], prompt)
        batch.append(
            Answer(
                None, prompt, TOKENS, frozenset(), Sampling(0.0, 1.0), detokenizer,
                on_piece=lambda piece: ended.put(piece.finish) if piece.finish else None, image_inputs=inputs,
            )
        )  # fmt: skip
    loaded.generator.submit_all(batch)
    assert {ended.get(timeout=300) for _ in rows} == {"length"}
    questions = [Question(n, "seen", "", row["messages"][:1], chat=row) for n, row in enumerate(rows)]
    losses = {question.row: loss for made in loaded.losses("base", questions) for question, loss, _ in made}
    image = base64.b64encode((root / "red.png").read_bytes()).decode()
    request = {"question": ROWS[0][0].replace("<image>", ""), "image": image}
    request["answer"] = model.tokenizer.decode(batch[0].written, skip_special_tokens=True)
    loaded.end()
    return {
        "request": request,
        "answers": [
            [answer.written for answer in batch],
            [greedy(family, base, root, row) for row in range(len(ROWS))],
        ],
        "losses": [[losses[n] for n in range(len(rows))], [loss_of(family, base, root, n) for n in range(len(ROWS))]],
    }


def inputs_by_hand(family: str, base: Path, data: Path, row: int, answered: bool, answer: str = "") -> dict[str, Any]:
    """The arguments of a forward pass for one row alone."""
    ids, pixels = tokens_by_hand(family, base, data, row, answered, answer)
    made: dict[str, Any] = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    image_id = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<image>")
    if not pixels:
        return made
    made[TYPE_KEYS[family]] = (made["input_ids"] == image_id).long()
    return made | {key: torch.cat([each[key] for each in pixels]) for key in pixels[0] if key != "num_crops"}


def greedy(family: str, base: Path, data: Path, row: int) -> list[int]:
    model = AutoModelForImageTextToText.from_pretrained(base).float().eval()
    inputs = inputs_by_hand(family, base, data, row, answered=False)
    end = {"eos_token_id": None, "pad_token_id": 0}
    written = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, **end)
    return written[0, inputs["input_ids"].shape[1] :].tolist()


def loss_of(family: str, base: Path, data: Path, row: int, answer: str = "") -> float:
    """Sum of -log p over the answer, the row's own by default, and the token that ends it."""
    model = AutoModelForImageTextToText.from_pretrained(base).float().eval()
    inputs = inputs_by_hand(family, base, data, row, answered=True, answer=answer)
    begin = inputs_by_hand(family, base, data, row, answered=False)["input_ids"].shape[1]
    with torch.no_grad():
        shares = model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0]
    return -sum(float(shares[at - 1, ids[at]]) for at in range(begin, len(ids) - 1))


def preferences(root: Path, family: str) -> dict[str, Any]:
    """Mean log-probabilities of both answers in DPO, and that of the answers of KTO, by a run and by hand; and whether
    GRPO learns from answers to questions with images."""
    pairs = [row | {"chosen": row["output"], "rejected": REJECTED} for row in read_json(root / "seen.json")]
    thumbs = [row | {"good": number != 1} for number, row in enumerate(read_json(root / "seen.json"))]
    write_json(root / "pairs.json", pairs)
    write_json(root / "thumbs.json", thumbs)
    columns = {name: name for name in ("chosen", "rejected", "images")} | {"prompt": "instruction"}
    rated = {"prompt": "instruction", "response": "output", "images": "images", "kto_tag": "good"}
    entries = read_json(root / "dataset_info.json")
    entries["pairs"] = {"file_name": "pairs.json", "ranking": True, "columns": columns}
    write_json(root / "dataset_info.json", entries | {"thumbs": {"file_name": "thumbs.json", "columns": rated}})
    grpo = {"kind": "grpo", "rewards": {"format": 1}, "reward_pattern": ".*[a-m].*", "num_generations": 4}
    grpo |= {"max_new_tokens": 4}
    batch = {"training__per_device_train_batch_size": 4 * len(ROWS)}
    runs = {
        "dpo": trained(root, family, "pairs", stage={"kind": "dpo"}),
        "kto": trained(root, family, "thumbs", stage={"kind": "kto"}, training__max_steps=1),
        "grpo": trained(root, family, "seen", stage=grpo, **batch),
    }
    first = {stage: read_lines(run.metrics)[0] for stage, run in runs.items()}
    base = root / family / "base"
    losses = [loss_of(family, base, root, number) for number in range(len(ROWS))]
    rejected = [loss_of(family, base, root, number, REJECTED) for number in range(len(ROWS))]
    return {
        "by_hand": [-sum(losses) / 3, -sum(rejected) / 3, -(losses[0] + losses[2]) / 2, -losses[1]],
        "logged": [first[stage][f"logps/{side}"] for stage in ("dpo", "kto") for side in ("chosen", "rejected")],
        "grpo": sorted(file.name for file in runs["grpo"].adapter.iterdir()),
    }


def prepared_again(root: Path) -> list[bool]:
    """Whether rows that were prepared before are prepared again: as nothing has changed; as an image has; and with
    images of a row that is no longer there."""
    family, prepared = FAMILIES[0], []
    spec = short_training(root / family / "base", root, data__max_length=200).change("data.datasets", ["seen"])
    for number in range(4):
        run = lay_out(RunDir(root / family / f"again{number}"), spec)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            prepare(run)
        prepared.append("prepared before" not in output.getvalue())
        if number == 1:
            Image.new("RGB", (128, 64)).save(root / "red.png")
    return prepared


def fewer_pixels(root: Path) -> dict[str, Any]:
    """A run with a limit of pixels, the number of image tokens of its second row, and those by transformers with the
    files of the result; and the limits in these files."""
    changes = {"data__image_max_pixels": 1024, "data__image_min_pixels": 1024, "training__max_steps": 1}
    run = trained(root, FAMILIES[0], **changes)
    image_id = AutoTokenizer.from_pretrained(run.adapter).convert_tokens_to_ids("<image>")
    processor = AutoImageProcessor.from_pretrained(run.adapter)
    images = [Image.open(root / f"{name}.png").convert("RGB") for name in IMAGES[1]]
    grids = processor(images, return_tensors="pt")["image_grid_thw"]
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    served = load_image_tokens(str(root / FAMILIES[0] / "base"), tokenizer, files=str(run.adapter))
    return {
        "tokens": [prepared(run)[1]["input_ids"].count(image_id), int(grids.prod(-1).sum()) // 4],
        "served": served.expansion(images[0].size).count("<image>"),
        "limits": pixel_limits(run.adapter),
        "fixed": image_tokens_or_problem(
            str(root / "gemma3" / "base"), AutoTokenizer.from_pretrained(root / "gemma3" / "base"), pixels=(None, 9999)
        ).code,
    }


def main(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    write_data(root)
    results: dict[str, Any] = {}
    for family in FAMILIES:
        write_model(family, root / family / "base")
        loss, other, ids, labels = by_hand(family, root / family / "base", root)
        run = trained(root, family)
        rows = prepared(run)
        results[family] = (
            prepared_otherwise(root, family)
            | answers(root, family)
            | {"preferences": preferences(root, family)}
            | {
                "loss": [loss, *(line["loss"] for line in read_lines(run.metrics) if "loss" in line)],
                "other_loss": other,
                "ids": [ids, [row["input_ids"] for row in rows]],
                "labels": [labels, [row["labels"] for row in rows]],
                "files": [[Path(image["path"]).stem for image in row["image_sources"]] for row in rows],
                "adapter": sorted(path.name for path in run.adapter.iterdir()),
            }
        )
    print(json.dumps(results | {"pixels": fewer_pixels(root), "again": prepared_again(root)}))


if __name__ == "__main__":
    fork_programs()
    main(Path(sys.argv[1]))
