"""Downloads over HTTP: files of a run, findings of a data job, and curves of several runs.

The engine decides which names are valid; no file is copied to serve it.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from engine.core.problems import Refusal
from engine.data import data_jobs
from engine.launch.workspace import Workplace
from engine.runs import compare, runs


def routes(workplace: Workplace) -> list[Route]:
    """`/download/<model>/<method>/<run>/<file>` and `/data/<job>/bad-rows.jsonl`; 404 for anything that is not such a
    file. `/compare/curves.csv?runs=…&runs=…&curve=loss`."""

    def download(request: Request) -> FileResponse:
        steps = request.path_params
        try:
            run = runs.get(workplace.saves, f"{steps['model']}/{steps['method']}/{steps['run']}")
            path = runs.file(run, steps["file"])
        except Refusal as refusal:
            raise HTTPException(404, str(refusal)) from None
        return FileResponse(path, filename=path.name, headers={"X-Content-Type-Options": "nosniff"})

    def bad_rows(request: Request) -> FileResponse:
        job = data_jobs.get(workplace.saves, request.path_params["job"])
        path = job.path / data_jobs.BAD_ROWS_FILE if job else None
        if path is None or not path.is_file():
            raise HTTPException(404)
        return FileResponse(path, filename=path.name, headers={"X-Content-Type-Options": "nosniff"})

    def curves(request: Request) -> Response:
        chosen_runs, _ = compare.select_runs(workplace.saves, request.query_params.getlist("runs"))
        if not chosen_runs:
            raise HTTPException(404)
        text = compare.curves_csv(chosen_runs, request.query_params.get("curve", ""))
        headers = {
            "Content-Disposition": 'attachment; filename="curves.csv"',
            "X-Content-Type-Options": "nosniff",
        }
        return Response(text, media_type="text/csv; charset=utf-8", headers=headers)

    return [
        Route("/compare/curves.csv", curves),
        Route("/download/{model}/{method}/{run}/{file:path}", download),
        Route(f"/data/{{job}}/{data_jobs.BAD_ROWS_FILE}", bad_rows),
    ]
