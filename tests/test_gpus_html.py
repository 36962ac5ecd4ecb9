"""The GPUs as the page and the command line show them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from engine.core import leases
from engine.core.leases import Holder
from engine.launch.workspace import Workplace
from engine.runs import gpu_use
from tests.conftest import engine
from tests.nvml import Nvml
from webui import gpus_html
from webui.words import Words

GB = 10**9


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A leased GPU, one on which this process computes, an idle one, and one without figures."""
    monkeypatch.setenv(leases.FOLDER_VARIABLE, str(tmp_path / "leases"))
    busy = {"utilization": 97, "temperature": 71, "milliwatts": 312_500, "limit_milliwatts": 700_000}
    Nvml(tmp_path / "library", monkeypatch).report(
        gpus=[
            {"uuid": "GPU-a", "memory": 80 * GB, "free": 60 * GB, **busy},
            {"uuid": "GPU-b", "memory": 80 * GB, "free": 10 * GB, "processes": [[os.getpid(), 70 * GB], [2**30, None]]},
            {"uuid": "GPU-c", "memory": 80 * GB, "free": 79 * GB},
            {"uuid": "GPU-d", "name": "<GB10>"},
        ]
    )
    held = leases.take(["GPU-a"], Holder("<b>tickets", "training", by="ada"))
    yield
    for descriptor in held:
        os.close(descriptor)


def test_who_uses_each_gpu_and_nothing_of_theirs_is_html(gpus: Any) -> None:
    uses = gpu_use.gpu_uses()
    assert [(use.holder.text if use.holder else "", use.others) for use in uses] == [
        ("<b>tickets (ada)", False),
        ("", True),
        ("", False),
        ("", False),
    ]
    english, chinese = Words("en"), Words("zh")
    table, bars = gpus_html.table(uses, english), gpus_html.bars(uses, chinese)
    for expected in ("20 GB of 80 GB", "97 %", "71 °C", "312 W / 700 W", "&lt;b&gt;tickets (ada)", "&lt;GB10&gt;"):
        assert expected in table
    assert f"{os.getpid()} · 70 GB · {gpu_use.psutil.Process().username()} " in table
    assert f"{2**30} · — · process that cannot be seen from here" in table
    assert bars.count("<li") == 4
    assert "20 GB / 80 GB</span> <span>97 %</span> <span>71 °C</span> <span>312 W</span></small>" in bars
    assert "<small><span>&lt;GB10&gt;</span> <span>与主机共享</span></small>" in bars  # no dashes for what is unknown
    assert 'class="leased"' in bars
    assert 'width:25%"' in bars
    assert "被其他程序占用" in bars
    assert gpus_html.bars([], english) == ""
    assert gpus_html.bars(uses[:1] * 2, english).startswith('<p class="gpu-names">2 × ')
    assert "no GPU" in gpus_html.table([], english)


@pytest.mark.slow
def test_the_command_line_lists_them_and_changes_the_turn_of_a_run(
    forked: None, gpus: Any, workplace: Workplace
) -> None:
    printed = engine(workplace, "queue").stdout.splitlines()
    assert printed == [
        "GPU 0    20.0 of 80.0 GB  <b>tickets (ada)",
        "GPU 1    70.0 of 80.0 GB  others",
        "GPU 2     1.0 of 80.0 GB  free",
        "GPU 3     0.0 of 0.0 GB  free",
    ]
    assert "There is no run" in engine(workplace, "queue", "nothing", "--hold").stderr
    assert "Name the run" in engine(workplace, "queue", "--hold").stderr
    for words in (("--random", "0"), ("--random", "-5"), ("--budget", "nan"), ("--budget", "-1")):
        stderr = engine(workplace, "sweep", "spec.yaml", "--set", "method.r=8", *words).stderr
        assert re.search(r"must be a (whole )?number (above 0|of at least 1), not", stderr)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["python", "-m", "train", "--token=secret"], "python -m train"),
        (["python", "train.py", "--token=secret"], "python train.py"),
        (["serve", "--key", "secret"], "serve"),
        (["env", "KEY=secret", "serve"], "env"),
        ([], ""),
    ],
)
def test_arguments_of_processes_are_not_shown(words: list[str], shown: str) -> None:
    assert gpu_use._without_arguments(words) == shown
