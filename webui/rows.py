"""Data sets, rows, tokens and findings as HTML: pure functions from what engine says to text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from engine.core.problems import Problem
from engine.data.browse import Shown
from engine.data.datasets import Dataset
from engine.data.soundness import flaw
from webui import charts, notices, sources
from webui.numbers import size
from webui.words import Words

LONG = 700  # characters of one text that are shown before it is folded
RAW = 4_000  # characters of a row that could not be read as one
FINDINGS = 8  # of each sort that are shown before the others are folded


# ------------------------------------------------------------------------------------------- the list


def listed(
    sets: Sequence[Dataset], counts: Mapping[str, int | None], broken: Sequence[Problem], files: Sequence[str],
    chosen: str, words: Words,
) -> str:  # fmt: skip
    """Every data set of the folder, those that cannot be used with the reason; then files that none of them names."""
    wrong = notices.listed(broken, words) if broken else ""
    items = "".join(_item(one, counts.get(one.name), chosen, words) for one in sets)
    if not sets and not broken:
        items = f'<li class="none">{escape(words("sets-none"))}</li>'
    loose = "".join(
        f'<li><a href="#" data-set="file:{escape(name)}" class="{_on(f"file:{name}", chosen)}"><b>{escape(name)}</b></a></li>'
        for name in files
    )
    if loose:
        loose = f'<h3>{escape(words("files-loose"))}</h3><ul class="sets">{loose}</ul>'
    return f'{wrong}<ul class="sets">{items}</ul>{loose}'


def _on(id: str, chosen: str) -> str:
    return "on" if id == chosen else ""


def _item(one: Dataset, count: int | None, chosen: str, words: Words) -> str:
    id = f"set:{one.name}"
    if found := flaw(one):
        told = f'<small class="wrong">{escape(notices.sentence(found, words))}</small>'
    else:
        facts = [words(f"set-{one.kind}")]
        if count is not None:
            facts.append(words("count-rows", count=f"{count:,}"))
        facts.append(words("on-hub") if one.hub else size(bytes_of(one)))
        told = f"<small>{escape(' · '.join(facts))}</small>"
    link = f"?tab=data&set={quote(one.name)}"
    return (
        f'<li><a href="{escape(link)}" data-set="{escape(id)}" class="{_on(id, chosen)}">'
        f"<b>{escape(one.name)}</b>{told}</a></li>"
    )


def bytes_of(dataset: Dataset) -> int:
    return sum(file.stat().st_size for file in dataset.files)


def head(dataset: Dataset, count: int | None, words: Words) -> str:
    """What is known of the chosen set at once, and how its files are read."""
    facts = [
        words(f"set-{dataset.kind}"),
        count is not None and words("count-rows", count=f"{count:,}"),
        dataset.files and size(bytes_of(dataset)),
        dataset.hub and words("on-hub-named", hub=dataset.hub),
        ", ".join(file.name for file in dataset.files[:3]) + (" …" if len(dataset.files) > 3 else ""),
    ]
    chips = "".join(f"<span>{escape(str(one))}</span>" for one in facts if one)
    found = flaw(dataset)
    wrong = notices.listed([found], words) if found else ""
    if dataset.problem:
        chips = ""
    return f'<div class="run-title"><h1>{escape(dataset.name)}</h1></div><p class="chips">{chips}</p>{wrong}{sources.described(dataset, words)}'


def file_head(name: str, dataset: Dataset, words: Words) -> str:
    """What is known of a file that is in no set yet."""
    read = sources.described(dataset, words)
    return f'<div class="run-title"><h1>{escape(name)}</h1></div><p class="quiet">{escape(words("file-loose-help"))}</p>{read}'


# ---------------------------------------------------------------------------------------------- rows


def page(shown: Sequence[Shown], words: Words, text: str = "") -> str:
    """Rows as conversations, each with where it is; bad ones with the reason."""
    return f'<div class="rows">{"".join(_row(one, words, text) for one in shown)}</div>'


def _row(one: Shown, words: Words, text: str) -> str:
    place = f"<header><b>{one.number:,}</b><span>{escape(str(one.place))}</span></header>"
    if one.problem:
        raw = (
            json.dumps(one.row, ensure_ascii=False, indent=1, default=str)[:RAW]
            if one.row is not None
            else ""
        )
        wrong = f'<p class="wrong">{escape(notices.sentence(one.problem, words))}</p>'
        return f'<article class="bad">{place}{wrong}{f"<pre>{_marked(raw, text)}</pre>" if raw else ""}</article>'
    notes = "".join(
        f'<p class="quiet">{escape(notices.sentence(note, words))}</p>'
        for note in one.example.get("notes", ())
    )
    return f"<article>{place}{conversation(one.example, words, text)}{notes}</article>"


def conversation(example: Mapping[str, Any], words: Words, text: str = "") -> str:
    """A canonical row as people read it."""
    if "text" in example:
        return f'<div class="speech"><div class="said">{_folded(example["text"], text)}</div></div>'
    weights = iter(example.get("weights", ()))
    turns = [
        _turn(turn["role"], turn, words, text, next(weights, 1.0) if turn["role"] == "assistant" else 1.0)
        for turn in example["messages"]
    ]
    for side in ("chosen", "rejected"):
        turns += [_turn(side, turn, words, text) for turn in example.get(side, ())]
    if example.get("label") is not None:
        turns.append(
            _turn("label", {"content": words("thumb-up" if example["label"] else "thumb-down")}, words, "")
        )
    if example.get("tools"):
        names = ", ".join(str(tool.get("function", {}).get("name", "")) for tool in example["tools"])
        turns.insert(0, _turn("tools", {"content": names}, words, text))
    return "".join(turns)


def _turn(role: str, turn: Mapping[str, Any], words: Words, text: str, weight: float = 1.0) -> str:
    said = _folded(turn["content"], text) if turn["content"] else ""
    if reasoning := turn.get("reasoning_content"):
        said = f'<div class="thought">{_folded(reasoning, text)}</div>{said}'
    for call in turn.get("tool_calls", ()):
        name, arguments = (
            call["function"]["name"],
            json.dumps(call["function"]["arguments"], ensure_ascii=False),
        )
        said += f"<code>{_marked(f'{name}({arguments})', text)}</code>"
    name = escape(words(f"turn-{role}"))
    if weight != 1:
        name += f" <em>{escape(words('turn-weight', weight=f'{weight:g}') if weight else words('turn-untrained'))}</em>"
    return f'<div class="speech {escape(role)}"><span>{name}</span><div class="said">{said}</div></div>'


def _folded(said: str, text: str) -> str:
    if len(said) <= LONG:
        return _marked(said, text)
    return (
        f"<details><summary>{_marked(said[:LONG], text)}<i>… {len(said) - LONG:,}</i></summary>"
        f"{_marked(said[LONG:], text)}</details>"
    )


def _marked(said: str, text: str) -> str:
    """Escaped, with every word that was searched for marked."""
    wanted = [re.escape(word) for word in text.split()]
    if not wanted:
        return escape(said)
    parts = re.split(f"({'|'.join(wanted)})", said, flags=re.IGNORECASE)
    return "".join(
        f"<mark>{escape(part)}</mark>" if number % 2 else escape(part) for number, part in enumerate(parts)
    )


# -------------------------------------------------------------------------------------------- findings


def findings(result: Mapping[str, Any], download: str, words: Words) -> str:
    """What checking the whole set has found: how many of what, and the first of each."""
    kept = [*result["problems"], *result["warnings"]]
    bad_codes = {one["code"] for one in result["problems"]}
    doubts = sum(count for code, count in result["counts"].items() if code not in bad_codes)
    scripts = Counter({script: count for script, count in result["scripts"].items() if script})
    total = max(scripts.total(), 1)
    written = ", ".join(
        words("script-share", script=words(f"script-{script}"), share=f"{count / total:.0%}")
        for script, count in scripts.most_common(3)
    )
    stats = [
        ("stat-good", f"{result['good']:,}", ""),
        ("stat-bad", f"{result['bad']:,}", "bad" if result["bad"] else ""),
        ("stat-doubts", f"{doubts:,}", ""),
        ("stat-scripts", written or "—", "text"),
    ]
    cells = "".join(
        f'<div><dt>{escape(words(code))}</dt><dd class="{kind}">{escape(value)}</dd></div>'
        for code, value, kind in stats
    )
    groups = "".join(
        _group(code, count, [one for one in kept if one["code"] == code], code in bad_codes, words)
        for code, count in sorted(
            result["counts"].items(), key=lambda item: (item[0] not in bad_codes, -item[1])
        )
    )
    if "dataset-empty" in bad_codes:
        groups += _group("dataset-empty", 1, kept, True, words)
    link = ""
    if result["bad"]:
        link = f'<a class="load" download href="{escape(download)}">{escape(words("bad-rows-file"))}</a>'
    fine = "" if groups else f'<p class="state right">{escape(words("check-fine"))}</p>'
    return f'<dl class="stats four">{cells}</dl>{link}{fine}{groups}'


def _group(code: str, count: int, told: Sequence[Mapping[str, Any]], bad: bool, words: Words) -> str:
    lines = [
        f"<li>{escape(notices.sentence(Problem(one['code'], '', _named(one, words)), words))}</li>"
        for one in told
    ]
    rest = ""
    if len(lines) > FINDINGS:
        rest = f"<details><summary>{escape(words('findings-more'))}</summary><ul>{''.join(lines[FINDINGS:])}</ul></details>"
    name = words(f"found-{code}") if words.knows(f"found-{code}") else words("found-other")
    return (
        f'<section class="finding {"bad" if bad else ""}"><h3>{escape(name)}<span>{count:,}</span></h3>'
        f"<ul>{''.join(lines[:FINDINGS])}</ul>{rest}</section>"
    )


def _named(one: Mapping[str, Any], words: Words) -> Mapping[str, Any]:
    """The values of a finding; writing systems by the names that people have for them."""
    values = one["values"]
    if one["code"] != "row-other-script":
        return values
    return values | {name: words(f"script-{values[name]}") for name in ("found", "usual")}


def working(progress: Mapping[str, Any], words: Words) -> str:
    """How far an errand is."""
    done, total = progress.get("done", 0), progress.get("total")
    unit = progress.get("unit", "rows")
    said = size(done) if unit == "B" else words("count-rows", count=f"{done:,}")
    if total:
        said += f" / {size(total) if unit == 'B' else f'{total:,}'}"
    wide = f"width:{100 * done / total:.1f}%" if total else ""
    return (
        f'<div class="bar running {"" if total else "unknown"}"><i style="{wide}"></i></div>'
        f'<p class="told"><span>{escape(words("working"))}</span><span>{escape(said)}</span></p>'
    )


# ---------------------------------------------------------------------------------------------- tokens


def tokens(told: Mapping[str, Any], words: Words) -> str:
    """Rows as the tokens that are trained on: trained ones coloured, control tokens framed, ids on hover."""
    kinds = [("on", "trained"), ("", "untrained"), ("sp", "control")]
    pieces = (piece for row in told["rows"] for side in row["sides"] for piece in side["pieces"])
    if any(not isinstance(trained, bool) for _, _, trained, _ in pieces):
        kinds.insert(1, ("on weighted", "weighted"))
    legend = "".join(
        f'<span class="tok {kind}" style="--weight:1">{escape(words(f"legend-{name}"))}</span>'
        for kind, name in kinds
    )
    rows = "".join(_token_row(row, words) for row in told["rows"])
    return f'<p class="legend">{legend}</p><div class="rows">{rows}</div>'


def _token_row(row: Mapping[str, Any], words: Words) -> str:
    facts = [row["place"]]
    if row["sides"]:
        facts.append(words("count-tokens", count=f"{max(side['tokens'] for side in row['sides']):,}"))
        facts.append(words("count-trained", count=f"{sum(side['trained'] for side in row['sides']):,}"))
    fate = ""
    if row["fate"] != "kept":
        said = words(f"fate-{row['fate']}", whole=f"{row.get('whole', 0):,}")
        fate = f'<em class="{escape(row["fate"])}">{escape(said)}</em>'
    head = f"<header><b>{row['number']:,}</b>{''.join(f'<span>{escape(one)}</span>' for one in facts)}{fate}</header>"
    reason = ""
    if row["reason"]:
        found = Problem(row["reason"]["code"], "", row["reason"]["values"])
        reason = f'<p class="wrong">{escape(notices.sentence(found, words))}</p>'
    sides = "".join(_side(side, words) for side in row["sides"])
    out = row["fate"] not in ("kept", "cut", "spread")
    return f'<article class="{"bad" if out else ""}">{head}{reason}{sides}</article>'


def _side(side: Mapping[str, Any], words: Words) -> str:
    name = ""
    if side["name"]:
        called = words(f"turn-{side['name']}")
        name = f"<h4>{escape(called)}</h4>"
    pieces = "".join(_piece(*piece) for piece in side["pieces"])
    rest = side["tokens"] - len(side["pieces"])
    said = escape(words("tokens-more", count=f"{rest:,}"))
    more = f'<p class="quiet">{said}</p>' if rest > 0 else ""
    return f'{name}<p class="tokens">{pieces}</p>{more}'


def _piece(id: int, text: str, trained: bool | float, special: bool) -> str:
    """`trained` is a number where the token's loss is weighted."""
    kind = " ".join(name for name, true in (("on", trained), ("sp", special)) if true)
    shown = escape(text).replace("\n", "<i>↵</i>\n") if text else "<i>·</i>"
    weighted = trained is not True and trained is not False
    style, title = (
        (f' style="--weight:{min(trained, 2):g}"', f"{id} × {trained:g}") if weighted else ("", str(id))
    )
    return f'<span class="tok {kind}{" weighted" if weighted else ""}"{style} title="{title}">{shown}</span>'


def lengths(told: Mapping[str, Any], facts: Sequence[tuple[str, str, str]], words: Words) -> str:
    """The numbers of a sample, and how its lengths are spread."""
    cells = "".join(
        f"<div><dt>{escape(words(code))}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for code, value, note in facts
    )
    seen, total = f"{told['seen']:,}", f"{told['total']:,}"
    note = (
        words("sample-all") if told["seen"] >= told["total"] else words("sample-of", seen=seen, total=total)
    )
    return (
        f'<dl class="stats four">{cells}</dl>{charts.histogram(told["edges"], told["counts"], told["max_length"], words)}'
        f'<p class="quiet">{escape(note)}</p>'
    )
