"""The list of exports as HTML: pure functions from the folders of exports to text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from engine.core.problems import Problem, Refusal
from engine.core.rundir import read_object
from engine.export import gguf, ollama, vllm_command
from engine.models.adapters import adapter_config
from engine.runs import progress, publish, queue, runs
from engine.runs.failures import explain
from engine.runs.runs import Run
from webui import notices
from webui.numbers import ago, moment, size
from webui.words import Words

MAX_MODELFILE_CHARACTERS = 65_536  # characters of a Modelfile that are shown


def list_html(export_runs: Sequence[Run], root: str, words: Words) -> str:
    """All exports, the newest first and open."""
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
    return f'<details class="export" data-export="{escape(run.id)}"{opened}>{head}<div class="inside">{body}</div></details>'


def _unfinished(run: Run, words: Words) -> str:
    """How far it is, or why it ended."""
    link = f'<a href="?run={quote(run.id)}">{escape(words("export-run-link"))}</a>'
    if run.final:
        why = explain(run)
        what = (
            escape(why.what(words.language)).replace("\n", "<br>")
            if why
            else escape(words(f"state-{run.state}"))
        )
        return f'<p class="wrong">{what}</p><p class="told">{link}</p>'
    now = progress.progress(run)
    phase = (
        words("queue-position", position=queue.position(run))
        if run.state == "queued"
        else words(f"phase-{now.phase}")
    )
    wide = 100 * min(now.fraction or 0.0, 1.0)
    unknown = " unknown" if now.fraction is None and run.state != "queued" else ""
    bar = f'<div class="bar {escape(run.state)}{unknown}"><i style="width:{wide:.1f}%"></i></div>'
    return f'{bar}<p class="told"><span>{escape(phase)}</span> · {link}</p>'


def _finished(run: Run, result_folder: Path, number: int, root: str, words: Words) -> str:
    spec, name = run.spec, ollama.model_name(run.title)
    adapter = adapter_config(result_folder) if result_folder == run.dir.adapter else {}
    folder = f'<p class="quiet folder"><code>{escape(str(result_folder))}</code></p>'
    buttons = f'<button type="button" class="plain" data-use="{escape(run.id)}">{escape(words("export-use"))}</button>'
    buttons += f'<a class="plain" href="?run={quote(run.id)}">{escape(words("export-run-link"))}</a>'
    if sent := publish.published(run):
        link = f'<a href="{escape(sent["url"])}" rel="noreferrer">{escape(sent["url"])}</a>'
        folder += f'<p class="quiet">{escape(words("upload-last", when=moment(sent["at"])))} {link}</p>'
    parts = [
        folder,
        comparison_html(read_object(result_folder / "comparison.json"), words),
        f'<p class="buttons-row">{buttons}</p>',
    ]
    is_reward_model = read_object(result_folder / "result.json").get("stage") == "rm"
    if not is_reward_model:
        base = str(spec.model.model_name_or_path)
        wrong = vllm_command.adapter_problems(adapter) if adapter else []
        serve = notices.code(
            f"vllm-{number}", vllm_command.serve_command(result_folder, name, base, adapter or None), words
        )
        parts.append(_block("vLLM", notices.listed(wrong, words) if wrong else serve))
        file = result_folder / "Modelfile"
        text = file.read_text(encoding="utf-8")[:MAX_MODELFILE_CHARACTERS] if file.exists() else ""
        create = f"cd {shlex.quote(str(result_folder))} && ollama create {name} -f Modelfile"
        parts.append(
            _block(
                "Ollama",
                notices.code(f"ollama-{number}", create, words)
                + _folded("Modelfile", notices.code(f"modelfile-{number}", text, words)),
            )
        )
        parts.append(_block("GGUF", gguf_html(run, result_folder, number, root, words)))
    parts.append(_folded(words("files"), files_html(run, root, words)))
    return "".join(parts)


def _block(title: str, html: str) -> str:
    return f"<h3>{escape(title)}</h3>{html}"


def _folded(title: str, html: str) -> str:
    return f'<details class="more"><summary>{escape(title)}</summary>{html}</details>'


def comparison_html(comparison: Mapping[str, Any], words: Words) -> str:
    """How many answers are equal, and each pair with the place where it parts."""
    if not comparison.get("prompts"):
        return f'<p class="quiet">{escape(words("export-not-compared"))}</p>'
    equal, count = comparison["equal"], comparison["prompts"]
    state = "right" if equal == count else "partly"
    line = words("export-equal", equal=equal, count=count, precision=comparison["precision"])
    if equal < count:
        line += " " + words("export-unequal-why")
    table = _answers_table(comparison["rows"], ("export-before", "export-after"), words)
    return f'<p class="state {state}">{escape(line)}</p>{_folded(words("export-answers"), table)}'


def _answers_table(rows: Sequence[Mapping[str, Any]], names: tuple[str, str], words: Words) -> str:
    """Pairs of answers, those that differ first; `names` are the codes of what the two models are called."""
    heads = "".join(f"<th>{escape(words(name))}</th>" for name in ("export-prompt", *names))
    body = "".join(
        f"<tr><td>{escape(row['prompt'])}<small>{escape(row['source'])}</small></td>{_pair(row, words)}</tr>"
        for row in sorted(rows, key=lambda row: row["equal"])
    )
    return f'<table class="samples alike"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


def _pair(row: Mapping[str, Any], words: Words) -> str:
    if row["equal"]:
        return f'<td colspan="2">{_text_html(row["before"], words)}<small class="right">{escape(words("export-same"))}</small></td>'
    at = words("export-differs", token=row["differs_at"] + 1)
    return f"<td>{_text_html(row['before'], words)}</td><td>{_text_html(row['after'], words)}<small>{escape(at)}</small></td>"


def _text_html(text: str, words: Words) -> str:
    return escape(text).replace("\n", "<br>") or f'<i class="quiet">{escape(words("samples-empty"))}</i>'


# ------------------------------------------------------------------------------------------ GGUF


def gguf_html(run: Run, result_folder: Path, number: int, root: str, words: Words) -> str:
    """What became of the GGUF file: how far it is from the merged model, or why there is none; else how to make one."""
    made = gguf.outcome(run.dir)
    if made is None:
        base = str(run.spec.model.model_name_or_path) if result_folder == run.dir.adapter else ""
        return notices.code(f"gguf-{number}", gguf.commands(result_folder, base), words)
    problems = [Problem(problem["code"], "", problem["values"]) for problem in made.get("problems", ())]
    listed = notices.listed(problems, words) if problems else ""
    if made["status"] == "failed":
        again = f'<button type="button" class="plain" data-retry="{escape(run.id)}">{escape(words("gguf-retry"))}</button>'
        stays = f'<p class="quiet">{escape(words("gguf-stays"))}</p>'
        return f'{listed}{stays}<p class="buttons-row">{again if "resume" in run.can else ""}</p>'
    where = f"{root}/download/{quote(run.id)}/model/{quote(made['file'])}"
    file = f'<a download href="{escape(where)}">{escape(made["file"])}</a> · {size(made["bytes"])}'
    return (
        f'<p class="folder">{file}</p>{listed}{_read_back(made, words) if made["status"] == "made" else ""}'
    )


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
    table = _answers_table(answers["rows"], ("gguf-merged", "gguf-file"), words)
    return f'{weights_html}<p class="quiet">{escape(line)}</p>{_folded(words("gguf-rows"), table)}'


def files_html(run: Run, root: str, words: Words) -> str:
    """The files of the result, and LoRA alone as one file."""
    files = [
        file
        for file in runs.files(run)
        if file[0].startswith(("model/", "adapter/")) or file[0] == "adapter.zip"
    ]
    rows = "".join(
        f'<tr><td><a download href="{escape(f"{root}/download/{quote(run.id)}/{quote(name)}")}">{escape(name)}</a></td>'
        f"<td>{size(count)}</td></tr>"
        for name, count in sorted(files, key=lambda file: file[0] != "adapter.zip")
    )
    return f'<table class="files"><tbody>{rows}</tbody></table>'
