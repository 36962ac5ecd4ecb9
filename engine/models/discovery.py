"""Which models are available, in the root folders of this installation and in the hub's cache, and what a name or path
refers to."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.core import regular_files
from engine.core.regular_files import list_folders
from engine.models.facts import ModelFacts, inspect_model, is_language_model
from engine.models.safetensors_headers import gguf_files

MAX_FOLDER_DEPTH = 4  # maximum depth of a model folder below a root: root/team/org/name/model
# A small real model for users without one, where `make smollm2` puts it.
SMOLLM2 = Path(__file__).resolve().parents[2] / "data" / "models" / "SmolLM2-135M-Instruct"


def hub_cache() -> Path:
    """The cache folder of huggingface_hub. Its rules are repeated so that it need not be imported."""
    if cached := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cached).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser() / "hub"


def find_models(roots: Sequence[Path]) -> list[ModelFacts]:
    """Every language model in `roots` and in the hub's cache, by name. A folder is listed once, one with a broken
    config.json is listed too (without facts), and links that leave the roots are not followed."""
    allowed = allowed_roots(roots)
    models: dict[str, ModelFacts] = {}
    for root in dict.fromkeys(allowed):
        for folder, name in _model_folders(root, root, allowed, MAX_FOLDER_DEPTH, set(), _has_config):
            real = os.path.realpath(folder)
            if real not in models and is_language_model(folder):
                models[real] = inspect_model(folder, name)
    return sorted(models.values(), key=lambda model: model.name.casefold())


def find_gguf(roots: Sequence[Path]) -> list[tuple[str, Path]]:
    """Name and path of every folder in `roots` and in the hub's cache with a model as GGUF alone, which can be trained
    once it is converted, by name."""
    allowed = allowed_roots(roots)
    folders = {
        os.path.realpath(folder): name
        for root in dict.fromkeys(allowed)
        for folder, name in _model_folders(root, root, allowed, MAX_FOLDER_DEPTH, set(), _has_weights)
        if not _has_config(folder) and gguf_files(folder)
    }
    return sorted(((name, Path(path)) for path, name in folders.items()), key=lambda model: model[0].casefold())


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a hub ID, "org/name". Says nothing about whether such a model exists."""
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    return bool(re.fullmatch(f"{part}/{part}", text, re.ASCII)) and ".." not in text and "--" not in text


def locate(text: str, roots: Sequence[Path]) -> Path | None:
    """The existing file or folder that `text` refers to: a full path, or one relative to a root. Not yet checked to
    stay inside the roots."""
    for candidate in [text] if os.path.isabs(text) else [os.path.join(root, text) for root in roots]:
        if os.path.exists(candidate):
            return Path(candidate)
    return None


def identity(text: str) -> str:
    """The identity of a model wherever it is: the ID of a folder in the hub's cache, the real path of any other folder,
    and the text itself if nothing is on this machine."""
    if not os.path.exists(text):
        return text
    real, cache = os.path.realpath(text), os.path.realpath(hub_cache())
    cached_as = re.match(r"models--(.+?)--(.+?)/snapshots/", os.path.relpath(real, cache))
    return "/".join(cached_as.groups()) if cached_as else real


def allowed_roots(roots: Sequence[Path]) -> list[str]:
    return [os.path.realpath(root) for root in (*roots, hub_cache())]


def is_below(path: str | Path, allowed: Sequence[str]) -> bool:
    return bool(root_of(path, allowed))


def root_of(path: str | Path, allowed: Sequence[str]) -> str:
    """The innermost of the `allowed` folders that contains `path`, with links resolved; "" if none does."""
    real = os.path.realpath(path)
    above = [root for root in allowed if real == root or real.startswith(root.rstrip(os.sep) + os.sep)]
    return max(above, key=len, default="")


def _has_config(folder: str | Path) -> bool:
    return os.path.isfile(os.path.join(folder, "config.json"))


def _has_weights(folder: str | Path) -> bool:
    return _has_config(folder) or bool(gguf_files(Path(folder)))


def _model_folders(
    folder: str, root: str, allowed: Sequence[str], depth: int, seen: set[str], is_model: Callable[[str], bool]
) -> Iterator[tuple[Path, str]]:
    """(folder, name) of everything that looks like a model; `seen` prevents endless loops of links."""
    real = os.path.realpath(folder)
    if real in seen or not is_below(real, allowed):
        return
    seen.add(real)
    cached_as = re.fullmatch(r"models--(.+?)--(.+)", os.path.basename(folder))
    if cached_as and (snapshot := _snapshot(folder)):
        yield snapshot, "/".join(cached_as.groups())
    elif is_model(folder):
        name = os.path.relpath(folder, root)
        yield Path(folder), os.path.basename(root) if name == "." else Path(name).as_posix()
    elif depth:
        # A folder that this user may not list has no model that this user can train.
        for child in sorted(entry.path for entry in list_folders(folder) if entry.name[0] != "."):
            yield from _model_folders(child, root, allowed, depth - 1, seen, is_model)


def _snapshot(repository: str) -> Path | None:
    """The revision that `main` points to in the hub's cache, otherwise the newest one."""
    snapshots = Path(repository, "snapshots")
    try:
        main = regular_files.read_text(Path(repository, "refs", "main"), "ascii").strip()
        if re.fullmatch(r"\w+", main) and (snapshots / main).is_dir():
            return snapshots / main
    except (OSError, ValueError):
        pass  # downloaded by commit: there is no main
    revisions = [path for path in snapshots.glob("*") if path.is_dir()]
    return max(revisions, key=lambda path: path.stat().st_mtime, default=None)
