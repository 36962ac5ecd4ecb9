"""The estimate of a training's time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.launch.workspace import Workplace
from engine.runs import speed
from engine.spec.run_spec import RunSpec


def test_a_busy_moment_does_not_make_days_of_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten multiplications of 512 × 512 matrices, nine of them while others compute: 2 · 512³ operations in 10 ms."""
    durations = iter([5.0, 7.0, 3.0, 0.01, 9.0, 2.0, 4.0, 6.0, 8.0, 1.0])
    moments = (moment for duration in durations for moment in (0.0, duration))
    speed._cpu_speed.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(speed.time, "perf_counter", lambda: next(moments))
        assert speed._cpu_speed() == pytest.approx(2 * 512**3 / 0.01)
    place = replace(Workplace(), saves=tmp_path)
    spec = RunSpec().change("hardware.device", "cpu").change("training.gradient_checkpointing", False)
    estimate = speed.training_time(spec, 10_000, 1_000_000, place)
    speed._cpu_speed.cache_clear()
    # LoRA: forward 2 operations per weight and token, backward 2; a third of the speed is reached.
    assert estimate.seconds == pytest.approx(4 * 1e10 / (2 * 512**3 / 0.01 * 0.35))
