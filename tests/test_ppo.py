"""PPO: its arithmetic against numbers worked by hand, that it learns, that it survives, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.core.rundir import read_json, read_lines, write_json
from engine.launch import command
from engine.launch.workspace import Workplace
from engine.models.reward_models import reward_model_problems
from engine.preflight.checks import preflight_problems
from engine.runs import progress, queue, runs
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec
from engine.worker.training import ppo_math
from engine.worker.training.ppo_monitor import BATCHES_MONITORED, PpoMonitor
from tests.conftest import by_hand, wait_until
from tests.preloaded import run_python, run_ranks
from tests.train_many import train_many

pytestmark = pytest.mark.usefixtures("forked")

NAN = float("nan")


def tensor(*rows: Any) -> torch.Tensor:
    return torch.tensor(rows if len(rows) > 1 else rows[0])


# ------------------------------------------------------------------------------------------- arithmetic


def test_an_answer_goes_up_to_its_first_end_and_may_have_none() -> None:
    mask, ended = ppo_math.answer_mask(tensor([5, 2, 2, 7], [5, 6, 7, 8], [9, 3, 5, 5]), ends=[2, 3])
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [True, True, False, False]]
    assert ended.tolist() == [True, False, True]


def test_the_score_comes_with_the_last_token_and_the_kl_with_each() -> None:
    mask = tensor([True, True, False], [True, True, True])
    kl = tensor([1.0, -2.0, NAN], [0.0, 0.5, 1.0])
    rewards = ppo_math.token_rewards(tensor([3.0, -1.0]), kl, mask, kl_coef=0.1)
    assert rewards.flatten().tolist() == pytest.approx([-0.1, 3.2, 0.0, 0.0, -0.05, -1.1])


def test_scores_are_held_in_a_limit_and_lowered_where_there_is_no_end() -> None:
    told = ppo_math.final_scores(tensor([9.0, -9.0, 1.0]), tensor([True, True, False]), clip=4.0, penalty=2.5)
    assert told.tolist() == [4.0, -4.0, -1.5]
    assert ppo_math.final_scores(tensor([9.0, 1.0]), tensor([False, True]), None, None).tolist() == [
        9.0,
        1.0,
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_advantages_are_the_sum_of_the_discounted_errors_of_the_values(gamma: float, lam: float) -> None:
    """A_t = Σ_l (γλ)^l δ_{t+l}, written out (Schulman et al. 2016, eq. 16); nothing comes from behind the end."""
    torch.manual_seed(0)
    lengths, width = [5, 1, 3], 5
    rewards, values = torch.randn(3, width).double(), torch.randn(3, width).double()
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    rewards[~mask] = values[~mask] = NAN
    advantages, returns = ppo_math.advantages_and_returns(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        value = [*values[row, :length].tolist(), 0.0]
        error = [rewards[row, t].item() + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** step * error[t + step] for step in range(length - t))
            assert advantages[row, t].item() == pytest.approx(expected)
            assert returns[row, t].item() == pytest.approx(expected + value[t])
        assert advantages[row, length:].tolist() == returns[row, length:].tolist() == [0.0] * (width - length)


def test_with_lambda_one_a_return_is_what_was_really_earned() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = ppo_math.advantages_and_returns(
        tensor([1.0, 2.0, 4.0]).unsqueeze(0), tensor([0.5, -3.0, 9.0]).unsqueeze(0), mask, gamma=0.5, lam=1.0
    )
    assert returns.tolist() == [[3.0, 4.0, 4.0]]  # 1 + 2/2 + 4/4, 2 + 4/2, 4
    assert advantages.tolist() == [[2.5, 7.0, -5.0]]


def test_the_clipped_policy_loss_by_hand() -> None:
    ratios, advantages = [1.5, 0.5, 1.5, 0.5, 1.1], [1.0, 1.0, -1.0, -1.0, 2.0]
    old = torch.full((5,), -1.0)
    loss, clipped = ppo_math.policy_loss(old + tensor(ratios).log(), old, tensor(advantages), cliprange=0.2)
    # Too far in the good direction gains no more; in the bad direction all of it counts.
    assert loss.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8, -2.2])
    assert clipped.tolist() == [True, False, False, True, False]


def test_no_gradient_pushes_a_probability_farther_than_the_clip() -> None:
    log_probs = tensor([0.5, -0.5, 0.1]).requires_grad_()
    loss, _ = ppo_math.policy_loss(log_probs, torch.zeros(3), tensor([1.0, -1.0, 1.0]), cliprange=0.2)
    loss.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([0.0, 0.0, -math.exp(0.1)])


def test_the_clipped_value_loss_by_hand() -> None:
    values, old, returns = tensor([2.0, 1.1, 0.0]), tensor([1.0, 1.0, 1.0]), tensor([2.0, 3.0, 0.0])
    loss = ppo_math.value_loss(values, old, returns, cliprange=0.2)
    # ½·max(0², 0.8²): right by too large a step; ½·1.9²: within the clip; ½·max(0², 0.8²)
    assert loss.tolist() == pytest.approx([0.32, 1.805, 0.32])


def test_whitening_looks_at_the_answers_alone() -> None:
    values, mask = tensor([1.0, 2.0, NAN], [3.0, 6.0, NAN]), tensor([True, True, False], [True, True, False])
    white = ppo_math.whiten(values, mask)[mask]
    assert white.mean().item() == pytest.approx(0, abs=1e-6)
    assert white.square().mean().item() == pytest.approx(1)
    kept = ppo_math.whiten(values, mask, keep_mean=True)[mask]
    assert kept.mean().item() == pytest.approx(3)
    halves = [ppo_math.whiten(values[row : row + 1], mask[row : row + 1]) for row in (0, 1)]
    assert halves[0][0, 0].item() != pytest.approx(white[0].item())  # why processes add up what they know


def test_the_kls_weight_follows_the_target_and_stays_without_one() -> None:
    assert ppo_math.next_kl_coef(0.1, kl=99.0, target=None, horizon=1000, answers=50) == 0.1
    assert ppo_math.next_kl_coef(0.1, kl=6.6, target=6.0, horizon=1000, answers=50) == pytest.approx(0.1 * 1.005)
    assert ppo_math.next_kl_coef(0.1, kl=60.0, target=6.0, horizon=1000, answers=50) == pytest.approx(0.1 * 1.01)
    assert ppo_math.next_kl_coef(0.1, kl=0.0, target=6.0, horizon=1000, answers=50) == pytest.approx(0.1 * 0.99)


def test_log_probabilities_and_entropy_of_a_coin() -> None:
    log_probs, entropy = ppo_math.log_probs_and_entropy(
        tensor([[0.0, 0.0], [math.log(3), 0.0]]).unsqueeze(0), tensor([[1, 0]])
    )
    assert log_probs.flatten().tolist() == pytest.approx([math.log(0.5), math.log(0.75)])
    assert entropy.flatten().tolist() == pytest.approx([math.log(2), 0.5623351])


# --------------------------------------------------------------------------------------- the trainer alone


def story(name: str, tiny: Path, folder: Path, **changes: Any) -> Any:
    """One of the stories of tests.ppo_toy, told by a child process."""
    printed = run_python("-m", "tests.ppo_toy", name, tiny, folder, json.dumps(changes))
    return json.loads(printed.splitlines()[-1])


@pytest.mark.slow
def test_what_is_rewarded_becomes_three_times_as_frequent(tiny: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 12, "num_ppo_epochs": 6, "max_new_tokens": 6, "seed": 1}
    lines = story("learn", tiny, tmp_path / "run", **changes)
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[:2]) / 2 < 0.15  # chance is a tenth
    assert sum(rewards[-3:]) / 3 > 3 * sum(rewards[:2]) / 2
    assert lines[0]["kl"] == 0.0  # exactly
    assert lines[-1]["kl"] > 1
    wanted = {
        "entropy", "policy_loss", "value_loss", "clip_fraction", "answer_length", "ended", "kl_coef", "advantage_mean",
        "advantage_std", "num_tokens", "loss", "grad_norm", "learning_rate",
    }  # fmt: skip
    assert wanted <= set(lines[-1])
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert sorted({line["step"] for line in samples}) == list(range(2, 13, 2))
    assert samples[-1]["prompt"].startswith("user\nsay ")


@pytest.mark.slow
def test_the_reference_is_the_policy_as_it_begins_however_it_begins(tiny: Path, tmp_path: Path) -> None:
    told = story("begin", tiny, tmp_path)
    assert {name: one["kl"] for name, one in told.items()} == dict.fromkeys(told, 0.0)
    moved = {name for name, one in told.items() if one["from_base"] > 0.1}
    assert moved == {"pissa", "continued"}  # the others begin as the base itself


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tiny: Path, tmp_path: Path) -> None:
    told = story("resume", tiny, tmp_path)
    assert {name: one["apart"] for name, one in told.items()} == dict.fromkeys(told, 0.0)
    for one in told.values():
        moved = one["moved"]
        assert {"kl_coef", "head.weight"} <= set(moved)
        assert any(name.endswith("lora_B.critic.weight") for name in moved)
        assert len(moved) > 0.9 * one["weights"]


@pytest.mark.slow
def test_two_processes_learn_as_one_with_twice_the_batch(
    tiny: Path, tmp_path: Path, make_spec: Callable[..., RunSpec]
) -> None:
    together = story("share", tiny, tmp_path / "one", processes=1)
    assert together["grad_norm"] > 0.01
    environment = command.environment(make_spec(hardware__num_processes=2), tmp_path, gpus=(), threads=2)
    run_ranks(2, "-m", "tests.ppo_toy", "share", tiny, tmp_path / "two", '{"processes": 2}', env=environment)
    shared = read_lines(tmp_path / "two" / "metrics.jsonl")[-1]
    names = set(together) - {"time"}
    assert {name: shared[name] for name in names} == pytest.approx(
        {name: together[name] for name in names}, rel=1e-4, abs=1e-6
    )
    one, two = (load_file(tmp_path / name / "checkpoint-1" / "ppo.safetensors") for name in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6), name


# --------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def judge(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a reward-model run on the tiny model."""
    folder = tmp_path_factory.mktemp("judge")
    run_python("-m", "tests.tiny_reward_model", tiny, folder)
    return folder / "adapter"


