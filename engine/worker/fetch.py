"""A hub id → a folder on this machine, with progress; a local path never asks the network."""

from __future__ import annotations

import os
from typing import Any

from engine.models import is_hub_id
from engine.problems import Refusal, problem
from engine.spec import RunSpec
from engine.worker.edge import Report

# Safetensors only: pickled weights run code when they are opened.
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def fetch_model(spec: RunSpec, report: Report) -> str:
    """The folder of the spec's model, downloaded first if it is a hub id. Raises Refusal if it cannot be had."""
    name = spec.model.model_name_or_path
    if os.path.isdir(name) or not is_hub_id(name):
        return name
    report("downloading")
    try:
        return FETCH[spec.model.hub](name, spec, report)
    except Refusal:
        raise
    except Exception as error:  # whatever a hub's client raises, the reader needs one sentence
        raise Refusal(
            problem("download-failed", "model.model_name_or_path", name=name, hub=spec.model.hub, why=error)
        ) from error


def _huggingface(name: str, spec: RunSpec, report: Report) -> str:
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    class Progress(tqdm):
        """The hub's progress bar, told to the page in bytes."""

        def update(self, n: float | None = 1) -> Any:
            shown = super().update(n)
            report("downloading", int(self.n), int(self.total) if self.total else None, self.unit)
            return shown

    patterns = WANTED + (["*.py"] if spec.model.trust_remote_code else [])
    return snapshot_download(
        name, revision=spec.model.model_revision, allow_patterns=patterns, tqdm_class=Progress
    )


def _modelscope(name: str, spec: RunSpec, _report: Report) -> str:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise Refusal(
            problem("package-missing", "model.hub", what="modelscope", package="modelscope")
        ) from None
    return snapshot_download(name, revision=spec.model.model_revision, allow_patterns=WANTED)


FETCH = {"huggingface": _huggingface, "modelscope": _modelscope}
