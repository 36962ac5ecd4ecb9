"""Reward model, DPO, KTO, ORPO, SimPO: their arithmetic is the papers', and what they learn is in what they leave."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.core.rundir import RunDir, read_json, read_lines, write_json, write_text
from engine.launch import command
from engine.models.safetensors_headers import read_header
from engine.preflight.model_checks import trained_parameters
from engine.spec.contradictions import spec_problems
from engine.spec.run_spec import RunSpec
from engine.spec.stage_settings import LABEL_SMOOTHING_LOSSES, Dpo
from tests.preloaded import run_python, run_ranks
from tests.train_many import train_many

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------------------------ the arithmetic


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows as preparation makes them; the better answer is of other tokens than the worse one."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(low, high) for _ in range(draw.randrange(2, 6))]

    return [
        {"prompt_ids": [1, *tokens(300, 800)], "chosen_ids": [*tokens(10, 40), 2], "rejected_ids": [*tokens(40, 70), 2]}
        for _ in range(count)
    ]


def thumbs(count: int, seed: int) -> list[dict[str, Any]]:
    """The same as single answers. All good ones come first, as they may in somebody's file."""
    rows, marks = pairs(count // 2, seed), (("chosen_ids", True), ("rejected_ids", False))
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row[side], "label": good}
        for side, good in marks
        for row in rows
    ]


BETA, EPSILON, TAU = 0.3, 0.1, 0.05


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-x))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def bco_pair(chosen: np.ndarray, rejected: np.ndarray, shift: float) -> np.ndarray:
    return -log_sigmoid(chosen - shift) - log_sigmoid(-(rejected - shift))


# Each paper's formula, from the log-ratios log π(y|x)/π_ref(y|x) of the chosen and the rejected answer, shape (B,), and
# from their lengths in tokens.
FORMULAS: dict[str, Callable[..., np.ndarray]] = {
    # Rafailov et al. 2023, equation 7
    "sigmoid": lambda c, r, *_: -log_sigmoid(BETA * (c - r)),
    # Zhao et al. 2023 (SLiC-HF), equation 1, with DPO's reward
    "hinge": lambda c, r, *_: np.maximum(0, 1 - BETA * (c - r)),
    # Azar et al. 2023, equation 17, with log-ratios per token as its authors compute them
    "ipo": lambda c, r, of_c, of_r: (c / of_c - r / of_r - 1 / (2 * BETA)) ** 2,
    # Chowdhury et al. 2024, equation 11
    "robust": lambda c, r, *_: (
        -((1 - EPSILON) * log_sigmoid(BETA * (c - r)) - EPSILON * log_sigmoid(BETA * (r - c))) / (1 - 2 * EPSILON)
    ),
    # Ji et al. 2024, equation 16: KL of softmax(β c, β r) from (1 - ε, ε)
    "exo_pair": lambda c, r, *_: (
        sigmoid(BETA * (c - r)) * np.log(sigmoid(BETA * (c - r)) / (1 - EPSILON))
        + sigmoid(BETA * (r - c)) * np.log(sigmoid(BETA * (r - c)) / EPSILON)
    ),
    # Chen et al. 2024 (NCA), two answers
    "nca_pair": lambda c, r, *_: -log_sigmoid(BETA * c) - 0.5 * log_sigmoid(-BETA * c) - 0.5 * log_sigmoid(-BETA * r),
    # Jung et al. 2024 (BCO), equation 8: the rewards, less what they are on average
    "bco_pair": lambda c, r, *_: bco_pair(BETA * c, BETA * r, BETA * (c.mean() + r.mean()) / 2),
    # Wu et al. 2024 (SPPO), equation 4.7 with η = 1/β and probabilities 1 and 0
    "sppo_hard": lambda c, r, *_: (c - (1 - 0.5) / BETA) ** 2 + (r - (0 - 0.5) / BETA) ** 2,
    # Melnyk et al. 2024, unpaired: quantiles of the better ones beside those of the worse ones
    "aot_unpaired": lambda c, r, *_: (
        -(1 - EPSILON) * log_sigmoid(BETA * (np.sort(c) - np.sort(r)))
        - EPSILON * log_sigmoid(BETA * (np.sort(r) - np.sort(c)))
    ),
    # D'Oosterlinck et al. 2024, equations 7 and 8, and 1 more
    "apo_zero": lambda c, r, *_: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
    "apo_down": lambda c, r, *_: sigmoid(BETA * c) + 1 - sigmoid(BETA * (c - r)),
    # Lu et al. 2024 (DiscoPOP), equation 5
    "discopop": lambda c, r, *_: (
        (1 - sigmoid(BETA * (c - r) / TAU)) * -log_sigmoid(BETA * (c - r))
        + sigmoid(BETA * (c - r) / TAU) * np.exp(-BETA * (c - r))
    ),
    # Lambert et al. 2024 (Tülu 3), equation 6
    "sigmoid_norm": lambda c, r, of_c, of_r: -log_sigmoid(BETA * (c / of_c - r / of_r)),
}


