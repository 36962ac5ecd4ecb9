"""Prints all figures, targets and the peer's figures: `python -m bench`; `--peer PYTHON` measures the peer, too."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from bench import compare, pages, prepare, start, tick, validation
from bench.figures import Figure, table
from tests.browser.find_chromium import chromium

# Measured earlier on the machine of RESULTS.md; printed in brackets if there is no peer.
PEER_FIGURES_MEASURED_ONCE = {"ready": "(8.8 s)", "resident": "(631 MB)", "torch": "(yes)", "outside": "(2)"}
PEER_FIGURES_MEASURED_ONCE |= {"tick_ms": "(12,851 ms)", "peak_mb": "(5,066 MB)"}


def start_figures(peer_python: Path | None) -> list[Figure]:
    ours, other = start.measure(peer_python)
    theirs = PEER_FIGURES_MEASURED_ONCE | {"page": None, "usable": None}
    if other:
        theirs = {
            "ready": other.ready_s,
            "page": other.page_s,
            "usable": other.usable_s,
            "resident": other.resident_mb,
            "torch": "yes" if other.torch else "no",
            "outside": len(other.outside),
        }
    return [
        Figure("command → page answers", ours.ready_s, "s", 4.5, theirs["ready"]),
        Figure("page asked for → usable", ours.page_s, "s", None, theirs["page"]),
        Figure("command → usable", ours.usable_s, "s", None, theirs["usable"]),
        Figure("resident when idle", ours.resident_mb, "MB", 300, theirs["resident"]),
        Figure("torch in the web process", "yes" if ours.torch else "no", "", "no", theirs["torch"]),
        Figure("outside hosts the page asks", len(ours.outside), "", 0, theirs["outside"]),
    ]


def tick_figures(peer_python: Path | None) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        measured = tick.measure_in_process(Path(folder))
        peer = tick.measure_peer(Path(folder), peer_python) if peer_python else PEER_FIGURES_MEASURED_ONCE
    return [
        Figure("first opening, 1 GB log, 1M metric lines", measured["first_s"], "s"),
        Figure("a tick on it, median of 200", measured["tick_ms"], "ms", 50, peer["tick_ms"]),
        Figure("… of it computing", measured["computed_ms"], "ms"),
        Figure("a tick on it, the slowest 5 %", measured["slow_ms"], "ms"),
        Figure("a tick when nothing is new", measured["still_ms"], "ms"),
        Figure("memory grown over 200 ticks", measured["grown_mb"], "MB", 5),
        Figure("peak memory of all that", measured["peak_mb"], "MB", None, peer["peak_mb"]),
    ]


def page_figures() -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        measured = pages.measure(Path(folder))
    ticks = f"{measured['ticks']:,.0f} ticks of {pages.PAGES} pages"
    return [
        Figure(f"memory grown over {ticks}", measured["grown_mb"], "MB", 20),
        Figure(f"… after the first {pages.WARMUP_TICKS}", measured["grown_warm_mb"], "MB"),
        Figure("answer to a tick, all pages asking at once", measured["answer_ms"], "ms"),
        Figure("ticks answered a second", measured["ticks"] / measured["seconds"]),
    ]


def compare_figures() -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        measured = compare.measure_in_processes(Path(folder))
    return [
        Figure(
            f"{compare.RUNS} runs of {compare.POINTS:,} points drawn, never read before",
            measured["first_s"],
            "s",
            1,
        ),
        Figure("… of it reading", measured["read_s"], "s"),
        Figure("… computing, on all cores together", measured["computed_s"], "s"),
        Figure("… read before, by a studio just started", measured["later_first_s"], "s", 1),
        Figure("the same figure again", measured["again_s"] * 1000, "ms"),
        Figure("its SVG", measured["svg_mb"], "MB", 1),
        Figure("all that is sent to the page", measured["sent_mb"], "MB"),
    ]


def data_figures() -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        measured = validation.measure_in_process(Path(folder))
    return [
        Figure("every one of 1,000,000 rows checked", measured["check_s"], "s", 60),
        Figure("… of it computing, on one core", measured["core_s"], "s"),
        Figure("… peak memory", measured["peak_mb"], "MB"),
        Figure("the last page of them, first time", measured["page_s"], "s"),
        Figure("a page in the middle, later", measured["again_s"] * 1000, "ms"),
        Figure("first rows as tokens, nothing warm", measured["tokens_s"], "s", 4),
        Figure("… from the middle, later", measured["next_s"] * 1000, "ms"),
        Figure("lengths of 20,000 of the rows", measured["numbers_s"], "s"),
    ]


def prepare_figures(peer_python: Path | None) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        measured = prepare.measure(Path(folder), peer_python)
    figures = []
    for processes, name in ((1, "one process"), (2, "two")):
        ours, theirs = measured[f"rate_{processes}"], measured.get(f"peer_rate_{processes}")
        figures.append(Figure(f"100,000 short rows prepared, {name}", ours, "rows/s", None, theirs))
        if theirs:
            figures.append(Figure("… its time as a share of the peer's", theirs / ours, "", 1 / 5))
    figures.append(Figure("500,000 rows prepared: memory of all processes", measured["peak_mb"], "MB", 2048))
    for kind, name, share in (("cold", "nothing prepared", 1 / 2), ("cached", "prepared before", 1 / 3)):
        ours, theirs = measured[f"{kind}_s"], measured.get(f"peer_{kind}_s")
        figures.append(Figure(f"submitted → first step on 100,000 rows, {name}", ours, "s", None, theirs))
        if theirs:
            figures.append(Figure("… as a share of the peer's", ours / theirs, "", share))
    ours, theirs = measured["samples"], measured.get("peer_samples")
    figures.append(Figure("training on rows of mixed length, 26M model", ours, "rows/s", None, theirs))
    if theirs:
        figures.append(Figure("… its time as a share of the peer's", theirs / ours, "", 1 / 1.8))
    return figures


FIGURES_OF_PART = {
    "start": start_figures,
    "tick": tick_figures,
    "pages": lambda _: page_figures(),
    "compare": lambda _: compare_figures(),
    "data": lambda _: data_figures(),
    "prepare": prepare_figures,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="python of an environment with LLaMA-Factory")
    parser.add_argument("--only", choices=FIGURES_OF_PART, help="one part of it")
    arguments = parser.parse_args()
    if not chromium():
        print("This needs a Chromium: python -m tests.browser.find_chromium installs one.", file=sys.stderr)
        return 2
    if arguments.peer and not (arguments.peer.parent / "llamafactory-cli").exists():
        print(f"There is no llamafactory-cli beside {arguments.peer}.", file=sys.stderr)
        return 2
    if os.getloadavg()[0] > 0.7:
        print(
            f"Something else is at work here (load {os.getloadavg()[0]:.1f}): times will be long.",
            file=sys.stderr,
        )
    figures = []
    for name, part in FIGURES_OF_PART.items():
        if arguments.only in (None, name):
            print(f"measuring: {name} …", file=sys.stderr, flush=True)
            figures += part(arguments.peer.absolute() if arguments.peer else None)
    print(table(figures, "LLaMA-Factory 0.9.5"))
    if not arguments.peer and arguments.only not in ("pages", "compare", "data"):
        print("\nThe peer was not measured in this run; in brackets what was measured once. See bench/README.md.")
    return 1 if any(figure.met is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
