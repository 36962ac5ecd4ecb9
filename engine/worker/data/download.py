"""Download a data set from a hub into the data folder: `python -m engine.worker.data.download FOLDER`, a data job
(engine.data.data_jobs).

Only data files are downloaded, never code. The datasets library, without network access, selects subset and split as it
does elsewhere. The result is Parquet, described in dataset_info.json like an upload. HF_ENDPOINT and ModelScope's own
variables set the addresses of the hubs.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from engine.core import hardware
from engine.core.problems import Refusal, problem
from engine.core.rundir import write_json
from engine.data import dataset_info_edits, owners, uploads
from engine.data.data_jobs import ReportProgress, job_process
from engine.data.row_files import SUFFIXES

# README.md says which files belong to which subset and split.
FILE_PATTERNS = [
    "README.md",
    *(f"*{suffix}{packed}" for suffix in SUFFIXES for packed in ("", ".gz", ".zst")),
]


def download(request: Mapping[str, Any], report: ReportProgress) -> dict[str, Any]:
    """Download `given["id"]` and add it to dataset_info.json: as a new set, or for the entry `given["into"]`."""
    data, name = Path(request["data"]), request["id"]
    if not name or name.startswith((".", "/")) or name.count("/") > 1:
        raise Refusal(problem("hub-set-name", name=name or "—"))
    with tempfile.TemporaryDirectory(dir=data, prefix=uploads.ARRIVING) as scratch:
        folder = Path(scratch, "hub")
        try:
            FETCHERS[request["hub"]](name, folder, report)
            rows = load_rows(
                folder, Path(scratch, "cache"), request["subset"], request["split"], request.get("folder", "")
            )
        except Refusal:
            raise
        except Exception as error:  # whatever a hub's client raises, the reader needs one sentence
            reason = str(error).strip().split("\n")[0][:300].rstrip(". ") or type(error).__name__
            raise Refusal(problem("hub-set-failed", name=name, hub=request["hub"], why=reason)) from error
        title = request["into"] or name.rpartition("/")[2]
        file = Path(scratch, uploads.safe_name(f"{title}.parquet"))
        rows.to_parquet(str(file))
        placed = uploads.place(file, data)
    first = dataset_info_edits.first_rows(placed)
    if request["into"]:
        entry = {"file_name": placed.name} | _without_location(dataset_info_edits.entry_of(data, request["into"]))
        made = dataset_info_edits.save(data, request["into"], entry, instead_of=request["into"])
    else:
        made = dataset_info_edits.add(data, title, _entry_of(placed.name, first))
    return {"made": [made], "counts": {made: len(rows), "left out": 0}}


def _entry_of(file_name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        return dataset_info_edits.entry_for_mapping(file_name, dataset_info_edits.propose(rows), rows)
    except Refusal:  # its columns do not show what it is; a person may know
        return {"file_name": file_name}


def _without_location(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry says about the rows, without their source, which is still in its `hf_hub_url`."""
    return {
        key: value for key, value in entry.items() if key not in ("file_name", "folder", "subset", "split", "encoding")
    }


def load_rows(folder: Path, cache: Path, subset: str, split: str, inside: str) -> Any:
    """The rows of a subset and split; `inside` is their folder in the repository, "" for all of it. Messages with
    different keys are each stored as JSON, because a table would fill them up with nulls."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from datasets import load_dataset_builder

    # The set itself decides which files are read (README.md), and may name any file of this machine, by path, dots or
    # link. Patterns are checked first, because resolving one could walk through all folders of the machine.
    if outside := next(filter(_leads_outside, _stated_files(folder / "README.md")), ""):
        raise Refusal(problem("hub-set-outside", file=outside))
    builder = load_dataset_builder(str(folder), subset or None, data_dir=inside or None, cache_dir=str(cache))
    for paths in (builder.config.data_files or {}).values():
        for path in map(str, paths):
            if "://" in path or not Path(path).resolve().is_relative_to(folder.resolve()):
                raise Refusal(problem("hub-set-outside", file=path))
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _stated_files(card: Path) -> Iterator[str]:
    """The files, patterns and folders of rows that a set's README.md names."""
    from huggingface_hub import DatasetCard

    if not card.is_file():
        return
    configs = DatasetCard.load(str(card)).data.to_dict().get("configs")
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict):
            yield from _texts([config.get("data_files"), config.get("data_dir")])


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings, except names of splits and other keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([inner for key, inner in value.items() if key != "split"])
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _leads_outside(pattern: str) -> bool:
    return "://" in pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts


def _fetch_huggingface(name: str, folder: Path, report: ReportProgress) -> None:
    from huggingface_hub import snapshot_download

    download = partial(snapshot_download, name, repo_type="dataset", allow_patterns=FILE_PATTERNS, local_dir=folder)
    coming: Any = download(dry_run=True)
    total = sum(file.file_size for file in coming if file.will_download)
    if not total:
        raise Refusal(problem("hub-set-empty", name=name, known=", ".join(SUFFIXES)))
    if 3 * total > hardware.free_disk(folder):  # the files, their unpacked form, and the result
        raise Refusal(problem("data-not-writable", folder=folder.parents[1], why=os.strerror(errno.ENOSPC)))

    class Bar(tqdm):
        """One of the hub's progress bars: of files, of downloaded bytes, of written bytes."""

        def update(self, n: float | None = 1) -> Any:
            shown = super().update(n)
            if self.unit == "B":
                report(int(self.n), max(total, int(self.n)), "B")
            return shown

    report(0, total, "B")
    download(tqdm_class=Bar)


def _fetch_modelscope(name: str, folder: Path, report: ReportProgress) -> None:
    try:
        from modelscope_hub import HubApi, ProgressCallback
    except ImportError:
        package = problem("package-missing", what="ModelScope", package="modelscope-hub")
        raise Refusal(package) from None
    done, adding = 0, threading.Lock()  # files are downloaded in threads

    class File(ProgressCallback):
        """The progress of one file."""

        def update(self, size: int) -> None:
            nonlocal done
            with adding:
                done += size
                report(done, None, "B")

    report(0, None, "B")
    HubApi().download_repo(
        name, "dataset", allow_patterns=FILE_PATTERNS, local_dir=str(folder), progress_callbacks=[File]
    )


FETCHERS: dict[str, Callable[[str, Path, ReportProgress], None]] = {
    "huggingface": _fetch_huggingface,
    "modelscope": _fetch_modelscope,
}


if __name__ == "__main__":
    with job_process(sys.argv[1]) as (folder, request, report):
        result = download(request, report)
        owners.claim_result(request, result)
        write_json(folder / "result.json", result)
