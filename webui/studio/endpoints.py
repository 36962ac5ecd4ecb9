"""What other programs can call: the same few actions as the page, checked by the same code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from engine.core.problems import Refusal
from engine.launch.workspace import Workplace
from engine.runs import kinds, progress, runs
from webui.people import acting
from webui.studio.header import user


def add_endpoints(workplace: Workplace) -> None:
    """Add them to the page that is being built."""

    def start(spec: str, request: gr.Request) -> str:
        """Start a run from its spec as YAML. Returns the run's id."""

        def submit() -> str:
            value = kinds.read(spec)
            with acting(workplace.saves, "start", f"{value.kind} {value.name}".strip()):
                return runs.submit(value, workplace, by=user(request)).id

        return _or_gradio_error(submit)

    def list_runs() -> list[dict[str, Any]]:
        """All runs, newest first."""
        return [
            {"id": run.id, "state": run.state, "by": run.by, "submitted": run.submitted}
            for run in runs.find(workplace.saves)
        ]

    def show_run(run: str) -> dict[str, Any]:
        """State and progress of one run."""
        selected_run = _or_gradio_error(lambda: runs.get(workplace.saves, run))
        return {"id": selected_run.id, "state": selected_run.state, **vars(progress.progress(selected_run))}

    def stop_run(run: str, how: str, request: gr.Request) -> str:
        """Stop a run: how = "save" writes a checkpoint first, "kill" does not."""

        def end() -> str:
            selected_run, action = runs.get(workplace.saves, run), "kill" if how == "kill" else "stop"
            with acting(workplace.saves, action, selected_run.id, selected_run.by):
                runs.stop(selected_run, "kill" if how == "kill" else "save", user(request))
            return runs.get(workplace.saves, selected_run.id).state

        return _or_gradio_error(end)

    for name, action in {"start": start, "runs": list_runs, "run": show_run, "stop": stop_run}.items():
        gr.api(action, api_name=name, queue=False)


def _or_gradio_error(act: Callable[[], Any]) -> Any:
    """The action's result; a Refusal becomes the endpoint's error."""
    try:
        return act()
    except Refusal as refusal:
        raise gr.Error(str(refusal)) from None
