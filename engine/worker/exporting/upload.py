"""Upload the files of an export to a hub repository: python -m engine.worker.exporting.upload FOLDER

Standard input is one JSON object, {"repo", "private", "token"}; standard output ends with one, {"url", "commit"} or
{"problems"}. The token is nowhere else: in no argument, file, variable or log.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def upload(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Create the repository if necessary, and upload all files of `folder` in one commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi(token=request["token"], library_name="athanor")
    try:
        hub.create_repo(request["repo"], private=request["private"], exist_ok=True)
        done = hub.upload_folder(
            repo_id=request["repo"],
            folder_path=folder,
            commit_message="Exported by Athanor",
            ignore_patterns=[".*"],
        )
    except HFValidationError:
        return {"code": "upload-name", "values": {"repo": request["repo"]}}
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        code = "upload-refused" if status in (401, 403) else "upload-failed"
        return {
            "code": code,
            "values": {"repo": request["repo"], "why": _error_line(error, request["token"])},
        }
    except Exception as error:  # no network, a proxy, an invalid name: one sentence
        return {
            "code": "upload-silent",
            "values": {"endpoint": ENDPOINT, "why": _error_line(error, request["token"])},
        }
    return {"url": f"{ENDPOINT}/{request['repo']}", "commit": done.oid}


def _error_line(error: Exception, token: str) -> str:
    """The first line of the error, never with the token in it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].replace(token, "…")[:200]


if __name__ == "__main__":
    print("\n" + json.dumps(upload(Path(sys.argv[1]), json.load(sys.stdin))))
