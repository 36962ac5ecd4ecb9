"""Download a model by its hub ID, with progress; a local path never uses the network.

What is known about a model on a hub is known from its files. So their names are checked before anything is downloaded,
and the downloaded folder is checked like a local one before a run: problems have the same sentences.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from engine.core.hardware import free_disk
from engine.core.problems import Refusal, problem
from engine.models.checks import model_problems
from engine.models.discovery import hub_cache, is_hub_id
from engine.models.facts import inspect_model
from engine.models.safetensors_headers import PICKLE_SUFFIXES
from engine.preflight.model_checks import model_setting_problems
from engine.spec.run_spec import RunSpec
from engine.worker.runtime.process_lifecycle import ProgressReport

MODEL_FIELD = "model.model_name_or_path"
# Safetensors only: pickled weights run code when they are opened.
ALLOWED_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
# The same weights in other forms, which are not loaded.
IGNORED_PATTERNS = ["original/*", "onnx/*", "consolidated*"]


def fetch_model(spec: RunSpec, report: ProgressReport) -> str:
    """The folder of the spec's model, which is downloaded first if it is a hub ID. Raises Refusal if it is not
    available, or cannot be trained as the spec says."""
    name = spec.model.model_name_or_path
    if os.path.isdir(name) or not is_hub_id(name):
        return name
    with DownloadProgress(report) as progress:
        folder = Path(FETCH[spec.model.hub](name, spec, progress))
    problems = model_problems(
        folder, [folder], allow_remote_code=spec.model.trust_remote_code, scorer=spec.stage.kind == "rm"
    )
    if problems := problems or model_setting_problems(spec, inspect_model(folder, name)):
        raise Refusal(problems)
    return str(folder)


class DownloadProgress:
    """Reports how many bytes of all files have been downloaded, twice a second for the duration of the context, because
    a hub's client may be silent for long, and downloads in threads."""

    def __init__(self, report: ProgressReport):
        self.report, self.over, self.lock = report, threading.Event(), threading.Lock()
        self.reporter = threading.Thread(target=self._report_regularly, daemon=True)
        self.done = self.total = 0

    def __enter__(self) -> DownloadProgress:
        self.report("downloading")
        self.reporter.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.reporter.join()

    def _report_regularly(self) -> None:
        while not self.over.wait(0.5):
            self.report("downloading", self.done, max(self.total, self.done), "B")

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count


def _huggingface(name: str, spec: RunSpec, progress: DownloadProgress) -> str:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from tqdm.auto import tqdm

    class Bar(tqdm):
        """One of the hub's progress bars: of files, of downloaded bytes, of written bytes."""

        def update(self, n: float | None = 1) -> Any:
            shown = super().update(n)
            if self.unit == "B":
                progress.done = max(progress.done, int(self.n))
            return shown

    revision = spec.model.model_revision
    code = ["*.py"] if spec.model.trust_remote_code else []
    download = partial(
        snapshot_download,
        name,
        revision=revision,
        allow_patterns=ALLOWED_PATTERNS + code,
        ignore_patterns=IGNORED_PATTERNS,
    )
    answered = False
    try:
        try:
            coming: Any = download(dry_run=True)
        except DryRunError as silent:  # or the hub refuses; earlier downloads may be all that is needed
            with contextlib.suppress(LocalEntryNotFoundError, IncompleteSnapshotError):
                return download(local_files_only=True)
            raise silent.__cause__ or silent from None
        answered = True
        _check_file_names(HfApi().list_repo_files(name, revision=revision))
        progress.total = sum(file.file_size for file in coming if file.will_download)
        _check_disk_space(progress.total, hub_cache())
        return download(tqdm_class=Bar)
    except Refusal:
        raise
    except Exception as error:  # whatever a hub's client raises, the reader needs one sentence
        status = getattr(getattr(error, "response", None), "status_code", None)
        kinds = {
            "hub-gated": isinstance(error, GatedRepoError) or status == 403,
            "hub-missing": isinstance(error, RepositoryNotFoundError),
            "hub-revision": isinstance(error, RevisionNotFoundError),
            "hub-silent": not answered,
        }
        raise _refusal(kinds, error, spec, progress, constants.ENDPOINT, "HF_TOKEN", "HF_ENDPOINT") from error


