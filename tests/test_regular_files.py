"""Files that are read as a whole: in the memory they need, up to a limit, whatever they are."""

from __future__ import annotations

import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from engine.core.regular_files import read_bytes


@pytest.mark.parametrize("size", [0, 1, 1000, 1_000_000])
def test_a_file_is_read_as_it_is(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert read_bytes(tmp_path / "file") == content
    assert read_bytes(tmp_path / "file", size) == content


def test_a_small_file_needs_no_more_memory_than_its_size(tmp_path: Path) -> None:
    """A buffer of the size of the limit would be reserved and released for each of ten thousand runs."""
    (tmp_path / "file").write_bytes(b"x" * 1000)
    tracemalloc.start()
    try:
        read_bytes(tmp_path / "file")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000  # other threads of this process may need some meanwhile


@pytest.mark.parametrize("size", [101, 200, 100_000])
def test_a_file_above_the_limit_is_an_error(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    with pytest.raises(OSError, match="large"):
        read_bytes(tmp_path / "file", 100)


def test_a_file_whose_size_is_not_known_is_read_to_its_end() -> None:
    """The files of /proc have no size, although they have a content: as one that grows while it is read."""
    path = Path("/proc/self/environ")
    assert os.stat(path).st_size == 0
    assert read_bytes(path) == path.read_bytes() != b""
    with pytest.raises(OSError, match="large"):
        read_bytes("/proc/self/status", 100)


def test_a_pipe_is_an_error_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    errors: list[OSError] = []

    def read() -> None:
        try:
            read_bytes(tmp_path / "pipe")
        except OSError as error:
            errors.append(error)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(60)
    assert not reading.is_alive()
    assert errors
