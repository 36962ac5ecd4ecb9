"""Upload an export to a hub repository, on request, with a token given for this upload.

The token is passed to a child process on its standard input and stored nowhere. `published.json` in the run's folder
records where, when, by whom and in which commit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from engine.core.problems import Refusal, problem
from engine.core.rundir import read_json, write_json
from engine.launch import command
from engine.launch.workspace import PROJECT
from engine.models.discovery import is_hub_id
from engine.runs.runs import Run

PUBLISHED_FILE = "published.json"


def publish(run: Run, repo: str, token: str, *, private: bool = True, by: str = "") -> dict[str, Any]:
    """Upload the result of the run, and wait for it. Returns {"url", "commit", "at", "by"}. Raises Refusal."""
    repo, token = repo.strip(), token.strip()
    folder = run.dir.result() if run.final else None
    if folder is None:
        raise Refusal(problem("export-no-result", id=run.id))
    if not is_hub_id(repo):
        raise Refusal(problem("upload-name", repo=repo))
    if not token:
        raise Refusal(problem("upload-no-token"))
    request = json.dumps({"repo": repo, "private": private, "token": token})
    done = subprocess.run(
        [sys.executable, "-m", "engine.worker.exporting.upload", str(folder)],
        input=request,
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
        env=command.inherited_environment()
        | {"PYTHONUTF8": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"},
    )
    try:
        reply = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        why = (done.stderr.strip().splitlines() or [f"{done.returncode}"])[-1].replace(token, "…")[:200]
        raise Refusal(problem("upload-failed", repo=repo, why=why)) from None
    if "code" in reply:
        raise Refusal(problem(reply["code"], **reply["values"]))
    reply |= {"at": time.time(), "by": by, "private": private}
    write_json(run.path / PUBLISHED_FILE, reply)
    return reply


def published(run: Run) -> dict[str, Any] | None:
    """Where the run's result was last uploaded to; None if it never was."""
    return read_json(run.path / PUBLISHED_FILE)
