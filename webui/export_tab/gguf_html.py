"""The outcome of the GGUF file of an export as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from engine.core.problems import Problem
from engine.export import gguf
from engine.runs.runs import Run
from webui import notices
from webui.export_tab.comparison_html import answers_table, folded
from webui.numbers import size
from webui.words import Words


def gguf_file(run: Run, result_folder: Path, number: int, root: str, words: Words) -> str:
    """The outcome of the GGUF file: how far it is from the merged model, or why there is none; otherwise how to create
    one."""
    made = gguf.outcome(run.dir)
    if made is None:
        base = str(run.spec.model.model_name_or_path) if result_folder == run.dir.adapter else ""
        return notices.code(f"gguf-{number}", gguf.commands(result_folder, base), words)
    problems = [Problem(problem["code"], "", problem["values"]) for problem in made.get("problems", ())]
    listed = notices.listed(problems, words) if problems else ""
    if made["status"] == "failed":
        label = escape(words("gguf-retry"))
        again = f'<button type="button" class="plain acts" data-retry="{escape(run.id)}">{label}</button>'
        stays = f'<p class="quiet">{escape(words("gguf-stays"))}</p>'
        return f'{listed}{stays}<p class="buttons-row">{again if "resume" in run.can else ""}</p>'
    where = f"{root}/download/{quote(run.id)}/model/{quote(made['file'])}"
    file = f'<a download href="{escape(where)}">{escape(made["file"])}</a> · {size(made["bytes"])}'
    return f'<p class="folder">{file}</p>{listed}{_read_back(made, words) if made["status"] == "made" else ""}'


def _read_back(made: Mapping[str, Any], words: Words) -> str:
    weights, answers = made["weights"], made["answers"]
    counts = {name: weights[name] for name in ("compared", "count")}
    far = words("gguf-weights", far=f"{weights['largest']:.2%}", type=made["type"], **counts)
    weights_html = f'<p class="state right">{escape(far)}</p>'
    if not answers["tokens"]:
        return weights_html
    shares = {name: answers[name] for name in ("equal", "same_tokens", "tokens")}
    line = words("gguf-answers", count=answers["prompts"], **shares)
    if answers["equal"] < answers["prompts"]:
        line += " " + words("gguf-unequal-why")
    table = answers_table(answers["rows"], ("gguf-merged", "gguf-file"), words)
    return f'{weights_html}<p class="quiet">{escape(line)}</p>{folded(words("gguf-rows"), table)}'
