"""The cache of prepared rows in `saves/.prepared/`, found by the content that they were prepared from.

The key consists of the contents of the data files and of the tokenizer, of the entries in dataset_info.json, and of the
relevant settings; so a changed file never gets outdated rows, whatever its modification time. A run gets hard links,
and stays complete when the cache is deleted. This module imports nothing heavy: a run whose rows are cached starts at
once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.core.locks import is_locked, try_lock
from engine.core.permissions import apply_umask
from engine.core.rundir import ALIVE_BYTE, read_object, write_json
from engine.core.stages import STAGES
from engine.data.datasets import Dataset
from engine.launch.engine_choice import is_local
from engine.launch.workspace import template_file
from engine.models.chat_templates import TEMPLATE_FOLDER
from engine.models.processor_files import PROCESSOR_FILES
from engine.spec.run_spec import RunSpec

# Version of the preparation: raise it whenever the same rows give a different result (ids, labels, weights,
# truncation). tests/test_mask_fingerprints.py fails if the mask has changed and this has not.
PREPARATION_VERSION = 5
MAX_CACHE_BYTES = 20 * 10**9  # the least recently used are deleted first
LEFT_SECONDS, ABANDONED_SECONDS = 60.0, 86400.0  # in which nothing was added to a folder whose process may have ended
SUMMARY_FILE = "summary.json"
# The files of a tokenizer in a model's folder.
TOKENIZER_FILES = (
    "tokenizer*", "*token*.json", "vocab*", "merges.txt", "chat_template*", "additional_chat_templates/*", "*.jinja",
    "*.model", "*.tiktoken", "config.json", "generation_config.json", "*.py", PROCESSOR_FILES,
)  # fmt: skip
SETTINGS_WITHOUT_EFFECT = (
    "dataset_dir",
    "preprocessing_num_workers",
    "group_by_length",
)  # settings that do not change rows


def cache_key(spec: RunSpec, datasets: Sequence[Dataset], model_path: str, cache: Path) -> str:
    """What the rows of a run are made from, as one word. Equal keys mean equal rows."""
    data = spec.data.model_dump(exclude=set(SETTINGS_WITHOUT_EFFECT))
    drawn = data["validation_share"] or data["validation_rows"] or data["mix_strategy"] != "concat"
    chance = drawn or any(weight % 1 for weight in spec.data.datasets.values())
    template = spec.model.chat_template and Path(
        template_file(spec) or TEMPLATE_FOLDER / f"{spec.model.chat_template}.jinja"
    )
    model = Path(model_path)
    files = sorted({file for pattern in TOKENIZER_FILES for file in model.glob(pattern) if file.is_file()})
    files += [template] if template else []
    fingerprints = Fingerprints(cache)
    made_of = {
        "version": [PREPARATION_VERSION, version("transformers"), version("tokenizers")],
        "form": STAGES[spec.stage.kind].form,
        "images": STAGES[spec.stage.kind].images,
        "train_on": getattr(spec.stage, "train_on", None),
        "data": data,
        "seed": spec.training.seed if chance else None,
        "remote_code": spec.model.trust_remote_code,
        "tokenizer": [[file.name, fingerprints.of(file)] for file in files],
        "entries": [_dataset_entry(dataset, fingerprints) for dataset in datasets],
        # A template may write the date, and then the rows depend on it.
        "day": time.strftime("%Y-%m-%d") if any(map(_uses_the_date, files)) else None,
    }
    if spec.model.added_tokens:
        made_of["added_tokens"] = [spec.model.add_tokens, spec.model.add_special_tokens]
    fingerprints.keep()
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def _dataset_entry(dataset: Dataset, fingerprints: Fingerprints) -> Mapping[str, Any]:
    entry = asdict(dataset) | {
        "columns": dict(dataset.columns),
        "tags": dict(dataset.tags),
        "problem": None,
        "root": "",
    }
    return entry | {"files": [[file.name, fingerprints.of(file)] for file in dataset.files]}


def _uses_the_date(file: Path) -> bool:
    """Whether the file can contain a chat template that asks for the date."""
    holds = file.suffix == ".jinja" or "template" in file.name or file.name == "tokenizer_config.json"
    return holds and b"strftime_now" in file.read_bytes()


class Fingerprints:
    """Hashes of file contents, cached until the file's size, inode or any of its times changes."""

    def __init__(self, cache: Path):
        self.path = cache / "fingerprints.json"
        self.known: dict[str, list[Any]] = read_object(self.path)
        self.new = False

    def of(self, file: Path) -> str:
        """The SHA-256 of the file's content."""
        status = file.stat()
        stamp = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        before = self.known.get(str(file))
        if before and before[:-1] == stamp:
            return before[-1]
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        # A file written a moment ago may be written again without its times changing.
        if time.time_ns() - status.st_ctime_ns > 2_000_000_000:
            self.known[str(file)] = [*stamp, digest]
            self.new = True
        return digest

    def keep(self) -> None:
        if self.new:
            there = {file: stamp for file, stamp in self.known.items() if os.path.exists(file)}
            with contextlib.suppress(OSError):  # it is only a cache
                write_json(self.path, there, durable=False)


