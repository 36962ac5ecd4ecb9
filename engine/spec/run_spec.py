"""RunSpec: everything that is needed to repeat a run, as one value.

Each setting is declared here and nowhere else: its type, default, limits, English label and help. The form,
the YAML, the shell, the validation and docs/spec.md read it from here. Names are those of transformers, peft
and TRL. A part that does not apply is absent: a choice between kinds (`stage`, `method`, `quantization`,
`rope_scaling`) is a union of parts, so a full fine-tuning has no LoRA rank to ignore.

What a spec means on a particular machine is left to `engine.preflight.checks`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import reprlib
from collections.abc import Iterator
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import regex
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from engine.core import stages
from engine.core.problems import Problem, Refusal, problem
from engine.spec.extra_argument_limits import limit_problems
from engine.spec.schedules import schedule_problems

TRAINER_ARGUMENTS = Path(__file__).parent / "trainer_arguments.json"
LONGEST_NAME = 80  # characters of what a run is called

Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay", "greedy",
]  # fmt: skip
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "adafactor", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit", "sgd", "adagrad", "rmsprop",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "ademamix", "ademamix_8bit", "paged_ademamix_8bit",
    "paged_ademamix_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw", "apollo_adamw_layerwise",
    "lomo", "adalomo", "grokadamw", "stable_adamw", "schedule_free_adamw", "schedule_free_sgd",
    "schedule_free_radam", "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_torch_xla",
    "adamw_torch_npu_fused",
]  # fmt: skip


class _Loader(yaml.CSafeLoader):
    """1e-5 is a number to everybody except YAML 1.1, which wants 1.0e-5."""


class _Dumper(yaml.SafeDumper):
    """Puts a text that looks like 1e-5 in quotes."""


for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
# Half of a character, cut off by some program, and NUL.
UNWRITABLE = re.compile("[\ud800-\udfff\0]")
DEEPEST = 40  # mappings and lists inside each other; libyaml ends the process at some ten thousand


def read_yaml(text: str, field: str = "") -> Any:
    """Plain data from YAML, with aliases refused: a few lines of them stand for more than a machine holds.

    Raises Refusal at `field`, with line and column where the text is not YAML at all.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                code = "yaml-too-deep" if depth > DEEPEST else "yaml-alias"
                raise Refusal(problem(code, field, line=event.start_mark.line + 1))
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist, say
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise Refusal(problem("spec-not-yaml", field, line=line, column=column, what=what)) from None


def write_yaml(plain: Any) -> str:
    """YAML that `read_yaml` reads back to the same."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class Part(BaseModel):
    """A group of settings. Unknown keys are refused; numbers must be finite; a spec is never changed in place."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def read(cls, given: Any) -> Self:
        """The settings from plain data. Raises Refusal with every problem, each at its field."""
        if not isinstance(given, dict):
            raise Refusal(problem("spec-not-a-mapping"))
        if broken := list(_unwritable(given, "", set())):
            raise Refusal(broken)
        wrong = list(_true_as_number(given, cls))
        try:
            part = cls.model_validate(given)
        except ValidationError as error:
            known = {each.field for each in wrong}
            wrong += [
                each for each in (_explain(one, cls) for one in error.errors()) if each.field not in known
            ]
        if wrong:
            raise Refusal(wrong)
        return part


def _true_as_number(given: dict[str, Any], whole: type[Part]) -> Iterator[Problem]:
    """Every number that is given as true or false, which Python, and so pydantic, takes for 1 or 0."""
    for path, info in fields(whole).items():
        value: Any = given
        for step in path.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        numbers = _plain_types(info.annotation) & {int, float}
        if numbers and any(isinstance(each, bool) for each in inner):
            yield problem("spec-type-int" if int in numbers else "spec-type-float", path, given=_short(value))


def _plain_types(annotation: Any) -> set[type]:
    """The types that an annotation is made of, without containers: int and NoneType for `list[int] | None`."""
    if parts := get_args(annotation):
        return set().union(*map(_plain_types, parts))
    return {annotation} if isinstance(annotation, type) else set()


def _unwritable(value: Any, path: str, seen: set[int]) -> Iterator[Problem]:
    """Every text in plain data, a key or a value, that no file can hold or that ends a file's name in its middle. What is in
    several places is looked at once."""
    if isinstance(value, str):
        if broken := UNWRITABLE.search(value):
            yield problem("spec-unwritable", path, found=ascii(broken[0])[1:-1])
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for key, inner in value.items() if isinstance(value, dict) else (("", one) for one in value):
            yield from _unwritable(key, path, seen)
            named = isinstance(key, str) and key and not UNWRITABLE.search(key)
            yield from _unwritable(inner, f"{path}.{key}".lstrip(".") if named else path, seen)


def setting(default: Any, label: str, help: str, *, essential: bool = False, **limits: Any) -> Any:
    """Declare one setting. `essential` puts it in plain view on the page; the rest is in collapsed groups."""
    if isinstance(default, (list, dict)):
        given = default
        return Field(
            default_factory=lambda: given.copy(), title=label, description=help,
            json_schema_extra={"essential": essential}, **limits,
        )  # fmt: skip
    return Field(default, title=label, description=help, json_schema_extra={"essential": essential}, **limits)


def _kind_alone(given: Any) -> Any:
    """`method: lora` in a file is short for `method: {kind: lora}`."""
    return {"kind": given} if isinstance(given, str) else given


