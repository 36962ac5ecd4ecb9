"""Rows as the tokens that a model sees, and their lengths, as HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from engine.core.problems import Problem
from engine.data.images import ImageSource
from webui import charts, notices
from webui.thumbnails import thumbnail
from webui.words import Words

TOKENS_FOLDED = 4  # equal control tokens in a row that are shown as one


def tokens(answer: Mapping[str, Any], words: Words, images: Mapping[str, ImageSource] | None = None) -> str:
    """Rows as trained tokens: trained ones coloured, control tokens framed, ids on hover. `images` of the rows by their
    identity are shown before their tokens."""
    kinds = [("on", "trained"), ("", "untrained"), ("sp", "control")]
    pieces = (piece for row in answer["rows"] for side in row["sides"] for piece in side["pieces"])
    if any(not isinstance(trained, bool) for _, _, trained, _ in pieces):
        kinds.insert(1, ("on weighted", "weighted"))
    legend = "".join(
        f'<span class="tok {kind}" style="--weight:1">{escape(words(f"legend-{name}"))}</span>' for kind, name in kinds
    )
    rows = "".join(_row(row, words, images or {}) for row in answer["rows"])
    return f'<p class="legend">{legend}</p><div class="rows">{rows}</div>'


def _row(row: Mapping[str, Any], words: Words, images: Mapping[str, ImageSource]) -> str:
    facts = [row["place"]]
    if row["sides"]:
        facts.append(words("count-tokens", count=f"{max(side['tokens'] for side in row['sides']):,}"))
        facts.append(words("count-trained", count=f"{sum(side['trained'] for side in row['sides']):,}"))
    status = ""
    if row["fate"] != "kept":
        text = words(f"fate-{row['fate']}", whole=f"{row.get('whole', 0):,}")
        status = f'<em class="{escape(row["fate"])}">{escape(text)}</em>'
    spans = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    head = f"<header><b>{row['number']:,}</b>{spans}{status}</header>"
    reason = ""
    if row["reason"]:
        problem = Problem(row["reason"]["code"], "", row["reason"]["values"])
        reason = f'<p class="wrong">{escape(notices.sentence(problem, words))}</p>'
    sides = "".join(_side(side, words, images) for side in row["sides"])
    out = row["fate"] not in ("kept", "cut", "spread")
    return f'<article class="{"bad" if out else ""}">{head}{reason}{sides}</article>'


def _side(side: Mapping[str, Any], words: Words, images: Mapping[str, ImageSource]) -> str:
    name = f"<h4>{escape(words('turn-' + side['name']))}</h4>" if side["name"] else ""
    begin, pieces = 0, ""
    for image_begin, identity in side.get("images", ()):
        if image_begin < len(side["pieces"]) and (image := images.get(identity)):
            pieces += "".join(_pieces(side["pieces"][begin:image_begin])) + thumbnail(image)
            begin = image_begin
    pieces += "".join(_pieces(side["pieces"][begin:]))
    rest = side["tokens"] - len(side["pieces"])
    more = f'<p class="quiet">{escape(words("tokens-more", count=f"{rest:,}"))}</p>' if rest > 0 else ""
    return f'{name}<p class="tokens">{pieces}</p>{more}'


def _pieces(pieces: Sequence[Sequence[Any]]) -> Iterator[str]:
    """The tokens; repeated ones, such as those of an image, as one with their number."""
    for (_, _, _, special), group in groupby(pieces, key=tuple):
        alike = list(group)
        if special and len(alike) >= TOKENS_FOLDED:
            yield f"{_piece(*alike[0])}<small>× {len(alike):,}</small>"
        else:
            yield from (_piece(*piece) for piece in alike)


def _piece(id: int, text: str, trained: bool | float, special: bool) -> str:
    """`trained` is a number if the token's loss is weighted."""
    kind = " ".join(name for name, true in (("on", trained), ("sp", special)) if true)
    shown = escape(text).replace("\n", "<i>↵</i>\n") if text else "<i>·</i>"
    weighted = trained is not True and trained is not False
    style, title = (f' style="--weight:{min(trained, 2):g}"', f"{id} × {trained:g}") if weighted else ("", str(id))
    return f'<span class="tok {kind}{" weighted" if weighted else ""}"{style} title="{title}">{shown}</span>'


def lengths(statistics: Mapping[str, Any], facts: Sequence[tuple[str, str, str]], words: Words) -> str:
    """The figures of a sample, and the distribution of its lengths. A fact is the code of a label, a value and a
    note."""
    cells = "".join(
        f"<div><dt>{escape(words(code))}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for code, value, note in facts
    )
    seen, total = statistics["seen"], statistics["total"]
    note = words("sample-all") if seen >= total else words("sample-of", seen=f"{seen:,}", total=f"{total:,}")
    histogram = charts.histogram(statistics["edges"], statistics["counts"], statistics["max_length"], words)
    return f'<dl class="stats four">{cells}</dl>{histogram}<p class="quiet">{escape(note)}</p>'
