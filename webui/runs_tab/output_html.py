"""The output of a run as HTML: its log, its settings and its files."""

from __future__ import annotations

from html import escape
from urllib.parse import quote

from engine.core import regular_files
from engine.core.problems import Problem, Refusal
from engine.export import plain_script
from engine.launch.workspace import Workplace
from engine.runs import runs
from engine.runs.logs import log_tail
from engine.runs.runs import Run
from engine.spec.run_spec import RunSpec
from webui import notices
from webui.numbers import size
from webui.words import Words

MAX_FILES_LISTED = 200
MAX_LOGS_SHOWN = 4  # of machines; the others can be downloaded


def logs(run: Run, words: Words) -> str:
    """The end of the log; of a run of several machines, that of each."""
    texts = [log_tail(log) for log in run.dir.logs()[:MAX_LOGS_SHOWN]]
    if not any(texts):
        return f'<p class="quiet">{escape(words("log-none"))}</p>'
    boxes = [f'<div class="log-box" tabindex="0"><pre class="log">{escape(text)}</pre></div>' for text in texts]
    heads = [words("log-of-machine", number=number) for number in range(1, len(texts) + 1)]
    headed = (f'<p class="log-head">{escape(head)}</p>{box}' for head, box in zip(heads, boxes, strict=True))
    return "".join(headed) if len(boxes) > 1 else boxes[0]


def log_links(run: Run, root: str, words: Words) -> str:
    """The links to the full logs."""
    names = [log.name for log in run.dir.logs()]
    labels = [words("log-whole"), *names[1:]]
    links = (
        f'<a class="quiet" download href="{escape(address(run, name, root))}">{escape(label)}</a>'
        for name, label in zip(names, labels, strict=True)
    )
    return " · ".join(links)


def script(run: Run, workplace: Workplace, root: str, words: Words) -> str:
    """The link to a training as a plain script, or why it cannot be one. Opens in a tab of its own, where what only the
    download itself finds out can be read."""
    try:
        if not isinstance(run.spec, RunSpec):
            return ""
        problems = plain_script.script_problems(run.dir, run.spec, workplace)
    except (Refusal, OSError):
        return ""  # the settings, above it, say what is wrong
    if problems:
        return f'<p class="quiet script-link">{escape(words("script-not"))}</p>{notices.noted(problems, words)}'
    link = f'<a target="_blank" rel="noopener" href="{escape(f"{root}/script/{quote(run.id)}.zip")}">'
    remark = f'<span class="quiet">{escape(words("script-remark"))}</span>'
    return f'<p class="script-link">{link}{escape(words("script-link"))}</a> {remark}</p>'


def settings(run: Run, words: Words) -> str:
    """The run's spec as YAML, or why it cannot be read; and how its processes were launched, if there are several."""
    try:
        text = notices.code("run-yaml", run.spec.to_yaml(brief=True), words, save=True)
        if run.dir.accelerate.exists():
            launch = regular_files.read_text(run.dir.accelerate)
            text += notices.code("run-accelerate", f"# accelerate.yaml\n{launch}", words)
        return text
    except (Refusal, OSError) as error:
        problems: list[Problem] = getattr(error, "problems", [])
        return notices.listed(problems, words)


def files(run: Run, root: str, words: Words) -> str:
    """The run's files; each link leads to a route on which the engine checks the name."""
    of_run = runs.files(run)
    if not of_run:
        return no_files(words)
    rows = "".join(
        (
            f'<tr><td><a download href="{escape(address(run, name, root))}">'
            f"{escape(name)}</a></td><td>{size(count)}</td></tr>"
        )
        for name, count in of_run[:MAX_FILES_LISTED]
    )
    rest = (
        f'<p class="quiet">{escape(words("files-more", count=len(of_run) - MAX_FILES_LISTED))}</p>'
        if len(of_run) > MAX_FILES_LISTED
        else ""
    )
    heads = f"<th>{escape(words('file-name'))}</th><th>{escape(words('file-size'))}</th>"
    return f'<table class="files"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>{rest}'


def no_files(words: Words) -> str:
    return f'<p class="quiet">{escape(words("files-none"))}</p>'


def address(run: Run, name: str, root: str) -> str:
    """The address of a file of the run for download."""
    return f"{root}/download/{quote(run.id)}/{quote(name)}"
