"""Every chat template that can be had × every kind of conversation: is exactly what should be trained trained?

    python -m tests.template_table [--only NAME …] [--kind NAME] [--package NAME] [--show] [--fetch]
        [--write FILE]

Prints a line per result that is wrong, then the counts. `--show` prints the
renderings, what is trained between ⟦ and ⟧.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from tests.templates import report, sources
from tests.templates.trial import results, shown

logging.getLogger("transformers").setLevel(logging.ERROR)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.template_table", description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="NAME", help="templates whose name contains one of these"
    )
    parser.add_argument("--package", default="", help="templates of this package alone")
    parser.add_argument("--kind", default="", help="conversations whose name contains this")
    parser.add_argument("--show", action="store_true", help="print renderings, with what is trained marked")
    parser.add_argument("--all", action="store_true", help="details of every result, not of wrong ones alone")
    parser.add_argument("--fetch", action="store_true", help="fetch the packages first")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the whole table as a page")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.fetch:
        sources.fetch()
    chosen = [
        template
        for template in sources.every()
        if options.package in template.package
        and (not options.only or any(name in str(template) for name in options.only))
    ]
    states, rules, refusals = Counter(), Counter(), Counter()
    with ProcessPoolExecutor() as pool:
        table = dict(zip(chosen, pool.map(results, chosen, repeat(options.kind), chunksize=4), strict=True))
    for template, verdicts in table.items():
        for name, verdict in verdicts.items():
            states[verdict.state] += 1
            if verdict.state == "wrong":
                rules[verdict.rule] += 1
            elif verdict.state == "refused":
                refusals[verdict.rule] += 1
            if options.all or verdict.state == "wrong":
                print(f"{template} · {name}: {verdict.state} {verdict.rule} {verdict.detail}")
                if options.show:
                    print("    " + shown(verdict).replace("\n", "⏎\n    "))
    if options.write:
        report.write(table, options.write)
    print(f"\n{len(chosen)} templates:", ", ".join(f"{count} {state}" for state, count in states.most_common()))
    print("wrong:", dict(rules.most_common()))
    print("refused:", dict(refusals.most_common()))
    return 1 if states["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
