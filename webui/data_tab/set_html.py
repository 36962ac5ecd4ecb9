"""The list of data sets and the head of one as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

from engine.core.problems import Problem
from engine.data.datasets import Dataset
from engine.data.owners import file_id, set_id
from engine.data.soundness import flaw
from webui import notices
from webui.data_tab import sources
from webui.data_tab.data_folder import Selection, bytes_of
from webui.numbers import size
from webui.words import Words


def listed(
    sets: Sequence[Dataset],
    counts: Mapping[str, int | None],
    broken: Sequence[Problem],
    files: Sequence[str],
    chosen: str,
    words: Words,
) -> str:
    """Every data set of the folder, unusable ones with the reason; then files that are in no set."""
    wrong = notices.listed(broken, words) if broken else ""
    entries = "".join(_entry(dataset, counts.get(dataset.name), chosen, words) for dataset in sets)
    if not sets and not broken:
        entries = f'<li class="none">{escape(words("sets-none"))}</li>'
    loose = "".join(
        (
            f'<li><a href="#" data-set="file:{escape(name)}" class="{_on(file_id(name), chosen)}">'
            f"<b>{escape(name)}</b></a></li>"
        )
        for name in files
    )
    if loose:
        loose = f'<h3>{escape(words("files-loose"))}</h3><ul class="sets">{loose}</ul>'
    return f'{wrong}<ul class="sets">{entries}</ul>{loose}'


def _on(id: str, chosen: str) -> str:
    return "on" if id == chosen else ""


def _entry(dataset: Dataset, count: int | None, chosen: str, words: Words) -> str:
    id = set_id(dataset.name)
    if wrong := flaw(dataset):
        about = f'<small class="wrong">{escape(notices.sentence(wrong, words))}</small>'
    else:
        facts = [words(f"set-{dataset.kind}")]
        if count is not None:
            facts.append(words("count-rows", count=f"{count:,}"))
        facts.append(words("on-hub") if dataset.hub else size(bytes_of(dataset)))
        about = f"<small>{escape(' · '.join(facts))}</small>"
    link = f"?tab=data&set={quote(dataset.name)}"
    return (
        f'<li><a href="{escape(link)}" data-set="{escape(id)}" class="{_on(id, chosen)}">'
        f"<b>{escape(dataset.name)}</b>{about}</a></li>"
    )


def title(selection: Selection, count: int | None, words: Words) -> str:
    """The head of the open set or file; `count` is the number of its rows, if they have been counted."""
    if selection.is_set:
        return head(selection.dataset, count, words)
    return file_head(selection.name, selection.dataset, words)


def head(dataset: Dataset, count: int | None, words: Words) -> str:
    """Kind, size and files of a set, and how its files are read."""
    facts = [
        words(f"set-{dataset.kind}"),
        count is not None and words("count-rows", count=f"{count:,}"),
        dataset.files and size(bytes_of(dataset)),
        dataset.hub and words("on-hub-named", hub=dataset.hub),
        ", ".join(file.name for file in dataset.files[:3]) + (" …" if len(dataset.files) > 3 else ""),
    ]
    chips = "".join(f"<span>{escape(str(fact))}</span>" for fact in facts if fact)
    problem = flaw(dataset)
    wrong = notices.listed([problem], words) if problem else ""
    if dataset.problem:
        chips = ""
    return (
        f'<div class="run-title"><h1>{escape(dataset.name)}</h1></div>'
        f'<p class="chips">{chips}</p>{wrong}{sources.described(dataset, words)}'
    )


def folder_head(name: str, words: Words) -> str:
    """A folder of images that has no rows yet."""
    return (
        f'<div class="run-title"><h1>{escape(name)}</h1></div>'
        f'<p class="quiet">{escape(words("imagefolder-help", folder=name))}</p>'
    )


def file_head(name: str, dataset: Dataset, words: Words) -> str:
    """What is known about a file that is in no set yet."""
    read = sources.described(dataset, words)
    return (
        f'<div class="run-title"><h1>{escape(name)}</h1></div>'
        f'<p class="quiet">{escape(words("file-loose-help"))}</p>{read}'
    )
