"""A compressed file (gz, bz2, xz, zst, or a zip of one file, or of images) → the data file in it, up to a given
size."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from engine.core.problems import Refusal, problem
from engine.data import limited_process
from engine.data.images import IMAGE_SUFFIXES, is_metadata
from engine.data.row_files import SUFFIXES

BLOCK_BYTES = 1 << 20
MAX_SECONDS = 1800  # of CPU time: bz2 takes 5 minutes for 8 GiB
# What readers raise for damaged or encrypted files; pyarrow raises OSError.
READ_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
)


def _open_zst(source: Path) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(source)), "zstd")


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}
PACKED_SUFFIXES = (*OPENERS, ".zip")
TREE = "tree"  # the folder in which a data file and its images are unpacked
MAX_IMAGES = 100_000  # of a zip


def unpack(source: Path, name: str, folder: Path, limit: int) -> Path:
    """Unpack `source`, which is called `name`, into `folder`; returns the file, with the name under which it was
    packed.

    `limit`: its maximum number of bytes. Raises Refusal if it has more, is damaged, is not a single file, or takes too
    much memory: an xz dictionary can have 4 GiB.
    """
    question = {"name": name, "folder": str(folder.absolute()), "limit": limit}
    answer = limited_process.ask(__name__, source, seconds=MAX_SECONDS, **question)
    return folder / answer["name"]


def _answer(source: Path, name: str, folder: str, limit: int) -> dict[str, str]:
    return {"name": str(_unpack(source, name, Path(folder), limit).relative_to(folder))}


def _unpack(source: Path, name: str, folder: Path, limit: int) -> Path:
    suffix = Path(name).suffix.lower()
    if suffix != ".zip":
        target = folder / Path(name).stem
        _copy(lambda: OPENERS[suffix](source), target, name, limit)
        return target
    try:
        with zipfile.ZipFile(source) as packed:
            members = [member for member in packed.infolist() if not member.is_dir() and not _hidden(member.filename)]
            if _is_of_images(members):
                return _unpack_tree(packed, _without_notes(members), folder, name, limit)
            if len(members) != 1:
                names = ", ".join(member.filename for member in members[:10]) or "(none)"
                raise Refusal(problem("upload-zip", file=name, names=names))
            target = folder / PurePosixPath(members[0].filename.replace("\\", "/")).name.replace("\0", "")
            _copy(lambda: packed.open(members[0]), target, name, limit)
            return target
    except READ_ERRORS as error:
        raise Refusal(problem("upload-broken", file=name, reason=error)) from error


def _is_of_images(members: Sequence[zipfile.ZipInfo]) -> bool:
    """Whether a zip has images, and besides them notes on them, and at most one data file or descriptions of them."""
    useful = _without_notes(members)
    rows = _data_files(useful)
    described = all(is_metadata(Path(member.filename)) for member in rows)
    images = sum(_suffix(member) in IMAGE_SUFFIXES for member in useful)
    return images > 0 and images + len(rows) == len(useful) and (len(rows) <= 1 or described)


def _without_notes(members: Sequence[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """All but texts like classes.txt. A text called like an image is its caption, and no note."""
    images = {str(PurePosixPath(each.filename).with_suffix("")) for each in members if _suffix(each) in IMAGE_SUFFIXES}
    return [
        member
        for member in members
        if _suffix(member) != ".txt" or str(PurePosixPath(member.filename).with_suffix("")) in images
    ]


def _data_files(members: Sequence[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    return [member for member in members if _suffix(member) in SUFFIXES]


def _suffix(member: zipfile.ZipInfo) -> str:
    return PurePosixPath(member.filename).suffix.lower()


def _unpack_tree(
    packed: zipfile.ZipFile,
    members: Sequence[zipfile.ZipInfo],
    folder: Path,
    name: str,
    limit: int,
) -> Path:
    """Unpack images and their data files with their folders, of which one that holds all is left out. Returns the data
    file; the folder if there is none for all images."""
    parts = [PurePosixPath(member.filename.replace("\\", "/").replace("\0", "")).parts for member in members]
    if len(members) > MAX_IMAGES or any(".." in path or path[0] == "/" for path in parts):
        raise Refusal(problem("upload-zip", file=name, names=members[0].filename))
    # One folder that holds all is no label if there are folders in it, or rows.
    depth = 1 if _data_files(members) else 2
    shared = 1 if len({path[0] for path in parts}) == 1 and all(len(path) > depth for path in parts) else 0
    target = {
        member.filename: folder.joinpath(TREE, *path[shared:]) for member, path in zip(members, parts, strict=True)
    }
    for member in members:
        file = target[member.filename]
        file.parent.mkdir(parents=True, exist_ok=True)
        _copy(partial(packed.open, member), file, name, limit)
        limit -= file.stat().st_size
    rows = [target[member.filename] for member in _data_files(members)]
    return rows[0] if len(rows) == 1 and not is_metadata(rows[0]) else folder / TREE


def _hidden(name: str) -> bool:
    """Files that systems add themselves: __MACOSX, .DS_Store."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def _copy(opened: Callable[[], Any], target: Path, name: str, limit: int) -> None:
    size = 0
    with target.open("wb") as into:
        for block in _blocks(opened, name):
            size += len(block)
            if size > limit:
                raise Refusal(problem("upload-bomb", file=name, limit=f"{limit >> 20:,} MB"))
            into.write(block)  # outside the try: a full disk is not a damaged file


def _blocks(opened: Callable[[], Any], name: str) -> Iterator[bytes]:
    """The unpacked content, block by block. Raises Refusal if the file is damaged."""
    try:
        with opened() as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block
    except READ_ERRORS as error:
        raise Refusal(problem("upload-broken", file=name, reason=error)) from error


if __name__ == "__main__":
    limited_process.reply(_answer)
