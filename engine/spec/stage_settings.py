"""Settings of each stage: what kind of learning a training is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from engine.spec.parts import Part, named_weights, setting


class Pretraining(Part):
    """Pre-training: the model reads plain text and learns to continue it."""

    kind: Literal["pt"] = "pt"


class Sft(Part):
    """Supervised fine-tuning: the model learns to answer as the examples answer."""

    kind: Literal["sft"] = "sft"
    train_on: Literal["answers", "last_answer", "everything"] = setting(
        "answers", "Trained turns",
        "answers: every assistant turn. last_answer: only the last. everything: the questions too.",
    )  # fmt: skip


class RewardModel(Part):
    """Reward model: the model learns to give the better of two answers the higher score."""

    kind: Literal["rm"] = "rm"
    center_rewards_coefficient: float | None = setting(
        None, "Centre the scores",
        "Pulls the scores towards zero mean (Eisenstein et al. 2023); 0.01 is usual. Empty: not at all.", gt=0, le=10,
    )  # fmt: skip


DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm",
]  # fmt: skip
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # losses whose formula has label smoothing in it


class Preference(Part):
    """What the stages share that keep near a frozen reference."""

    beta: float = setting(
        0.1, "Beta",
        "How strongly the model is held to what it was before: larger stays nearer. 0.05 to 0.5 is usual.",
        essential=True, gt=0, le=100,
    )  # fmt: skip


class Dpo(Preference):
    """DPO: the model learns from pairs to prefer the better answer, without a reward model (Rafailov et al. 2023)."""

    kind: Literal["dpo"] = "dpo"
    loss_type: DpoLoss = setting(
        "sigmoid", "Loss", "sigmoid is DPO's own; ipo overfits less on clear-cut pairs; robust allows for wrong labels.",
        essential=True,
    )  # fmt: skip
    label_smoothing: float = setting(
        0.0, "Label smoothing", "Share of the pairs thought to be labelled the wrong way round. For robust, exo_pair and aot.",
        ge=0, lt=0.5,
    )  # fmt: skip
    sft_weight: float = setting(
        0.0, "Answer loss", "Weight of the ordinary loss on the better answer, added to keep its probability up.",
        ge=0, le=100,
    )  # fmt: skip


class Kto(Preference):
    """KTO: the model learns from single answers marked good or bad (Ethayarajh et al. 2024)."""

    kind: Literal["kto"] = "kto"
    desirable_weight: float = setting(
        1.0, "Weight of good answers",
        "If good answers are rarer than bad ones, raise it until weight × count is about equal on both sides.", gt=0, le=1000,
    )  # fmt: skip
    undesirable_weight: float = setting(
        1.0, "Weight of bad answers", "If bad answers are rarer than good ones, raise it.", gt=0, le=1000
    )


class Orpo(Part):
    """ORPO: answering and preferring are learned at once, without a reference model (Hong et al. 2024)."""

    kind: Literal["orpo"] = "orpo"
    orpo_lambda: float = setting(
        0.1, "Lambda", "Weight of the odds ratio of better to worse answer, beside the ordinary loss.",
        essential=True, gt=0, le=100,
    )  # fmt: skip


class Simpo(Part):
    """SimPO: preference by average log-probability, without a reference model (Meng et al. 2024)."""

    kind: Literal["simpo"] = "simpo"
    simpo_beta: float = setting(
        2.0, "SimPO beta", "Scale of the difference; 2 to 2.5 is usual.", essential=True, gt=0, le=100
    )
    simpo_gamma: float = setting(
        1.0, "SimPO margin", "By how much the better answer is to lead; 0.5 to 1.5 is usual.",
        essential=True, ge=0, le=100,
    )  # fmt: skip


class Answering(Part):
    """What the stages share in which the model writes answers of its own, and these are scored."""

    max_new_tokens: int = setting(
        256, "Longest answer", "An answer is cut off after this many tokens. Most of the time of a step goes into writing them.",
        essential=True, ge=1, le=10**6,
    )  # fmt: skip
    temperature: float = setting(
        1.0, "Temperature", "How freely the answers are drawn. Near 0 all of them are alike, and nothing can be learned.",
        gt=0, le=10,
    )  # fmt: skip
    top_p: float = setting(
        1.0, "Top p", "Draw only from the likeliest tokens that make up this share. 1: from all.", gt=0, le=1
    )
    reward_model: str = setting(
        "", "Reward model", "Result folder of a finished reward model run, which scores the answers.",
        essential=True, max_length=1024,
    )  # fmt: skip
    sample_steps: int = setting(
        10, "Show answers every", "Optimizer steps between two looks at a few of the answers, on the run's page.",
        ge=1, le=10**9,
    )  # fmt: skip


class Ppo(Answering):
    """PPO: the model writes answers of its own, a reward model scores them, and better ones become likelier (Schulman et al. 2017)."""

    kind: Literal["ppo"] = "ppo"
    init_kl_coef: float = setting(
        0.05, "KL weight",
        "How strongly the model is held to what it was before: raise it if answers turn into gibberish, lower it if the reward does not rise.",
        essential=True, ge=0, le=100,
    )  # fmt: skip
    kl_target: float | None = setting(
        None, "KL target",
        "The weight is adapted so that an answer is on average this far (in nats) from what the model would have written before; 6 is usual. Empty: the weight stays.",
        gt=0, le=10_000,
    )  # fmt: skip
    kl_horizon: int = setting(
        10_000,
        "KL horizon",
        "Answers in which an adapted weight moves by at most 20 %. Only with a target.",
        ge=1,
        le=10**9,
    )
    missing_eos_penalty: float | None = setting(
        1.0, "Penalty without an end",
        "Taken from the score of an answer that is broken off before it ends, so that the model learns to finish. Empty: none.",
        ge=0, le=10_000,
    )  # fmt: skip
    score_clip: float | None = setting(
        None,
        "Score limit",
        "Scores beyond ± this are cut to it, so that single ones do not decide. Empty: never.",
        gt=0,
        le=10_000,
    )
    num_ppo_epochs: int = setting(
        4,
        "Passes",
        "How many times the model learns from each batch of answers before it writes new ones.",
        ge=1,
        le=1000,
    )
    num_mini_batches: int = setting(
        1,
        "Parts of a batch",
        "Updates in each pass over a batch of answers. More are faster and less steady.",
        ge=1,
        le=65536,
    )
    cliprange: float = setting(
        0.2,
        "Clip range",
        "A token's probability gains nothing by changing more than this share in one step.",
        gt=0,
        lt=1,
    )
    cliprange_value: float = setting(
        0.2,
        "Clip range of values",
        "The same for what the critic expects, in units of reward.",
        gt=0,
        le=10_000,
    )
    vf_coef: float = setting(
        0.1, "Weight of the critic", "Weight of the critic's loss beside the policy's.", ge=0, le=100
    )
    gamma: float = setting(
        1.0,
        "Discount",
        "How much less a reward counts for each token it lies ahead. 1: nothing less.",
        gt=0,
        le=1,
    )
    lam: float = setting(
        0.95,
        "GAE lambda",
        "1 trusts the rewards alone, lower values trust the critic more (Schulman et al. 2016).",
        ge=0,
        le=1,
    )
    whiten_rewards: bool = setting(
        False,
        "Whiten rewards",
        "Scale the rewards of each batch to variance 1. For reward models whose scores are very large or small.",
    )


GrpoLoss = Literal["dapo", "grpo", "dr_grpo", "bnpo", "luspo", "cispo", "sapo", "vespo"]
Reward = Literal["format", "exact", "numeric", "length", "reward_model", "file"]
# What a reward cannot do without.
REWARD_NEEDS = {
    "format": "reward_pattern", "length": "reward_length", "reward_model": "reward_model", "file": "reward_file",
}  # fmt: skip


class Grpo(Answering):
    """GRPO: several answers to each question are scored, and the better ones become likelier (Shao et al. 2024)."""

    kind: Literal["grpo"] = "grpo"
    rewards: Annotated[
        dict[Reward, Annotated[float, Field(ge=-1000, le=1000)]],
        BeforeValidator(named_weights, json_schema_input_type=list[Reward] | dict[Reward, float]),
    ] = setting(
        {}, "Rewards",
        "What makes an answer good. Each is multiplied by its weight, and all are added up; a negative weight punishes.",
        essential=True,
    )  # fmt: skip
    reward_pattern: str | None = setting(
        None, "Pattern of the format",
        "For the reward format: a regular expression that the whole answer must match, such as .*Answer: [0-9]+ "
        "(a dot is any character, line breaks too). 1 if it does, else 0.",
        max_length=1000,
    )  # fmt: skip
    reward_length: int | None = setting(
        None, "Wanted length", "For the reward length, in tokens: 1 for just as many, the less the further away.",
        ge=1, le=10**6,
    )  # fmt: skip
    reward_file: str | None = setting(
        None, "Reward file",
        "For the reward file: Python that defines reward(prompt, completion, answer) -> float. prompt is the list of "
        "messages, completion the text of the answer, answer the one in the data or None. "
        "Only below a folder that the operator named with --reward-files.",
        max_length=1024,
    )  # fmt: skip
    num_generations: int = setting(
        8, "Group size", "Answers to each question. Each is judged against the others of its group.",
        essential=True, ge=2, le=1024,
    )  # fmt: skip
    grpo_beta: float = setting(
        0.0, "KL coefficient",
        "How strongly the model is held to what it was before. 0: not at all, and no memory for a reference. 0.001 to 0.04 is usual.",
        ge=0, le=100,
    )  # fmt: skip
    epsilon: float = setting(
        0.2,
        "Clip below",
        "A token's probability counts no further down than by this share in one update.",
        gt=0,
        le=1,
    )
    epsilon_high: float | None = setting(
        None,
        "Clip above",
        "The same upwards. Empty: as below; 0.28 is DAPO's (Yu et al. 2025).",
        gt=0,
        le=100,
    )
    grpo_loss: GrpoLoss = setting(
        "dapo", "GRPO loss",
        "dapo weighs every token alike; grpo every answer, so that short ones weigh more; dr_grpo divides by the longest answer.",
    )  # fmt: skip
    importance_sampling_level: Literal["token", "sequence"] = setting(
        "token", "Ratio per", "Compare new and old probability of each token, or of the whole answer (GSPO, Zheng et al. 2025)."
    )  # fmt: skip
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group", "Scale rewards", "Divide what is above or below the group's mean by the spread in the group, or of all answers."
    )  # fmt: skip
    num_iterations: int = setting(
        1, "Updates per answers", "How many times the same answers are learned from. More is cheaper and less stable.", ge=1, le=100
    )  # fmt: skip
    mask_truncated_completions: bool = setting(
        False, "Ignore cut answers", "Learn nothing from answers that were cut off at the longest length."
    )


STAGES = {
    "pt": Pretraining, "sft": Sft, "rm": RewardModel, "dpo": Dpo, "kto": Kto, "orpo": Orpo, "simpo": Simpo,
    "ppo": Ppo, "grpo": Grpo,
}  # fmt: skip
