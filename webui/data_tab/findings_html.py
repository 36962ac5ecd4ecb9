"""The findings of a check, and the progress of a job, as HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from engine.core.problems import Problem
from webui import notices
from webui.numbers import size
from webui.words import Words

FINDINGS_UNFOLDED = 8  # of each kind; the others are folded


def findings(result: Mapping[str, Any], download: str, words: Words) -> str:
    """The findings of a check of the whole set: the number of each kind, and the first ones. `download` is the address
    of the bad rows."""
    bad_codes = {finding["code"] for finding in result["problems"]}
    link = ""
    if result["bad"]:
        link = f'<a class="load" download href="{escape(download)}">{escape(words("bad-rows-file"))}</a>'
    groups = _groups(result, bad_codes, words)
    fine = "" if groups else f'<p class="state right">{escape(words("check-fine"))}</p>'
    return f"{_totals(result, bad_codes, words)}{link}{fine}{groups}"


def _totals(result: Mapping[str, Any], bad_codes: set[str], words: Words) -> str:
    doubts = sum(count for code, count in result["counts"].items() if code not in bad_codes)
    stats = [
        ("stat-good", f"{result['good']:,}", ""),
        ("stat-bad", f"{result['bad']:,}", "bad" if result["bad"] else ""),
        ("stat-doubts", f"{doubts:,}", ""),
        ("stat-scripts", _scripts(result["scripts"], words) or "—", "text"),
    ]
    cells = "".join(
        f'<div><dt>{escape(words(code))}</dt><dd class="{kind}">{escape(value)}</dd></div>'
        for code, value, kind in stats
    )
    return f'<dl class="stats four">{cells}</dl>'


def _scripts(counts: Mapping[str, int], words: Words) -> str:
    """The most common writing systems, with their shares."""
    scripts = Counter({script: count for script, count in counts.items() if script})
    total = max(scripts.total(), 1)
    return ", ".join(
        words("script-share", script=words(f"script-{script}"), share=f"{count / total:.0%}")
        for script, count in scripts.most_common(3)
    )


def _groups(result: Mapping[str, Any], bad_codes: set[str], words: Words) -> str:
    """The findings by their codes: unusable rows first, then the most frequent ones."""
    findings = [*result["problems"], *result["warnings"]]
    counts = sorted(result["counts"].items(), key=lambda pair: (pair[0] not in bad_codes, -pair[1]))
    groups = "".join(
        _group(code, count, [finding for finding in findings if finding["code"] == code], code in bad_codes, words)
        for code, count in counts
    )
    if "dataset-empty" in bad_codes:
        groups += _group("dataset-empty", 1, findings, True, words)
    return groups


def _group(code: str, count: int, findings: Sequence[Mapping[str, Any]], bad: bool, words: Words) -> str:
    lines = [
        f"<li>{escape(notices.sentence(Problem(finding['code'], '', _values(finding, words)), words))}</li>"
        for finding in findings
    ]
    rest = ""
    if len(lines) > FINDINGS_UNFOLDED:
        rest = (
            f"<details><summary>{escape(words('findings-more'))}</summary>"
            f"<ul>{''.join(lines[FINDINGS_UNFOLDED:])}</ul></details>"
        )
    name = words(f"found-{code}") if words.knows(f"found-{code}") else words("found-other")
    return (
        f'<section class="finding {"bad" if bad else ""}"><h3>{escape(name)}<span>{count:,}</span></h3>'
        f"<ul>{''.join(lines[:FINDINGS_UNFOLDED])}</ul>{rest}</section>"
    )


def _values(finding: Mapping[str, Any], words: Words) -> Mapping[str, Any]:
    """The values of a finding, with the common names of writing systems."""
    values = finding["values"]
    if finding["code"] != "row-other-script":
        return values
    return values | {name: words(f"script-{values[name]}") for name in ("found", "usual")}


def working(progress: Mapping[str, Any], words: Words) -> str:
    """The progress of a job."""
    done, total = progress.get("done", 0), progress.get("total")
    unit = progress.get("unit", "rows")
    amount = size(done) if unit == "B" else words("count-rows", count=f"{done:,}")
    if total:
        amount += f" / {size(total) if unit == 'B' else f'{total:,}'}"
    wide = f"width:{100 * done / total:.1f}%" if total else ""
    return (
        f'<div class="bar running {"" if total else "unknown"}"><i style="{wide}"></i></div>'
        f'<p class="told"><span>{escape(words("working"))}</span><span>{escape(amount)}</span></p>'
    )
