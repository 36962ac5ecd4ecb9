"""A name is just a name: spaces, quotes and Chinese in the names of everything, through a whole training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.launch.workspace import Workplace
from engine.runs import failures, runs
from engine.runs.plan import summary
from engine.spec.run_spec import RunSpec
from tests.conftest import wait_until

pytestmark = pytest.mark.usefixtures("forked")

NAME = """it's "第二版" $(id); & <b>"""


@pytest.mark.slow
def test_a_run_whose_every_name_has_spaces_quotes_and_chinese_finishes(
    tmp_path: Path, tiny: Path, make_spec: Callable[..., RunSpec]
) -> None:
    place = Workplace(models=(tmp_path / f"m {NAME}",), data=tmp_path / f"d {NAME}", saves=tmp_path / f"s {NAME}")
    place.data.mkdir()
    place.saves.mkdir()
    model = place.models[0] / NAME
    shutil.copytree(tiny, model)
    rows = [{"instruction": f"What comes after {n}?", "output": f"{n + 1}."} for n in range(8)]
    (place.data / f"{NAME}.json").write_text(json.dumps(rows), encoding="utf-8")
    info = {NAME: {"file_name": f"{NAME}.json"}}
    (place.data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    spec = make_spec(
        name=NAME,
        model__model_name_or_path=NAME,
        data__dataset_dir=str(place.data),
        data__datasets=[NAME],
        training__max_steps=2,
    )
    plan = summary(spec, place)
    assert (plan.problems, plan.rows) == ([], 8)
    run = runs.submit(spec, place)
    run = wait_until(lambda: (now := runs.get(place.saves, run.id)).final and now)
    assert run.state == "finished", failures.explain(run)
    assert run.title == NAME
    config = json.loads((run.dir.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(model)