@pytest.fixture
def make_ppo(workplace: Workplace, make_spec: Callable[..., RunSpec], judge: Path) -> Callable[..., RunSpec]:
    """A spec of PPO with a reward model in this test's own saves folder."""
    kept = workplace.saves / "judge" / "adapter"
    shutil.copytree(judge.parent, kept.parent)

    def make(**changes: Any) -> RunSpec:
        stage = {"kind": "ppo", "reward_model": str(kept), "max_new_tokens": 8, "sample_steps": 1}
        return make_spec(stage=stage, **changes)

    return make


def ended(run: runs.Run) -> runs.Run:
    return wait_until(lambda: (now := runs.read(run.path, queue.saves_of(run.path))).final and now)


@pytest.mark.slow
def test_a_run_with_a_reward_model_leaves_a_policy_and_nothing_else(
    workplace: Workplace, make_ppo: Callable[..., RunSpec], tiny: Path
) -> None:
    spec = make_ppo(training__max_steps=4, data__validation_share=0.5, logging__eval_steps=2)
    run = ended(runs.submit(spec, workplace))
    assert run.state == "finished", run.dir.log.read_text()[-3000:]
    curves = progress.curves(run)
    assert curves["kl"].value[0] == 0.0
    assert {"reward", "value_loss", "clip_fraction", "eval_reward", "eval_loss"} <= set(curves)
    assert curves["eval_reward"].step[0] == 2  # none before training: its answers would take too long
    assert "ranks 100.0% of its own evaluation pairs" in run.dir.log.read_text()
    samples = read_lines(run.dir.samples)
    assert sorted({line["step"] for line in samples}) == [1, 2, 3, 4]
    assert "What comes after" in samples[0]["prompt"]
    assert not [path for path in run.dir.adapter.iterdir() if path.is_dir()]  # neither critic nor reference
    [told] = by_hand(tiny, run.dir.adapter, rows=[{"instruction": "say", "output": ""}])
    assert told["answers"]


