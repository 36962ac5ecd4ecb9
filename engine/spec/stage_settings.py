"""Settings of each stage, which is the kind of training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from engine.spec.fields import choices
from engine.spec.parts import Part, named_weights, setting


class Pretraining(Part):
    """Pre-training: the model reads plain text and learns to continue it."""

    kind: Literal["pt"] = "pt"


class Sft(Part):
    """Supervised fine-tuning: the model learns to answer like the examples."""

    kind: Literal["sft"] = "sft"
    train_on: Literal["answers", "last_answer", "everything"] = setting(
        "answers",
        "Trained turns",
        "Every assistant turn, only the last one, or the questions too.",
    )


class RewardModel(Part):
    """Reward model: the model learns to score the better of two answers higher."""

    kind: Literal["rm"] = "rm"
    center_rewards_coefficient: float | None = setting(
        None,
        "Reward centering",
        "Pulls the mean score towards zero (Eisenstein et al. 2023), typically 0.01. Leave empty to turn it off.",
        gt=0,
        le=10,
    )


DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm",
]  # fmt: skip
LABEL_SMOOTHING_LOSSES = (
    "robust",
    "exo_pair",
    "aot",
    "aot_unpaired",
)  # losses whose formula contains label smoothing


class Preference(Part):
    """Settings of the stages that stay close to a frozen reference."""

    beta: float = setting(
        0.1,
        "Beta",
        "How strongly the model is kept close to the reference model; a higher value keeps it closer. "
        "Typically 0.05 to 0.5.",
        essential=True,
        gt=0,
        le=100,
    )


class Dpo(Preference):
    """DPO: the model learns from pairs to prefer the better answer, without a reward model (Rafailov et al. 2023)."""

    kind: Literal["dpo"] = "dpo"
    loss_type: DpoLoss = setting(
        "sigmoid",
        "Loss",
        "sigmoid is the original DPO loss; ipo overfits less on clear-cut pairs; robust tolerates wrong labels.",
        essential=True,
    )
    label_smoothing: float = setting(
        0.0,
        "Label smoothing",
        "Estimated share of pairs whose labels are swapped. For robust, exo_pair and aot.",
        ge=0,
        lt=0.5,
    )
    sft_weight: float = setting(
        0.0,
        "SFT loss weight",
        "Weight of the SFT loss on the better answer, added to keep its probability from falling.",
        ge=0,
        le=100,
    )


class Kto(Preference):
    """KTO: the model learns from single answers marked good or bad (Ethayarajh et al. 2024)."""

    kind: Literal["kto"] = "kto"
    desirable_weight: float = setting(
        1.0,
        "Weight of good answers",
        "If good answers are rarer than bad ones, raise this until weight × count is about equal on both sides.",
        gt=0,
        le=1000,
    )
    undesirable_weight: float = setting(
        1.0, "Weight of bad answers", "If bad answers are rarer than good ones, raise this.", gt=0, le=1000
    )


class Orpo(Part):
    """ORPO: the model learns to answer and to prefer in one stage, without a reference model (Hong et al. 2024)."""

    kind: Literal["orpo"] = "orpo"
    orpo_lambda: float = setting(
        0.1, "Lambda", "Weight of the odds-ratio loss, which is added to the SFT loss.", essential=True, gt=0, le=100
    )


class Simpo(Part):
    """SimPO: the model learns preferences from average log-probabilities,
    without a reference model (Meng et al. 2024)."""

    kind: Literal["simpo"] = "simpo"
    simpo_beta: float = setting(
        2.0,
        "SimPO beta",
        "Scales the difference between the two answers, typically 2 to 2.5.",
        essential=True,
        gt=0,
        le=100,
    )
    simpo_gamma: float = setting(
        1.0,
        "SimPO margin",
        "Target margin between the better and the worse answer, typically 0.5 to 1.5.",
        essential=True,
        ge=0,
        le=100,
    )


class Answering(Part):
    """Settings of the stages in which the model generates answers that are scored."""

    max_new_tokens: int = setting(
        256,
        "Max answer length",
        "Answers are cut off after this many tokens. Most of each step is spent generating them.",
        essential=True,
        ge=1,
        le=10**6,
    )
    temperature: float = setting(
        1.0,
        "Temperature",
        "How random the sampling is. Near 0, all answers are alike and nothing can be learned.",
        gt=0,
        le=10,
    )
    top_p: float = setting(
        1.0,
        "Top-p",
        "Samples only from the most likely tokens that add up to this probability. 1 means all tokens.",
        gt=0,
        le=1,
    )
    reward_model: str = setting(
        "",
        "Reward model",
        "Result folder of a finished reward model run. It scores the answers.",
        essential=True,
        max_length=1024,
    )
    sample_steps: int = setting(
        10,
        "Sample answers every",
        "Optimizer steps between the sample answers shown on the run's page.",
        ge=1,
        le=10**9,
    )


class Ppo(Answering):
    """PPO: the model generates answers, a reward model scores them, and better
    ones become more likely (Schulman et al. 2017)."""

    kind: Literal["ppo"] = "ppo"
    init_kl_coef: float = setting(
        0.05,
        "Initial KL coefficient",
        "How strongly the model is kept close to the reference model: raise it if answers turn into "
        "gibberish, lower it if the reward does not rise.",
        essential=True,
        ge=0,
        le=100,
    )
    kl_target: float | None = setting(
        None,
        "KL target",
        "Adapts the KL coefficient so that an answer's mean KL to the reference model stays near this many "
        "nats, typically 6. Leave empty for a constant coefficient.",
        gt=0,
        le=10_000,
    )
    kl_horizon: int = setting(
        10_000,
        "KL horizon",
        "Number of answers over which the adaptive KL coefficient changes by at most 20 %. Only used with a KL target.",
        ge=1,
        le=10**9,
    )
    missing_eos_penalty: float | None = setting(
        1.0,
        "Missing-EOS penalty",
        "Subtracted from the score of an answer that is cut off before it ends, so that the model learns to "
        "finish. Leave empty for none.",
        ge=0,
        le=10_000,
    )
    score_clip: float | None = setting(
        None,
        "Score clipping",
        "Clips scores to ± this value, so that outliers do not dominate. Leave empty for no clipping.",
        gt=0,
        le=10_000,
    )
    num_ppo_epochs: int = setting(
        4,
        "PPO epochs",
        "Passes over each batch of answers before new ones are generated.",
        ge=1,
        le=1000,
    )
    num_mini_batches: int = setting(
        1,
        "Mini-batches",
        "Updates per pass over a batch of answers. More learn faster, but less stably.",
        ge=1,
        le=65536,
    )
    cliprange: float = setting(
        0.2,
        "Clip range",
        "Limits how far a token's probability can profitably change in one step, as a share of it.",
        gt=0,
        lt=1,
    )
    cliprange_value: float = setting(
        0.2,
        "Value clip range",
        "The same limit for the critic's estimates, in units of reward.",
        gt=0,
        le=10_000,
    )
    vf_coef: float = setting(
        0.1,
        "Value loss coefficient",
        "Weight of the critic's loss relative to the policy loss.",
        ge=0,
        le=100,
    )
    gamma: float = setting(
        1.0,
        "Discount factor",
        "Discounts a reward for each token it lies ahead. 1 means no discount.",
        gt=0,
        le=1,
    )
    lam: float = setting(
        0.95,
        "GAE lambda",
        "1 relies on rewards alone; lower values rely more on the critic (Schulman et al. 2016).",
        ge=0,
        le=1,
    )
    whiten_rewards: bool = setting(
        False,
        "Whiten rewards",
        "Scales each batch of rewards to unit variance. For reward models with very large or very small scores.",
    )


GrpoLoss = Literal["dapo", "grpo", "dr_grpo", "bnpo", "luspo", "cispo", "sapo", "vespo"]
Reward = Literal[
    "format", "exact", "numeric", "contains", "contains_ignore_case", "rouge_1", "rouge_2", "rouge_l", "bleu", "length",
    "reward_model", "file",
]  # fmt: skip
# Rewards that compare the answer with the one in the data.
COMPARING_REWARDS = (
    "exact", "numeric", "contains", "contains_ignore_case", "rouge_1", "rouge_2", "rouge_l", "bleu",
)  # fmt: skip
# The setting that a reward requires.
SETTING_BY_REWARD = {
    "format": "reward_pattern",
    "length": "reward_length",
    "reward_model": "reward_model",
    "file": "reward_file",
}


class Grpo(Answering):
    """GRPO: several answers to each question are scored, and the better ones become more likely (Shao et al. 2024)."""

    kind: Literal["grpo"] = "grpo"
    rewards: Annotated[
        dict[Reward, Annotated[float, Field(ge=-1000, le=1000)]],
        BeforeValidator(named_weights, json_schema_input_type=list[Reward] | dict[Reward, float]),
    ] = setting(
        {},
        "Rewards",
        "What makes an answer good. Rewards are multiplied by their weights and added up; a negative weight "
        "is a penalty.",
        essential=True,
    )
    reward_pattern: str | None = setting(
        None,
        "Format pattern",
        "For the format reward: a regular expression that the whole answer must match, such as .*Answer: "
        "[0-9]+ (a dot matches any character, line breaks included). 1 if it matches, else 0.",
        max_length=1000,
    )
    reward_length: int | None = setting(
        None,
        "Target length",
        "For the length reward, in tokens: 1 at exactly this length, less the further away.",
        ge=1,
        le=10**6,
    )
    reward_file: str | None = setting(
        None,
        "Reward file",
        "For the file reward: a Python file that defines reward(prompt, completion, answer) -> float. prompt "
        "is the list of messages, completion the text of the answer, answer the reference in the data or "
        "None. It must be in a folder that the operator has allowed with --reward-files.",
        max_length=1024,
    )
    num_generations: int = setting(
        8,
        "Group size",
        "Answers per question. Each is compared with the others in its group.",
        essential=True,
        ge=2,
        le=1024,
    )
    grpo_beta: float = setting(
        0.0,
        "KL coefficient",
        "How strongly the model is kept close to the reference model. 0: not at all, which also saves the "
        "reference's memory. Typically 0.001 to 0.04.",
        ge=0,
        le=100,
    )
    epsilon: float = setting(
        0.2,
        "Lower clip range",
        "Clips the ratio of new to old probability at 1 minus this value.",
        gt=0,
        le=1,
    )
    epsilon_high: float | None = setting(
        None,
        "Upper clip range",
        "Clips the ratio at 1 plus this value. Leave empty to use the lower value; DAPO uses 0.28 (Yu et al. 2025).",
        gt=0,
        le=100,
    )
    grpo_loss: GrpoLoss = setting(
        "dapo",
        "GRPO loss",
        "dapo weights all tokens equally; grpo weights all answers equally, so tokens of short answers count "
        "more; dr_grpo divides by the max answer length.",
    )
    importance_sampling_level: Literal["token", "sequence"] = setting(
        "token",
        "Importance sampling",
        "Compares new and old probability per token, or per answer (GSPO, Zheng et al. 2025).",
    )
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group",
        "Scale rewards",
        "Divides the difference from the group's mean by the standard deviation of the group, or of the whole batch.",
    )
    num_iterations: int = setting(
        1,
        "Updates per batch",
        "How many times the same answers are trained on. More is cheaper, but less stable.",
        ge=1,
        le=100,
    )
    mask_truncated_completions: bool = setting(
        False,
        "Ignore truncated answers",
        "Learns nothing from answers that were cut off at the max answer length.",
    )


AnyStage = Pretraining | Sft | RewardModel | Dpo | Kto | Orpo | Simpo | Ppo | Grpo
STAGE_SETTINGS = choices(AnyStage)