def dpo(loss: str, **more: Any) -> dict[str, Any]:
    smoothing = {"label_smoothing": EPSILON} if loss in LABEL_SMOOTHING_LOSSES else {}
    return {"kind": "dpo", "loss_type": loss, "beta": BETA, **smoothing, **more}


CASES: dict[str, dict[str, Any]] = {
    **{loss: dpo(loss) for loss in (*FORMULAS, "aot")},
    "with_sft": dpo("sigmoid", sft_weight=0.7),
    "kto": {"kind": "kto", "beta": BETA, "desirable_weight": 1.3, "undesirable_weight": 0.8},
    "orpo": {"kind": "orpo", "orpo_lambda": 0.4},
    "simpo": {"kind": "simpo", "simpo_beta": 2.0, "simpo_gamma": 1.2},
    "rm": {"kind": "rm"},
    "rm_centred": {"kind": "rm", "center_rewards_coefficient": 0.05},
}
ROWS = pairs(4, seed=0)


@pytest.fixture(scope="module")
def judged(tiny: Path) -> dict[str, dict[str, Any]]:
    """Of each case: the trainer's loss of one batch ("loss"), and the log-probabilities of its answers as arrays."""
    cases = [
        {"stage": stage, "rows": thumbs(6, seed=0) if stage["kind"] == "kto" else ROWS} for stage in CASES.values()
    ]
    told = json.loads(run_python("-m", "tests.judged", tiny, input=json.dumps(cases)).splitlines()[-1])
    arrays = ({name: np.array(value) for name, value in one.items()} for one in told)
    return dict(zip(CASES, arrays, strict=True))


