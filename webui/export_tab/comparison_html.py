"""Answers of two models side by side as HTML: before and after a merge, or of the merged model and its GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from webui.text_html import lines
from webui.words import Words


def comparison(compared: Mapping[str, Any], words: Words) -> str:
    """How many answers are equal, and each pair with the place where it diverges; `compared` is the content of an
    export's comparison.json."""
    if not compared.get("prompts"):
        return f'<p class="quiet">{escape(words("export-not-compared"))}</p>'
    equal, count = compared["equal"], compared["prompts"]
    state = "right" if equal == count else "partly"
    line = words("export-equal", equal=equal, count=count, precision=compared["precision"])
    if equal < count:
        line += " " + words("export-unequal-why")
    table = answers_table(compared["rows"], ("export-before", "export-after"), words)
    return f'<p class="state {state}">{escape(line)}</p>{folded(words("export-answers"), table)}'


def answers_table(rows: Sequence[Mapping[str, Any]], names: tuple[str, str], words: Words) -> str:
    """Pairs of answers, different ones first; `names` are the codes of the two models' labels."""
    heads = "".join(f"<th>{escape(words(name))}</th>" for name in ("export-prompt", *names))
    body = "".join(
        f"<tr><td>{escape(row['prompt'])}<small>{escape(row['source'])}</small></td>{_pair(row, words)}</tr>"
        for row in sorted(rows, key=lambda row: row["equal"])
    )
    return f'<table class="samples alike"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _pair(row: Mapping[str, Any], words: Words) -> str:
    if row["equal"]:
        return (
            f'<td colspan="2">{_text_html(row["before"], words)}'
            f'<small class="right">{escape(words("export-same"))}</small></td>'
        )
    at = words("export-differs", token=row["differs_at"] + 1)
    return (
        f"<td>{_text_html(row['before'], words)}</td>"
        f"<td>{_text_html(row['after'], words)}<small>{escape(at)}</small></td>"
    )


def _text_html(text: str, words: Words) -> str:
    return lines(text) or f'<i class="quiet">{escape(words("samples-empty"))}</i>'


def folded(title: str, html: str) -> str:
    return f'<details class="more"><summary>{escape(title)}</summary>{html}</details>'