def _modelscope(name: str, spec: RunSpec, progress: DownloadProgress) -> str:
    try:
        from modelscope_hub import HubApi, ProgressCallback
        from modelscope_hub.errors import (
            AuthenticationError,
            CacheError,
            NetworkError,
            NotExistError,
            PermissionDeniedError,
        )
    except ImportError:
        package = problem("package-missing", "model.hub", what="modelscope", package="modelscope-hub")
        raise Refusal(package) from None

    class File(ProgressCallback):
        """The progress of one file."""

        def update(self, size: int) -> None:
            progress.add(size)

    api = HubApi()
    revision = spec.model.model_revision
    download = partial(
        api.download_repo,
        name,
        "model",
        revision=revision,
        allow_patterns=ALLOWED_PATTERNS,
        ignore_patterns=IGNORED_PATTERNS,
    )
    try:
        try:
            files = {file.path: file.size for file in api.list_repo_files(name, "model", revision=revision)}
        except NetworkError:
            return str(download(local_files_only=True))
        _check_file_names(files)
        progress.total = sum(size for path, size in files.items() if _is_allowed(path))
        return str(download(progress_callbacks=[File]))
    except Refusal:
        raise
    except Exception as error:
        kinds = {
            "hub-gated": isinstance(error, (AuthenticationError, PermissionDeniedError)),
            "hub-missing": isinstance(error, NotExistError) and not revision,
            "hub-revision": isinstance(error, NotExistError),
            "hub-silent": isinstance(error, CacheError),
        }
        where = os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
        raise _refusal(kinds, error, spec, progress, where, "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT") from error


FETCH = {"huggingface": _huggingface, "modelscope": _modelscope}


def _is_allowed(path: str) -> bool:
    match = Path(path).match
    return any(map(match, ALLOWED_PATTERNS)) and not any(map(match, IGNORED_PATTERNS))


def _check_file_names(files: Iterable[str]) -> None:
    """Raises Refusal for a repository without trainable weights, before anything is downloaded."""
    names = list(files)
    if any(name.endswith(".safetensors") for name in names):
        return
    if matches := [name for name in names if name.endswith((".gguf", *PICKLE_SUFFIXES))]:
        raise Refusal(problem("hub-not-safetensors", MODEL_FIELD, file=matches[0]))


def _check_disk_space(needed: int, folder: Path) -> None:
    if needed > (free := free_disk(folder)):
        sizes = {"needed": f"{needed / 1e9:.2f} GB", "free": f"{free / 1e9:.2f} GB"}
        raise Refusal(problem("hub-no-room", MODEL_FIELD, folder=folder, **sizes))


def _refusal(
    kinds: Mapping[str, bool],
    error: Exception,
    spec: RunSpec,
    progress: DownloadProgress,
    endpoint: str,
    token: str,
    variable: str,
) -> Refusal:
    """The problem for the first of `kinds` that matches the error; otherwise that the download broke off, or failed."""
    kind = next((kind for kind, true in kinds.items() if true), "hub-broke-off" if progress.done else "hub-failed")
    message = str(error.__cause__ or error).strip() or type(error).__name__
    values = {
        "name": spec.model.model_name_or_path,
        "revision": spec.model.model_revision,
        "hub": spec.model.hub,
        "endpoint": endpoint,
        "token": token,
        "variable": variable,
        "why": message.splitlines()[0][:200],
        "done": f"{progress.done / 1e6:,.1f} MB",
    }
    return Refusal(problem(kind, "model.model_revision" if kind == "hub-revision" else MODEL_FIELD, **values))
