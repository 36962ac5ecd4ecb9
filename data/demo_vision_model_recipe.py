"""Make `data/demo_vision_model`, the small model that reads images with which a fresh machine can show such a run.

    python data/demo_vision_model_recipe.py OUT_FOLDER [--steps N]

As with `demo_model_recipe`, a demo has to learn something visible within a minute or two on two CPU cores, and random
weights cannot. So this recipe pre-trains a Qwen2-VL-shaped model of a million parameters to *see* the shapes and
colours of `shapes_recipe`, and to *write* their words, but never both together: about a picture it is asked for two
code letters, one for the colour and one for the shape, and words it only repeats, or translates into codes and back. So
it does not know the answers of the data sets, and fine-tuning only has to teach it to say in words what it sees. Its
pictures are drawn with a seed of their own; none is in the data sets.

The same steps and versions give the same weights on the same machine, in four minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from shapes_recipe import COLOURS, SHAPES, SIDE, answer, draw_picture

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE, VIDEO)
VOCABULARY = 384
PATCH, MERGE = 8, 2  # pixels of a patch; patches of a token, in each direction
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
    "tie_word_embeddings": True, "use_sliding_window": False,
}  # fmt: skip
VISION = {
    "depth": 2, "embed_dim": 96, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2, "patch_size": PATCH,
    "spatial_merge_size": MERGE, "temporal_patch_size": 2,
}  # fmt: skip
# Qwen's ChatML, less its default system prompt: what the rows say is all the model sees.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else %}{{- part['text'] }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SEED, STEPS, BATCH, PEAK_LEARNING_RATE, WARMUP = 2024, 1600, 32, 2e-3, 0.05
LETTERS = "bdfghjkmpqt"  # one for each colour and shape
TABLES = 2  # of codes; each gives other letters to the same colours and shapes
PHRASES = ("What is in the picture?", "Describe it.", "Hello!", "Thank you.", "Yes, it is.", "No.", "I see a picture.")
Kind = tuple[str, str]  # colour and shape
Lesson = tuple[Kind | None, str, str]  # what is in the picture, if there is one; question, answer


def code_tables() -> list[dict[str, str]]:
    """Word → its letter, of each table."""
    rng = random.Random(f"{SEED} codes")
    words = [*COLOURS, *SHAPES]
    return [dict(zip(words, rng.sample(LETTERS, len(words)), strict=True)) for _ in range(TABLES)]


def lessons() -> Iterator[Lesson]:
    """All that the model ever sees, without end: three of five are codes of a picture; the others have no picture, and
    are answers to write in codes or to read from them, or words to repeat."""
    rng = random.Random(f"{SEED} lessons")
    tables = code_tables()
    while True:
        kind = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        number, share, words = rng.randrange(TABLES), rng.randrange(10), answer(*kind)
        coded = f"A {tables[number][kind[0]]} {tables[number][kind[1]]}."
        if share < 6:
            yield kind, f"Codes in table {number}?", coded
        elif share < 8:
            pairs = (f"In table {number}: {words}", coded), (f"From table {number}: {coded}", words)
            yield None, *rng.choice(pairs)
        else:
            words = rng.choice([words, rng.choice(PHRASES), rng.choice([*COLOURS, *SHAPES])])
            yield None, f"Repeat: {words}", words


def illustrated_lessons() -> Iterator[tuple[Lesson, Any]]:
    """The lessons with their pictures, each drawn for it alone; None for a lesson without one."""
    rng = random.Random(f"{SEED} pictures")
    for lesson in lessons():
        yield lesson, lesson[0] and draw_picture(*lesson[0], rng)


# --- tokenizer, model and image processor ---------------------------------------------------------------


def make_tokenizer() -> Any:
    """A Qwen2 tokenizer with VOCABULARY entries, of which the last are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    plain = Qwen2Tokenizer().backend_tokenizer  # the family's own splitting, still without words
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = plain.pre_tokenizer
    words = [answer(colour, shape) for colour in COLOURS for shape in SHAPES] + list(PHRASES) * 4
    words += [
        "Repeat: ",
        "Codes in table 0?",
        "In table 1: A",
        "From table 0: A",
        "system\n",
        "user\n",
        "assistant\n",
    ] * 20
    learner.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    while len(vocabulary) < VOCABULARY - len(SPECIAL):
        vocabulary[f"<|unused_{len(vocabulary)}|>"] = len(vocabulary)
    for token in SPECIAL:
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[tuple(merge) for merge in learned["merges"]], eos_token=TURN_END,
        pad_token=END_OF_TEXT, additional_special_tokens=list(SPECIAL[1:]), model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: Any) -> Any:
    """The model with fresh weights."""
    import torch
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(SEED)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    ends = {"eos_token_id": ids[TURN_END], "pad_token_id": ids[END_OF_TEXT], "bos_token_id": None}
    config = Qwen2VLConfig(
        text_config={**TEXT, **ends}, vision_config=VISION, image_token_id=ids[IMAGE], video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START], vision_end_token_id=ids[VISION_END], tie_word_embeddings=True,
        dtype="float32",
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids[TURN_END], ids[END_OF_TEXT]], pad_token_id=ids[END_OF_TEXT], do_sample=False
    )
    return model


