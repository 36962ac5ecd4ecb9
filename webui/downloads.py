"""Files of a run over HTTP. Whether a name is a file of the run is engine's to say; nothing is copied to serve it."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route

from engine import runs
from engine.problems import Refusal
from engine.workplace import Workplace


def route(workplace: Workplace) -> Route:
    """`/download/<model>/<method>/<run>/<file>`; 404 for whatever is not a file of a run."""

    def download(request: Request) -> FileResponse:
        steps = request.path_params
        try:
            run = runs.get(workplace.saves, f"{steps['model']}/{steps['method']}/{steps['run']}")
            path = runs.file(run, steps["file"])
        except Refusal as refusal:
            raise HTTPException(404, str(refusal)) from None
        return FileResponse(path, filename=path.name, headers={"X-Content-Type-Options": "nosniff"})

    return Route("/download/{model}/{method}/{run}/{file:path}", download)