@contextlib.contextmanager
def new_cache_entry(cache: Path, key: str) -> Iterator[Path]:
    """A folder to prepare in, which can be found under `key` from the end of the block on; deleted if the block
    fails."""
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    lock = None
    with contextlib.suppress(OSError):  # a file system of a cluster may have no locks
        lock = try_lock(partial / "lock", ALIVE_BYTE, shared=False)
    try:
        yield partial
        (partial / "lock").unlink(missing_ok=True)
        apply_umask(partial)
        if (cache / key).exists() and not (cache / key / SUMMARY_FILE).exists():
            shutil.rmtree(cache / key)  # someone has removed parts of it
        with contextlib.suppress(OSError):  # someone else was faster, with the same result
            partial.rename(cache / key)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    prune(cache)


def _images_unchanged(folder: Path, summary: Mapping[str, Any]) -> bool:
    """Whether all images of the rows are unchanged. Images of rows that were truncated or left out are not checked;
    they may have changed."""
    with_images = [split for split in summary["splits"] if summary[split].get("images")]
    if not with_images:
        return not summary.get("images_refused")
    kept = all(summary[split]["rows"] == summary[split].get("rows_kept") for split in with_images)
    if summary["bad_rows"] or not kept:
        return False
    # Imported here: most rows have no images, and are returned at once.
    from engine.worker.data.images_column import images_unchanged

    return all(images_unchanged(folder / f"{split}.arrow") for split in with_images)


def prune(cache: Path, most: int = MAX_CACHE_BYTES) -> None:
    """Delete the least recently used, until the rest has `most` bytes; and leftovers of kills."""
    for folder in cache.glob(".partial-*"):
        with contextlib.suppress(OSError):
            if _is_left_over(folder):
                shutil.rmtree(folder)
    used = []
    for folder in cache.glob("[!.]*/"):
        with contextlib.suppress(OSError):
            size = sum(file.stat().st_size for file in folder.iterdir())
            used.append(((folder / SUMMARY_FILE).stat().st_mtime, size, folder))
    total = 0
    for _, size, folder in sorted(used, reverse=True):
        total += size
        if total > most:
            with contextlib.suppress(OSError):
                _remove(folder)


def _is_left_over(folder: Path) -> bool:
    """Whether the process that prepares there was killed. Where runs are on several machines, or there are no locks,
    the lock says nothing, but a day in which nothing was added does."""
    age = time.time() - folder.stat().st_mtime
    try:
        locked = is_locked(folder / "lock", ALIVE_BYTE)
    except OSError:
        return age > ABANDONED_SECONDS
    return not locked and age > (LEFT_SECONDS if is_local(folder.parents[1]) else ABANDONED_SECONDS)


def _remove(folder: Path) -> None:
    gone = folder.rename(folder.with_name(f".partial-{folder.name}"))  # atomic, so that nobody sees an incomplete file
    shutil.rmtree(gone)


def link_into_run(folder: Path, to: Path, *, look_at_images: bool = True) -> dict[str, Any] | None:
    """Link the files of a prepared folder into a run's, with hard links if the file system has them; returns its
    summary.

    None if there is no such folder, it is being deleted, or an image of its rows has changed. Marks the folder as most
    recently used.
    """
    try:
        os.utime(folder / SUMMARY_FILE)
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        if look_at_images and not _images_unchanged(folder, summary):
            _remove(folder)
            return None
        to.mkdir(exist_ok=True)
        for file in (f"{split}.arrow" for split in summary["splits"]):
            (to / file).unlink(missing_ok=True)
            try:
                os.link(folder / file, to / file)
            except FileNotFoundError:
                raise
            except OSError:
                shutil.copyfile(folder / file, to / file)
    except FileNotFoundError:
        return None
    return summary
