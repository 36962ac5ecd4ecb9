"""What a finished run left is found, offered where it fits, and gone on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.problems import Refusal
from engine.core.rundir import write_json, write_text
from engine.launch.workspace import Workplace
from engine.runs import runs
from engine.runs.results import (
    MAX_NEXT_STAGE_EPOCHS,
    MIN_ANSWERS_PER_STEP,
    next_spec,
    possible_next_stages,
    results,
)
from engine.runs.runs import Run
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec
from engine.spec.steps import examples_per_step


@pytest.fixture
def finished(workplace: Workplace, make_spec: Callable[..., RunSpec]) -> Callable[..., Run]:
    """A run as one that has finished leaves it; the weights themselves are not looked at here."""

    def make(name: str, **changes: object) -> Run:
        spec = make_spec(name=name, **changes)
        folder = workplace.saves / "tiny" / spec.method.kind / name
        left = folder / ("adapter" if spec.method.kind == "lora" else "model")
        left.mkdir(parents=True)
        write_text(folder / "spec.yaml", spec.to_yaml())
        write_json(folder / "request.json", {"by": "", "submitted": 1.0, "attempt": 1})
        write_json(folder / "exit.json", {"outcome": "finished", "reason": "finished", "ended": 2.0})
        write_json(left / "result.json", {"attempt": 1, "stage": spec.stage.kind, "complete": True})
        return runs.read(folder, workplace.saves)

    return make


def add_pairs(data: Path) -> None:
    rows = [{"instruction": "a?", "chosen": "b", "rejected": "c"}]
    (data / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    info = json.loads((data / "dataset_info.json").read_text(encoding="utf-8"))
    info["pairs"] = {"file_name": "pairs.json", "ranking": True}
    (data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def test_a_run_that_goes_on_and_one_that_left_nothing_offer_nothing(
    finished: Callable[..., Run], workplace: Workplace
) -> None:
    done = finished("done")
    assert [one.run.id for one in results(workplace.saves)] == [done.id]
    (done.path / "exit.json").unlink()
    assert results(workplace.saves) == []
    assert possible_next_stages(runs.read(done.path, workplace.saves)) == []


def test_dpo_goes_on_from_an_adapter_with_pairs_and_a_tenth_of_the_learning_rate(
    finished: Callable[..., Run], workplace: Workplace
) -> None:
    add_pairs(workplace.data)
    run = finished("first", data__max_length=48)
    assert {"rm", "dpo", "kto"} <= set(possible_next_stages(run))
    spec = next_spec(run, "dpo", workplace)
    assert spec.model.adapter_path == str(run.path / "adapter")
    assert spec.data.datasets == {"pairs": 1.0}
    assert spec.data.max_length == 48
    assert spec.training.learning_rate == pytest.approx(run.spec.training.learning_rate / 10)
    assert spec.name == ""
    assert spec_problems(spec) == []


def test_a_whole_model_is_the_model_of_the_next_run(finished: Callable[..., Run], workplace: Workplace) -> None:
    run = finished("whole", method={"kind": "full"})
    spec = next_spec(run, "orpo", workplace)
    assert spec.model.model_name_or_path == str(run.path / "model")
    assert spec.model.adapter_path is None


def test_what_a_result_has_already_is_not_done_to_it_again(finished: Callable[..., Run], workplace: Workplace) -> None:
    pissa = {"kind": "lora", "r": 8, "lora_alpha": 16, "init_lora_weights": "pissa"}
    run = finished("pissa", method=pissa)
    left = {
        "r": 16,
        "lora_alpha": 32,
        "use_dora": False,
        "use_rslora": False,
    }  # an ordinary one of twice the rank
    write_json(run.path / "adapter" / "adapter_config.json", left)
    method = next_spec(run, "dpo", workplace).method
    assert (method.r, method.lora_alpha, method.init_lora_weights) == (16, 32, "default")
    rope = {"kind": "linear", "factor": 2.0}
    whole = finished("stretched", method={"kind": "full"}, model__rope_scaling=rope)
    assert next_spec(whole, "dpo", workplace).model.rope_scaling.kind == "none"


def test_data_sets_that_fit_the_next_stage_stay(finished: Callable[..., Run], workplace: Workplace) -> None:
    run = finished("read", stage={"kind": "pt"}, data__datasets={"text": 2.0}, data__packing=True)
    assert next_spec(run, "sft", workplace).data.datasets == {"chat": 1.0}
    again = finished("again", data__datasets={"chat": 2.0})
    add_pairs(workplace.data)
    assert next_spec(again, "dpo", workplace).data.packing is False


def test_learning_from_scores_goes_on_with_more_of_it_or_with_pairs(
    finished: Callable[..., Run], workplace: Workplace
) -> None:
    stage = {"kind": "grpo", "rewards": {"length": 2.0}, "num_generations": 4, "reward_length": 64}
    run = finished("scored", stage=stage, training__gradient_accumulation_steps=16)
    assert possible_next_stages(run) == ["dpo", "ppo", "grpo"]
    finished("judge", stage={"kind": "rm"})
    again = next_spec(run, "grpo", workplace)  # by the same rewards, though there is a reward model by now
    assert again.stage == run.spec.stage
    assert again.training.learning_rate == pytest.approx(run.spec.training.learning_rate)
    assert next_spec(run, "ppo", workplace).stage.reward_model
    assert possible_next_stages(finished("policy", stage={"kind": "ppo"})) == ["dpo", "ppo", "grpo"]


def test_a_stage_that_cannot_follow_is_refused(finished: Callable[..., Run], workplace: Workplace) -> None:
    run = finished("first")
    for stage in ("pt", "no such stage", ""):
        with pytest.raises(Refusal, match="cannot continue"):
            next_spec(run, stage, workplace)


def test_behind_a_reward_model_what_has_learned_to_answer_is_trained(
    finished: Callable[..., Run], workplace: Workplace
) -> None:
    judge = finished("judge", stage={"kind": "rm"}, training__num_train_epochs=30)
    spec = next_spec(judge, "ppo", workplace)
    assert spec.stage.reward_model == str(judge.dir.adapter)
    assert spec.model.adapter_path is None  # nothing has learned yet
    assert spec.training.num_train_epochs == MAX_NEXT_STAGE_EPOCHS
    assert examples_per_step(spec) >= MIN_ANSWERS_PER_STEP

    talker = finished("talker")
    assert next_spec(judge, "ppo", workplace).model.adapter_path == str(talker.dir.adapter)
    whole = finished("whole", stage={"kind": "rm"}, method={"kind": "full"})
    spec = next_spec(whole, "ppo", workplace)  # all weights are trained: there is no adapter to go on with
    assert (spec.method.kind, spec.model.adapter_path) == ("full", None)
    continued = finished("continued", stage={"kind": "rm"}, model__adapter_path="an/adapter")
    assert next_spec(continued, "ppo", workplace).model.adapter_path == "an/adapter"
