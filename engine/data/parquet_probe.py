"""Read an uploaded Parquet file once within limits: a kilobyte of it may stand for gigabytes of rows."""

from __future__ import annotations

from pathlib import Path

from engine.data import limited_process
from engine.data.row_files import PLACE_INTERVAL_ROWS


def prove_bounded(file: Path) -> None:
    """Raises Refusal if reading the file takes more memory or time than allowed. Other damage is reported by its
    reader."""
    limited_process.ask(__name__, file)


def _read(file: Path) -> dict[str, int]:
    from pyarrow import ArrowException, ArrowMemoryError, parquet  # a tenth of a second, which only this process takes

    rows = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=PLACE_INTERVAL_ROWS):
            rows += len(batch.to_pylist())  # as its rows are read later
    except ArrowMemoryError as error:  # also an ArrowException
        raise MemoryError from error
    except (ArrowException, OSError):
        pass
    return {"rows": rows}


if __name__ == "__main__":
    limited_process.reply(_read)
