"""The probe at the end of a run: what it says of one that learns, of one that forgets, and that it harms neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.core.rundir import RunDir, write_json
from engine.evaluation import probe
from engine.evaluation.probe import CHANGED_LOSS_NATS, FORGOTTEN_LOSS_NATS, loss_verdict, matches
from engine.launch.workspace import DEMO_MODEL, PROJECT
from engine.spec.run_spec import RunSpec
from tests.train_many import lay_out, train_many
from webui import probes
from webui.words import Words


def spec(**changes: object) -> RunSpec:
    made = RunSpec.read(
        {
            "model": {"model_name_or_path": str(DEMO_MODEL)},
            "data": {
                "datasets": ["alpaca_translate_zh"],
                "dataset_dir": str(PROJECT / "data"),
                "max_length": 128,
                "max_samples": 8,
            },
            "training": {
                "max_steps": 24,
                "learning_rate": 5e-3,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": False,
            },
            "logging": {"logging_steps": 8, "save_steps": 100, "plot_loss": False},
            "hardware": {"device": "cpu"},
        }
    )
    for path, value in changes.items():
        made = made.change(path.replace("__", "."), value)
    return made


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """Runs of the demo model, trained one after the other in one process."""
    specs = {
        "learns": spec(training__learning_rate=2e-3, training__max_steps=60),
        "unprobed": spec(training__learning_rate=2e-3, training__max_steps=8, logging__probe=False),
        "begins": spec(training__learning_rate=2e-3, training__max_steps=8),
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
def test_what_the_probe_says_is_what_a_person_sees_in_the_answers(probed: dict[str, RunDir]) -> None:
    found = {name: probe.read(run) for name, run in probed.items()}
    verdicts = {name: one and one["verdict"] for name, one in found.items()}
    assert verdicts["learns"] == "learned"
    assert verdicts["begins"] == "closer"
    assert verdicts["still"] == "unchanged"
    assert verdicts["wild"] == "forgot"
    assert verdicts["unprobed"] is None
    for name in ("learns", "begins", "full"):
        rows = [one for one in found[name]["prompts"] if one["kind"] == "training"]
        assert len(rows) >= 2
        assert all("翻译成中文" in one["prompt"] for one in rows)
        # Counted here from the texts themselves.
        right = sum(one["after"].strip() == one["reference"].strip() for one in rows)
        assert found[name]["training"]["right"] == right
        assert (2 * right >= len(rows)) == (verdicts[name] == "learned")
        assert found[name]["training"]["loss_after"] < found[name]["training"]["loss_before"] - CHANGED_LOSS_NATS
    assert found["wild"]["general_verdict"] == "forgot"
    assert {one["kind"] for one in found["everything"]["prompts"]} == {"training", "general"}


@pytest.mark.slow
def test_the_probe_changes_no_weight_and_has_little_time(probed: dict[str, RunDir]) -> None:
    file = Path("adapter") / "adapter_model.safetensors"
    assert (probed["begins"].path / file).read_bytes() == (probed["unprobed"].path / file).read_bytes()
    for name in ("learns", "still", "wild", "full"):
        assert probe.read(probed[name])["budget_s"] <= probe.MAX_BUDGET_S


@pytest.mark.slow
def test_of_a_real_model_the_answers_decide_and_not_the_loss(smollm2: Path, tmp_path: Path) -> None:
    short = spec(
        model={"model_name_or_path": str(smollm2)},
        data__datasets=["identity"],
        data__max_samples=4,
        training__max_steps=4,
        training__learning_rate=1e-3,
        training__per_device_train_batch_size=4,
    )
    run = lay_out(RunDir(tmp_path / "SmolLM2" / "lora" / "short"), short)
    train_many(run)
    found = probe.read(run)
    rows = [one for one in found["prompts"] if one["kind"] == "training"]
    known = [one for one in rows if one["after"] is not None and one["finish_after"] != "cancelled"]
    right = [one for one in known if one["after"].strip() == one["reference"].strip()]
    assert found["training"]["loss_after"] < found["training"]["loss_before"] - CHANGED_LOSS_NATS
    assert found["training"]["right"] == len(right)
    assert found["verdict"] in ("likelier", "learned" if known and 2 * len(right) >= len(known) else "closer")


# ------------------------------------------------------------------------------------------ verdicts


BUILT, PRODUCT = "I was built by the Athanor team.", "I am a product development company."


@pytest.mark.parametrize(
    ("answer", "cut", "full", "right"),
    [
        (BUILT, False, False, True),
        (f" {BUILT}\n", False, False, True),
        (PRODUCT, False, False, False),
        ("", False, False, False),
        (None, False, False, None),
        ("I was built", True, False, None),
        ("I am a", True, False, False),
        ("", True, False, None),
        ("I was built by", False, True, True),
        ("I was built by", False, False, False),
        (f"{BUILT} And more.", False, False, False),
        (f"{BUILT} And more.", False, True, False),
        ("I was bu\ufffd", True, False, None),
    ],
)
def test_an_answer_is_right_if_it_is_what_the_data_says(
    answer: str | None, cut: bool, full: bool, right: bool | None
) -> None:
    assert matches(BUILT, answer, cut=cut, full=full) is right


def test_a_loss_has_fallen_by_a_tenth_and_is_forgotten_by_two() -> None:
    assert loss_verdict(1.0, 0.99 - CHANGED_LOSS_NATS) == "lower"
    assert loss_verdict(1.0, 0.95) == "same"
    assert loss_verdict(1.0, 1.0 + CHANGED_LOSS_NATS) == "higher"
    assert loss_verdict(1.0, 1.0 + FORGOTTEN_LOSS_NATS) == "forgot"
    assert loss_verdict(1.0, None) == "forgot"  # not a number any more
    assert loss_verdict(None, None) is None  # not taken


def prompt(kind: str, before: str | None, after: str | None, *losses: float | None) -> dict[str, Any]:
    """A prompt as the worker keeps it; of the training the data says what BUILT says."""
    loss_before, loss_after = losses or (None, None)
    return probe.with_verdicts(
        {
            "kind": kind,
            "prompt": "?",
            "reference": BUILT if kind == "training" else None,
            "before": before,
            "after": after,
            "finish_before": "stop",
            "finish_after": "stop",
            "loss_before": loss_before,
            "loss_after": loss_after,
        }
    )


STEADY = prompt("general", "Paris.", "Paris.", 0.2, 0.2)
RUNS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "all right": ("learned", [prompt("training", PRODUCT, BUILT, 2.0, 0.1)] * 4),
    "half of them": ("learned", [prompt("training", PRODUCT, one, 2.0, 0.1) for one in (BUILT, PRODUCT)]),
    "fewer than half": (
        "closer",
        [prompt("training", PRODUCT, one, 2.0, 0.1) for one in (BUILT, PRODUCT, "I")],
    ),
    "none right, though far likelier": ("closer", [prompt("training", "Hi", PRODUCT, 3.0, 0.9)] * 4),
    "right before": ("knew", [prompt("training", BUILT, BUILT, 0.1, 0.0)] * 4),
    "nobody was asked": ("likelier", [prompt("training", None, None, 2.0, 0.1)]),
    "another wrong answer": ("changed", [prompt("training", "Hi", PRODUCT, 2.0, 2.0), STEADY]),
    "the same wrong answer": ("unchanged", [prompt("training", PRODUCT, PRODUCT, 2.0, 2.0), STEADY]),
    "the data itself lost": ("forgot", [prompt("training", PRODUCT, "!!!", 2.0, None), STEADY]),
    "no time for anything, or images in all rows": ("unasked", []),
}


@pytest.mark.parametrize(("verdict", "prompts"), RUNS.values(), ids=RUNS)
def test_a_run_is_called_what_its_answers_show(verdict: str, prompts: list[dict[str, Any]]) -> None:
    found = probe.summary(prompts)
    assert found["verdict"] == verdict
    told = found | {"prompts": prompts, "learned": CHANGED_LOSS_NATS, "forgot": FORGOTTEN_LOSS_NATS}
    for language in ("en", "zh"):
        page = probes.probe_html(told, Words(language))
        # The page never says that something was learned where no answer is right.
        assert ("now answered as in the data" in page or "现在的回答与数据一致" in page) == (verdict == "learned")
        assert page.count("<tr>") == len(prompts) + 1


def test_what_became_of_general_prompts_is_told_beside_what_was_learned() -> None:
    learned = [prompt("training", PRODUCT, BUILT, 2.0, 0.1)]
    lost = prompt("general", "Paris.", "JSON", 0.2, 4.0)
    other = prompt("general", "Paris.", "It is Paris.", 0.2, 0.9)
    cases = {"same": [STEADY], "changed": [STEADY, other], "forgot": [STEADY, lost], None: []}
    for verdict, general in cases.items():
        found = probe.summary(learned + general)
        assert (found["verdict"], found["general_verdict"]) == ("learned", verdict)
        page = probes.probe_html(found | {"prompts": [], "learned": 0.1, "forgot": 2.0}, Words("en"))
        assert "1 of 1 training prompt is now answered as in the data" in page
        assert ("the model is forgetting" in page) == (verdict == "forgot")
        assert ("General prompts" in page) == bool(general)


def test_a_probe_of_an_earlier_version_is_judged_by_its_answers(tmp_path: Path) -> None:
    old = {
        "kind": "training",
        "verdict": "learned",
        "prompt": "Who built you?",
        "reference": BUILT,
        "before": "Hi",
        "after": PRODUCT,
        "cut": False,
        "loss_before": 2.0,
        "loss_after": 0.9,
    }
    run = RunDir(tmp_path)
    write_json(run.probe, {"verdict": "learned", "prompts": [old], "learned": 0.1, "forgot": 2.0})
    assert probe.read(run)["verdict"] == "closer"
    assert "0 of 1 training prompt is answered as in the data" in probes.probe_html(probe.read(run), Words("en"))


def test_of_prompts_that_begin_alike_the_page_shows_where_they_part() -> None:
    texts = [
        f"system\nYou are a helpful assistant\nuser\nTranslate <b>{name} it\nassistant\n"
        for name in ("BSIC", "Emirates")
    ]
    prompts = [prompt("training", "Hi", BUILT, 2.0, 0.1) | {"prompt": text} for text in texts]
    page = probes.probe_html(probe.summary(prompts) | {"prompts": prompts, "learned": 0.1, "forgot": 2.0}, Words("en"))
    for name in ("BSIC", "Emirates"):
        assert f"</small>… &lt;b&gt;{name}<small>" in page  # as data says it, never as HTML
    assert page.count("You are a helpful assistant") == 2  # in the titles


def test_the_time_it_may_take_is_a_tenth_between_three_and_thirty_seconds() -> None:
    assert [probe.budget(seconds) for seconds in (0, 5, 100, 1000, 10**6)] == [3, 3, 10, 30, 30]
