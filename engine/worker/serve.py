"""Serve a base model and its adapters through OpenAI's API: python -m engine.worker.serve FOLDER

transformers generates the answers in this process, or vLLM in one behind it, depending on `engine` in serve.json.

The folder contains `serve.json` (see `engine.serving.servers`) and, if required, `key`; in a Slurm job, `keeper.json`
says where other machines reach this one, and there is always a key. The worker adds `lock`, `progress.json` while it
loads, then `address.json`; at the end `ended.json`, or `error.json`. It ends by itself when there have been no requests
for a while, and sooner if no studio is alive that might send one.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time

from engine.core import leases
from engine.core.problems import Refusal, problem
from engine.core.rundir import read_json, read_object, write_json
from engine.core.sockets import listen
from engine.worker.runtime.optional_packages import hide_unused_packages
from engine.worker.runtime.process_lifecycle import ProgressReport, library_imports, run_lifecycle


def main() -> None:
    with run_lifecycle(sys.argv[1]) as run:
        settings = read_json(run.path / "serve.json")
        place = read_object(run.keeper)  # of a Slurm job: where its machine can be reached
        key = run.path / "key"
        secret = key.read_text(encoding="utf-8").strip() if key.exists() else ""
        if place and not secret:  # the network reaches its port
            raise Refusal(problem("chat-key-missing", file=key))
        leases.keep_touched(list(filter(None, [settings["gpu"]])))
        # First: a port in use is reported before anything slow.
        sock = listen(place.get("listen") or settings["host"], settings["port"])
        ProgressReport(run)("loading")
        hide_unused_packages(settings["quantized"])
        with library_imports():
            from engine.worker.serving.openai_api import serve
            from engine.worker.serving.server_state import load

        with contextlib.ExitStack() as closing:
            if settings["engine"] != "transformers":
                # Uvicorn raises the signal again after shutting down; exiting then closes the contexts.
                signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            state = load(run, settings, closing)
            asyncio.run(serve(state, sock, secret, place.get("host", "")))
            if fault := state.generator.fault():
                raise Refusal(fault)
        write_json(run.path / "ended.json", {"at": time.time()})


if __name__ == "__main__":
    main()