def one_of(*parts: type[Part]) -> Any:
    """A choice between parts by their `kind`."""
    return Annotated[reduce(or_, parts), Field(discriminator="kind"), BeforeValidator(_kind_alone)]


def named_weights(given: Any) -> Any:
    """`datasets: [a, b]` in a file is short for `{a: 1, b: 1}`."""
    names = isinstance(given, (list, tuple)) and all(isinstance(name, str) for name in given)
    return dict.fromkeys(given, 1.0) if names else given


# ---------------------------------------------------------------------------------------------- model


class NoQuantization(Part):
    """Weights are loaded in the training precision."""

    kind: Literal["none"] = "none"


class EightBit(Part):
    """Weights are loaded in 8 bits (LLM.int8(), Dettmers et al. 2022); only an adapter can be trained."""

    kind: Literal["8bit"] = "8bit"


class FourBit(Part):
    """Weights are loaded in 4 bits (QLoRA, Dettmers et al. 2023); only an adapter can be trained."""

    kind: Literal["4bit"] = "4bit"
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = setting(
        "nf4", "4-bit type", "NF4 fits normally distributed weights best; FP4 is the plain 4-bit float."
    )
    bnb_4bit_use_double_quant: bool = setting(
        True, "Double quantization", "Also quantize the scales: saves about 0.4 bit per parameter."
    )
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Compute type", "Type of the matrix products. Auto follows the training precision."
    )


class NoRopeScaling(Part):
    """The model's own context length."""

    kind: Literal["none"] = "none"


class RopeScaling(Part):
    """Stretch the rotary position embedding, so that the model takes texts longer than it was made for."""

    factor: float = setting(2.0, "Context factor", "Context length after ÷ before.", gt=1, le=64)


class LinearRope(RopeScaling):
    """Linear position interpolation (Chen et al. 2023)."""

    kind: Literal["linear"] = "linear"


class DynamicRope(RopeScaling):
    """NTK-aware scaling that grows with the text."""

    kind: Literal["dynamic"] = "dynamic"


class YarnRope(RopeScaling):
    """YaRN (Peng et al. 2023)."""

    kind: Literal["yarn"] = "yarn"


