"""The list of exports as HTML: pure functions from the folders of exports to text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from engine.core import regular_files
from engine.core.problems import Refusal
from engine.core.rundir import read_object
from engine.export import ollama, vllm_command
from engine.models.adapters import adapter_config
from engine.runs import engines, progress, publish, runs
from engine.runs.failures import explain
from engine.runs.lineage import adapts_vision
from engine.runs.runs import Run
from webui import notices, queue_html
from webui.export_tab.comparison_html import comparison, folded
from webui.export_tab.gguf_html import gguf_file
from webui.numbers import ago, moment, size
from webui.text_html import lines
from webui.words import Words

MAX_MODELFILE_CHARACTERS = 65_536  # number of characters of a Modelfile that are shown


def listed(export_runs: Sequence[Run], root: str, words: Words) -> str:
    """All exports, newest first and open."""
    if not export_runs:
        return ""
    items = "".join(_export(run, number, root, words) for number, run in enumerate(export_runs))
    return f'<h2 class="exports-title">{escape(words("export-list"))}</h2>{items}'


def _export(run: Run, number: int, root: str, words: Words) -> str:
    try:
        spec = run.spec
    except (Refusal, OSError):
        return ""
    result_folder = run.dir.left() if run.final else None
    chips = [
        words.export_choice("form", spec.form),
        spec.precision,
        *([spec.quantize] if spec.quantize != "none" else []),
    ]
    if result_folder:
        chips.append(size(sum(file.stat().st_size for file in result_folder.iterdir() if file.is_file())))
    head = (
        f'<summary><span class="dot {escape(run.state)}"></span><b>{escape(run.title)}</b>'
        f'<span class="chips">{"".join(f"<span>{escape(chip)}</span>" for chip in chips)}</span>'
        f'<time title="{moment(run.submitted)}">{escape(ago(run.submitted, words))}</time></summary>'
    )
    body = _finished(run, result_folder, number, root, words) if result_folder else _unfinished(run, words)
    opened = " open" if number == 0 or not run.final else ""
    return (
        f'<details class="export" data-export="{escape(run.id)}"{opened}>'
        f'{head}<div class="inside">{body}</div></details>'
    )


def _unfinished(run: Run, words: Words) -> str:
    """Its progress, or why it ended."""
    link = f'<a href="?run={quote(run.id)}">{escape(words("export-run-link"))}</a>'
    if run.final:
        why = explain(run)
        what = lines(why.what(words.language) if why else words(f"state-{run.state}"))
        return f'<p class="wrong">{what}</p><p class="told">{link}</p>'
    now = progress.progress(run)
    place = engines.place(run)
    phase = queue_html.position(place, words) if place else words(f"phase-{now.phase}")
    wide = 100 * min(now.fraction or 0.0, 1.0)
    unknown = " unknown" if now.fraction is None and run.state != "queued" else ""
    bar = f'<div class="bar {escape(run.state)}{unknown}"><i style="width:{wide:.1f}%"></i></div>'
    return f'{bar}<p class="told"><span>{escape(phase)}</span> · {link}</p>'


def _finished(run: Run, result_folder: Path, number: int, root: str, words: Words) -> str:
    """Its folder, its comparison, and its actions."""
    folder = f'<p class="quiet folder"><code>{escape(str(result_folder))}</code></p>'
    buttons = f'<button type="button" class="plain" data-use="{escape(run.id)}">{escape(words("export-use"))}</button>'
    buttons += f'<a class="plain" href="?run={quote(run.id)}">{escape(words("export-run-link"))}</a>'
    if sent := publish.published(run):
        link = f'<a href="{escape(sent["url"])}" rel="noreferrer">{escape(sent["url"])}</a>'
        folder += f'<p class="quiet">{escape(words("upload-last", when=moment(sent["at"])))} {link}</p>'
    compared = comparison(read_object(result_folder / "comparison.json"), words)
    is_reward_model = read_object(result_folder / "result.json").get("stage") == "rm"
    programs = "" if is_reward_model else _programs(run, result_folder, number, root, words)
    result_files = folded(words("files"), _files(run, root, words))
    return f'{folder}{compared}<p class="buttons-row">{buttons}</p>{programs}{result_files}'


def _programs(run: Run, result_folder: Path, number: int, root: str, words: Words) -> str:
    """How other programs run it."""
    name, base = ollama.model_name(run.title), str(run.spec.model.model_name_or_path)
    adapter = adapter_config(result_folder) if result_folder == run.dir.adapter else {}
    wrong = vllm_command.adapter_problems(adapter, on_vision=adapts_vision(result_folder)) if adapter else []
    serve = notices.code(
        f"vllm-{number}", vllm_command.serve_command(result_folder, name, base, adapter or None), words
    )
    file = result_folder / "Modelfile"
    text = regular_files.read_text(file)[:MAX_MODELFILE_CHARACTERS] if file.exists() else ""
    create = f"cd {shlex.quote(str(result_folder))} && ollama create {name} -f Modelfile"
    modelfile = folded("Modelfile", notices.code(f"modelfile-{number}", text, words))
    blocks = {
        "vLLM": notices.listed(wrong, words) if wrong else serve,
        "Ollama": notices.code(f"ollama-{number}", create, words) + modelfile,
        "GGUF": gguf_file(run, result_folder, number, root, words),
    }
    return "".join(f"<h3>{title}</h3>{html}" for title, html in blocks.items())


def _files(run: Run, root: str, words: Words) -> str:
    """The files of the result, and a LoRA adapter also as one file."""
    files = [
        (name, count)
        for name, count in runs.files(run)
        if name.startswith(("model/", "adapter/")) or name == "adapter.zip"
    ]
    rows = "".join(
        f'<tr><td><a download href="{escape(f"{root}/download/{quote(run.id)}/{quote(name)}")}">{escape(name)}</a></td>'
        f"<td>{size(count)}</td></tr>"
        for name, count in sorted(files, key=lambda file: file[0] != "adapter.zip")
    )
    return f'<table class="files"><tbody>{rows}</tbody></table>'