def log_ratios(told: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    better, worse = (told[f"policy {side}"] - told[f"reference {side}"] for side in ("chosen", "rejected"))
    assert np.abs(better - worse).min() > 0.1  # else any formula would do
    return better, worse


def lengths() -> list[np.ndarray]:
    return [np.array([len(row[f"{side}_ids"]) for row in ROWS]) for side in ("chosen", "rejected")]


def test_every_loss_that_is_offered_is_worked_out_here() -> None:
    offered = Dpo.model_fields["loss_type"].annotation.__args__
    assert set(offered) == {*FORMULAS, "aot"}


@pytest.mark.parametrize("name", ["ld_alpha", "use_weighting"])
def test_bco_refuses_arguments_that_its_shift_does_not_know(name: str) -> None:
    for loss, codes in (("bco_pair", ["bco-pair-alone"]), ("sigmoid", [])):
        spec = RunSpec.read({"stage": dpo(loss), "extra": {name: 0.5 if name == "ld_alpha" else True}})
        assert [one.code for one in spec_problems(spec) if one.field == "extra"] == codes


@pytest.mark.parametrize("loss", FORMULAS)
def test_a_dpo_loss_has_the_value_of_its_formula(judged: dict[str, dict[str, Any]], loss: str) -> None:
    expected = FORMULAS[loss](*log_ratios(judged[loss]), *lengths()).mean()
    assert judged[loss]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_bco_shifts_by_the_mean_of_all_rewards_so_far_on_all_devices(
    tiny: Path, tmp_path: Path, processes: int
) -> None:
    spec = RunSpec.read(
        {
            "model": {"model_name_or_path": str(tiny)},
            "stage": dpo("bco_pair", sft_weight=0.7),
            "data": {"datasets": ["x"]},
            "method": {"kind": "full"},
            "training": {"gradient_checkpointing": False, "per_device_train_batch_size": 2},
            "hardware": {"device": "cpu", "num_processes": processes},
        }
    )
    batches = [pairs(4, seed=3), pairs(4, seed=4)]
    write_text(tmp_path / "spec.yaml", spec.to_yaml())
    write_json(tmp_path / "batches.json", batches)
    environment = command.environment(spec, tmp_path, gpus=(), threads=2)
    run_ranks(processes, "-m", "tests.shifted", tmp_path, env=environment)
    ranks = [read_json(tmp_path / f"rank-{rank}.json") for rank in range(processes)]
    rewards: list[float] = []
    for number, batch in enumerate(batches):
        parts = [rank["batches"][number] for rank in ranks]
        implied = [
            [BETA * np.subtract(part["policy"][side], part["reference"][side]) for side in ("chosen", "rejected")]
            for part in parts
        ]
        rewards += np.concatenate(implied, axis=None).tolist()
        shift = np.mean(rewards)
        assert abs(shift) > 0.05  # else the loss would be TRL's
        share = len(batch) // processes
        for rank, (part, (better, worse)) in enumerate(zip(parts, implied, strict=True)):
            tokens = sum(len(row["chosen_ids"]) for row in batch[rank * share : (rank + 1) * share])
            of_answers = -sum(part["policy"]["chosen"]) / tokens
            assert part["loss"] == pytest.approx(bco_pair(better, worse, shift).mean() + 0.7 * of_answers, rel=1e-4)
            assert part["shift"] == pytest.approx(shift, rel=1e-4)
    assert all(rank["shift_after_measuring"] == rank["batches"][-1]["shift"] for rank in ranks)


def test_aot_compares_the_quantiles_of_the_leads(judged: dict[str, dict[str, Any]]) -> None:
    told = judged["aot"]  # Melnyk et al. 2024, paired: the model's leads, sorted, beside the reference's
    now, before = (np.sort(told[f"{one} chosen"] - told[f"{one} rejected"]) for one in ("policy", "reference"))
    lead = BETA * (now - before)
    expected = (-(1 - EPSILON) * log_sigmoid(lead) - EPSILON * log_sigmoid(-lead)).mean()
    assert told["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_answer_loss_is_added_with_its_weight(judged: dict[str, dict[str, Any]]) -> None:
    told = judged["with_sft"]
    per_token = -told["policy chosen"].sum() / lengths()[0].sum()
    expected = FORMULAS["sigmoid"](*log_ratios(told)).mean() + 0.7 * per_token
    assert told["loss"] == pytest.approx(expected, rel=1e-4)


def test_kto_has_the_value_of_its_formula_and_measures_drift_with_exchanged_answers(
    judged: dict[str, dict[str, Any]],
) -> None:
    told, rows = judged["kto"], thumbs(6, seed=0)  # Ethayarajh et al. 2024, equations 7 and 8
    ratio, exchanged = (told[f"policy {name}"] - told[f"reference {name}"] for name in ("completion", "exchanged"))
    drift = max(exchanged.mean(), 0)
    assert abs(exchanged.mean()) > 0.1
    good = np.array([row["label"] for row in rows])
    value = np.where(good, sigmoid(BETA * (ratio - drift)), sigmoid(BETA * (drift - ratio)))
    expected = (np.where(good, 1.3, 0.8) * (1 - value)).mean()
    assert told["loss"] == pytest.approx(expected, rel=1e-4)


def test_orpo_has_the_value_of_its_formula(judged: dict[str, dict[str, Any]]) -> None:
    told = judged["orpo"]  # Hong et al. 2024, equations 4 to 7
    better, worse = (
        told[f"policy {side}"] / length for side, length in zip(("chosen", "rejected"), lengths(), strict=True)
    )
    odds_w, odds_l = (np.exp(one) / (1 - np.exp(one)) for one in (better, worse))
    expected = (-better + 0.4 * -log_sigmoid(np.log(odds_w / odds_l))).mean()
    assert told["loss"] == pytest.approx(expected, rel=1e-4)


def test_simpo_has_the_value_of_its_formula(judged: dict[str, dict[str, Any]]) -> None:
    told = judged["simpo"]  # Meng et al. 2024, equation 6
    of_w, of_l = lengths()
    lead = 2.0 / of_w * told["policy chosen"] - 2.0 / of_l * told["policy rejected"] - 1.2
    assert told["loss"] == pytest.approx(-log_sigmoid(lead).mean(), rel=1e-4)


def test_a_reward_model_has_the_loss_of_bradley_and_terry(judged: dict[str, dict[str, Any]]) -> None:
    for name, centre in (("rm", 0), ("rm_centred", 0.05)):
        told = judged[name]
        better, worse = told["policy chosen"], told["policy rejected"]
        expected = -log_sigmoid(better - worse).mean() + centre * ((better + worse) ** 2).mean()
        assert told["loss"] == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------- the training

LORA = {"training.learning_rate": 5e-3}
WHOLE = {"method": {"kind": "full"}, "training.learning_rate": 1e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "rm": {"stage": {"kind": "rm"}, **LORA},
    "rm_full": {"stage": {"kind": "rm"}, **WHOLE},
    "rm_freeze": {"stage": {"kind": "rm"}, "method": {"kind": "freeze", "trainable_layers": 1}, **LORA},
    "rm_bf16": {"stage": {"kind": "rm"}, "training.precision": "bf16", **LORA},
    "rm_pissa": {"stage": {"kind": "rm"}, "method.init_lora_weights": "pissa", **LORA},
    "rm_qlora": {"stage": {"kind": "rm"}, "model.quantization": {"kind": "4bit"}, **LORA},
    "rm_stretched": {"stage": {"kind": "rm"}, "model.rope_scaling": {"kind": "linear", "factor": 4.0}, **WHOLE},
    "dpo": {"stage": {"kind": "dpo"}, "method.lora_dropout": 0.2, **LORA},
    "dpo_full": {"stage": {"kind": "dpo", "loss_type": "ipo"}, **WHOLE},
    "dpo_bco": {"stage": {"kind": "dpo", "loss_type": "bco_pair"}, **LORA},
    "dpo_freeze": {"stage": {"kind": "dpo"}, "method": {"kind": "freeze", "trainable_layers": 1}, **LORA},
    "dpo_pissa": {"stage": {"kind": "dpo"}, "method.init_lora_weights": "pissa", **LORA},
    "kto": {"stage": {"kind": "kto"}, "training.per_device_eval_batch_size": 20, **LORA},
    "kto_all_good": {"stage": {"kind": "kto"}},
    "orpo": {"stage": {"kind": "orpo", "orpo_lambda": 1.0}, "training.gradient_checkpointing": True, **LORA},
    "simpo": {"stage": {"kind": "simpo"}, "training.gradient_accumulation_steps": 2, **LORA},
}
ON = {"training.learning_rate": 1e-3}  # what has learned already is moved more gently
# These begin with what the others have left.
CONTINUED: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo_after_dpo": ("dpo", {"stage": {"kind": "dpo"}, **ON}),
    "dpo_after_dpo_quantized": ("dpo", {"stage": {"kind": "dpo"}, "model.quantization": {"kind": "4bit"}, **ON}),
    "rm_after_dpo": ("dpo", {"stage": {"kind": "rm"}, **ON}),
    "rm_after_rm": ("rm", {"stage": {"kind": "rm"}, **ON}),
}
FAILING = ("kto_all_good",)
EVERY = [name for name in (*VARIANTS, *CONTINUED) if name not in FAILING]
REWARD = [name for name in EVERY if name.startswith("rm")]
WRITERS = [name for name in EVERY if name not in REWARD]
RESUMED = (
    "rm",
    "rm_qlora",
    "dpo",
    "dpo_full",
    "dpo_pissa",
    "dpo_after_dpo",
    "dpo_bco",
    "kto",
    "orpo",
    "simpo",
)
STEPS = 24


def lay_out(run: RunDir, tiny: Path, changes: dict[str, Any]) -> RunDir:
    """A run whose rows are prepared already."""
    spec = RunSpec.read(
        {
            "model": {"model_name_or_path": str(tiny)},
            "data": {"datasets": ["toy"], "dataset_dir": str(run.path), "max_length": 64, "validation_share": 0.2},
            "training": {
                "max_steps": STEPS,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": False,
                "per_device_eval_batch_size": 20,
            },
            "logging": {"logging_steps": 1, "save_steps": STEPS // 2, "eval_steps": STEPS // 2, "plot_loss": False},
            "hardware": {"device": "cpu"},
        }
    )
    for path, value in changes.items():
        spec = spec.change(path, value)
    run.prepared.mkdir(parents=True)
    write_text(run.spec, spec.to_yaml())
    write_json(run.request, {"by": "", "submitted": 0, "queued": 0, "attempt": 1, "stop": None})
    made = thumbs if spec.stage.kind == "kto" else pairs
    for split, count, seed in (("train", 80, 1), ("validation", 20, 2)):
        write_rows(run.prepared / f"{split}.arrow", made(count, seed))
    write_json(run.prepared / "summary.json", {"model_path": str(tiny), "splits": ["train", "validation"]})
    return run


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as file:
        file.write_table(table)


def train(*folders: RunDir) -> None:
    """Train them one after the other in one child process, which pays for its imports once, as far as they go."""
    train_many(*folders)
    failed = [read_json(run.error) for run in folders if run.error.exists() and run.path.name not in FAILING]
    assert not failed, failed[0]["traceback"]


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    root = tmp_path_factory.mktemp("preference")
    folders = {name: lay_out(RunDir(root / name), tiny, changes) for name, changes in VARIANTS.items()}
    for name, (first, changes) in CONTINUED.items():
        start = {"model.adapter_path": str(folders[first].adapter)}
        folders[name] = lay_out(RunDir(root / name), tiny, {**changes, **start})
    good = [row for row in thumbs(80, 1) if row["label"]]
    write_rows(folders["kto_all_good"].prepared / "train.arrow", good)
    train(*folders.values())
    return folders


@pytest.fixture(scope="module")
def resumed(trained: dict[str, RunDir]) -> dict[str, RunDir]:
    """Copies of the runs as they were when half of the steps were done, trained from there to the end."""
    copies = {}
    for name in RESUMED:
        run = trained[name]
        copy = RunDir(run.path.with_name(f"{name}_resumed"))
        shutil.copytree(run.path, copy.path)
        shutil.rmtree(copy.path / f"checkpoint-{STEPS}")
        shutil.rmtree(copy.result())
        copies[name] = copy
    train(*copies.values())
    return copies


@pytest.fixture(scope="module")
def reread(trained: dict[str, RunDir]) -> dict[str, dict[str, list[float]]]:
    """What a process that did not train finds in each result."""
    printed = run_python("-m", "tests.reread", *(trained[name].result() for name in EVERY))
    return dict(zip(EVERY, json.loads(printed.splitlines()[-1]), strict=True))


def curve(run: RunDir, name: str) -> list[float]:
    return [line[name] for line in read_lines(run.metrics) if name in line]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_half_way_ends_with_the_same_weights(
    trained: dict[str, RunDir], resumed: dict[str, RunDir], name: str
) -> None:
    whole, two = (next(run.result().glob("*model.safetensors")).read_bytes() for run in (trained[name], resumed[name]))
    assert whole == two
    measured = [line["step"] for line in read_lines(resumed[name].metrics) if "eval_loss" in line]
    assert measured.count(STEPS // 2) == 1  # not once more as if that were a start
    assert read_json(resumed[name].result() / "result.json")["complete"]


@pytest.mark.parametrize("name", ["dpo", "dpo_freeze", "dpo_pissa", "dpo_after_dpo", "dpo_after_dpo_quantized"])
def test_a_model_begins_where_its_reference_is(trained: dict[str, RunDir], name: str) -> None:
    assert curve(trained[name], "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert curve(trained[name], "rewards/margins")[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_the_better_answers_come_to_lead(trained: dict[str, RunDir], name: str) -> None:
    run = trained[name]
    untrained, *later = curve(run, "eval_rewards/margins")
    assert min(later) > untrained
    assert curve(run, "eval_loss")[-1] < curve(run, "eval_loss")[0]
    if name != "kto":  # which knows no pairs
        assert curve(run, "eval_rewards/accuracies")[-1] > 0.7


@pytest.mark.parametrize("name", ["dpo", "dpo_full", "dpo_freeze", "dpo_pissa"])
def test_what_is_left_prefers_as_the_last_validation_said(
    trained: dict[str, RunDir], reread: dict[str, dict[str, list[float]]], name: str
) -> None:
    told = {key: np.array(value) for key, value in reread[name].items()}
    lead = (told["chosen"] - told["chosen before"]) - (told["rejected"] - told["rejected before"])
    assert 0.1 * lead.mean() == pytest.approx(curve(trained[name], "eval_rewards/margins")[-1], abs=1e-4)


def test_a_continued_adapter_is_compared_with_what_it_was_and_not_with_the_base(
    trained: dict[str, RunDir], reread: dict[str, dict[str, list[float]]]
) -> None:
    first, second = ({key: np.array(value) for key, value in reread[name].items()} for name in ("dpo", "dpo_after_dpo"))
    lead = (second["chosen"] - first["chosen"]) - (second["rejected"] - first["rejected"])
    run = trained["dpo_after_dpo"]
    assert 0.1 * lead.mean() == pytest.approx(curve(run, "eval_rewards/margins")[-1], abs=1e-4)
    assert [path.name for path in run.adapter.iterdir() if path.is_dir()] == []  # the reference is no result


@pytest.mark.parametrize(("name", "scale"), [("orpo", 1.0), ("simpo", 2.0)])
def test_what_is_left_without_a_reference_prefers_as_the_last_validation_said(
    trained: dict[str, RunDir], reread: dict[str, dict[str, list[float]]], name: str, scale: float
) -> None:
    told = {key: np.array(value) for key, value in reread[name].items()}
    lead = told["chosen"] / told["chosen tokens"] - told["rejected"] / told["rejected tokens"]
    assert scale * lead.mean() == pytest.approx(curve(trained[name], "eval_rewards/margins")[-1], abs=1e-4)


def test_what_kto_leaves_prefers_as_the_last_validation_said(
    trained: dict[str, RunDir], reread: dict[str, dict[str, list[float]]]
) -> None:
    told = {key: np.array(value) for key, value in reread["kto"].items()}
    good, bad = ((told[side] - told[f"{side} before"]).mean() for side in ("chosen", "rejected"))
    assert 0.1 * (good - bad) == pytest.approx(curve(trained["kto"], "eval_rewards/margins")[-1], abs=1e-4)


@pytest.mark.parametrize("name", [name for name in REWARD if name != "rm_freeze"])
def test_a_reward_model_ranks_pairs_it_has_not_seen(trained: dict[str, RunDir], name: str) -> None:
    told = read_json(trained[name].result() / "evaluation.json")
    assert (told["split"], told["pairs"]) == ("validation", 20)
    assert told["accuracy"] >= 0.9
    assert told["margin"] > 0.5


@pytest.mark.parametrize("name", REWARD)
def test_a_reward_model_scores_the_same_in_a_fresh_process(
    trained: dict[str, RunDir], reread: dict[str, dict[str, list[float]]], name: str
) -> None:
    written = read_lines(trained[name].result() / "evaluation_pairs.jsonl")
    assert len(written) == 20
    for side in ("chosen", "rejected"):
        assert [one[f"{side}_score"] for one in written] == pytest.approx(reread[name][side], abs=1e-5)


@pytest.mark.parametrize("name", ["rm", "rm_full", "rm_after_dpo", "rm_after_rm"])
def test_the_weights_of_a_reward_model_are_counted_with_its_head_before_it_starts(
    trained: dict[str, RunDir], name: str
) -> None:
    run = trained[name]
    spec = RunSpec.from_yaml(run.spec.read_text(encoding="utf-8"))
    left = read_header(next(run.result().glob("*model.safetensors")))
    assert trained_parameters(spec) == sum(math.prod(tensor.shape) for tensor in left.values())


def test_a_reward_model_of_an_adapter_that_wrote_begins_with_what_it_knew(trained: dict[str, RunDir]) -> None:
    fresh, after = (curve(trained[name], "loss")[0] for name in ("rm", "rm_after_dpo"))
    assert after != fresh  # the same head, and another body
    assert curve(trained["rm_after_rm"], "loss")[0] < 0.4  # and this one with its head


def test_thumbs_of_one_kind_are_refused_with_their_count(trained: dict[str, RunDir]) -> None:
    error = read_json(trained["kto_all_good"].error)
    assert error["problems"][0]["code"] == "thumbs-all-good"
    assert "40" in error["message"]
