"""The GPUs as HTML: a short bar for each, and a table with everything that the driver reports."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from engine.core.hardware import Gpu
from engine.runs.gpu_use import GpuUse, Process
from webui.numbers import size
from webui.words import Words

UNKNOWN = "—"  # what the driver does not report


def bars(uses: Sequence[GpuUse], words: Words) -> str:
    """Each GPU in two lines: how full it is and who uses it; what it is and does. The name of several equal ones is
    above them. Empty without GPUs."""
    if not uses:
        return ""
    names = {use.gpu.name for use in uses}
    shared = len(uses) > 1 and len(names) == 1
    title = f'<p class="gpu-names">{len(uses)} × {escape(names.pop())}</p>' if shared else ""
    return f'{title}<ul class="gpus">{"".join(_bar(use, words, not shared) for use in uses)}</ul>'


def _bar(use: GpuUse, words: Words, with_name: bool) -> str:
    gpu, state = use.gpu, "leased" if use.holder else "others" if use.others else "free"
    full = 100 * (gpu.memory - gpu.free) / gpu.memory if gpu.memory else 0
    return (
        f'<li class="{state}"><span>{escape(words("gpu-number", index=gpu.index))}</span>'
        f'<div class="bar"><i style="width:{full:.0f}%"></i></div>'
        f"<span>{escape(_user(use, words))}</span>"
        f"<small>{' '.join(map(_part, [*[gpu.name] * with_name, _memory(use, words), *_figures(gpu)]))}</small></li>"
    )


def _part(text: str) -> str:
    return f"<span>{escape(text)}</span>"


def _figures(gpu: Gpu) -> list[str]:
    """What the driver reports of load, temperature and power."""
    figures = (_load(gpu), _temperature(gpu), _power(gpu).partition(" / ")[0])  # the limit is in the table
    return [figure for figure in figures if figure != UNKNOWN]


def table(uses: Sequence[GpuUse], words: Words) -> str:
    """A row for each GPU, with the processes on it."""
    if not uses:
        return f'<p class="empty">{escape(words("gpus-none"))}</p>'
    names = ("gpu", "memory", "load", "temperature", "power", "use")
    head = "".join(f"<th>{escape(words(f'gpus-{name}'))}</th>" for name in names)
    rows = "".join(_row(use, words) for use in uses)
    return f'<table class="files gpu-table"><thead><tr>{head}</tr></thead>{rows}</table>'


def _row(use: GpuUse, words: Words) -> str:
    gpu = use.gpu
    cells = (_memory(use, words), _load(gpu), _temperature(gpu), _power(gpu))
    processes = "".join(f"<small>{escape(_process(process, words))}</small>" for process in use.processes)
    name = f"{escape(words('gpu-number', index=gpu.index))}<small>{escape(gpu.name)}</small>"
    values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr><td>{name}</td>{values}<td>{escape(_user(use, words))}{processes}</td></tr>"


def _load(gpu: Gpu) -> str:
    return UNKNOWN if gpu.utilization is None else f"{gpu.utilization} %"


def _temperature(gpu: Gpu) -> str:
    return UNKNOWN if gpu.temperature is None else f"{gpu.temperature} °C"


def _power(gpu: Gpu) -> str:
    if gpu.power is None:
        return UNKNOWN
    return f"{gpu.power:.0f} W" + (f" / {gpu.power_limit:.0f} W" if gpu.power_limit else "")


def _memory(use: GpuUse, words: Words) -> str:
    gpu = use.gpu
    if not gpu.memory:
        return words("gpus-memory-shared")
    return words("gpus-memory-used", used=size(gpu.memory - gpu.free), whole=size(gpu.memory))


def _user(use: GpuUse, words: Words) -> str:
    if use.holder:
        return use.holder.text
    return words("gpus-others") if use.others else words("gpus-free")


def _process(process: Process, words: Words) -> str:
    memory = size(process.memory) if process.memory is not None else UNKNOWN
    who = " ".join(filter(None, (process.user, process.command))) or words("gpus-process-unseen")
    return f"{process.pid} · {memory} · {who}"