class Model(Part):
    """Model: what is fine-tuned, and how it is loaded."""

    model_name_or_path: str = setting(
        "", "Model", "A model folder below the model roots, or a hub id such as Qwen/Qwen3-8B.",
        essential=True, max_length=1024,
    )  # fmt: skip
    hub: Literal["huggingface", "modelscope"] = setting(
        "huggingface", "Hub", "Where a hub id is fetched from. A local folder never asks the network."
    )
    model_revision: str | None = setting(
        None, "Revision", "Branch, tag or commit of a hub model.", max_length=200
    )
    adapter_path: str | None = setting(
        None, "Continue from", "The LoRA adapter of a finished run, of this stage or another. Empty: begin anew.",
        essential=True, max_length=1024,
    )  # fmt: skip
    chat_template: str | None = setting(
        None, "Chat template",
        "Leave empty for the tokenizer's own. For a base model without one: chatml, alpaca, plain, or a .jinja file.",
        max_length=1024,
    )  # fmt: skip
    quantization: one_of(NoQuantization, EightBit, FourBit) = setting(
        NoQuantization(), "Quantization", "Load the frozen weights in fewer bits. LoRA on 4 bits is QLoRA.",
        essential=True,
    )  # fmt: skip
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = setting(
        "auto",
        "Attention",
        "Auto takes PyTorch's scaled dot product. flash_attention_2 needs its own package.",
    )
    rope_scaling: one_of(NoRopeScaling, LinearRope, DynamicRope, YarnRope) = setting(
        NoRopeScaling(), "RoPE scaling", "For texts longer than the model's own context."
    )
    resize_embeddings: bool = setting(
        False, "Resize embeddings",
        "For a tokenizer that knows more tokens than the model has embeddings for: the missing rows are added. With LoRA, "
        "embedding and output head are then trained in full and saved with the adapter.",
    )  # fmt: skip
    trust_remote_code: bool = setting(
        False, "Run the model's own code",
        "Only for models that the operator allowed with --allow-remote-code.",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- method


def _not_zero(count: int) -> int:
    if not count:
        raise ValueError("0 layers")
    return count


class Full(Part):
    """Every weight is trained. Needs about 16 bytes of device memory per parameter."""

    kind: Literal["full"] = "full"


class Freeze(Part):
    """Some layers are trained, the others stay as they are."""

    kind: Literal["freeze"] = "freeze"
    trainable_layers: Annotated[int, AfterValidator(_not_zero)] = setting(
        2, "Trained layers", "The last n transformer layers are trained; of a negative number the first n.",
        ge=-1000, le=1000,
    )  # fmt: skip
    trainable_modules: list[str] = setting(
        [], "Trained modules",
        "Names of modules to train instead, such as model.layers.3 or lm_head. When given, the number above is not used.",
    )  # fmt: skip


class Lora(Part):
    """A small adapter is trained beside the frozen weights (Hu et al. 2021)."""

    kind: Literal["lora"] = "lora"
    r: int = setting(
        16, "LoRA rank", "Width of the adapter. 8 to 64 is usual; more learns more and costs more.",
        essential=True, ge=1, le=4096,
    )  # fmt: skip
    lora_alpha: int = setting(
        32, "LoRA alpha", "The adapter's output is scaled by alpha ÷ rank.", essential=True, ge=1, le=65536
    )
    lora_dropout: float = setting(0.0, "LoRA dropout", "Share of the adapter's inputs dropped.", ge=0, lt=1)
    target_modules: list[str] = setting(
        ["all-linear"], "Target modules",
        "Layers that get an adapter. all-linear: every linear layer but the output head.",
    )  # fmt: skip
    modules_to_save: list[str] = setting(
        [],
        "Also train fully",
        "Modules trained in full and saved with the adapter, such as embed_tokens, lm_head.",
    )
    use_dora: bool = setting(
        False, "DoRA", "Train magnitude and direction apart (Liu et al. 2024). Better at low rank, slower."
    )
    use_rslora: bool = setting(
        False, "rsLoRA", "Scale by alpha ÷ √rank (Kalajdzievski 2023), so that a high rank still learns."
    )
    init_lora_weights: Literal["default", "gaussian", "pissa", "olora"] = setting(
        "default",
        "Initialization",
        "PiSSA starts from the main singular vectors of the weights (Meng et al. 2024).",
    )
    loraplus_lr_ratio: float | None = setting(
        None, "LoRA+ ratio", "Learning rate of B ÷ that of A (Hayou et al. 2024); 16 is usual. Empty: equal.",
        ge=1, le=1024,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- stage


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


# ----------------------------------------------------------------------------------------------- data


class Data(Part):
    """Data: what the model learns from."""

    datasets: Annotated[
        dict[str, Annotated[float, Field(gt=0, le=1000)]],
        BeforeValidator(named_weights, json_schema_input_type=list[str] | dict[str, float]),
    ] = setting(
        {}, "Data sets",
        "Names from dataset_info.json, with weights: 2 shows the rows twice per epoch, 0.5 shows half of them.",
        essential=True,
    )  # fmt: skip
    dataset_dir: str = setting("data", "Data folder", "Folder that holds dataset_info.json.", max_length=1024)
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = setting(
        "concat", "Mixing",
        "concat: all rows, as often as the weights say. interleave: the weights are the chances of each set to give the next "
        "row, until the first set is used up (under) or all are (over).",
    )  # fmt: skip
    max_samples: int | None = setting(
        None,
        "Max rows",
        "Use only the first rows of each data set, at most this many. Empty: all.",
        ge=1,
        le=10**10,
    )
    max_length: int = setting(
        2048, "Max length", "Longest example in tokens. Longer rows are cut or dropped, and counted.",
        essential=True, ge=8, le=10**7,
    )  # fmt: skip
    too_long: Literal["cut_end", "cut_start", "drop"] = setting(
        "cut_end", "Longer rows",
        "cut_end: leave out the last turns that do not fit, and cut the first answer if need be. cut_start: keep the end, "
        "and leave out the oldest turns after the system message. drop: leave the row out.",
    )  # fmt: skip
    end_last_answer: bool = setting(
        True, "End last answers",
        "Some chat templates write nothing behind the last answer. The token at which generation stops is then added and "
        "trained there, or the model would not learn to stop.",
    )  # fmt: skip
    train_empty_thoughts: bool = setting(
        True, "Train empty thoughts",
        "Templates of thinking models write an empty thought (<think></think>) before an answer that has no reasoning. On: "
        "it is trained, and the model learns not to think. Off: it is only read, as in a chat with thinking off.",
    )  # fmt: skip
    skip_bad_rows: bool = setting(
        False,
        "Leave out bad rows",
        "Rows with a problem are left out and counted. Off: a run does not start with any.",
    )
    preprocessing_num_workers: int | None = setting(
        None, "Preparing processes",
        "How many processes turn rows into tokens before the training. Empty: as many as there are cores.",
        ge=1, le=256,
    )  # fmt: skip
    packing: bool = setting(
        False, "Packing", "Put several short examples into one sequence; none of them sees another."
    )
    group_by_length: bool = setting(
        True, "Batches by length",
        "Put examples of similar length into a batch: less is computed for padding, and each is still seen once per epoch. "
        "Without packing only.",
    )  # fmt: skip
    validation_share: float = setting(
        0.0,
        "Validation share",
        "Share of the rows kept away from training to measure on. 0: none.",
        ge=0,
        lt=1,
    )
    validation_rows: int | None = setting(
        None,
        "Validation rows",
        "The same as a number of rows of all data sets together. Empty: the share above.",
        ge=1,
        le=10**9,
    )
    eval_datasets: list[str] = setting(
        [], "Validation sets", "Data sets to measure on, instead of a share of the training rows."
    )


# ------------------------------------------------------------------------------------------- training


class Training(Part):
    """Training: how long, how fast, in what precision."""

    num_train_epochs: float = setting(
        3.0, "Epochs", "How many times the model sees the data.", essential=True, gt=0, le=100_000
    )
    max_steps: int | None = setting(
        None, "Max steps", "Stop after this many optimizer steps, whatever the epochs say.", ge=1, le=10**9
    )
    learning_rate: float = setting(
        1e-4, "Learning rate", "LoRA: 5e-5 to 2e-4. Full: 1e-6 to 2e-5.", essential=True, gt=0, le=1
    )
    per_device_train_batch_size: int = setting(
        2,
        "Batch size",
        "Examples per device and forward pass; of PPO and GRPO, answers.",
        essential=True,
        ge=1,
        le=65536,
    )
    gradient_accumulation_steps: int = setting(
        8, "Accumulation", "Forward passes per optimizer step. Same effect as a larger batch, less memory.",
        essential=True, ge=1, le=65536,
    )  # fmt: skip
    lr_scheduler_type: Scheduler = setting(
        "cosine", "Schedule", "How the learning rate moves during training."
    )
    warmup_steps: float = setting(
        0.0,
        "Warm-up",
        "Steps in which the learning rate rises; below 1 it is a share of all steps.",
        ge=0,
        le=10**9,
    )
    optim: Optimizer = setting("adamw_torch", "Optimizer", "The 8-bit and paged ones save memory on a GPU.")
    weight_decay: float = setting(0.0, "Weight decay", "Pulls the weights towards zero.", ge=0, le=10)
    max_grad_norm: float = setting(
        1.0, "Max gradient norm", "Longer gradients are cut to this. 0: never.", ge=0, le=10**6
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "Precision", "Auto: bf16 where the card has it, else fp16; fp32 on a CPU."
    )
    gradient_checkpointing: bool = setting(
        True,
        "Activation checkpointing",
        "Compute activations again in the backward pass: less memory, about 30 % slower.",
    )
    neftune_noise_alpha: float | None = setting(
        None, "NEFTune", "Noise on the embeddings (Jain et al. 2023); 5 is usual. Empty: none.", gt=0, le=1000
    )
    per_device_eval_batch_size: int = setting(
        2, "Validation batch", "Examples per device when measuring.", ge=1, le=65536
    )
    seed: int = setting(
        42, "Seed", "The same seed on the same machine gives the same run.", ge=0, le=2**32 - 1
    )


class Logging(Part):
    """Logging and checkpoints: what is written down, and how often."""

    logging_steps: int = setting(
        5, "Log every", "Optimizer steps between two points of the curve.", ge=1, le=10**9
    )
    eval_strategy: Literal["steps", "epoch"] = setting(
        "steps", "Validate by", "Every so many steps, or at the end of each epoch."
    )
    eval_steps: int = setting(
        100, "Validate every", "Optimizer steps between two validations.", ge=1, le=10**9
    )
    save_strategy: Literal["steps", "epoch", "no"] = setting(
        "steps", "Save by",
        "A checkpoint every so many steps, at the end of each epoch, or never. The result is always saved.",
    )  # fmt: skip
    save_steps: int = setting(100, "Save every", "Optimizer steps between two checkpoints.", ge=1, le=10**9)
    save_total_limit: int | None = setting(
        2, "Checkpoints kept", "The newest n (and the best, if it is kept). Empty: all.", ge=1, le=10**6
    )
    load_best_model_at_end: bool = setting(
        False,
        "Keep the best",
        "The result is the checkpoint that did best in validation: the lowest loss, or the highest reward in a "
        "stage that scores answers. Needs validation data.",
    )
    early_stopping_patience: int | None = setting(
        None,
        "Early stopping",
        "Stop after this many validations without improvement. Empty: never.",
        ge=1,
        le=10**6,
    )
    report_to: list[
        Literal["tensorboard", "wandb", "swanlab", "mlflow", "comet_ml", "clearml", "trackio"]
    ] = setting([], "Report to", "Trackers besides Athanor's own curves. Each needs its own package.")
    plot_loss: bool = setting(True, "Plot the loss", "Leave training_loss.png beside the result.")
    probe: bool = setting(
        True,
        "Probe at the end",
        "Of SFT: ask a few training and general prompts before and after, and say what was learned and what forgotten. "
        "A tenth of the run's time, half a minute at most; one prompt of each kind in any case.",
    )


class Hardware(Part):
    """Devices: where the run computes."""

    device: Literal["auto", "cuda", "cpu"] = setting(
        "auto",
        "Device",
        "Auto: the GPUs if there are any. CPU is for small models and for trying things out.",
    )
    num_processes: int = setting(
        1,
        "Processes",
        "One per device. Four processes on four cards see four times the batch.",
        ge=1,
        le=1024,
    )
    devices: list[Annotated[int, Field(ge=0, le=1023)]] = setting(
        [], "Cards", "Indices of the cards to use, such as 0, 1, 2, 3. Empty: the first ones."
    )


# ------------------------------------------------------------------------------------------- the whole


class Spec(Part):
    """A whole: everything needed to repeat a run of one kind. Each has a name, a model and hardware; its `shelf` is
    the folder below the model's in which such runs lie."""

    @property
    def shelf(self) -> str:
        return self.kind

    def named(self, name: str) -> Self:
        """The spec itself if it has a name; else a copy that is called `name`, as much of it as a name may have."""
        return self if self.name.strip() else self.change("name", name[:LONGEST_NAME])

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """A spec from YAML. Raises Refusal, with line and column where the text is not YAML at all."""
        return cls.read(read_yaml(text))

    def to_yaml(self, *, brief: bool = False) -> str:
        """YAML that `from_yaml` reads back to an equal spec. `brief` leaves out what is at its default."""
        return write_yaml({"kind": self.kind} | self.model_dump(mode="json", exclude_defaults=brief))

    def change(self, path: str, value: Any) -> Self:
        """A copy in which the field at `path` ("training.seed") is `value`. Raises Refusal as `read` does."""
        plain = self.model_dump()
        *parents, last = path.split(".")
        inner = plain
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        return self.read(plain)


class RunSpec(Spec):
    """Everything needed to repeat a training."""

    kind: ClassVar[str] = "training"
    name: str = setting(
        "", "Run name", "A few words to find the run again. May be empty.", max_length=LONGEST_NAME
    )
    stage: one_of(Pretraining, Sft, RewardModel, Dpo, Kto, Orpo, Simpo, Ppo, Grpo) = setting(
        Sft(), "Stage", "What kind of learning this is.", essential=True
    )
    model: Model = Field(default_factory=Model)
    method: one_of(Lora, Freeze, Full) = setting(
        Lora(), "Method", "Which weights are trained.", essential=True
    )
    data: Data = Field(default_factory=Data)
    training: Training = Field(default_factory=Training)
    logging: Logging = Field(default_factory=Logging)
    hardware: Hardware = Field(default_factory=Hardware)
    extra: dict[str, Any] = setting(
        {},
        "Further arguments",
        "Any other argument of the trainer's configuration class, as YAML: adam_beta2: 0.95",
    )

    @property
    def shelf(self) -> str:
        return self.method.kind

    def to_yaml(self, *, brief: bool = False) -> str:
        plain = self.model_dump(mode="json", exclude_defaults=brief)
        if brief:
            plain = {"stage": {"kind": self.stage.kind}, "method": {"kind": self.method.kind}} | plain
            for union in ("stage", "method"):
                plain[union] = {"kind": getattr(self, union).kind} | plain[union]
            for union in ("quantization", "rope_scaling"):
                if union in plain.get("model", {}):
                    plain["model"][union] = {"kind": getattr(self.model, union).kind} | plain["model"][union]
        return write_yaml(plain)


NO_VALUE = "(nothing)"  # told as engine/reasons.yaml has it
MANY_CHOICES, NEAREST = 12, 5  # of a longer list only so many are told
WEIGHTED = ("data.datasets", "stage.rewards")  # mappings for which a list is short


def _explain(error: Any, whole: type[Part]) -> Problem:
    """One of pydantic's errors with a `whole` as one of ours."""
    # A union's location names the chosen kind ("method.lora.r"); the reader's path does not ("method.r").
    location = [str(step) for step in error["loc"]]
    if location[-1:] == ["[key]"]:  # of a mapping whose keys are a choice: it is the mapping that is wrong
        location = location[:-2]
    unions = {"stage": STAGES, "method": METHODS, "quantization": QUANTIZATIONS, "rope_scaling": ROPES}
    steps = [
        step
        for before, step in zip(["", *location], location, strict=False)
        if step not in unions.get(before, {})
    ]
    path, kind, context = ".".join(steps), error["type"], error.get("ctx", {})
    given = _short(error.get("input"))
    if kind == "extra_forbidden":
        if path in fields(whole):  # of another kind than the one chosen
            union = next(step for step in location if step in unions)
            chosen = next(step for step in location if step in unions[union])
            owners = [name for name, part in unions[union].items() if steps[-1] in part.model_fields]
            return problem(
                "spec-other-kind", path, key=path, what=union, chosen=chosen, kinds=", ".join(owners)
            )
        if hint := _did_you_mean(path, whole):
            return problem("spec-unknown-key", path, key=path, hint=hint)
        if "extra" in fields(whole):
            return problem("spec-key-for-extra", path, key=path)
        return problem("spec-no-such-key", path, key=path, known=", ".join(whole.model_fields))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = context.get("expected_tags") or ", ".join(map(repr, unions[steps[-1]]))
        tag = context.get("tag", error.get("input"))
        return _no_choice(path, _short(None if tag == "None" else tag), tags)
    if kind == "literal_error":
        return _no_choice(path, given, context["expected"].replace(" or ", ", "))
    if error.get("input") is None and path in UNIONS:
        return _no_choice(path, given, ", ".join(UNIONS[path]))
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        sign = {"greater_than": ">", "greater_than_equal": "≥", "less_than": "<", "less_than_equal": "≤"}[
            kind
        ]
        limit = next(iter(context.values()))
        return problem("spec-limit", path, given=given, limit=f"{sign} {limit:.12g}")
    if kind == "string_too_long":
        return problem("spec-too-long", path, limit=context["max_length"])
    known = ("int", "float", "finite", "bool", "string", "list", "dict")
    kind = "dict" if kind.startswith("model") else kind  # a part of the spec
    wanted = next((word for word in known if kind.startswith(word)), "value")
    if path in WEIGHTED and wanted == "dict":
        wanted = "names"
    return problem(f"spec-type-{wanted}", path, given=given)


def _short(value: Any) -> str:
    if value is None:
        return NO_VALUE
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _no_choice(path: str, given: str, choices: str) -> Problem:
    """What may stand there: all choices, or of a long list those that are near to what was given."""
    every = [choice.strip().strip("'") for choice in choices.split(",")]
    given = "(empty)" if given == NO_VALUE else given
    if len(every) <= MANY_CHOICES:
        return problem("spec-choice", path, given=given, choices=", ".join(every))
    if near := _nearest(given, every):
        return problem("spec-choice-near", path, given=given, choices=", ".join(near))
    return problem("spec-choice-many", path, given=given, choices=", ".join(every[:NEAREST]))


def _nearest(given: str, every: list[str]) -> list[str]:
    """Those that begin with what was given, or else hold it; or else those that are written much like it."""
    if not (wanted := given.casefold().strip()):
        return []
    begin = [choice for choice in every if choice.startswith(wanted)]
    inside = [choice for choice in every if wanted in choice]
    return (begin or inside)[:NEAREST] or difflib.get_close_matches(wanted, every, NEAREST, 0.6)


def _did_you_mean(path: str, whole: type[Part]) -> str:
    """The nearest known path to a misspelt one; "" if none is near. A known key at the wrong place is found by its last
    step, and one of the same part goes before others."""
    known = list(fields(whole))
    parent, _, last = path.rpartition(".")
    beside = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == parent}
    anywhere = {one.rpartition(".")[2]: one for one in reversed(known)}
    if last in anywhere:
        return anywhere[last]
    for names in (beside, anywhere):
        short_for = [name for name in names if len(last) > 1 and _initials(name) == last]
        holding = [name for name in names if len(last) > 3 and f"_{last}_" in f"_{name}_"]
        nearest, near = (difflib.get_close_matches(last, names, 1, least) for least in (0.85, 0.6))
        if meant := short_for or nearest or holding or near:
            return names[meant[0]]
    return next(iter(difflib.get_close_matches(path, known, 1, 0.8)), "")


def _initials(name: str) -> str:
    """`lr` of `learning_rate`."""
    return "".join(word[:1] for word in name.split("_"))


STAGES = {
    "pt": Pretraining, "sft": Sft, "rm": RewardModel, "dpo": Dpo, "kto": Kto, "orpo": Orpo, "simpo": Simpo,
    "ppo": Ppo, "grpo": Grpo,
}  # fmt: skip
METHODS = {"lora": Lora, "freeze": Freeze, "full": Full}
QUANTIZATIONS = {"none": NoQuantization, "8bit": EightBit, "4bit": FourBit}
ROPES = {"none": NoRopeScaling, "linear": LinearRope, "dynamic": DynamicRope, "yarn": YarnRope}
UNIONS = {
    "stage": STAGES,
    "method": METHODS,
    "model.quantization": QUANTIZATIONS,
    "model.rope_scaling": ROPES,
}


@cache
def fields(whole: type[Part] = RunSpec) -> dict[str, Any]:
    """Every setting of a whole: path → pydantic's FieldInfo, in the order of declaration.

    A union stands under its own path ("method"); the settings of each of its kinds follow it ("method.r"). A
    path that several kinds share ("model.rope_scaling.factor") is listed once, since it is one setting.
    """
    found: dict[str, Any] = {}

    def walk(part: type[Part], prefix: str) -> None:
        for name, info in part.model_fields.items():
            path = prefix + name
            if path in UNIONS:
                found[path] = info
                for kind in UNIONS[path].values():
                    walk(kind, f"{path}.")
            elif isinstance(info.annotation, type) and issubclass(info.annotation, Part):
                walk(info.annotation, f"{path}.")
            elif name != "kind":
                found.setdefault(path, info)

    walk(whole, "")
    return found


@cache
def trainer_arguments() -> dict[str, Any]:
    """Stage → name → types of the arguments of its configuration class ("int|null"), as
    `python -m engine.worker.training.trainer_arguments` wrote them."""
    return json.loads(TRAINER_ARGUMENTS.read_text(encoding="utf-8"))


# Settings of a stage that its configuration class has under another name.
RENAMED: dict[str, dict[str, str]] = {
    "grpo": {"grpo_beta": "beta", "grpo_loss": "loss_type", "max_new_tokens": "max_completion_length"},
}
# Arguments of the configuration class that the spec has elsewhere, or that the run folder decides.
DECIDED = {
    "output_dir": "", "resume_from_checkpoint": "", "overwrite_output_dir": "", "do_train": "", "do_eval": "",
    "do_predict": "", "local_rank": "", "disable_tqdm": "", "remove_unused_columns": "", "dataset_kwargs": "",
    "model_init_kwargs": "model", "chat_template_path": "model.chat_template", "bf16": "training.precision",
    "fp16": "training.precision", "use_cpu": "hardware.device", "save_strategy": "logging.save_steps",
    "eval_strategy": "logging.eval_steps", "logging_strategy": "logging.logging_steps",
    "assistant_only_loss": "stage.train_on", "completion_only_loss": "stage.train_on", "padding_free": "data.packing",
    "activation_checkpointing": "training.gradient_checkpointing", "metric_for_best_model": "logging.load_best_model_at_end",
    "max_length": "data.max_length", "packing": "data.packing", "run_name": "name", "data_seed": "training.seed",
    "ignore_data_skip": "", "push_to_hub": "", "hub_token": "", "hub_model_id": "", "hub_strategy": "",
    "hub_private_repo": "", "hub_always_push": "", "hub_revision": "", "logging_first_step": "",
    "logging_nan_inf_filter": "", "trackio_space_id": "", "trackio_bucket_id": "", "trackio_static_space_id": "",
    "greater_is_better": "logging.load_best_model_at_end", "save_only_model": "", "enable_jit_checkpoint": "",
    # A stage has its own names for these, or makes the data itself.
    "loss_weights": "stage.sft_weight", "truncation_mode": "data.too_long",
    "precompute_ref_log_probs": "", "precompute_ref_batch_size": "", "dataset_num_proc": "", "disable_dropout": "method.lora_dropout",
    "ref_model_init_kwargs": "", "sync_ref_model": "", "eos_token": "", "pad_token": "",
    "trust_remote_code": "model.trust_remote_code", "reward_weights": "stage.rewards", "num_generations_eval": "",
    "generation_batch_size": "training.gradient_accumulation_steps", "chat_template_kwargs": "model.chat_template",
    "steps_per_generation": "training.gradient_accumulation_steps", "log_completions": "stage.sample_steps",
    "log_completions_hub_repo": "", "num_completions_to_print": "stage.sample_steps",
    "log_unique_prompts": "stage.sample_steps", "use_transformers_continuous_batching": "", "use_transformers_paged": "",
    # How a model is spread over cards is Athanor's own to say; most of these can name a file, too.
    "deepspeed": "hardware", "fsdp": "hardware", "fsdp_config": "hardware", "accelerator_config": "hardware",
    "parallelism_config": "hardware",
}  # fmt: skip


def problems(spec: RunSpec) -> list[Problem]:
    """What is wrong with the spec in itself, whatever the machine: settings that contradict each other."""
    found: list[Problem] = []
    if not spec.model.model_name_or_path.strip():
        found.append(problem("model-not-chosen", "model.model_name_or_path"))
    if not spec.data.datasets:
        found.append(problem("data-not-chosen", "data.datasets"))
    quantized = spec.model.quantization.kind != "none"
    if quantized and spec.method.kind != "lora":
        found.append(
            problem(
                "quantized-needs-lora", "method", bits=spec.model.quantization.kind, method=spec.method.kind
            )
        )
    if quantized and spec.method.kind == "lora" and spec.method.init_lora_weights in ("pissa", "olora"):
        found.append(
            problem("quantized-svd-init", "method.init_lora_weights", init=spec.method.init_lora_weights)
        )
    if spec.model.adapter_path and spec.method.kind != "lora":
        found.append(problem("adapter-needs-lora", "model.adapter_path", method=spec.method.kind))
    if spec.method.kind == "lora":
        found += _target_problems(spec.method.target_modules)
    found += _validation_problems(spec) + schedule_problems(spec)
    if spec.training.optim.startswith(("galore", "apollo")) and not spec.extra.get("optim_target_modules"):
        found.append(problem("optimizer-needs-targets", "training.optim", optim=spec.training.optim))
    cards = spec.hardware.devices
    if len(set(cards)) != len(cards):
        found.append(problem("cards-twice", "hardware.devices", given=", ".join(map(str, cards))))
    if cards and len(cards) != spec.hardware.num_processes:
        found.append(
            problem(
                "cards-count", "hardware.devices", cards=len(cards), processes=spec.hardware.num_processes
            )
        )
    if spec.hardware.device == "cpu" and spec.training.precision == "fp16":
        found.append(problem("fp16-on-cpu", "training.precision"))
    found += [*_stage_problems(spec), *_extra_problems(spec), *limit_problems(spec, measured(spec))]
    return found


def measured(spec: RunSpec) -> bool:
    """Whether there are rows to measure on."""
    return spec.data.validation_share > 0 or bool(spec.data.validation_rows or spec.data.eval_datasets)


def _validation_problems(spec: RunSpec) -> list[Problem]:
    data, logging, found = spec.data, spec.logging, []
    if (data.validation_share or data.validation_rows) and data.eval_datasets:
        found.append(problem("two-validations", "data.validation_share"))
    if data.validation_share and data.validation_rows:
        found.append(problem("two-shares", "data.validation_rows"))
    if shared := sorted(set(data.eval_datasets) & set(data.datasets)):
        found.append(problem("validation-is-training", "data.eval_datasets", names=", ".join(shared)))
    for path in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(logging, path) and not measured(spec):
            found.append(problem("needs-validation", f"logging.{path}"))
    if logging.load_best_model_at_end:
        if logging.save_strategy != logging.eval_strategy:
            values = {"save": logging.save_strategy, "eval": logging.eval_strategy}
            found.append(problem("best-needs-same", "logging.save_strategy", **values))
        elif logging.save_strategy == "steps" and logging.save_steps % logging.eval_steps:
            values = {"save": logging.save_steps, "eval": logging.eval_steps}
            found.append(problem("best-needs-multiple", "logging.save_steps", **values))
    if spec.training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") and not measured(spec):
        found.append(problem("needs-validation", "training.lr_scheduler_type"))
    return found


def _stage_problems(spec: RunSpec) -> list[Problem]:
    stage, found = spec.stage, []
    if spec.data.packing and stages.STAGES[stage.kind].form not in ("text", "chat"):
        found.append(problem("packing-not-here", "data.packing", stage=stage.kind))
    if stage.kind == "dpo":
        smoothed = stage.loss_type in SMOOTHED
        if stage.label_smoothing and not smoothed:
            found.append(
                problem("smoothing-not-here", "stage.label_smoothing", loss=stage.loss_type, known=", ".join(SMOOTHED))
            )  # fmt: skip
        if stage.loss_type == "exo_pair" and not stage.label_smoothing:
            found.append(problem("smoothing-needed", "stage.label_smoothing", loss=stage.loss_type))
        if stage.loss_type == "bco_pair" and (
            odd := [name for name in ("ld_alpha", "use_weighting") if spec.extra.get(name)]
        ):
            found.append(problem("bco-pair-alone", "extra", names=", ".join(odd)))
    if stage.kind == "ppo":
        if not stage.reward_model.strip():
            found.append(problem("reward-not-chosen", "stage.reward_model"))
        # A new answer is as likely as it was a moment ago: nothing may be left to chance in between.
        if getattr(spec.method, "lora_dropout", 0):
            found.append(problem("ppo-no-noise", "method.lora_dropout"))
        if spec.training.neftune_noise_alpha:
            found.append(problem("ppo-no-noise", "training.neftune_noise_alpha"))
    if stage.kind == "kto" and spec.training.per_device_train_batch_size < 2:
        found.append(problem("kto-batch", "training.per_device_train_batch_size"))
    if stage.kind == "grpo":
        found += _grpo_problems(spec)
    return found


def examples_per_step(spec: RunSpec) -> int:
    """How many examples, or answers that the model writes, one optimizer step is made from, on all devices."""
    training = spec.training
    return (
        training.per_device_train_batch_size
        * training.gradient_accumulation_steps
        * spec.hardware.num_processes
    )


def _grpo_problems(spec: RunSpec) -> list[Problem]:
    stage, found = spec.stage, []
    if not any(stage.rewards.values()):
        found.append(problem("rewards-not-chosen", "stage.rewards", known=", ".join(get_args(Reward))))
    for reward in stage.rewards:
        needed = REWARD_NEEDS.get(reward)
        if needed and not getattr(stage, needed):
            found.append(problem("reward-needs", f"stage.{needed}", reward=reward, needed=needed))
    if "format" in stage.rewards and stage.reward_pattern:
        try:
            regex.compile(stage.reward_pattern)
        except (regex.error, ValueError, OverflowError, RecursionError) as error:
            found.append(
                problem("pattern-broken", "stage.reward_pattern", pattern=_short(stage.reward_pattern), why=error)
            )  # fmt: skip
    if "length" in stage.rewards and (stage.reward_length or 0) > stage.max_new_tokens:
        found.append(
            problem("length-unreachable", "stage.reward_length", given=stage.reward_length, longest=stage.max_new_tokens)
        )  # fmt: skip
    answers, group = examples_per_step(spec), stage.num_generations
    if answers % group:
        others = [size for size in range(2, answers + 1) if answers % size == 0]
        more = spec.training.gradient_accumulation_steps
        while more * answers // spec.training.gradient_accumulation_steps % group:
            more += 1
        nearest = min(others, key=lambda size: abs(size - group), default=None)
        found.append(
            problem("group-does-not-divide", "stage.num_generations", group=group, answers=answers,
                    nearest=nearest or "—", accumulation=more)
        )  # fmt: skip
    if stage.grpo_loss == "cispo" and (stage.epsilon_high or 0) < 1:
        found.append(
            problem("cispo-clips-all", "stage.epsilon_high", given=stage.epsilon_high or stage.epsilon)
        )
    if stage.grpo_loss == "luspo" and stage.importance_sampling_level != "sequence":
        found.append(problem("luspo-needs-sequence", "stage.importance_sampling_level"))
    return found


def _target_problems(targets: list[str]) -> list[Problem]:
    if not targets:
        return [problem("no-targets", "method.target_modules")]
    if "all-linear" in targets and len(targets) > 1:
        others = ", ".join(target for target in targets if target != "all-linear")
        return [problem("all-linear-alone", "method.target_modules", others=others)]
    heads = [target for target in targets if target.rpartition(".")[2] == "lm_head"]
    return [problem("lora-on-head", "method.target_modules", given=head) for head in heads]


def _extra_problems(spec: RunSpec) -> list[Problem]:
    known = trainer_arguments()[spec.stage.kind]
    here = [path for path in fields() if path.split(".")[0] in ("training", "logging")]
    here += [f"stage.{name}" for name in type(spec.stage).model_fields]
    renamed = RENAMED.get(spec.stage.kind, {})
    ours = {renamed.get(path.rsplit(".", 1)[-1], path.rsplit(".", 1)[-1]): path for path in here}
    found = []
    for name, value in spec.extra.items():
        if name in ours or name in DECIDED:
            found.append(
                problem("extra-has-a-field", "extra", name=name, place=ours.get(name) or DECIDED[name] or "—")
            )
        elif name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.6)
            found.append(
                problem(
                    "extra-unknown",
                    "extra",
                    name=name,
                    config=f"{spec.stage.kind} config",
                    hint=near[0] if near else "—",
                )
            )
        elif not _is_of(value, known[name]):
            types = known[name].replace("|", ", ")
            found.append(problem("extra-type", "extra", name=name, types=types, given=_short(value)))
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(problem("spec-type-finite", f"extra.{name}", given=value))
    return found


def _is_of(value: Any, types: str) -> bool:
    kind = {"NoneType": "null"}.get(type(value).__name__, type(value).__name__)
    allowed = types.split("|")
    return "any" in allowed or kind in allowed or (kind == "int" and "float" in allowed)


def optimizer_steps(spec: RunSpec, rows: int) -> int:
    """Optimizer steps of a run over `rows` training examples, as transformers' Trainer counts them."""
    if spec.training.max_steps:
        return spec.training.max_steps
    if spec.stage.kind == "grpo":
        # A step has as many questions as there is room for groups of answers; the last, smaller lot is left out.
        questions = max(examples_per_step(spec) // spec.stage.num_generations, 1)
        return math.ceil(spec.training.num_train_epochs * (rows // questions) * spec.stage.num_iterations)
    per_process = math.ceil(rows / spec.hardware.num_processes)
    batches = math.ceil(per_process / spec.training.per_device_train_batch_size)
    per_epoch = max(math.ceil(batches / spec.training.gradient_accumulation_steps), 1)
    return math.ceil(spec.training.num_train_epochs * per_epoch)