def make_image_processor() -> Any:
    """Scales every image to as many pixels as the pictures have."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
    )  # fmt: skip


# --- pre-training ---------------------------------------------------------------------------------------


def batch_of(batch: list[tuple[Lesson, Any]], tokenizer: Any, processor: Any) -> dict[str, Any]:
    """Pixels, and ids, mask and labels, (batch, length): only the answers are trained on."""
    import torch

    pad = tokenizer.pad_token_id
    pixels = processor([picture for _, picture in batch if picture], return_tensors="pt")
    tokens = int(pixels["image_grid_thw"][0].prod()) // MERGE**2
    rows, starts = [], []
    for (kind, question, reply), _ in batch:
        image = f"{VISION_START}{IMAGE * tokens}{VISION_END}" if kind else ""
        prompt = f"{TURN_START}user\n{image}{question}{TURN_END}\n{TURN_START}assistant\n"
        rows.append(tokenizer.encode(f"{prompt}{reply}{TURN_END}", add_special_tokens=False))
        starts.append(len(tokenizer.encode(prompt, add_special_tokens=False)))
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    for row, start in enumerate(starts):
        labels[row, :start] = -100
    types = (ids == tokenizer.convert_tokens_to_ids(IMAGE)).int()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": types, **pixels}


class Classifier:
    """Two linear layers on the image tokens, by which the tower also learns to classify, as towers usually do before
    there is a language part. They are not part of the model."""

    def __init__(self, model: Any):
        from torch import nn

        self.layers = nn.ModuleList(nn.Linear(TEXT["hidden_size"], len(names)) for names in (COLOURS, SHAPES))
        self.tokens: Any = None  # of the last forward pass: (images · tokens of each, hidden size)
        model.model.visual.merger.register_forward_hook(self._keep)

    def _keep(self, _module: Any, _inputs: Any, tokens: Any) -> None:
        self.tokens = tokens

    def parameters(self) -> list[Any]:
        return list(self.layers.parameters())

    def loss(self, batch: list[tuple[Lesson, Any]]) -> Any:
        """The mean cross-entropy of colour and shape, of each image token."""
        import torch

        kinds = [kind for (kind, _, _), _ in batch if kind]
        each = len(self.tokens) // len(kinds)
        total: Any = 0
        for part, (layer, names) in enumerate(zip(self.layers, (list(COLOURS), SHAPES), strict=True)):
            targets = torch.tensor([names.index(kind[part]) for kind in kinds]).repeat_interleave(each)
            total = total + torch.nn.functional.cross_entropy(layer(self.tokens), targets)
        return total / 2


def pretrain(model: Any, tokenizer: Any, processor: Any, steps: int) -> list[float]:
    """Train on `lessons` in place and return the loss of every step."""
    import torch

    stream = illustrated_lessons()
    classifier = Classifier(model)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *classifier.parameters()],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        fused=True,
    )
    model.train()
    losses: list[float] = []
    began = time.monotonic()
    for step in range(steps):
        done = step / steps
        rate = min(1.0, done / WARMUP) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * rate
        batch = list(islice(stream, BATCH))
        loss = model(**batch_of(batch, tokenizer, processor)).loss
        losses.append(loss.item())
        (loss + classifier.loss(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}  loss {losses[-1]:.3f}  {time.monotonic() - began:.0f} s", flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo model that reads images.")
    parser.add_argument("out_folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(2)  # part of the recipe: sums come out differently with another number
    tokenizer, processor = make_tokenizer(), make_image_processor()
    model = make_model(tokenizer)
    losses = pretrain(model, tokenizer, processor, arguments.steps)
    model.save_pretrained(arguments.out_folder)
    tokenizer.save_pretrained(arguments.out_folder)
    processor.save_pretrained(arguments.out_folder)
    last = losses[-10:]
    print(json.dumps({"steps": len(losses), "first_loss": losses[0], "last_loss": sum(last) / len(last)}))


if __name__ == "__main__":
    main()
