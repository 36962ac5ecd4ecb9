"""Put the sources of the documentation's site together: every page of the repository, and what the pages link to.

    python -m docs.site FOLDER

The pages keep their places, so that their links are right as they stand;
`mkdocs build` makes the site of them (`make site`).
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PLACES = ("*.md", "docs/**/*.md", "bench/*.md", "examples/*.md")
LINKS = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)|<img[^>]* src=\"([^\"]+)\"")


def sources() -> set[Path]:
    """The pages, and the files that they link to."""
    pages = {page for pattern in PLACES for page in PROJECT.glob(pattern)}
    linked = {
        (page.parent / (first or second)).resolve()
        for page in pages
        for first, second in LINKS.findall(page.read_text(encoding="utf-8"))
    }
    return pages | {path for path in linked if path.is_file() and path.is_relative_to(PROJECT)}


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    for source in sorted(sources()):
        place = folder / source.relative_to(PROJECT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)


if __name__ == "__main__":
    main()