@pytest.mark.slow
def test_two_processes_resume_where_they_were(workplace: Workplace, make_ppo: Callable[..., RunSpec]) -> None:
    spec = make_ppo(hardware__num_processes=2, training__per_device_train_batch_size=2, training__max_steps=5)
    run = ended(runs.submit(spec, workplace))
    assert run.state == "finished", run.dir.log.read_text()[-3000:]
    assert progress.curves(run)["kl"].value[0] == 0.0
    before = (run.dir.adapter / "adapter_model.safetensors").read_bytes()

    (run.dir.checkpoints()[-1] / "complete.json").unlink()  # as if all had been killed in the middle of step 5
    run.dir.exit.unlink()
    runs.resume(runs.read(run.path, workplace.saves))
    run = ended(run)
    assert run.state == "finished", run.dir.log.read_text()[-3000:]
    assert [line["step"] for line in read_lines(run.dir.metrics) if "reward" in line] == [1, 2, 3, 4, 5, 5]
    assert (run.dir.adapter / "adapter_model.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------------------------- refusals


def codes(problems_found: list[Any]) -> list[str]:
    return [one.code for one in problems_found]


def test_what_would_only_disturb_is_refused(make_spec: Callable[..., RunSpec]) -> None:
    spec = make_spec(stage={"kind": "ppo"}, method__lora_dropout=0.1, training__neftune_noise_alpha=5.0)
    assert codes(spec_problems(spec)) == ["reward-not-chosen", "ppo-no-noise", "ppo-no-noise"]


def test_a_reward_model_is_judged_by_what_its_run_says_of_it(tmp_path: Path) -> None:
    def refused() -> list[str]:
        return codes(reward_model_problems(tmp_path / "adapter"))

    assert refused() == ["reward-missing"]
    (tmp_path / "adapter").mkdir()
    assert refused() == ["reward-is-none"]
    write_json(tmp_path / "adapter" / "result.json", {"stage": "sft"})
    assert refused() == ["reward-is-none"]
    write_json(tmp_path / "adapter" / "result.json", {"stage": "rm"})
    assert refused() == ["reward-unmeasured"]
    pair = {
        "prompt_ids": [1],
        "chosen_ids": [2],
        "rejected_ids": [3],
        "chosen_score": 1.0,
        "rejected_score": 0.0,
    }
    write_json(tmp_path / "adapter" / "evaluation.json", {"accuracy": 0.56, "pairs": 64})
    assert refused() == ["reward-unmeasured"]
    (tmp_path / "adapter" / "evaluation_pairs.jsonl").write_text(json.dumps(pair) + "\n")
    assert refused() == ["reward-at-chance"]  # a fair coin does as well one time in six
    write_json(tmp_path / "adapter" / "evaluation.json", {"accuracy": 0.56, "pairs": 1024})
    assert refused() == []


def test_prompt_and_answer_have_to_fit_into_the_context(workplace: Workplace, make_ppo: Callable[..., RunSpec]) -> None:
    found = preflight_problems(make_ppo(data__max_length=512), workplace)  # the tiny model's whole context
    assert codes(found) == ["context-without-answer"]
    assert "504" in found[0].text()


@pytest.mark.slow
def test_a_reward_model_that_is_not_what_it_was_is_not_learned_from(
    workplace: Workplace, make_ppo: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs.queue, "advance", lambda *_: None)
    spec, told = make_ppo(), {}

    def spoil_pairs(folder: Path) -> None:
        lines = read_lines(folder / "evaluation_pairs.jsonl")
        for line in lines:
            line["chosen_ids"], line["rejected_ids"] = line["rejected_ids"], line["chosen_ids"]
        (folder / "evaluation_pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def spoil_template(folder: Path) -> None:
        file = folder / "chat_template.jinja"
        file.write_text(file.read_text() + " ")

    def spoil_vocabulary(folder: Path) -> None:
        file = folder / "tokenizer.json"
        tokenizer = read_json(file)
        words = list(tokenizer["model"]["vocab"])
        one, other = words[700], words[701]
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        write_json(file, tokenizer)

    for spoil in (spoil_pairs, spoil_template, spoil_vocabulary):
        folder = workplace.saves / spoil.__name__ / "adapter"
        shutil.copytree(workplace.saves / "judge", folder.parent)
        spoil(folder)
        told[spoil.__name__] = runs.submit(spec.change("stage.reward_model", str(folder)), workplace)
    train_many(*(run.dir for run in told.values()))
    assert {name: read_json(run.dir.error)["problems"][0]["code"] for name, run in told.items()} == {
        "spoil_pairs": "reward-model-changed",
        "spoil_template": "reward-other-reading",
        "spoil_vocabulary": "reward-other-vocabulary",
    }


# ------------------------------------------------------------------------------------- when it makes no sense


GOOD = {"reward": 1.0, "kl": 3.0, "answer_length": 20.0, "ended": 0.9, "entropy": 1.0}


@pytest.mark.parametrize(
    ("figures", "code"),
    [
        ({}, None),
        ({"kl": -0.3}, None),  # the mean of few samples may be below zero
        ({"kl": -3.0}, "ppo-negative-kl"),
        ({"kl": 70.0}, None),  # 3.5 nats a token
        ({"kl": 120.0}, "ppo-runaway-kl"),
        ({"answer_length": 1.0, "ended": 1.0, "kl": 1.0}, "ppo-empty-answers"),
        (
            {"answer_length": 1.0, "ended": 0.0, "kl": 1.0},
            None,
        ),  # not empty: one token is all that was allowed
    ],
)
def test_training_stops_when_it_has_gone_wrong_for_a_while(figures: dict[str, float], code: str | None) -> None:
    watch = PpoMonitor()
    first = [watch(GOOD | figures, step) for step in range(1, BATCHES_MONITORED)]
    assert first == [None] * (BATCHES_MONITORED - 1)
    found = watch(GOOD | figures, BATCHES_MONITORED)
    assert (found and found.code) == code
    assert found is None or str(BATCHES_MONITORED) in found.text("zh")


def test_one_bad_batch_among_good_ones_stops_nothing() -> None:
    watch = PpoMonitor()
    assert [watch(GOOD | ({"kl": -4.0} if step % 5 == 0 else {}), step) for step in range(20)] == [None] * 20


def test_a_figure_that_is_no_number_stops_the_run_at_once() -> None:
    found = PpoMonitor()(GOOD | {"value_loss": NAN, "reward": math.inf}, 7)
    assert found.code == "ppo-not-finite"
    assert "value_loss" in found.text()
    assert "step 7" in found.text()
