"""What a training step keeps for the backward pass with images, and the estimate: python -m tests.image_memory FOLDER

Every tensor that the forward pass makes on the CPU is counted while it lives. Prints one JSON object: by run, the bytes
that live when the loss is known, and the bytes that the estimate adds for images; and the numbers that two processors
make of images.
"""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl import SFTTrainer

from engine.core.rundir import RunDir, read_json, write_json
from engine.models.facts import inspect_model
from engine.models.image_values import image_values
from engine.preflight.image_memory import image_bytes
from engine.worker.prepare import prepare
from engine.worker.train import train
from tests import zoo
from tests.conftest import short_training
from tests.image_training import write_model
from tests.train_many import lay_out

SIDE = 224  # pixels
RUNS = {
    (family, tower, recomputes)
    for family in ("qwen2_5_vl", "gemma3")
    for tower in ("frozen", "adapter")
    for recomputes in (False, True)
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in it, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        return output


def kept_bytes(root: Path, family: str, tower: str, recomputes: bool) -> dict[str, float]:
    spec = short_training(
        root / family / "base", root, training__max_steps=1, training__per_device_train_batch_size=2,
        data__max_length=448, vision__tower=tower, training__gradient_checkpointing=recomputes,
    ).change("data.datasets", ["seen"])  # fmt: skip
    run = lay_out(RunDir(root / family / f"{tower}-{recomputes}"), spec)
    prepare(run)
    kept: list[int] = []
    compute_loss = SFTTrainer.compute_loss

    def counted(*arguments: Any, **keywords: Any) -> Any:
        with LiveBytes() as live:
            loss = compute_loss(*arguments, **keywords)
        kept.append(sum(live.sizes.values()))
        return loss

    SFTTrainer.compute_loss = counted  # type: ignore[method-assign]
    try:
        train(run)
    finally:
        SFTTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    estimated = image_bytes(spec, inspect_model(root / family / "base"), half=False)
    assert estimated is not None
    return {"kept": kept[0], "estimated": estimated}


def processed_values(root: Path) -> dict[str, int | None]:
    zoo.build("smolvlm", root / "smolvlm")
    file = root / "smolvlm" / "preprocessor_config.json"
    write_json(file, read_json(file) | {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}})

    def values(folder: Path, *sizes: tuple[int, int]) -> int | None:
        return image_values(short_training(folder, root), sizes)

    return {
        "scaled": values(root / "qwen2_5_vl" / "base", (SIDE, SIDE)),
        "tiles": values(root / "smolvlm", (128, 128), (128, 64)),
    }


def main(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        Image.effect_noise((SIDE, SIDE), 80).convert("RGB").save(root / f"{number}.png")
    rows = [{"instruction": "<image>Which?", "output": "It is red.", "images": [f"{n}.png"]} for n in range(2)]
    write_json(root / "seen.json", rows)
    write_json(root / "dataset_info.json", {"seen": {"file_name": "seen.json"}})
    for family in sorted({family for family, _, _ in RUNS}):
        write_model(family, root / family / "base")
    kept = {" ".join(map(str, run)): kept_bytes(root, *run) for run in sorted(RUNS)}
    print(json.dumps(kept | {"values": processed_values(root)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
