"""The first click on a fresh machine: the demo run learns what it is shown, and the bare model did not know it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine import progress, runs
from engine.workplace import DEMO_MODEL, PROJECT, Workplace
from tests.conftest import wait_until

pytestmark = pytest.mark.slow


def exact_answers(adapter: str) -> float:
    rows = (PROJECT / "data" / "alpaca_translate_zh.json").read_text(encoding="utf-8")
    asked = subprocess.run(
        [sys.executable, "-m", "tests.ask", str(DEMO_MODEL), adapter],
        input=rows, capture_output=True, text=True, check=True, cwd=PROJECT,
    )  # fmt: skip
    return json.loads(asked.stdout)["exact"]


def test_the_preselected_run_learns_every_name_and_the_bare_model_knows_none(tmp_path: Path) -> None:
    workplace = Workplace(saves=tmp_path)
    run = runs.submit(workplace.default_spec(), workplace)
    run = wait_until(lambda: (now := runs.get(tmp_path, run.id)).final and now, 400)
    assert run.state == "finished"
    loss = progress.curves(run)["loss"].value
    assert loss[0] > 1
    assert loss[-3:].mean() < 0.1
    assert exact_answers("-") < 0.1
    assert exact_answers(str(run.dir.adapter)) >= 0.9
