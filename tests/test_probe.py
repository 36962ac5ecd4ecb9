"""The probe at the end of a run: what it says of one that learns, of one that forgets, and that it harms neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import probe
from engine.probe import FORGOT, LEARNED, of_general, of_run, of_training
from engine.rundir import RunDir
from engine.spec import RunSpec
from engine.workplace import DEMO_MODEL, PROJECT
from tests.train_many import lay_out, train_many


def spec(**changes: object) -> RunSpec:
    made = RunSpec.read({
        "model": {"model_name_or_path": str(DEMO_MODEL)},
        "data": {"datasets": ["alpaca_translate_zh"], "dataset_dir": str(PROJECT / "data"), "max_length": 128, "max_samples": 8},
        "training": {
            "max_steps": 24, "learning_rate": 5e-3, "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
        },
        "logging": {"logging_steps": 8, "save_steps": 100},
        "hardware": {"device": "cpu"},
    })  # fmt: skip
    for path, value in changes.items():
        made = made.change(path.replace("__", "."), value)
    return made


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """Runs of the demo model, trained one after the other in one process."""
    specs = {
        "learns": spec(training__learning_rate=2e-3),
        "unprobed": spec(training__learning_rate=2e-3, logging__probe=False),
        "still": spec(training__learning_rate=1e-9, training__max_steps=2),
        "wild": spec(training__learning_rate=1.0, training__max_steps=6),
        "full": spec(
            method={"kind": "full"},
            training__learning_rate=2e-3,
            training__max_steps=12,
            data__packing=True,
            training__per_device_train_batch_size=1,
        ),
        "everything": spec(stage={"kind": "sft", "train_on": "everything"}, training__max_steps=2),
    }
    saves, folders = tmp_path_factory.mktemp("probe"), {}
    for name, one in specs.items():
        folders[name] = lay_out(RunDir(saves / "demo_model" / "lora" / name), one)
    train_many(*folders.values())
    return folders


@pytest.mark.slow
def test_a_run_that_learns_is_told_from_one_that_forgets_and_from_one_that_does_nothing(
    probed: dict[str, RunDir],
) -> None:
    found = {name: probe.read(run) for name, run in probed.items()}
    told = {name: one and one["verdict"] for name, one in found.items()}
    assert told["learns"] == told["full"] == "learned"
    assert told["still"] == "unchanged"
    assert told["wild"] == "forgot"
    assert told["unprobed"] is None
    learned = [one for one in found["learns"]["prompts"] if one["kind"] == "training"]
    assert len(learned) == 4
    for one in learned:
        assert "翻译成中文" in one["prompt"]
        assert one["reference"]
        assert one["loss_after"] < one["loss_before"] - LEARNED
    forgotten = [one["verdict"] for one in found["wild"]["prompts"] if one["kind"] == "general"]
    assert "forgot" in forgotten  # how many there is time for depends on the machine
    assert {one["kind"] for one in found["everything"]["prompts"]} == {"training", "general"}


@pytest.mark.slow
def test_the_probe_changes_no_weight_and_has_little_time(probed: dict[str, RunDir]) -> None:
    file = Path("adapter") / "adapter_model.safetensors"
    assert (probed["learns"].path / file).read_bytes() == (probed["unprobed"].path / file).read_bytes()
    for name in ("learns", "still", "wild", "full"):
        assert probe.read(probed[name])["budget_s"] <= probe.MOST_S


def test_a_verdict_is_about_a_tenth_and_about_a_seventh() -> None:
    assert of_training(1.0, 0.99 - LEARNED, same=False) == "learned"
    assert of_training(1.0, 0.95, same=False) == "changed"
    assert of_training(0.05, 0.0, same=True) == "unchanged"  # it knew that before
    assert of_training(1.0, 1.0 + FORGOT, same=False) == "forgot"
    assert of_training(1.0, None, same=False) == "forgot"  # not a number any more
    assert of_general(0.3, 0.4 + FORGOT, same=False) == "forgot"
    assert of_general(0.3, 1.5, same=False) == "changed"
    assert of_general(0.3, 0.2, same=True) == "unchanged"
    assert of_general(None, None, same=True) == "unchanged"  # an empty answer, before and after


def test_a_run_forgot_if_half_of_its_prompts_are_forgotten_whatever_it_has_learned() -> None:
    assert of_run({"training": ["learned"] * 4, "general": ["forgot"] * 2 + ["changed"] * 2}) == "forgot"
    assert (
        of_run({"training": ["learned"] * 2 + ["changed"] * 2, "general": ["forgot"] + ["changed"] * 3})
        == "learned"
    )
    assert of_run({"training": ["learned", "changed", "changed"], "general": []}) == "changed"
    assert of_run({"training": ["unchanged"], "general": ["unchanged"]}) == "unchanged"


def test_the_time_it_may_take_is_a_tenth_between_one_and_thirty_seconds() -> None:
    assert [probe.budget(seconds) for seconds in (0, 5, 100, 1000, 10**6)] == [1, 1, 10, 30, 30]
