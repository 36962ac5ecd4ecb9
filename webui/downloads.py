"""Downloads over HTTP: files of a run, a run as a plain script, findings of a data job, and curves of several runs.

The engine decides which names are valid. Only a script is made when it is asked for; other files are served as they
are.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from engine.core.problems import Refusal, problem
from engine.data import data_jobs
from engine.data.upload_folder import UPLOADS_FOLDER
from engine.export import plain_script
from engine.launch.workspace import Workplace
from engine.runs import compare, runs
from webui.people import acting
from webui.reader_language import language_of


def script_archive(run: runs.Run, workplace: Workplace, writing: threading.Lock) -> Path:
    """The script of a run as a zip file. Raises Refusal, also if another is being written."""
    if not writing.acquire(blocking=False):
        raise Refusal(problem("script-busy"))
    try:
        spec = plain_script.training_spec(run.spec)
        return plain_script.write_archive(run.dir, spec, workplace, workplace.saves / UPLOADS_FOLDER)
    finally:
        writing.release()


def routes(workplace: Workplace) -> list[Route]:
    """`/download/<model>/<method>/<run>/<file>` and `/data/<job>/bad-rows.jsonl`; 404 for anything that is not such a
    file. `/script/<model>/<method>/<run>.zip`; 409 with the reason if a run cannot be written as a script.
    `/compare/curves.csv?runs=…&runs=…&curve=loss`."""
    writing = threading.Lock()  # each script takes seconds of a child that imports the libraries

    def download(request: Request) -> FileResponse:
        steps = request.path_params
        try:
            run = runs.get(workplace.saves, f"{steps['model']}/{steps['method']}/{steps['run']}")
            path = runs.file(run, steps["file"])
        except Refusal as refusal:
            raise HTTPException(404, str(refusal)) from None
        return FileResponse(path, filename=path.name, headers={"X-Content-Type-Options": "nosniff"})

    def script(request: Request) -> Response:
        steps = request.path_params
        try:
            run = runs.get(workplace.saves, f"{steps['model']}/{steps['method']}/{steps['run']}")
            with acting(workplace.saves, "script", run.id):
                archive = script_archive(run, workplace, writing)
        except Refusal as refusal:
            language = language_of(request)
            return PlainTextResponse("\n".join(reason.text(language) for reason in refusal.problems), 409)
        removal = BackgroundTask(shutil.rmtree, archive.parent, ignore_errors=True)
        headers = {"X-Content-Type-Options": "nosniff"}
        return FileResponse(archive, filename=archive.name, headers=headers, background=removal)

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
        Route("/script/{model}/{method}/{run}.zip", script),
        Route("/download/{model}/{method}/{run}/{file:path}", download),
        Route(f"/data/{{job}}/{data_jobs.BAD_ROWS_FILE}", bad_rows),
    ]
